"""The report of a comparison, made from its runs' JSON and the test pictures."""

import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from labs_common.comparing import cell, figure_text, mean_and_spread, pareto, seeds_text
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
from vit_transfer.catalogue import family
from vit_transfer.comparison import (
    CNN,
    TRANSFORMER,
    Entry,
    best_of_kind,
    hard_pictures,
    order,
    paper_table,
    recommended,
    within_noise,
)
from vit_transfer.config import CompareConfig

COSTS: tuple[tuple[str, Callable[[Entry], list[float]]], ...] = (
    ("trained parameters", lambda entry: entry.cost("trainable")),
    ("all parameters", lambda entry: entry.cost("parameters")),
    ("training seconds", lambda entry: entry.cost("seconds")),
    ("front seconds", lambda entry: entry.cost("preparation seconds")),
    ("pictures/s", lambda entry: entry.cost("pictures per second")),
    ("peak MiB", lambda entry: [value / 2**20 for value in entry.cost("peak memory")]),
    ("cache MiB", lambda entry: [value / 2**20 for value in entry.cost("cache bytes")]),
)
SHOWN = 12


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
        said = "  ".join(f"{name} {figure_text(row[name])}" for name in ("test accuracy", "training seconds"))
        console.print(f"{row['network']}: {said}")
    console.print(f"recommended: {best.name}")
    print(f"report: {path}")


def table_rows(entries: Mapping[str, Entry]) -> list[dict[str, Any]]:
    """One row per entry, best first: accuracy and costs as means over seeds, `NAME ±` their spread."""
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
    """The rule, and what it gives."""
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
    """The table and the accuracies as bars."""
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
            "Front seconds: computing what the "
            "frozen layers give for every picture, once, or reading it where an earlier run had kept it. Peak memory "
            "is of the whole process, libraries included, on a CPU."
        ),
    ]
    if config.comparison.seeds > 1:
        blocks.append(Text(f"Mean ± standard deviation over {config.comparison.seeds} seeds."))
    if failed:
        said = ", ".join(f"{name} (exit code {code})" for name, code in failed.items())
        blocks.append(Text(f"Not finished, and not in the tables: {said}."))
    return Section("Numbers", list(blocks))


def kinds_section(entries: Mapping[str, Entry]) -> Section:
    """The best CNN beside the best transformer, and whether the difference is more than noise."""
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


def paper_section(entries: Mapping[str, Entry], config: CompareConfig) -> Section:
    """What the paper reports of the same networks."""
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
    """Accuracy against parameters, time and memory."""
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
    """Validation accuracy by epoch, all on one axis."""
    curves = {
        entry.name: ([epoch for epoch, _ in entry.curve], [accuracy for _, accuracy in entry.curve])
        for entry in entries.values()
    }
    svg = save_figure(run, "curves", curve_figure(curves, "epoch", "validation accuracy"))
    return Section("Curves", [Figure(svg, "Accuracy on the validation pictures by epoch; first seed.")])


def pictures_section(entries: Mapping[str, Entry], test: LabelledPictures, seed: int) -> Section:
    """The test pictures that defeat every network."""
    hard = hard_pictures(entries, seed)
    text = f"{len(hard)} of {len(test)} test pictures are wrong with every network, first seed."
    shown = [(test.image(int(place)), test.classes[test.labels[place]]) for place in hard[:SHOWN]]
    return Section("Hard for all", [Gallery(shown, f"{text} The line is the true class.") if shown else Text(text)])


def budget_section(entries: Mapping[str, Entry], test: LabelledPictures) -> Section:
    """What was the same for all, as the runs recorded it, and on what machine."""
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
