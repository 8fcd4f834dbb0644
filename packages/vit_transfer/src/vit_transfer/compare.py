"""Several networks under one budget, and one report: `python -m vit_transfer.compare --models resnet50,deit_…`."""

from vit_transfer import commands

if __name__ == "__main__":  # before the imports below: --help and a wrong option answer at once
    commands.compare()

import dataclasses
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np

from labs_common.cli import parse
from labs_common.compare.collect import Entry, Measure, cost_measures, recommend, rows_of, within_one_error
from labs_common.compare.plan import comparison_folder, plan_runs, seeds_text
from labs_common.compare.processes import compare_runs, start_server
from labs_common.compare.report import (
    Findings,
    budget_section,
    curves_of,
    notes_on,
    pareto_section,
    recommendation_section,
    table_of,
)
from labs_common.data.classes import LabelledPictures
from labs_common.report.classes import wilson_interval
from labs_common.report.figures import bar_figure
from labs_common.report.page import Figure, Gallery, Section, Table, Text, save_figure
from labs_common.run import Run
from vit_transfer.catalogue import CNN, FAMILIES, TRANSFORMER, family
from vit_transfer.config import TINY, CompareConfig, ComparedOptions, ModelOptions, TrainConfig, complete
from vit_transfer.data import read_splits
from vit_transfer.report import beside_the_paper, ours_of
from vit_transfer.tiny import RECIPES, tiny_model
from vit_transfer.train import check_network

HARD = 12  # pictures that defeat every network, in the report
COSTS = cost_measures("pictures", ("front seconds", "preparation seconds"))
MEASURES: dict[str, Measure] = {
    "test accuracy": lambda entry: entry.values("test", "this run", "accuracy"),
    "validation loss": lambda entry: entry.values("validation", "loss"),
    **COSTS,
}


def compare(config: CompareConfig) -> None:
    """Plans the runs, does those that are missing, and writes the report."""
    planned = plan(config)
    folder = comparison_folder("compare-networks", config, [config.data.data])
    start_server(config.comparison.launch, ["vit_transfer.train"])
    splits = read_splits(config.data, config.comparison.seed, shown=True)
    for run in planned.values():
        check_network(run.model, len(splits["train"].classes), run.cache.cache)
        if run.model.model in TINY and run.model.pretrained:
            tiny_model(run.model.model, 2, pretrained=True)  # here, so that no run's memory is that of making it
    compare_runs(folder, config, "vit_transfer.train", planned, partial(findings, config, splits["test"]))


def plan(config: CompareConfig) -> dict[str, TrainConfig]:
    """Makes the run of each entry of --models: a network, and options of it after colons (`resnet50:unfreeze=head`).

    Raises:
        LabError: the comparison cannot start, or there is no such option, or its value is wrong.
    """
    shared = [f"--head={config.head}", f"--head-width={config.head_width}", f"--image-size={config.image_size}"]

    def run_of(name: str, flags: list[str]) -> TrainConfig:
        found = parse(ComparedOptions, "--models", [f"--model={name}", *shared, *flags])
        options = {field.name: getattr(found, field.name) for field in dataclasses.fields(ModelOptions)}
        rate = found.learning_rate or config.training.learning_rate
        training = dataclasses.replace(config.training, learning_rate=rate)
        chosen = TrainConfig(ModelOptions(**options), config.data, config.cache, training, recipe=config.recipe)
        return complete(dataclasses.replace(chosen, baselines="no"))

    return plan_runs(config.comparison, "--models", config.models, "network", run_of)


