"""The runs of a comparison: read from their directories, put in order, and reported on."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from caption_lab.config import CompareConfig
from caption_lab.evaluation import mistakes
from caption_lab.export import load_captioner
from caption_lab.looking import looked_at, word_tiles
from caption_lab.metrics import CiderD
from caption_lab.results import METRICS, published_section
from caption_lab.vocabulary import Cleaning
from labs_common.comparing import cell, figure_text, mean_and_spread, pareto, seeds_text, within_one_error
from labs_common.data import CaptionedPictures
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
    scatter_figure,
    write_report,
)
from labs_common.report.captioned import shown
from labs_common.run import Run
from labs_common.scenes import Scene
from labs_common.scenes.judging import GRAMMAR, KINDS

EXAMPLES, WORST = 5, 6


@dataclass(frozen=True)
class Entry:
    """One captioner of a comparison, over all seeds.

    Attributes:
        name: as --models names it.
        results: results.json by seed.
        captions: of the test pictures, by seed.
        path: the first seed's run.
    """

    name: str
    results: dict[int, dict[str, Any]]
    captions: dict[int, list[str]]
    path: Path

    @property
    def first(self) -> dict[str, Any]:
        """The first seed's results."""
        return next(iter(self.results.values()))

    def metric(self, key: str) -> list[float]:
        """A metric of the test captions by seed."""
        return [found["test"]["metrics"][key] for found in self.results.values()]

    def cost(self, key: str) -> list[float]:
        """A cost by seed."""
        return [found["cost"][key] for found in self.results.values()]


COSTS: tuple[tuple[str, Callable[[Entry], list[float]]], ...] = (
    ("trained parameters", lambda entry: entry.cost("trained")),
    ("all parameters", lambda entry: entry.cost("parameters")),
    ("training seconds", lambda entry: entry.cost("seconds")),
    ("captions/s", lambda entry: entry.cost("captions per second")),
    ("peak MiB", lambda entry: [value / 2**20 for value in entry.cost("peak memory")]),
    ("kept on disk, MiB", lambda entry: [value / 2**20 for value in entry.cost("cache bytes")]),
)


def gathered(folder: Path, paths: Mapping[str, str], seeds: Iterable[int]) -> dict[str, Entry]:
    """Reads what is finished; `paths` are the runs' directories by the entries' names."""
    entries = {}
    seeds = list(seeds)
    for name, path in paths.items():
        runs = {seed: Run(folder / path / f"seed-{seed}") for seed in seeds}
        done = {seed: run for seed, run in runs.items() if (run.path / "results.json").exists()}
        if done:
            results = {seed: run.load_json("results.json") for seed, run in done.items()}
            said = {seed: [row["caption"] for row in run.load_json("captions.json")] for seed, run in done.items()}
            entries[name] = Entry(name, results, said, next(iter(done.values())).path)
    return entries


def write_comparison(
    folder: Path,
    config: CompareConfig,
    entries: Mapping[str, Entry],
    test: CaptionedPictures,
    truth: Mapping[str, Scene],
    failed: Mapping[str, int],
) -> None:
    """Writes comparison.json and report.html, prints the table's main columns and where they are."""
    run = Run(folder)
    if not entries:
        console.print("no run finished: there is nothing to report")
        return
    rows = table_rows(entries)
    run.save_json("comparison.json", {"rows": rows})
    best = rows[0]["model"]
    equal = equal_to(entries[best], entries, test, config)
    summary = (
        f"{len(entries)} captioners, {seeds_text(config.comparison)} each. Highest CIDEr-D: {best} "
        f"({rows[0]['CIDEr-D']:.2f}); within one standard error of it: {', '.join(equal)}."
    )
    sections = [
        numbers_section(run, rows, failed, config),
        *([truth_section(run, entries)] if truth else []),
        published_section({name: entry.first["test"]["metrics"] for name, entry in entries.items()}, config.data.data),
        examples_section(entries, test, config.comparison.seed),
        looks_section(entries, test, config),
        *([errors_section(entries, test, truth, config.comparison.seed)] if truth else []),
        curves_section(run, entries),
        cost_section(run, rows, entries),
        asked_section(config),
        budget_section(entries),
    ]
    path = write_report(run, "Captioners compared", summary, sections)
    for row in rows:
        said = "  ".join(
            f"{name} {figure_text(row[name])}" for name in ("BLEU-1", "BLEU-4", "CIDEr-D", "training seconds")
        )
        right = f"  right in everything {row['right in everything']:.0%}" if "right in everything" in row else ""
        console.print(f"{row['model']}: {said}{right}")
    print(f"report: {path}")


