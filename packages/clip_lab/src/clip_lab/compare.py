"""CLIP, CoCa and SimVLM under one budget, and one report: `python -m clip_lab.compare --data flickr8k`."""

from clip_lab import commands

if __name__ == "__main__":  # before the imports below: --help and a wrong option answer at once
    commands.compare()

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch

from clip_lab.config import OWN, CompareConfig, ComparedOptions, TrainConfig
from clip_lab.data import read_data
from clip_lab.defaults import complete
from clip_lab.encoder import Encoder, load_encoder
from clip_lab.evaluate import embed_sentences, embeddings_of, likelihood_matrix, perplexity, picture_rows_of, written
from clip_lab.image import make_image_tower
from clip_lab.losses import OBJECTIVES, check_objective
from clip_lab.metrics import captions_of, retrieval_metrics
from clip_lab.probe import accuracy, features_of, read_splits
from clip_lab.zero_shot import class_embeddings, filled
from labs_common.caption_metrics import METRICS, SCORER, score_captions
from labs_common.cli import parse
from labs_common.compare.collect import Entry, cell, cost_measures, rows_of
from labs_common.compare.plan import comparison_folder, plan_runs
from labs_common.compare.processes import compare_runs, start_server
from labs_common.compare.report import Findings, curves_of, notes_on, table_of
from labs_common.data.captions import Captions
from labs_common.data.classes import LabelledPictures
from labs_common.logistic import fitted_layers
from labs_common.options import ClassDataOptions
from labs_common.report.captions import examples_section
from labs_common.report.classes import class_data_section
from labs_common.report.figures import bar_figure
from labs_common.report.page import Figure, Section, Table, Text, save_figure
from labs_common.run import Run

TEMPLATE = "a {} in the picture"  # in the words of the drawn scenes' captions
PENALTY = 1e-3  # of every model's probe: it compares them, and does not look for each one's best
NAMED = 240  # pictures that are named by likelihood, a pass for every class
BATCH = 256  # pictures through a frozen tower at once
MEASURED, WRITTEN = "measured.json", "written.json"  # with each run
# What is measured of each model, as the tables call it; a model that cannot do it has an empty cell.
CONTRASTIVE = ("R@1 by embedding", "R@5 by embedding", "classes by embedding")
GENERATIVE = ("R@1 by likelihood", "R@5 by likelihood", "classes by likelihood", "perplexity")
CAPTIONS = tuple(METRICS.values())
PROBES = ("linear probe", "linear probe of the image tower")
ABILITIES = (*CONTRASTIVE, *GENERATIVE, *PROBES, *CAPTIONS)
COSTS = cost_measures("pictures")


def compare(config: CompareConfig) -> None:
    """Plans the runs, does those that are missing, measures all of them alike, and writes the report."""
    planned = plan(config)
    folder = comparison_folder("compare-clip", config, [config.data.data, config.classes])
    start_server(config.comparison.launch, ["clip_lab.train"])
    data = read_data(config.data, config.comparison.seed, shown=True)
    image = next(iter(planned.values())).image
    make_image_tower(dataclasses.replace(image, image_pretrained=False, image_weights=None))  # or says why not
    compare_runs(folder, config, "clip_lab.train", planned, partial(findings, config, data))


def plan(config: CompareConfig) -> dict[str, TrainConfig]:
    """Makes the config of each run out of the entries of --objectives: an objective, and options of it after colons.

    Raises:
        LabError: there is no such objective or option, or its value is wrong; or the comparison cannot start.
    """
    shared: dict[str, Any] = {name: getattr(config, name) for name in ("image", "text", "data", "batch", "cache")}
    # The own text tower for all, if none is named: it is the only one that can write.
    shared["text"] = dataclasses.replace(config.text, text=config.text.text or OWN)
    usual = ComparedOptions(learning_rate=config.training.learning_rate)

    def run_of(objective: str, flags: list[str]) -> TrainConfig:
        own = parse(ComparedOptions, "--objectives", flags, usual)
        training = dataclasses.replace(config.training, learning_rate=own.learning_rate)
        run = complete(TrainConfig(objective=objective, head=own.head, training=training, **shared))
        check_objective(run)
        return run

    return plan_runs(config.comparison, "--objectives", config.objectives, "objective", run_of, [*OBJECTIVES])