def findings(
    config: CompareConfig, test: LabelledPictures, run: Run, entries: Mapping[str, Entry], failed: Mapping[str, int]
) -> Findings:
    """Makes the table, the most accurate first, and the sections of the report."""
    ordered = sorted(entries.values(), key=lambda entry: -accuracy(entry))
    best, equal = recommended(entries)
    rows = [
        {
            "network": row["network"],
            "family": family(model_of(entry)),
            "kind": kind(entry),
            "trains": trained(entry),
            "learning rate": entry.first["config"]["training"]["learning_rate"],
        }
        | row
        for entry, row in zip(ordered, rows_of("network", ordered, MEASURES), strict=True)
    ]
    kinds = " and ".join(
        f"{entry.name} ({kind}) {accuracy(entry):.1%}" for kind, entry in best_of_kind(entries).items()
    )
    summary = (
        f"{len(entries)} networks, {seeds_text(config.comparison)} each. Test accuracy: {kinds}. "
        f"Recommended by the rule below: {best.name}."
    )
    against = {
        "trained parameters": (COSTS["trained parameters"], True),
        "all parameters": (COSTS["all parameters"], True),
        "training seconds": (COSTS["training seconds"], False),
        "peak memory, MiB": (COSTS["peak MiB"], False),
    }
    curves = {name: entry.epochs("validation/accuracy") for name, entry in entries.items()}
    caption = "Accuracy on the validation pictures by epoch; first seed."
    sections = [
        recommendation_section("network", ordered[0], best, equal, accuracy, "test accuracy", "pictures", "trainable"),
        numbers_section(run, rows, entries, len(test), config, failed),
        kinds_section(entries),
        paper_section(entries.values(), config.data.data),
        pareto_section(run, entries, accuracy, "test accuracy", against),
        Section("Curves", [curves_of(run, curves, "epoch", "validation accuracy", caption)]),
        pictures_section(entries.values(), test, config.comparison.seed),
        budget_section("network", entries, "pictures",
                       f"Each network had the same pictures, order and epochs; {len(test)} test pictures."),
    ]  # fmt: skip
    return Findings(
        "CNNs beside transformers", summary, rows, sections, ("test accuracy", "training seconds"), best.name
    )


def accuracy(entry: Entry) -> float:
    """Averages the test accuracy over the seeds."""
    return entry.mean("test", "this run", "accuracy")


def model_of(entry: Entry) -> str:
    """Returns the network's name."""
    return str(entry.first["config"]["model"]["model"])


def kind(entry: Entry) -> str:
    """Returns CNN, transformer, or other for a network that the catalogue does not know."""
    name = model_of(entry)
    known = family(name)
    return FAMILIES[known].kind if known else RECIPES.get(name, {"kind": "other"})["kind"]


def trained(entry: Entry) -> str:
    """Says in words what of the network was trained."""
    model = entry.first["config"]["model"]
    start = "" if model["pretrained"] or model["weights"] else ", from random weights"
    return {"block": "last block", "head": "head", "all": "everything"}[model["unfreeze"]] + start


def right(entry: Entry) -> dict[int, np.ndarray]:
    """Reads by seed which test pictures were right (pictures,)."""
    return {seed: np.equal(found["said"], found["labels"]) for seed, found in entry.read("predictions.json").items()}


def within_noise(best: Entry, other: Entry) -> bool:
    """Tells whether `other` is at most one standard error worse than `best`, on the same pictures of the same seeds."""
    ours, theirs = right(best), right(other)
    there = sorted(ours.keys() & theirs.keys())
    if best is other or not there:
        return best is other
    return within_one_error(np.concatenate([ours[seed].astype(int) - theirs[seed] for seed in there]).tolist())


def recommended(entries: Mapping[str, Entry]) -> tuple[Entry, list[Entry]]:
    """Picks the entry with the fewest trained parameters among those within noise of the best; and all of those."""
    return recommend(entries, accuracy, within_noise, "trainable")


