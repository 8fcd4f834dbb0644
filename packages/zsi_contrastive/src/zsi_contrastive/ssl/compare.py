"""The results of a comparison's runs, and the report on them."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from labs_common.comparing import cell, figure_text, mean_and_spread, seeds_text, slug
from labs_common.progress import console
from labs_common.report import (
    Figure,
    Section,
    Table,
    Text,
    asked_section,
    bar_figure,
    curve_figure,
    save_figure,
    write_report,
)
from labs_common.run import Run, environment
from zsi_contrastive.ssl.config import CompareConfig

WORTH = {"kNN": "knn", "kNN, random weights": "knn before", "linear probe": "probe", "spread": "spread",
         "effective rank": "effective rank"}  # fmt: skip
COSTS = {"seconds": "seconds", "steps": "steps", "pictures": "pictures", "parameters": "parameters"}


def gathered(folder: Path, specs: Iterable[str], seeds: Sequence[int]) -> dict[str, list[Run]]:
    """The finished runs of each entry."""
    runs = {spec: [Run(folder / slug(spec) / f"seed-{seed}") for seed in seeds] for spec in specs}
    done = {spec: [run for run in of_spec if run.load_json("results.json")] for spec, of_spec in runs.items()}
    return {spec: of_spec for spec, of_spec in done.items() if of_spec}


def measured(runs: Iterable[Run]) -> dict[str, Any]:
    """Means, and spreads over seeds, of what is compared."""
    results = [run.load_json("results.json") for run in runs]
    line: dict[str, Any] = {}
    for name, key in WORTH.items():
        line |= mean_and_spread(name, [result["test"][key] for result in results if key in result["test"]])
    for name, key in COSTS.items():
        line |= mean_and_spread(name, [result["cost"][key] for result in results])
    line |= mean_and_spread("peak MiB", [result["cost"]["peak memory"] / 2**20 for result in results])
    rates = [result["cost"]["pictures"] / result["cost"]["seconds"] for result in results if result["cost"]["seconds"]]
    return line | mean_and_spread("pictures per second", rates)


def write_comparison(
    folder: Path, config: CompareConfig, found: Mapping[str, list[Run]], failed: Mapping[str, int]
) -> None:
    """Writes results.json and report.html, and prints where they are."""
    run = Run(folder)
    if not found:
        console.print("no run is finished: there is nothing to report")
        return
    lines = {spec: measured(runs) for spec, runs in found.items()}
    run.save_json("environment.json", environment())
    run.save_json("results.json", {"methods": lines, "failed": dict(failed)})
    worth = [name for name in WORTH if any(name in line for line in lines.values())]
    cost = ["seconds", "steps", "parameters", "pictures per second", "peak MiB"]
    tables = [
        Table(("", *names), [(spec, *(cell(line, name) for name in names)) for spec, line in lines.items()])
        for names in (worth, cost)
    ]
    curves = {spec: _curve(runs[0], "test/knn") for spec, runs in found.items()}
    curves = {spec: points for spec, points in curves.items() if points[0]}
    figures = []
    if curves:
        first = next(iter(curves.values()))
        last = max(points[0][-1] for points in curves.values())
        random = {"random weights": ([0.0, last], [first[1][0]] * 2)}
        figures.append(Figure(save_figure(run, "knn", curve_figure(curves | random, "epoch", "kNN accuracy, test")),
                              "Test pictures that neighbours name right, first seed."))  # fmt: skip
        shown: dict[str, dict[str, float]] = {
            spec: {name: line[name] for name in ("kNN", "linear probe") if name in line} for spec, line in lines.items()
        }
        if len({tuple(bars) for bars in shown.values()}) == 1:
            figures.append(Figure(save_figure(run, "methods", bar_figure(shown, "accuracy")), "Test pictures."))
    ranks = {spec: _curve(runs[0], "test/effective_rank") for spec, runs in found.items()}
    figures.append(Figure(save_figure(run, "rank", curve_figure(ranks, "epoch", "effective rank")),
                          "How many dimensions the features use; near 1 they have collapsed."))  # fmt: skip
    note = f"Every method saw the same pictures as often, with {seeds_text(config.comparison)}. "
    note += "What follows a colon is changed."
    if config.comparison.seeds == 1:
        note += " One run of each says little about small differences: see --seeds."
    sections = [
        asked_section(config),
        Section("Methods", [Text(note), *tables, *figures]),
        *([Section("What each change does", [effects_table(lines)])] if effects_of(lines) else []),
    ]
    if failed:
        sections.append(Section("Failed", [Table(("run", "exit code"), list(failed.items()))]))
    ranked = {spec: line["kNN"] for spec, line in lines.items() if "kNN" in line}
    best = max(ranked, key=lambda spec: ranked[spec]) if ranked else None
    summary = f"{best} has the best neighbours: {ranked[best]:.1%} right." if best else "No classes to ask for."
    path = write_report(run, "Pre-training compared", summary, sections)
    for spec, line in lines.items():
        print(f"{spec}: " + ", ".join(f"{name} {figure_text(line[name])}" for name in worth if name in line))
    print(f"report: {path}")


def effects_of(lines: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, float, float, float]]:
    """Each entry with options beside its method without: names, kNN of both and their difference."""
    found = []
    for spec, line in lines.items():
        method = spec.split(":")[0]
        if spec != method and method in lines and "kNN" in line and "kNN" in lines[method]:
            changed, usual = line["kNN"], lines[method]["kNN"]
            found.append((spec, method, changed, usual, changed - usual))
    return found


def effects_table(lines: Mapping[str, Mapping[str, Any]]) -> Table:
    """What `effects_of` found."""
    rows = [(spec, changed, usual, f"{change:+.3f}") for spec, _, changed, usual, change in effects_of(lines)]
    return Table(("with", "kNN", "without", "difference"), rows)


def _curve(run: Run, key: str) -> tuple[list[float], list[float]]:
    """Epochs and values of an evaluation."""
    timed = [line for line in run.lines("metrics.jsonl") if "epoch" in line]
    each = timed[-1]["step"] / timed[-1]["epoch"] if timed else 1.0
    points = [line for line in run.lines("metrics.jsonl") if key in line]
    return [line["step"] / each for line in points], [line[key] for line in points]