def table_rows(entries: Mapping[str, Entry]) -> list[dict[str, Any]]:
    """One row per entry, highest CIDEr-D first: metrics and costs as means over seeds, `NAME ±` their spread."""
    rows = []
    for entry in sorted(entries.values(), key=lambda entry: -float(np.mean(entry.metric("cider")))):
        row: dict[str, Any] = {"model": entry.name}
        for key, name in METRICS.items():
            row |= mean_and_spread(name, entry.metric(key))
        if entry.first["claims"]:
            whole = [found["claims"]["written"]["whole"] for found in entry.results.values()]
            row |= mean_and_spread("right in everything", whole)
        for name, cost in COSTS:
            row |= mean_and_spread(name, cost(entry))
        rows.append(row)
    return rows


def equal_to(best: Entry, entries: Mapping[str, Entry], test: CaptionedPictures, config: CompareConfig) -> list[str]:
    """The entries whose CIDEr-D is no more than one standard error below that of `best`, on the same pictures."""
    words = config.vocabulary
    cleaning = Cleaning(words.lowercase, words.punctuation, words.digits, words.symbols)
    critic = CiderD([[cleaning.words(caption) for caption in those] for those in test.captions])
    places = range(len(test))
    found = []
    for entry in entries.values():
        seeds = sorted(best.captions.keys() & entry.captions.keys())
        differences = [
            critic.scores([c.split() for c in best.captions[seed]], places)
            - critic.scores([c.split() for c in entry.captions[seed]], places)
            for seed in seeds
        ]
        if entry is best or (differences and within_one_error(np.concatenate(differences).tolist())):
            found.append(entry.name)
    return found


def numbers_section(
    run: Run, rows: Sequence[Mapping[str, Any]], failed: Mapping[str, int], config: CompareConfig
) -> Section:
    """The metrics of all, and as bars."""
    columns = ("model", *METRICS.values())
    bars = {row["model"]: {name: row[name] for name in ("BLEU-1", "BLEU-4")} for row in rows}
    blocks: list[Any] = [
        Table(columns, [(row["model"], *(cell(row, name) for name in METRICS.values())) for row in rows]),
        Figure(save_figure(run, "bleu", bar_figure(bars, "per cent")), "BLEU of the test captions."),
        Text(f"Each was read back from disk and described the test pictures with --beam {config.decoding.beam}."),
    ]
    if config.comparison.seeds > 1:
        blocks.append(Text(f"Mean ± standard deviation over {config.comparison.seeds} seeds."))
    if failed:
        said = ", ".join(f"{name} (exit code {code})" for name, code in failed.items())
        blocks.append(Text(f"Not finished, and not in the tables: {said}."))
    return Section("Numbers", blocks)


def truth_section(run: Run, entries: Mapping[str, Entry]) -> Section:
    """What the captions claim, and how much of it is so."""
    columns = (*KINDS, GRAMMAR)
    rows = []
    bars = {}
    for name, entry in entries.items():
        for how, found in entry.first["claims"].items():
            if how == "of another picture" and name != next(iter(entries)):
                continue  # it is the same for all
            shares = {kind: pair[0] / pair[1] for kind, pair in found["by kind"].items()}
            label = how if how == "of another picture" else f"{name}, {how}"
            rows.append((label, found["whole"], *(shares.get(kind) for kind in columns)))
            if how == "written":
                bars[name] = {kind: shares.get(kind, 0.0) for kind in ("objects", "colours", "relations")}
    text = (
        "What is drawn is known, so each claim of a caption can be judged. Written: the captions that were measured. "
        "Drawn by chance: three more of each picture (--top-p 0.9), which say more different things. Of another "
        "picture: true captions, but of other pictures."
    )
    svg = save_figure(run, "claims", bar_figure(bars, "share of claims that are right", 1.0))
    head = ("captions", "right in everything", *columns)
    table = Table(head, rows, "Share of claims that are right, by kind; first seed.")
    return Section("What is true", [Text(text), table, Figure(svg, "The captions that were measured.")])


def examples_section(entries: Mapping[str, Entry], test: CaptionedPictures, seed: int) -> Section:
    """Five test pictures with what each captioner says of them."""
    blocks: list[Any] = []
    for place in _examples(test):
        rows = [(name, entry.captions[seed][place]) for name, entry in entries.items() if seed in entry.captions]
        rows += [("true", caption) for caption in test.captions[place]]
        blocks += [Gallery([(shown(test.image(place)), test.names[place])], ""), Table(("", "caption"), rows)]
    return Section("Five test pictures", blocks)


