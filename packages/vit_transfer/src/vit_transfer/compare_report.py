"""The results of a comparison's runs: read from their directories, put in order by stated rules, and reported."""

import csv
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from labs_common.comparing import cell, figure_text, mean_and_spread, pareto, seeds_text, within_one_error
from labs_common.data import LabelledPictures
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
from labs_common.report.classes import wilson_interval
from labs_common.run import Run
from vit_transfer.catalogue import CNN, FAMILIES, TRANSFORMER, family
from vit_transfer.config import CompareConfig
from vit_transfer.tiny import RECIPES

PAPER = Path(__file__).with_name("paper_table.csv")
SHOWN = 12  # pictures that defeat every network


@dataclass(frozen=True)
class Entry:
    """One network of a comparison, over all seeds.

    Attributes:
        name: as --models names it.
        results: results.json by seed.
        right: which test pictures were right (pictures,), by seed.
        curve: of the first seed, (epoch, validation accuracy).
    """

    name: str
    results: dict[int, dict[str, Any]]
    right: dict[int, np.ndarray]
    curve: list[tuple[float, float]]

    @property
    def model(self) -> str:
        """The network's name."""
        return str(next(iter(self.results.values()))["config"]["model"]["model"])

    @property
    def kind(self) -> str:
        """CNN, transformer, or other for one that the catalogue does not know."""
        name = family(self.model)
        return FAMILIES[name].kind if name else RECIPES.get(self.model, {"kind": "other"})["kind"]

    @property
    def trained(self) -> str:
        """What of it was trained, in words."""
        model = next(iter(self.results.values()))["config"]["model"]
        start = "" if model["pretrained"] or model["weights"] else ", from random weights"
        return {"block": "last block", "head": "head", "all": "everything"}[model["unfreeze"]] + start

    @property
    def accuracies(self) -> list[float]:
        """Test accuracy by seed."""
        return [found["test"]["this run"]["accuracy"] for found in self.results.values()]

    @property
    def accuracy(self) -> float:
        """Mean test accuracy over the seeds."""
        return statistics.fmean(self.accuracies)

    def cost(self, name: str) -> list[float]:
        """Returns a cost by seed."""
        return [result["cost"][name] for result in self.results.values()]


def read_entries(folder: Path, paths: Mapping[str, str], seeds: Iterable[int]) -> dict[str, Entry]:
    """Reads what is finished; `paths` are the runs' directories by the entries' names."""
    entries = {}
    seeds = list(seeds)
    for name, path in paths.items():
        runs = {seed: Run(folder / path / f"seed-{seed}") for seed in seeds}
        runs = {seed: run for seed, run in runs.items() if (run.path / "results.json").exists()}
        if not runs:
            continue
        results = {seed: run.load_json("results.json") for seed, run in runs.items()}
        right = {}
        for seed, run in runs.items():
            found = run.load_json("predictions.json")
            right[seed] = np.equal(found["said"], found["labels"])
        first, result = next(iter(runs.values())), next(iter(results.values()))
        epoch = result["cost"]["steps"] / result["config"]["training"]["epochs"]
        lines = [line for line in first.lines("metrics.jsonl") if "validation/accuracy" in line]
        curve = [(line["step"] / epoch, line["validation/accuracy"]) for line in lines]
        entries[name] = Entry(name, results, right, curve)
    return entries


def within_noise(best: Entry, other: Entry) -> bool:
    """Tells whether `other` is at most one standard error worse than `best`, on the same pictures of the same seeds."""
    there = best.right.keys() & other.right.keys()
    if best is other or not there:
        return best is other
    differences = np.concatenate([best.right[seed].astype(int) - other.right[seed] for seed in sorted(there)])
    return within_one_error(differences.tolist())


def recommended(entries: Mapping[str, Entry]) -> tuple[Entry, list[Entry]]:
    """Picks the entry with the fewest trained parameters among those within noise of the best; and all of those."""
    best = max(entries.values(), key=lambda entry: entry.accuracy)
    equal = [entry for entry in entries.values() if within_noise(best, entry)]
    return min(equal, key=lambda entry: entry.cost("trainable")[0]), equal


