"""The results of a comparison's runs: read from their directories, put in order, and judged by a stated rule."""

import csv
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from labs_common.comparing import within_one_error
from labs_common.run import Run
from vit_transfer.catalogue import CATALOGUE, TRANSFORMERS, family

CNN, TRANSFORMER, OTHER = "CNN", "transformer", "other"
KINDS = {"tiny-vit": TRANSFORMER, "tiny-cnn": CNN}
PAPER = Path(__file__).with_name("paper_table.csv")


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
        of = family(self.model)
        return KINDS.get(self.model, OTHER) if of is None else TRANSFORMER if of in TRANSFORMERS else CNN

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
        """A cost by seed."""
        return [result["cost"][name] for result in self.results.values()]


def gathered(folder: Path, paths: Mapping[str, str], seeds: Iterable[int]) -> dict[str, Entry]:
    """Reads what is finished; `paths` are the runs' directories by the entries' names."""
    entries = {}
    seeds = list(seeds)
    for name, path in paths.items():
        runs = {seed: Run(folder / path / f"seed-{seed}") for seed in seeds}
        done = {seed: run for seed, run in runs.items() if (run.path / "results.json").exists()}
        if not done:
            continue
        first = next(iter(done.values()))
        lines = [line for line in first.lines("metrics.jsonl") if "validation/accuracy" in line]
        results = {seed: run.load_json("results.json") for seed, run in done.items()}
        epoch = results[next(iter(done))]["cost"]["steps"] / results[next(iter(done))]["config"]["training"]["epochs"]
        right = {}
        for seed, run in done.items():
            found = run.load_json("predictions.json")
            right[seed] = np.equal(found["said"], found["labels"])
        curve = [(line["step"] / epoch, line["validation/accuracy"]) for line in lines]
        entries[name] = Entry(name, results, right, curve)
    return entries


def within_noise(best: Entry, other: Entry) -> bool:
    """Whether `other` is no more than one standard error worse than `best`, on the same pictures of the same seeds."""
    there = best.right.keys() & other.right.keys()
    if best is other or not there:
        return best is other
    differences = np.concatenate([best.right[seed].astype(int) - other.right[seed] for seed in sorted(there)])
    return within_one_error(differences.tolist())


def recommended(entries: Mapping[str, Entry]) -> tuple[Entry, list[Entry]]:
    """The entry with the fewest trained parameters among those within noise of the best, and all of those."""
    best = max(entries.values(), key=lambda entry: entry.accuracy)
    equal = [entry for entry in entries.values() if within_noise(best, entry)]
    return min(equal, key=lambda entry: entry.cost("trainable")[0]), equal


def best_of_kind(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """The most accurate CNN and the most accurate transformer of those that start from pre-trained weights.

    If none does, of all.
    """
    chosen = [entry for entry in entries.values() if "random" not in entry.trained] or [*entries.values()]
    kinds = {kind: [entry for entry in chosen if entry.kind == kind] for kind in (CNN, TRANSFORMER)}
    return {kind: max(found, key=lambda entry: entry.accuracy) for kind, found in kinds.items() if found}


def hard_pictures(entries: Mapping[str, Entry], seed: int) -> np.ndarray:
    """Places of the test pictures that no entry gets right with this seed."""
    there = [entry.right[seed] for entry in entries.values() if seed in entry.right]
    return np.flatnonzero(~np.logical_or.reduce(there)) if there else np.array([], dtype=int)


@dataclass(frozen=True)
class Printed:
    """What the paper reports of a network: `accuracy` in per cent, None where it is not on file."""

    network: str
    family: str
    accuracy: float | None
    source: str


def paper_table(file: Path = PAPER) -> list[Printed]:
    """The reference table, in its order.

    Raises:
        ValueError: a network is not in the catalogue, or an accuracy is no percentage or has no source.
    """
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    rows = []
    for row in csv.DictReader(lines):
        accuracy = float(row["accuracy"]) if row["accuracy"] else None
        if row["network"] not in CATALOGUE.get(row["family"], ()):
            raise ValueError(f"{file}: {row['network']} is not in the catalogue as a {row['family']}")
        if accuracy is not None and not (0 <= accuracy <= 100 and row["source"]):
            raise ValueError(f"{file}: {row['network']}: an accuracy is a percentage and has a source")
        rows.append(Printed(row["network"], row["family"], accuracy, row["source"]))
    return rows


def order(entries: Sequence[Entry]) -> list[Entry]:
    """The most accurate first."""
    return sorted(entries, key=lambda entry: -entry.accuracy)
