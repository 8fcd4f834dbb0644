"""Collects what the runs of a comparison left: results by entry and seed, means and spreads, rules of judgement."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from labs_common.checkpoint import checkpoints
from labs_common.compare.plan import slug
from labs_common.errors import LabError, json_of
from labs_common.run import Run

OLD_COSTS = {"trainable": "trained"}  # as some labs called it before version 0.2


@dataclass(frozen=True)
class Entry:
    """One of the things that are compared, over all seeds whose run finished.

    Attributes:
        name: as the command line names it.
        runs: by seed.
        results: results.json by seed.
    """

    name: str
    runs: dict[int, Run]
    results: dict[int, dict[str, Any]]

    @property
    def run(self) -> Run:
        """The first seed's run."""
        return next(iter(self.runs.values()))

    @property
    def first(self) -> dict[str, Any]:
        """The first seed's results."""
        return next(iter(self.results.values()))

    def values(self, *path: str) -> list[float]:
        """Reads a number of results.json by seed, such as ("test", "accuracy"); seeds that lack it are left out."""
        found = []
        for value in self.results.values():
            here: Any = value
            for key in path:
                here = here.get(key) if isinstance(here, Mapping) else None
            if here is not None:
                found.append(here)
        return found

    def mean(self, *path: str) -> float:
        """Averages a number of results.json over the seeds."""
        return statistics.fmean(self.values(*path))

    def cost(self, name: str, scale: float = 1) -> list[float]:
        """Reads a cost by seed, in units of `scale`."""
        found = self.values("cost", name) or self.values("cost", OLD_COSTS.get(name, name))
        return [value / scale for value in found]

    def read(self, file: str) -> dict[int, Any]:
        """Reads a further JSON file of the runs, by seed."""
        return {seed: run.load_json(file) for seed, run in self.runs.items()}

    def curve(self, key: str) -> tuple[list[int], list[float]]:
        """Reads a metric of the first seed from metrics.jsonl: optimizer steps and values."""
        return self.run.curve(key)

    def epochs(self, key: str) -> tuple[list[float], list[float]]:
        """Reads the same with epochs in place of steps."""
        timed = [line for line in self.run.lines("metrics.jsonl") if "epoch" in line]
        length = timed[-1]["step"] / timed[-1]["epoch"] if timed else 1.0
        steps, values = self.curve(key)
        return [step / length for step in steps], values


# Gives a number by seed; an entry without it gives none.
Measure = Callable[[Entry], list[float]]


def cost_measures(unit: str, *more: tuple[str, str]) -> dict[str, Measure]:
    """Names the costs of runs that count `unit`s as tables do; `more`, each a name and a key, follow the seconds."""
    seconds = ("training seconds", "seconds"), *more, (f"{unit}/s", f"{unit} per second")
    plain = ("trained parameters", "trainable"), ("all parameters", "parameters"), *seconds
    measures: dict[str, Measure] = {name: partial(Entry.cost, name=key) for name, key in plain}
    kinds = ("peak", "memory"), ("cache", "bytes"), ("optimizer", "bytes")
    return measures | {f"{kind} MiB": partial(Entry.cost, name=f"{kind} {rest}", scale=2**20) for kind, rest in kinds}


def collect(folder: Path, names: Iterable[str], seeds: Iterable[int]) -> dict[str, Entry]:
    """Reads the finished runs of a comparison in `folder`; entries without one are left out."""
    entries = {}
    seeds = list(seeds)
    for name in names:
        runs = {seed: Run(folder / slug(name) / f"seed-{seed}") for seed in seeds}
        done = {seed: run for seed, run in runs.items() if (run.path / "results.json").exists()}
        if done:
            entries[name] = Entry(
                name, done, {seed: run.load_json("results.json", "cost") for seed, run in done.items()}
            )
    return entries


def check_same_data(entries: Mapping[str, Entry]) -> None:
    """Makes sure that all runs of a seed had the same data: it may have changed between two of them.

    Raises:
        LabError: it did.
    """
    first: dict[tuple[int, str], tuple[Path, Any]] = {}
    for seed, run in ((seed, run) for entry in entries.values() for seed, run in entry.runs.items()):
        position = next(reversed(checkpoints(run.path / "checkpoints")), run.path) / "position.json"
        said = json_of(position, str(position)) if position.exists() else None
        found = {"pictures": run.load_json("splits.json"), "sum": said.get("data") if isinstance(said, dict) else None}
        for what, data in found.items():
            path, known = first.setdefault((seed, what), (run.path, data)) if data is not None else (run.path, data)
            if data != known:
                raise LabError(f"{run.path}: had other data than {path}: they were changed in between; delete the runs "
                               "of those that you do not want, and start the same command again")  # fmt: skip


def rows_of(what: str, entries: Iterable[Entry], measures: Mapping[str, Measure]) -> list[dict[str, Any]]:
    """Makes a row for each entry, its name under `what`: means over seeds, and under `NAME ±` their spread."""
    rows = []
    for entry in entries:
        row: dict[str, Any] = {what: entry.name}
        for name, measure in measures.items():
            row |= mean_and_spread(name, measure(entry))
        rows.append(row)
    return rows


def recommend(
    entries: Mapping[str, Entry],
    quality: Callable[[Entry], float],
    within_noise: Callable[[Entry, Entry], bool],
    parameters: str,
) -> tuple[Entry, list[Entry]]:
    """Chooses the entry with the fewest trained parameters among those within noise of the best; returns those too.

    `within_noise(best, other)` compares on the same samples; `parameters` names the cost.
    """
    best = max(entries.values(), key=quality)
    equal = [entry for entry in entries.values() if entry is best or within_noise(best, entry)]
    return min(equal, key=lambda entry: entry.cost(parameters)[0]), equal


def pareto(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Returns the names of the Pareto front: no other point (cost, quality) is as good in both and better in one."""
    return [
        name
        for name, (cost, value) in points.items()
        if not any(less <= cost and more >= value and (less, more) != (cost, value) for less, more in points.values())
    ]


def within_one_error(differences: Sequence[float]) -> bool:
    """Says whether a mean difference from the best is at most one standard error (Breiman et al. 1984, 3.4.3).

    `differences` are those of each case, best minus other; at least two.
    """
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.fmean(differences) <= error


def mean_and_spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """Returns {name: mean, "name ±": standard deviation}; without the latter for one value, empty for none."""
    if not values:
        return {}
    found = {name: statistics.fmean(values)}
    return found | ({f"{name} ±": statistics.stdev(values)} if len(values) > 1 else {})


def cell(row: Mapping[str, Any], name: str) -> str | float | None:
    """Formats what `mean_and_spread` put into `row` for a table."""
    if name not in row:
        return None
    if f"{name} ±" in row and row[f"{name} ±"] > 0:
        return f"{figure_text(row[name])} ± {figure_text(row[f'{name} ±'])}"
    value: float = row[name]
    return int(value) if float(value).is_integer() and value >= 100 else value


def figure_text(value: float) -> str:
    """Writes a number with three digits, or with all before the point if those are more."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
