"""The runs of a comparison: measured alike, put side by side, and reported on."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clip_lab.classes import features_of, read_splits
from clip_lab.command_config import CompareConfig
from clip_lab.encoder import Encoder, load_encoder
from clip_lab.evaluation import picture_rows_of
from clip_lab.model import SimVlmModel
from clip_lab.recall import retrieval_metrics
from clip_lab.stored import Loaded
from clip_lab.templates import filled
from clip_lab.writing import likelihood_matrix, perplexity, writes
from clip_lab.zero_shot import class_embeddings
from labs_common.comparing import cell, mean_and_spread
from labs_common.data import LabelledPictures
from labs_common.data.described import Captions, PictureTensors
from labs_common.logistic import fitted_layers
from labs_common.options import ClassDataOptions
from labs_common.progress import console
from labs_common.report import (
    Figure,
    Gallery,
    Section,
    Table,
    Text,
    asked_section,
    bar_figure,
    curve_figure,
    save_figure,
    write_report,
)
from labs_common.report.captioned import shown
from labs_common.run import Run

TEMPLATE, PENALTY, NAMED = "a {} in the picture", 1e-3, 240
# What is measured of each model, by what it is called in the tables; a model without it has an empty cell.
CONTRASTIVE = ("R@1 by embedding", "R@5 by embedding", "classes by embedding")
GENERATIVE = ("R@1 by likelihood", "R@5 by likelihood", "classes by likelihood", "perplexity")
BOTH = ("linear probe",)
KINDS = {
    "clip": ("two towers", "each caption finds its picture among the batch's, and the other way round", "no"),
    "siglip": ("two towers", "is this the caption of this picture? for every pair of the batch", "no"),
    "coca": ("two towers and a decoder on both", "as clip, and every caption is written word by word", "yes"),
    "simvlm": ("one transformer on places and words", "the rest of each caption is written from its beginning", "yes"),
}


@dataclass(frozen=True)
class Entry:
    """One model of a comparison, over all seeds.

    Attributes:
        name: as --objectives names it.
        results: results.json by seed.
        measured: what was measured here, by seed.
    """

    name: str
    results: dict[int, dict[str, Any]]
    measured: dict[int, dict[str, float]]

    @property
    def first(self) -> dict[str, Any]:
        """The first seed's results."""
        return next(iter(self.results.values()))

    @property
    def objective(self) -> str:
        """Its objective."""
        return str(self.first["config"]["objective"])

    def values(self, key: str) -> list[float]:
        """What was measured under this name, by seed; empty if it cannot be."""
        return [found[key] for found in self.measured.values() if key in found]

    def cost(self, key: str) -> list[float]:
        """A cost by seed."""
        return [found["cost"][key] for found in self.results.values()]


COSTS: tuple[tuple[str, Callable[[Entry], list[float]]], ...] = (
    ("parameters", lambda entry: entry.cost("parameters")),
    ("training seconds", lambda entry: entry.cost("seconds")),
    ("pictures/s", lambda entry: entry.cost("pictures per second")),
    ("peak MiB", lambda entry: [value / 2**20 for value in entry.cost("peak memory")]),
    ("optimizer MiB", lambda entry: [value / 2**20 for value in entry.cost("optimizer bytes")]),
)


def gathered(
    folder: Path, paths: Mapping[str, str], seeds: Iterable[int], config: CompareConfig, data: Captions
) -> dict[str, Entry]:
    """Reads and measures what is finished; `paths` are the runs' directories by the entries' names."""
    splits = read_splits(ClassDataOptions(data=config.classes), config.comparison.seed)
    entries = {}
    seeds = list(seeds)
    for name, path in paths.items():
        runs = {seed: Run(folder / path / f"seed-{seed}") for seed in seeds}
        done = {seed: run for seed, run in runs.items() if (run.path / "results.json").exists()}
        if done:
            results = {seed: run.load_json("results.json") for seed, run in done.items()}
            measured = {seed: _measured(run, config, data, splits) for seed, run in done.items()}
            entries[name] = Entry(name, results, measured)
    return entries