def best_of_kind(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Picks the most accurate CNN and the most accurate transformer of those that start from pre-trained weights.

    If none does, of all.
    """
    chosen = [entry for entry in entries.values() if "random" not in trained(entry)] or [*entries.values()]
    kinds = {name: [entry for entry in chosen if kind(entry) == name] for name in (CNN, TRANSFORMER)}
    return {name: max(found, key=accuracy) for name, found in kinds.items() if found}


def hard_pictures(entries: Iterable[Entry], seed: int) -> np.ndarray:
    """Finds the places of the test pictures that no entry gets right with this seed."""
    there = [marks[seed] for marks in map(right, entries) if seed in marks]
    return np.flatnonzero(~np.logical_or.reduce(there)) if there else np.array([], dtype=int)


def numbers_section(
    run: Run,
    rows: list[dict[str, Any]],
    entries: Mapping[str, Entry],
    pictures: int,
    config: CompareConfig,
    failed: Mapping[str, int],
) -> Section:
    """Shows the table, and the accuracies as bars."""
    shown = []
    for row in rows:
        count = pictures * len(entries[row["network"]].runs)
        interval = "{:.3f} to {:.3f}".format(*wilson_interval(row["test accuracy"], count))
        shown.append(row | {"95 % interval": interval, "learning rate": f"{row['learning rate']:g}"})
    bars = {row["network"]: {"test accuracy": row["test accuracy"]} for row in rows}
    columns = ("network", "kind", "trains", "test accuracy", "95 % interval", "learning rate")
    note = (
        "Front seconds: computing the output of the frozen layers for every picture, once, or reading it where an "
        "earlier run had kept it. Peak memory is of the whole process, libraries included, on a CPU."
    )
    blocks: list[Any] = [
        table_of(shown, columns),
        Figure(save_figure(run, "accuracy", bar_figure(bars, "test accuracy", 1.0)), "Test accuracy."),
        Text("Each network is read back from disk and run whole on the test pictures."),
        table_of(rows, ("network", *COSTS)),
        Text(note),
        *notes_on(config.comparison, failed),
    ]
    return Section("Numbers", blocks)


def kinds_section(entries: Mapping[str, Entry]) -> Section:
    """Shows the best CNN beside the best transformer, and whether the difference is more than noise."""
    best = best_of_kind(entries)
    if len(best) < 2:
        return Section("CNNs beside transformers", [Text("The comparison has networks of one kind only.")])
    rows = []
    for name, entry in best.items():
        free, whole = (int(entry.cost(what)[0]) for what in ("trainable", "parameters"))
        rows.append((name, entry.name, trained(entry), accuracy(entry), free, whole, entry.mean("cost", "seconds")))
    ahead, behind = sorted(best.values(), key=lambda entry: -accuracy(entry))
    sure = "within one standard error: a tie" if within_noise(ahead, behind) else "more than one standard error"
    share = ahead.cost("parameters")[0] / behind.cost("parameters")[0]
    text = (
        f"The {kind(ahead)} is ahead by {accuracy(ahead) - accuracy(behind):.1%}, {sure} on the same pictures; it has "
        f"{share:.2f} times the other's parameters. The paper (arXiv 2110.05270) found transformers ahead of CNNs, "
        "some with about a quarter of the parameters."
    )
    columns = ("", "network", "trains", "test accuracy", "trained parameters", "all parameters", "training seconds")
    return Section("CNNs beside transformers", [Table(columns, rows, "The best of each kind."), Text(text)])


def paper_section(entries: Iterable[Entry], data: str | None) -> Section:
    """Shows the paper's results beside those of the same networks, first seed."""
    ours = [
        ours_of(
            entry.run, model_of(entry), int(entry.cost("trainable")[0]), entry.first["test"]["this run"]["accuracy"]
        )
        for entry in entries
        if trained(entry) == "last block"
    ]
    return beside_the_paper(ours, data)


def pictures_section(entries: Iterable[Entry], test: LabelledPictures, seed: int) -> Section:
    """Shows the test pictures that defeat every network."""
    hard = hard_pictures(entries, seed)
    text = f"{len(hard)} of {len(test)} test pictures are wrong with every network, first seed."
    shown = [(test.image(int(place)), test.classes[test.labels[place]]) for place in hard[:HARD]]
    return Section("Hard for all", [Gallery(shown, f"{text} The line is the true class.") if shown else Text(text)])
