"""Writes results.json and the report of a training, with the sections that only this lab has."""

import csv
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from labs_common.data.classes import LabelledPictures
from labs_common.fitting import Fitted, results_of, write_results
from labs_common.options import TrainingOptions
from labs_common.progress import console
from labs_common.report.classes import Predictions, class_data_section, class_sections, said_line, wilson_interval
from labs_common.report.figures import bar_figure, curve_figure
from labs_common.report.page import Figure, Gallery, Section, Table, Text, save_figure
from labs_common.report.sections import (
    asked_section,
    cost_section,
    curves_section,
    drawn_section,
    evaluations_table,
    rerun_section,
    structure_of,
)
from labs_common.run import Run, seconds_between
from vit_transfer.config import TrainConfig
from vit_transfer.data import Splits, Tensors, Transform, saved_transform
from vit_transfer.evaluate import heat_maps, overlaid
from vit_transfer.model import unfreeze
from vit_transfer.saved import FOLDER, load_model

MAPS = 8  # pictures with a heat-map
PAPER = Path(__file__).with_name("paper_table.csv")


def finish_report(
    run: Run,
    config: TrainConfig,
    splits: Splits,
    fitted: Fitted,
    scored: Mapping[str, Predictions],
    clock: Mapping[str, float],
    title: str,
    compared: str,
    more: Sequence[Section] = (),
) -> None:
    """Writes results.json and the report, prints the main numbers and where the report is.

    `scored` are the predictions on the test pictures, of this run first and then of what it is compared with, which
    `compared` says in words; `more` are sections that follow the numbers.
    """
    seconds = seconds_between(clock)
    results = results_of(run, config, fitted, "pictures", seconds["prepared"])
    results |= {"validation": kept_scores(run, config.training), "test": test_scores(scored)}
    own, test = scored["this run"], splits["test"]
    run.save_json(
        "predictions.json", {"classes": list(test.classes), "labels": own.labels.tolist(), "said": own.said.tolist()}
    )
    for name, found in results["test"].items():
        low, high = found["interval"]
        console.print(f"{name}: test accuracy {found['accuracy']:.3f} ({low:.3f} to {high:.3f})")
    print(f"model: {run.path / FOLDER}")

    def page() -> tuple[str, list[Section]]:
        network = load_model(run.path / FOLDER)
        ours = ours_of(run, config.model.model, fitted.trained, own.accuracy)
        known = config.model.unfreeze == "block" and ours["network"] in {row.network for row in paper_table()}
        paper = [beside_the_paper([ours], config.data.data)] if known or config.recipe == "paper" else []
        cost = cost_section(run, "pictures", seconds)
        cost.blocks.append(Table(("", ""), [*results["cost"].items()]))
        sections = [
            asked_section(config),
            class_data_section(splits),
            structure_section(run, config, fitted, network),
            _curves(run),
            numbers_section(run, results["test"], compared),
            *paper,
            *more,
            *class_sections(run, test, own),
            heat_map_section(network, test, own),
            cost,
            rerun_section(run),
        ]
        others = ", ".join(f"{name} {found.accuracy:.1%}" for name, found in scored.items() if name != "this run")
        summary = f"Test accuracy {own.accuracy:.1%} with {fitted.trained:,} trained parameters"
        return f"{summary}; {others}." if others else f"{summary}.", sections

    write_results(run, results, config.run.report, title, page)


def kept_scores(run: Run, options: TrainingOptions) -> dict[str, float]:
    """Finds loss and accuracy of the weights that were saved: with --patience the first best ones, else the last."""
    evaluations = [line for line in run.lines("metrics.jsonl") if "validation/loss" in line]
    name, sign = ("accuracy", -1) if options.schedule == "plateau" else ("loss", 1)  # what `fit` watches
    kept = min(evaluations, key=lambda line: sign * line[f"validation/{name}"]) if options.patience else evaluations[-1]
    return {name: kept[f"validation/{name}"] for name in ("loss", "accuracy")}


def test_scores(scored: Mapping[str, Predictions]) -> dict[str, dict[str, Any]]:
    """Measures predictions on the test pictures."""
    return {
        name: {
            "accuracy": found.accuracy,
            "interval": list(wilson_interval(found.accuracy, len(found.labels))),
            "loss": found.loss,
            "pictures": len(found.labels),
        }
        for name, found in scored.items()
    }


def structure_section(run: Run, config: TrainConfig, fitted: Fitted, network: torch.nn.Module) -> Section:
    """Shows what trained: the audit's verdict and table, and the saved network drawn with its fixed and free parts."""
    unfreeze(network, config.model.unfreeze, config.model.block)
    structure = structure_of(network)
    caption = (
        f"{structure.name}, input below: {fitted.trained:,} of {fitted.parameters:,} parameters train. The "
        "statistics of a fixed batch normalisation stay fixed too: they are among the verified tensors."
    )
    return drawn_section(run, fitted.audit, structure.rows, caption)