def looks_section(entries: Mapping[str, Entry], test: CaptionedPictures, config: CompareConfig) -> Section:
    """Where each captioner that attends looked for each word, on the same pictures."""
    blocks: list[Any] = []
    for name, entry in entries.items():
        captioner = load_captioner(entry.path)
        images = [test.image(place) for place in _examples(test)[:2]]
        for image, (words, attention) in zip(images, looked_at(captioner, images, config.decoding), strict=False):
            blocks.append(Gallery(word_tiles(image, words, attention), f"{name}: {' '.join(words)}"))
    return Section("Where they looked", blocks or [Text("None of them looks at places.")])


def errors_section(
    entries: Mapping[str, Entry], test: CaptionedPictures, truth: Mapping[str, Scene], seed: int
) -> Section:
    """Test pictures of which every captioner claims something wrong."""
    wrong = {
        name: [
            mistakes(caption, truth[picture]) for caption, picture in zip(entry.captions[seed], test.names, strict=True)
        ]
        for name, entry in entries.items()
        if seed in entry.captions
    }
    hard = [place for place in range(len(test)) if all(claims[place] for claims in wrong.values())]
    gallery = []
    for place in hard[:WORST]:
        said = "; ".join(
            f"{name}: {entries[name].captions[seed][place]} (wrong: {', '.join(claim.said for claim in claims[place])})"
            for name, claims in wrong.items()
        )
        gallery.append((shown(test.image(place)), said))
    text = f"Of {len(hard)} of {len(test)} test pictures every captioner claims something that is not so."
    return Section("Hard for all", [Gallery(gallery, text) if gallery else Text(text)])


def curves_section(run: Run, entries: Mapping[str, Entry]) -> Section:
    """Loss and CIDEr-D by epoch, all on one axis."""
    figures: list[Any] = []
    for key, name in (("validation/loss", "validation loss"), ("training/loss", "training loss"),
                      ("validation/cider", "validation CIDEr-D")):  # fmt: skip
        curves = {}
        for entry in entries.values():
            epoch = entry.first["cost"]["steps"] / entry.first["config"]["training"]["epochs"]
            lines = [line for line in entry.first["evaluations"] if key in line]
            curves[entry.name] = ([line["step"] / epoch for line in lines], [line[key] for line in lines])
        svg = save_figure(run, key.replace("/", "-"), curve_figure(curves, "epoch", name))
        figures.append(Figure(svg, f"{name.capitalize()} by epoch; first seed."))
    note = "show_attend_tell's training loss contains its attention penalty; validation losses are of the words alone."
    return Section("Curves", [*figures, Text(note)])


def cost_section(run: Run, rows: Sequence[Mapping[str, Any]], entries: Mapping[str, Entry]) -> Section:
    """What each one cost, and CIDEr-D against it."""
    blocks: list[Any] = [
        Table(
            ("model", *(name for name, _ in COSTS)),
            [(row["model"], *(cell(row, name) for name, _ in COSTS)) for row in rows],
        )
    ]
    for across in ("training seconds", "trained parameters"):
        points = {row["model"]: (row[across], row["CIDEr-D"]) for row in rows}
        svg = save_figure(
            run, f"cider-{across.split()[0]}", scatter_figure(points, across, "CIDEr-D", False, pareto(points))
        )
        blocks.append(Figure(svg, f"CIDEr-D against {across}; orange: no other is better in both."))
    return Section("Cost", blocks)


def budget_section(entries: Mapping[str, Entry]) -> Section:
    """What was the same for all, as the runs recorded it, and on what machine."""
    rows = [
        (name, entry.first["config"]["training"]["epochs"], int(entry.cost("steps")[0]), int(entry.cost("captions")[0]))
        for name, entry in entries.items()
    ]
    environment = next(iter(entries.values())).first["environment"]
    machine = [(name.replace("_", " "), str(value)) for name, value in environment.items() if name != "packages"]
    machine += list(environment["packages"].items())
    same = len({row[1:] for row in rows}) == 1
    verdict = (
        "All had the same captions in the same order, and the same number of epochs."
        if same
        else "They did not have the same number of epochs or captions: the table says which."
    )
    columns = ("model", "epochs", "optimizer steps", "captions")
    return Section("Budget and machine", [Text(verdict), Table(columns, rows), Table(("", ""), machine)])


def _examples(test: CaptionedPictures) -> list[int]:
    return [int(place) for place in np.linspace(0, len(test) - 1, min(EXAMPLES, len(test))).round()]