def findings(
    config: CompareConfig, data: Captions, run: Run, entries: dict[str, Entry], failed: dict[str, int]
) -> Findings:
    """Measures what finished, and puts it side by side."""
    splits = read_splits(ClassDataOptions(data=config.classes), config.comparison.seed)
    for entry in entries.values():
        for one in entry.runs.values():
            measure(one, config, data, splits)

    def measured(name: str, entry: Entry) -> list[float]:
        return [kept["found"][name] for kept in entry.read(MEASURED).values() if name in kept["found"]]

    measures = {name: partial(measured, name) for name in ABILITIES} | COSTS
    rows = [
        row | {"seeds": len(entry.results)}
        for row, entry in zip(rows_of("objective", entries.values(), measures), entries.values(), strict=True)
    ]
    same = Text("All had the same pictures and captions in the same order.")
    pictures = class_data_section(splits)
    pictures.title = "Pictures to be named"
    said = {name: its for name, entry in entries.items() if (its := entry.run.load_json(WRITTEN))}
    sections = [
        _differences_section(entries, rows),
        _numbers_section(run, config, rows),
        *([examples_section(said, data.splits["test"])] if said else []),
        _curves_section(run, entries),
        Section("Cost", [table_of(rows, ("objective", *COSTS)), same, *notes_on(config.comparison, failed)]),
        pictures,
    ]
    return Findings("CLIP, CoCa and SimVLM", _summary(rows), rows, sections, ABILITIES)


def measure(run: Run, config: CompareConfig, data: Captions, splits: Mapping[str, LabelledPictures]) -> None:
    """Measures everything that the model of a run can do, on the same pictures as all others; kept with the run."""
    asked = {"ranked": config.ranked, "classes": splits["test"].fingerprint(), "scorer": SCORER, "probes": [*PROBES]}
    known = run.load_json(MEASURED)
    if known is not None and known["asked"] == asked:
        return
    encoder = load_encoder(str(run.path))
    loaded = encoder.ours
    assert loaded is not None
    test, found = data.splits["test"], {}
    captions, of_picture = captions_of(test, min(config.ranked, len(test)))
    rows = picture_rows_of(loaded, test)
    few = rows[: int(of_picture[-1]) + 1]
    similarity = {}
    if loaded.model.embeds:
        similarity["embedding"] = embed_sentences(loaded, captions) @ embeddings_of(loaded, few).T
    if loaded.model.writes:
        found["perplexity"] = perplexity(loaded, rows, test)
        similarity["likelihood"] = likelihood_matrix(loaded, few, captions)
    for way, values in similarity.items():
        metrics = retrieval_metrics(values, of_picture)
        found |= {f"R@{k} by {way}": metrics[f"text_to_image/recall@{k}"] for k in (1, 5)}
    if said := written(loaded, rows, test):
        found |= {METRICS[key]: value for key, value in score_captions(said, test, {}).metrics.items()}
        run.save_json(WRITTEN, said)
    found |= _measure_classes(encoder, splits)
    run.save_json(MEASURED, {"asked": asked, "found": found})


def _measure_classes(encoder: Encoder, splits: Mapping[str, LabelledPictures]) -> dict[str, float]:
    """Measures the accuracy of naming test pictures in both ways, and of linear probes.

    One probe reads what each paper's does: CLIP's image tower, CoCa's pooled places, SimVLM's states of the picture.
    The other reads the same for all, so that what differs is how the tower has learnt and not what comes after it.
    """
    test, loaded, found = splits["test"], encoder.ours, {}
    assert loaded is not None
    model: Any = loaded.model
    names = list(test.classes)
    if encoder.text is not None:
        image = features_of(encoder, {"test": test}, "embedding", BATCH, True)["test"]
        said = (image.values @ class_embeddings(encoder, names, [TEMPLATE]).T).argmax(1)
        found["classes by embedding"] = float((said == image.labels).double().mean())
    if model.writes:
        few = test.subset(np.linspace(0, len(test) - 1, min(NAMED, len(test))).round().astype(int))
        pictures = torch.stack([encoder.view(few.image(place)) for place in range(len(few))])
        with torch.no_grad():
            seen = [model.image(part.to(encoder.device)).places.flatten(1).cpu() for part in pictures.split(64)]
        scores = likelihood_matrix(loaded, torch.cat(seen), [filled(TEMPLATE, name) for name in names])
        found["classes by likelihood"] = float(np.mean(scores.argmax(0).numpy() == few.labels))
    tower = encoder
    if model.reads != "feature":
        tower = dataclasses.replace(encoder, module=model.image, features=lambda x: model.image(x).feature)
    for name, probed in zip(PROBES, (encoder, tower), strict=True):
        features = features_of(probed, splits, "tower", BATCH, True)
        layer = fitted_layers(*features["train"].to(encoder.device), len(names), [PENALTY])[0]
        found[name] = accuracy(layer, features["test"].to(encoder.device))
    return found


