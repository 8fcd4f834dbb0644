"""Several methods of pre-training under one budget, and one report: `python -m zsi_contrastive.compare`."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from operator import methodcaller
from typing import Any

from labs_common.cli import parse
from labs_common.compare.collect import Entry, Measure, rows_of
from labs_common.compare.plan import comparison_folder, plan_runs, seeds_text
from labs_common.compare.processes import compare_runs, start_server
from labs_common.compare.report import Findings, curves_of, notes_on, table_of
from labs_common.report.figures import bar_figure
from labs_common.report.page import Figure, Section, Table, Text, save_figure
from labs_common.run import Run
from zsi_contrastive.ssl.config import OF_METHODS, CompareConfig, ComparedOptions, MethodOptions, PretrainConfig
from zsi_contrastive.ssl.data import read_splits
from zsi_contrastive.ssl.methods import METHODS, complete

LIBRARIES = ["zsi_contrastive.ssl.train"]  # it imports all that a run needs
WORTH: dict[str, Measure] = {
    "kNN": methodcaller("values", "test", "knn"),
    "kNN, random weights": methodcaller("values", "test", "knn before"),
    "linear probe": methodcaller("values", "test", "probe"),
    "spread": methodcaller("values", "test", "spread"),
    "effective rank": methodcaller("values", "test", "effective rank"),
}
COST: dict[str, Measure] = {
    "seconds": methodcaller("cost", "seconds"),
    "steps": methodcaller("cost", "steps"),
    "pictures": methodcaller("cost", "pictures"),
    "parameters": methodcaller("cost", "parameters"),
    "pictures per second": methodcaller("cost", "pictures per second"),
    "peak MiB": methodcaller("cost", "peak memory", 2**20),
}


def compare(config: CompareConfig) -> None:
    """Plans the runs, does those that are missing, and writes the report."""
    planned = plan(config)
    folder = comparison_folder("compare-pretraining", config, [config.data.data])
    start_server(config.comparison.launch, LIBRARIES)
    read_splits(config.data, config.comparison.seed, shown=True)  # what is wrong with it is said before anything runs
    compare_runs(folder, config, "zsi_contrastive.pretrain", planned, partial(findings, config))


def plan(config: CompareConfig) -> dict[str, PretrainConfig]:
    """Makes the run of each entry of --methods: a method, and options of it after colons (`moco:queue=256`).

    Raises:
        LabError: the comparison cannot start, or there is no such method or option, or its value is wrong.
    """
    views, training = config.views, config.training
    given = ComparedOptions(config.own, training.batch_size, views.local_crops, training.learning_rate,
                            training.optimizer)  # fmt: skip

    def run_of(method: str, flags: list[str]) -> PretrainConfig:
        own = parse(ComparedOptions, "--methods", flags, given)
        # What is said for all and is of other methods alone is none of this one's.
        foreign = [name for name, able in OF_METHODS.items() if method not in able]
        left = {name: getattr(MethodOptions(), name) for name in foreign
                if getattr(own.own, name) == getattr(config.own, name)}  # fmt: skip
        return complete(
            PretrainConfig(
                method, config.data, config.encoder, replace(views, local_crops=own.local_crops),
                replace(own.own, **left),
                replace(training, batch_size=own.batch_size, learning_rate=own.learning_rate, optimizer=own.optimizer),
                replace(config.measure, projected=config.measure.projected and not METHODS[method].on_patches),
            )
        )  # fmt: skip

    return plan_runs(config.comparison, "--methods", config.methods, "method", run_of, tuple(METHODS))


def findings(config: CompareConfig, run: Run, entries: dict[str, Entry], failed: dict[str, int]) -> Findings:
    """Makes the tables and figures, in the order of --methods: an entry with options stands below its method."""
    rows = rows_of("method", entries.values(), WORTH | COST)
    worth = [name for name in WORTH if any(name in row for row in rows)]
    note = f"Every method saw the same pictures as often, with {seeds_text(config.comparison)}. "
    note += "What follows a colon is changed."
    methods = sorted({name.split(":")[0] for name in entries}, key=[*METHODS].index)
    kinds = Table(("method", "against collapse"), [(name, METHODS[name].about) for name in methods])
    cost = [name for name in COST if name != "pictures"]
    tables = [table_of(rows, ["method", *names]) for names in (worth, cost)]
    sections = [Section("Methods", [Text(note), *notes_on(config.comparison, failed), *tables, kinds,
                                    *figures_of(run, entries, rows)])]  # fmt: skip
    if effects := effects_of(rows):
        shown = [(name, changed, usual, f"{change:+.3f}") for name, _, changed, usual, change in effects]
        sections.append(Section("What each change does", [Table(("with", "kNN", "without", "difference"), shown)]))
    ranked = [row for row in rows if "kNN" in row]
    best = max(ranked, key=lambda row: row["kNN"]) if ranked else None
    summary = "No classes to ask for."
    if best is not None:
        summary = f"{best['method']} has the best neighbours: {best['kNN']:.1%} right."
    return Findings("Pre-training compared", summary, rows, sections, worth)


def figures_of(run: Run, entries: Mapping[str, Entry], rows: list[dict[str, Any]]) -> list[Figure]:
    """Draws kNN accuracy and effective rank by epoch, and the accuracies side by side."""
    figures = []
    curves = {name: entry.epochs("test/knn") for name, entry in entries.items() if entry.curve("test/knn")[0]}
    if curves:
        random = next(iter(curves.values()))[1][0]  # before the first step
        end = max(epochs[-1] for epochs, _ in curves.values())
        curves["random weights"] = ([0.0, end], [random, random])
        figures.append(curves_of(run, curves, "epoch", "kNN accuracy, test",
                                 "Test pictures that neighbours name right, first seed."))  # fmt: skip
        bars: dict[str, dict[str, float]] = {
            row["method"]: {name: row[name] for name in ("kNN", "linear probe") if name in row} for row in rows
        }
        if len({tuple(named) for named in bars.values()}) == 1:  # all were measured alike
            figures.append(Figure(save_figure(run, "methods", bar_figure(bars, "accuracy")), "Test pictures."))
    ranks = {name: entry.epochs("test/effective_rank") for name, entry in entries.items()}
    caption = "How many dimensions the features use; near 1 they have collapsed."
    return [*figures, curves_of(run, ranks, "epoch", "effective rank", caption)]


def effects_of(rows: list[dict[str, Any]]) -> list[tuple[str, str, float, float, float]]:
    """Puts each entry with options beside its method without: names, kNN of both and their difference."""
    knn = {row["method"]: row["kNN"] for row in rows if "kNN" in row}
    pairs = [(name, name.split(":")[0]) for name in knn if ":" in name]
    return [(name, usual, knn[name], knn[usual], knn[name] - knn[usual]) for name, usual in pairs if usual in knn]


if __name__ == "__main__":
    raise SystemExit("the command is python -m zsi_contrastive.compare")