def best_of_kind(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Picks the most accurate CNN and the most accurate transformer of those that start from pre-trained weights.

    If none does, of all.
    """
    chosen = [entry for entry in entries.values() if "random" not in entry.trained] or [*entries.values()]
    kinds = {kind: [entry for entry in chosen if entry.kind == kind] for kind in (CNN, TRANSFORMER)}
    return {kind: max(found, key=lambda entry: entry.accuracy) for kind, found in kinds.items() if found}


def hard_pictures(entries: Mapping[str, Entry], seed: int) -> np.ndarray:
    """Finds the places of the test pictures that no entry gets right with this seed."""
    there = [entry.right[seed] for entry in entries.values() if seed in entry.right]
    return np.flatnonzero(~np.logical_or.reduce(there)) if there else np.array([], dtype=int)


def order(entries: Sequence[Entry]) -> list[Entry]:
    """Sorts the most accurate first."""
    return sorted(entries, key=lambda entry: -entry.accuracy)


COSTS: tuple[tuple[str, Callable[[Entry], list[float]]], ...] = (
    ("trained parameters", lambda entry: entry.cost("trainable")),
    ("all parameters", lambda entry: entry.cost("parameters")),
    ("training seconds", lambda entry: entry.cost("seconds")),
    ("front seconds", lambda entry: entry.cost("preparation seconds")),
    ("pictures/s", lambda entry: entry.cost("pictures per second")),
    ("peak MiB", lambda entry: [value / 2**20 for value in entry.cost("peak memory")]),
    ("cache MiB", lambda entry: [value / 2**20 for value in entry.cost("cache bytes")]),
)


def write_comparison(
    folder: Path,
    config: CompareConfig,
    entries: Mapping[str, Entry],
    test: LabelledPictures,
    failed: Mapping[str, int],
) -> None:
    """Writes comparison.json and report.html, prints the table's main columns and where they are."""
    run = Run(folder)
    if not entries:
        console.print("no run finished: there is nothing to report")
        return
    rows = table_rows(entries)
    best, _ = recommended(entries)
    run.save_json("comparison.json", {"rows": rows, "recommended": best.name})
    kinds = " and ".join(f"{entry.name} ({kind}) {entry.accuracy:.1%}" for kind, entry in best_of_kind(entries).items())
    summary = (
        f"{len(entries)} networks, {seeds_text(config.comparison)} each. Test accuracy: {kinds}. "
        f"Recommended by the rule below: {best.name}."
    )
    sections = [
        recommendation_section(entries),
        numbers_section(run, rows, entries, config, failed),
        kinds_section(entries),
        paper_section(entries, config),
        cost_section(run, entries),
        curves_section(run, entries),
        pictures_section(entries, test, config.comparison.seed),
        asked_section(config),
        budget_section(entries, test),
    ]
    path = write_report(run, "CNNs beside transformers", summary, sections)
    for row in rows:
        numbers = "  ".join(f"{name} {figure_text(row[name])}" for name in ("test accuracy", "training seconds"))
        console.print(f"{row['network']}: {numbers}")
    console.print(f"recommended: {best.name}")
    print(f"report: {path}")


def table_rows(entries: Mapping[str, Entry]) -> list[dict[str, Any]]:
    """Makes one row per entry, best first: accuracy and costs as means over seeds, `NAME ±` their spread."""
    rows = []
    for entry in order([*entries.values()]):
        rate = next(iter(entry.results.values()))["config"]["training"]["learning_rate"]
        row: dict[str, Any] = {
            "network": entry.name, "family": family(entry.model), "kind": entry.kind, "trains": entry.trained,
            "learning rate": rate,
        }  # fmt: skip
        row |= mean_and_spread("test accuracy", entry.accuracies)
        row |= mean_and_spread("validation loss", [found["validation"]["loss"] for found in entry.results.values()])
        for name, cost in COSTS:
            row |= mean_and_spread(name, cost(entry))
        rows.append(row)
    return rows


def recommendation_section(entries: Mapping[str, Entry]) -> Section:
    """Shows the rule, and what it gives."""
    best, equal = recommended(entries)
    top = order([*entries.values()])[0]
    return Section(
        "Which network",
        [
            Text(
                "Rule (Breiman's one standard error): of those whose test accuracy is within one standard error of the "
                "best, taken of the mean difference on the same pictures, take the one that trains the fewest "
                "parameters."
            ),
            Text(
                f"Best: {top.name} ({top.accuracy:.1%}). Within noise of it: {', '.join(e.name for e in equal)}. Of "
                f"these {best.name} trains the fewest parameters ({best.cost('trainable')[0]:,}): recommended."
            ),
        ],
    )


def numbers_section(
    run: Run, rows: list[dict[str, Any]], entries: Mapping[str, Entry], config: CompareConfig, failed: Mapping[str, int]
) -> Section:
    """Shows the table, and the accuracies as bars."""
    columns = ("network", "kind", "trains", "test accuracy", "95 % interval", "learning rate")
    table = []
    for row in rows:
        entry = entries[row["network"]]
        pictures = sum(len(right) for right in entry.right.values())
        interval = "{:.3f} to {:.3f}".format(*wilson_interval(entry.accuracy, pictures))
        accuracy = cell(row, "test accuracy")
        table.append((row["network"], row["kind"], row["trains"], accuracy, interval, f"{row['learning rate']:g}"))
    costs = [(row["network"], *(cell(row, name) for name, _ in COSTS)) for row in rows]
    bars = {row["network"]: {"test accuracy": row["test accuracy"]} for row in rows}
    blocks: list[Text | Table | Figure] = [
        Table(columns, table),
        Figure(save_figure(run, "accuracy", bar_figure(bars, "test accuracy", 1.0)), "Test accuracy."),
        Text("Each network is read back from disk and run whole on the test pictures."),
        Table(("network", *(name for name, _ in COSTS)), costs),
        Text(
            "Front seconds: computing the output of the frozen layers for every picture, once, or reading it where an "
            "earlier run had kept it. Peak memory is of the whole process, libraries included, on a CPU."
        ),
    ]
    if config.comparison.seeds > 1:
        blocks.append(Text(f"Mean ± standard deviation over {config.comparison.seeds} seeds."))
    if failed:
        named = ", ".join(f"{name} (exit code {code})" for name, code in failed.items())
        blocks.append(Text(f"Not finished, and not in the tables: {named}."))
    return Section("Numbers", list(blocks))


def kinds_section(entries: Mapping[str, Entry]) -> Section:
    """Shows the best CNN beside the best transformer, and whether the difference is more than noise."""
    best = best_of_kind(entries)
    if len(best) < 2:
        return Section("CNNs beside transformers", [Text("The comparison has networks of one kind only.")])
    columns = ("", "network", "trains", "test accuracy", "trained parameters", "all parameters", "training seconds")
    rows = [
        (kind, entry.name, entry.trained, entry.accuracy, int(entry.cost("trainable")[0]),
         int(entry.cost("parameters")[0]), statistics.fmean(entry.cost("seconds")))
        for kind, entry in best.items()
    ]  # fmt: skip
    ahead, behind = order([*best.values()])
    gap = ahead.accuracy - behind.accuracy
    sure = "within one standard error: a tie" if within_noise(ahead, behind) else "more than one standard error"
    share = ahead.cost("parameters")[0] / behind.cost("parameters")[0]
    text = (
        f"The {ahead.kind} is ahead by {gap:.1%}, {sure} on the same pictures; it has {share:.2f} times the other's "
        f"parameters. The paper (arXiv 2110.05270) found {TRANSFORMER}s ahead of {CNN}s, some with about a quarter of "
        "the parameters."
    )
    return Section("CNNs beside transformers", [Table(columns, rows, "The best of each kind."), Text(text)])


@dataclass(frozen=True)
class Printed:
    """The paper's result for a network: `accuracy` in per cent, None where it is not on file."""

    network: str
    family: str
    accuracy: float | None
    source: str


def paper_table(file: Path = PAPER) -> list[Printed]:
    """Reads the reference table, in its order.

    Raises:
        ValueError: a network is not in the catalogue, or an accuracy is no percentage or has no source.
    """
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    rows = []
    for row in csv.DictReader(lines):
        accuracy = float(row["accuracy"]) if row["accuracy"] else None
        known = FAMILIES.get(row["family"])
        if known is None or row["network"] not in known.networks:
            raise ValueError(f"{file}: {row['network']} is not in the catalogue as a {row['family']}")
        if accuracy is not None and not (0 <= accuracy <= 100 and row["source"]):
            raise ValueError(f"{file}: {row['network']}: an accuracy is a percentage and has a source")
        rows.append(Printed(row["network"], row["family"], accuracy, row["source"]))
    return rows


def paper_section(entries: Mapping[str, Entry], config: CompareConfig) -> Section:
    """Shows the paper's results for the same networks."""
    ours: dict[str, list[Entry]] = {}
    for entry in entries.values():
        if entry.trained == "last block":
            ours.setdefault(entry.model.removeprefix("timm/").split(".")[0], []).append(entry)
    rows = []
    for printed in paper_table():
        found = ", ".join(f"{100 * entry.accuracy:.2f}" for entry in ours.get(printed.network, ()))
        there = "not on file" if printed.accuracy is None else f"{printed.accuracy:.2f}"
        rows.append((printed.family, printed.network, there, found or None, printed.source or None))
    columns = ("family", "network", "paper, %", "here, %", "source")
    compared = [row for row in rows if row[3] is not None]
    here = config.data.data or "drawn scenes, which are other data"
    text = f"Accuracy on CIFAR-10 with one trainable block, from arXiv 2110.05270, beside that on {here}."
    blocks: list[Text | Table] = [Text(text)]
    if compared:
        blocks.append(Table(columns, compared))
    blocks.append(Table(columns, rows, "the whole table", folded=True))
    return Section("Reference table of the paper", list(blocks))


def cost_section(run: Run, entries: Mapping[str, Entry]) -> Section:
    """Plots accuracy against parameters, time and memory."""
    against: list[tuple[str, str, Callable[[Entry], float], bool]] = [
        ("trained", "trained parameters", lambda entry: entry.cost("trainable")[0], True),
        ("parameters", "all parameters", lambda entry: entry.cost("parameters")[0], True),
        ("time", "training seconds", lambda entry: statistics.fmean(entry.cost("seconds")), False),
        ("memory", "peak memory, MiB", lambda entry: statistics.fmean(entry.cost("peak memory")) / 2**20, False),
    ]
    figures = []
    for name, across, cost, log in against:
        points = {entry.name: (cost(entry), entry.accuracy) for entry in entries.values()}
        svg = save_figure(run, f"pareto-{name}", scatter_figure(points, across, "test accuracy", log, pareto(points)))
        figures.append(Figure(svg, f"Test accuracy against {across}; orange: no other is better in both."))
    return Section("Accuracy against cost", [*figures])


def curves_section(run: Run, entries: Mapping[str, Entry]) -> Section:
    """Plots validation accuracy by epoch, all on one axis."""
    curves = {
        entry.name: ([epoch for epoch, _ in entry.curve], [accuracy for _, accuracy in entry.curve])
        for entry in entries.values()
    }
    svg = save_figure(run, "curves", curve_figure(curves, "epoch", "validation accuracy"))
    return Section("Curves", [Figure(svg, "Accuracy on the validation pictures by epoch; first seed.")])


def pictures_section(entries: Mapping[str, Entry], test: LabelledPictures, seed: int) -> Section:
    """Shows the test pictures that defeat every network."""
    hard = hard_pictures(entries, seed)
    text = f"{len(hard)} of {len(test)} test pictures are wrong with every network, first seed."
    shown = [(test.image(int(place)), test.classes[test.labels[place]]) for place in hard[:SHOWN]]
    return Section("Hard for all", [Gallery(shown, f"{text} The line is the true class.") if shown else Text(text)])


def budget_section(entries: Mapping[str, Entry], test: LabelledPictures) -> Section:
    """Shows the budget of each, as the runs recorded it, and the machine."""
    rows = [(entry.name, int(entry.cost("steps")[0]), int(entry.cost("pictures")[0])) for entry in entries.values()]
    environment = next(iter(next(iter(entries.values())).results.values()))["environment"]
    machine = [(name.replace("_", " "), str(value)) for name, value in environment.items() if name != "packages"]
    machine += [(name, version) for name, version in environment["packages"].items()]
    same = len({(steps, pictures) for _, steps, pictures in rows}) == 1
    verdict = (
        f"Each network had the same pictures, order and epochs; {len(test)} test pictures."
        if same
        else "The networks did not have the same number of steps or pictures: the table says which."
    )
    return Section(
        "Budget and machine",
        [Text(verdict), Table(("network", "optimizer steps", "pictures"), rows), Table(("", ""), machine)],
    )