def _measured(run: Run, config: CompareConfig, data: Captions, splits: dict[str, LabelledPictures]) -> dict[str, float]:
    """Everything that the model can do, on the same pictures as all others; kept with the run."""
    asked = {"ranked": config.ranked, "classes": splits["test"].fingerprint()}
    if (run.path / "measured.json").exists() and (known := run.load_json("measured.json"))["asked"] == asked:
        return dict(known["found"])
    encoder = load_encoder(str(run.path))
    loaded = encoder.ours
    assert loaded is not None
    test = data.splits["test"]
    few = test.subset(range(min(config.ranked, len(test))))
    captions = [caption for of in few.captions for caption in of]
    of_picture = np.repeat(np.arange(len(few)), [len(of) for of in few.captions])
    found = {**_by_embedding(encoder, loaded, PictureTensors(few, loaded.transform), captions, of_picture)}
    if writes(loaded):
        rows = picture_rows_of(loaded, PictureTensors(test, loaded.transform))
        every = [caption for of in test.captions for caption in of]
        places = np.repeat(np.arange(len(test)), [len(of) for of in test.captions]).tolist()
        found["perplexity"] = perplexity(loaded, rows, every, places)
        metrics = retrieval_metrics(likelihood_matrix(loaded, rows[: len(few)], captions), of_picture)
        found |= {f"R@{k} by likelihood": metrics[f"text_to_image/recall@{k}"] for k in (1, 5)}
    found |= _of_classes(encoder, loaded, splits)
    run.save_json("measured.json", {"asked": asked, "found": found})
    return found


def _by_embedding(
    encoder: Encoder, loaded: Loaded, tensors: PictureTensors, captions: list[str], of_picture: np.ndarray
) -> dict[str, float]:
    model = loaded.model
    if isinstance(model, SimVlmModel):
        return {}
    rows = picture_rows_of(loaded, tensors)
    with torch.no_grad():
        image = model.embedded(rows.to(encoder.device)).float().cpu()
    metrics = retrieval_metrics(encoder.read(captions) @ image.T, of_picture)
    return {f"R@{k} by embedding": metrics[f"text_to_image/recall@{k}"] for k in (1, 5)}


def _of_classes(encoder: Encoder, loaded: Loaded, splits: dict[str, LabelledPictures]) -> dict[str, float]:
    """Accuracy of naming test pictures in both ways, and of a linear probe."""
    names, found = list(splits["test"].classes), {}
    if encoder.text is not None:
        image = features_of(encoder, {"test": splits["test"]}, "embedding", 256, True)["test"]
        said = (image.values @ class_embeddings(encoder, names, [TEMPLATE]).T).argmax(1)
        found["classes by embedding"] = float((said == image.labels).double().mean())
    if writes(loaded):
        test = splits["test"]
        even = np.linspace(0, len(test) - 1, min(NAMED, len(test))).round().astype(int)
        few = test.subset(even)
        pictures = torch.stack([encoder.view(few.image(place)) for place in range(len(few))])
        with torch.no_grad():
            seen = [loaded.model.image(part.to(encoder.device)).places.flatten(1).cpu() for part in pictures.split(64)]
        scores = likelihood_matrix(loaded, torch.cat(seen), [filled(TEMPLATE, name) for name in names])
        found["classes by likelihood"] = float(np.mean(scores.argmax(0).numpy() == few.labels))
    features = features_of(encoder, splits, "tower", 256, True)
    train, test_set = features["train"].to(encoder.device), features["test"].to(encoder.device)
    layer = fitted_layers(*train, len(names), [PENALTY])[0]
    found["linear probe"] = float((layer.logits(test_set[0]).argmax(1) == test_set[1]).double().mean())
    return found


def write_comparison(
    folder: Path, config: CompareConfig, entries: Mapping[str, Entry], failed: Mapping[str, int]
) -> None:
    """Writes comparison.json and report.html, prints the table's main columns and where they are."""
    run = Run(folder)
    if not entries:
        console.print("no run finished: there is nothing to report")
        return
    rows = table_rows(entries)
    run.save_json("comparison.json", {"rows": rows})
    for row in rows:
        said = ", ".join(f"{key} {row[key]:.3g}" for key in (*CONTRASTIVE, *GENERATIVE, *BOTH) if key in row)
        console.print(f"{row['objective']}: {said}")
    sections = [
        _differences_section(entries, rows),
        _numbers_section(run, config, rows),
        _curves_section(run, entries),
        _cost_section(rows),
        _pictures_section(config),
        asked_section(config),
    ]
    if failed:
        broken = [(name, f"exit code {code}") for name, code in failed.items()]
        sections.insert(0, Section("Failed", [Table(("run", ""), broken)]))
    path = write_report(run, "CLIP, CoCa and SimVLM", _summary(rows), sections)
    print(f"report: {path}")