def numbers_section(run: Run, scores: Mapping[str, Mapping[str, Any]], compared: str) -> Section:
    """Shows the accuracy on the test pictures, beside what it is compared with."""
    rows = [
        (name, found["accuracy"], "{:.3f} to {:.3f}".format(*found["interval"]), found["loss"])
        for name, found in scores.items()
    ]
    section = Section("Numbers", [Table(("", "test accuracy", "95 % interval", "test loss"), rows)])
    if len(rows) > 1:
        bars = {name: {"test accuracy": found["accuracy"]} for name, found in scores.items()}
        figure = save_figure(run, "baselines", bar_figure(bars, "test accuracy", 1.0))
        section.blocks.append(Figure(figure, compared))
    note = (
        "Measured once, on the network read back from disk and run whole on the test pictures; the interval is "
        "Wilson's score interval."
    )
    section.blocks.append(Text(note))
    return section


@dataclass(frozen=True)
class Printed:
    """A row of the paper's Table 1.

    Attributes:
        network: timm's name; `paper` is the paper's.
        trainable: parameters, as printed; `more` is what the same recipe trains beyond that here, for this `reason`.
        accuracy: in per cent, the maximum over epochs on CIFAR-10's test set.
    """

    network: str
    family: str
    paper: str
    trainable: int
    more: int
    reason: str
    accuracy: float


def paper_table(file: Path = PAPER) -> list[Printed]:
    """Reads the reference table, in its order."""
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return [
        Printed(row["network"], row["family"], row["paper"], int(row["trainable"]), int(row["more"]), row["reason"],
                float(row["accuracy"]))
        for row in csv.DictReader(lines)
    ]  # fmt: skip


def ours_of(run: Run, model: str, trainable: int, test: float) -> dict[str, Any]:
    """Gathers what stands beside the paper's row: of validation the best and the last epoch, accuracies in per cent."""
    accuracies, losses = (run.curve(f"validation/{name}")[1] for name in ("accuracy", "loss"))
    name = model.removeprefix("timm/").split(".")[0]
    return {"network": name, "trainable here": trainable, "maximum, %": 100 * max(accuracies),
            "last epoch, %": 100 * accuracies[-1], "its loss": losses[-1], "test, %": 100 * test}  # fmt: skip


def beside_the_paper(ours: Sequence[Mapping[str, Any]], data: str | None) -> Section:
    """Shows rows of `ours_of` beside the paper's of the same network, and the paper's whole table."""
    printed = {row.network: row for row in paper_table()}
    rows = []
    for own in ours:
        of = printed.get(own["network"])
        rows.append((own["network"], of and f"{of.accuracy:.3f}", of and of.trainable, *[*own.values()][1:]))
    columns = ("network", "paper, %", "trainable there", *ours[0]) if ours else ()
    text = (
        "arXiv 2110.05270, Table 1: one trainable block on CIFAR-10. The paper's figure is the maximum over epochs on "
        "the test set, which was its validation set; here maximum and last epoch are of validation pictures that were "
        f"set aside, and the test is measured once. Here on {data or 'drawn scenes, which are other data'}."
    )
    blocks: list[Any] = [Text(text)]
    if rows:
        blocks.append(Table([name for place, name in enumerate(columns) if place != 3], rows))
    whole = [
        (row.family, row.paper, row.network, f"{row.accuracy:.3f}", row.trainable, row.trainable + row.more, row.reason)
        for row in printed.values()
    ]
    names = ("family", "paper's name", "network", "paper, %", "trainable there", "trainable here", "why they differ")
    blocks.append(Table(names, whole, "the whole table, by --recipe paper", folded=True))
    return Section("Beside the paper", blocks)


def heat_map_section(network: Any, test: LabelledPictures, found: Predictions) -> Section:
    """Shows heat-maps of the saved network, on test pictures spread over the classes and on the first mistakes."""
    wrong = np.flatnonzero(found.said != found.labels)[: MAPS // 4]
    right = [np.flatnonzero((found.labels == place) & (found.said == place))[:1] for place in range(len(test.classes))]
    places = [int(place) for place in np.concatenate([*right, wrong])[-MAPS:]]
    transform = saved_transform(network)
    images = Tensors(test, transform).batch(0, places)
    method, maps = heat_maps(network, images, torch.from_numpy(found.said[places]))
    shown = [
        (overlaid(_seen(test.image(place), transform), heat), said_line(test.classes, found, place))
        for place, heat in zip(places, maps, strict=True)
    ]
    caption = f"Test pictures and, beside each, its map by {method}: bright is what counted for the prediction."
    return Section("Where it looked", [Gallery(shown, caption)])


def _curves(run: Run) -> Section:
    """Adds accuracies, and the numbers of every evaluation, to the curves that every lab shows."""
    section = curves_section(run, ("training/loss", "validation/loss"))
    accuracies = {name: run.curve(f"{name}/accuracy") for name in ("training", "validation")}
    svg = save_figure(run, "accuracy", curve_figure(accuracies, "optimizer step", "accuracy"))
    caption = (
        "Accuracy by epoch: on the training pictures as they were trained on, and on the validation pictures after it."
    )
    section.blocks.insert(0, Figure(svg, caption))
    keys = ("training/loss", "training/accuracy", "validation/loss", "validation/accuracy")
    section.blocks.append(evaluations_table(run, keys))
    return section


def _seen(image: Image.Image, transform: Transform) -> Image.Image:
    """Cuts out the picture's middle square, which is what the network sees."""
    levels = dataclasses.replace(transform, size=min(image.size)).levels(image, 0, 0)
    return Image.fromarray(levels.transpose(1, 2, 0))  # (height, width, 3)