def _differences_section(entries: Mapping[str, Entry], rows: list[dict[str, Any]]) -> Section:
    """Shows what each one is, and what was measured of that here; a column per model."""
    kinds = [OBJECTIVES[entry.first["config"]["objective"]] for entry in entries.values()]
    one_by_one = "no: each caption is read with each picture"
    table: list[tuple[Any, ...]] = [
        ("made of", *(kind.model.made_of for kind in kinds)),
        ("learns", *(kind.learns for kind in kinds)),
        ("writes captions", *("yes" if kind.model.writes else "no" for kind in kinds)),
        ("searches by one matrix product", *("yes" if kind.model.embeds else one_by_one for kind in kinds)),
    ]
    measured = (CONTRASTIVE[0], GENERATIVE[0], "perplexity", METRICS["bleu-4"], METRICS["cider"], PROBES[0])
    table += [(key, *(cell(row, key) for row in rows)) for key in measured]
    return Section("Differences", [Table(("", *entries), table)])


def _numbers_section(run: Run, config: CompareConfig, rows: list[dict[str, Any]]) -> Section:
    """Shows everything that was measured, a column per model."""
    table = [(key, *(cell(row, key) for row in rows)) for key in ABILITIES]
    shares = [key for key in (*CONTRASTIVE, *GENERATIVE, *PROBES) if key != "perplexity"]
    bars = {key: {row["objective"]: float(row.get(key, 0.0)) for row in rows} for key in shares}
    figure = save_figure(run, "numbers", bar_figure(bars, "share that is right", 1.0))
    note = (
        f"R@k: a test caption finds its picture among {config.ranked} (by chance {1 / config.ranked:.3f} at 1). By "
        "embedding: cosines. By likelihood: how much more probable the caption is with this picture than with any. "
        f"Classes: “{filled(TEMPLATE, '…')}” with every name; by likelihood on at most {NAMED} pictures. A bar of 0 is "
        "what the model cannot do: its cell in the table is empty. The linear probe reads what each paper's reads: "
        "CLIP's image tower, CoCa's pooled picture, the mean of SimVLM's states of the picture; the second one reads "
        f"every image tower itself. Their penalty is {PENALTY:g} for all. Captions are written by beam search of 3, "
        "from the picture alone; BLEU and ROUGE-L in per cent."
    )
    figures = Figure(figure, "All measured on the same pictures.")
    return Section("Numbers", [Table(("", *(row["objective"] for row in rows)), table), figures, Text(note)])


def _curves_section(run: Run, entries: Mapping[str, Entry]) -> Section:
    """Draws recall and loss on the validation pictures, where a model has them."""
    blocks: list[Any] = []
    for key, said in (("validation/recall", "mean recall"), ("validation/loss", "validation loss")):
        curves = {name: curve for name, entry in entries.items() if (curve := entry.curve(key))[0]}
        if curves:
            caption = f"{said.capitalize()} after each epoch; first seed."
            blocks.append(curves_of(run, curves, "optimizer step", said, caption))
    note = Text(
        "Losses of different objectives are of different things: how each falls says something, not which is lowest."
    )
    return Section("Curves", [*blocks, note])


def _summary(rows: list[dict[str, Any]]) -> str:
    said = []
    for row in rows:
        key = next((key for key in ("R@1 by embedding", "R@1 by likelihood") if key in row), None)
        if key is not None:
            said.append(f"{row['objective']} finds the picture of {row[key]:.0%} of captions first ({key[4:]})")
    return "; ".join(said) + "."