def table_rows(entries: Mapping[str, Entry]) -> list[dict[str, Any]]:
    """Mean and spread of everything, a row per model."""
    rows = []
    for name, entry in entries.items():
        row: dict[str, Any] = {"objective": name, "seeds": len(entry.results)}
        for key in (*CONTRASTIVE, *GENERATIVE, *BOTH):
            row |= mean_and_spread(key, entry.values(key))
        for key, values in COSTS:
            row |= mean_and_spread(key, values(entry))
        rows.append(row)
    return rows


def _differences_section(entries: Mapping[str, Entry], rows: list[dict[str, Any]]) -> Section:
    """What each one is, and what was measured of that here; a column per model."""
    kinds = [KINDS[entry.objective] for entry in entries.values()]
    one_by_one = ["no: each caption is read with each picture" if entry.objective == "simvlm" else "yes"
                  for entry in entries.values()]  # fmt: skip
    table: list[tuple[Any, ...]] = [
        (said, *(kind[place] for kind in kinds)) for place, said in enumerate(("made of", "learns", "writes captions"))
    ]
    table.append(("searches by one matrix product", *one_by_one))
    measured = (CONTRASTIVE[0], GENERATIVE[0], "perplexity", "linear probe")
    table += [(key, *(cell(row, key) for row in rows)) for key in measured]
    return Section("Differences", [Table(("", *entries), table)])


def _numbers_section(run: Run, config: CompareConfig, rows: list[dict[str, Any]]) -> Section:
    keys = (*CONTRASTIVE, *GENERATIVE, *BOTH)
    table = [(key, *(cell(row, key) for row in rows)) for key in keys]
    bars = {key: {row["objective"]: float(row.get(key, 0.0)) for row in rows} for key in keys if key != "perplexity"}
    figure = save_figure(run, "numbers", bar_figure(bars, "share that is right", 1.0))
    note = (
        f"R@k: a test caption finds its picture among {config.ranked} (by chance {1 / config.ranked:.3f} at 1). By "
        "embedding: cosines. By likelihood: how much more probable the caption is with this picture than with any. "
        f"Classes: “{filled(TEMPLATE, '…')}” with every name; by likelihood on at most {NAMED} pictures. A bar of 0 is "
        "what the model cannot do: its cell in the table is empty. The linear probe reads what the image tower makes "
        f"of pictures, with a penalty of {PENALTY:g} for all."
    )
    figures = Figure(figure, "All measured on the same pictures.")
    return Section("Numbers", [Table(("", *(row["objective"] for row in rows)), table), figures, Text(note)])


def _curves_section(run: Run, entries: Mapping[str, Entry]) -> Section:
    blocks: list[Any] = []
    for key, said in (("validation/recall", "mean recall"), ("validation/loss", "validation loss")):
        curves = {}
        for name, entry in entries.items():
            lines = [line for line in entry.first["evaluations"] if key in line]
            if lines:
                curves[name] = ([line["step"] for line in lines], [line[key] for line in lines])
        if curves:
            svg = save_figure(run, key.replace("/", "-"), curve_figure(curves, "optimizer step", said))
            blocks.append(Figure(svg, f"{said.capitalize()} after each epoch; first seed."))
    note = Text(
        "Losses of different objectives are of different things: how each falls says something, not which is lowest."
    )
    return Section("Curves", [*blocks, note])


def _cost_section(rows: list[dict[str, Any]]) -> Section:
    table = [(row["objective"], *(cell(row, name) for name, _ in COSTS)) for row in rows]
    return Section("Cost", [Table(("", *(name for name, _ in COSTS)), table),
                            Text("All had the same pictures and captions in the same order.")])  # fmt: skip


def _pictures_section(config: CompareConfig) -> Section:
    test = read_splits(ClassDataOptions(data=config.classes), config.comparison.seed)["test"]
    places = [int(np.flatnonzero(test.labels == label)[0]) for label in range(min(12, len(test.classes)))
              if (test.labels == label).any()]  # fmt: skip
    tiles = [(shown(test.image(place), 96), test.classes[int(test.labels[place])]) for place in places]
    return Section("Pictures to be named", [Gallery(tiles, f"From {test.source}.")])


def _summary(rows: list[dict[str, Any]]) -> str:
    said = []
    for row in rows:
        key = next((key for key in ("R@1 by embedding", "R@1 by likelihood") if key in row), None)
        if key is not None:
            said.append(f"{row['objective']} finds the picture of {row[key]:.0%} of captions first ({key[4:]})")
    return "; ".join(said) + "."
