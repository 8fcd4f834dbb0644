"""Writes results.json and the report, with the sections that only this lab has."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from labs_common.cli import to_plain
from labs_common.data import LabelledPictures
from labs_common.progress import console
from labs_common.report import (
    Figure,
    Gallery,
    Section,
    Table,
    Text,
    architecture_figure,
    asked_section,
    bar_figure,
    cost_section,
    curve_figure,
    curves_section,
    rerun_section,
    save_figure,
    trained_section,
    write_report,
)
from labs_common.report.classes import (
    Predictions,
    class_data_section,
    class_sections,
    said_line,
    wilson_interval,
)
from labs_common.run import Run, cost_of, machine_of, seconds_between
from vit_transfer.config import TrainConfig
from vit_transfer.data import Tensors, Transform
from vit_transfer.evaluate import heat_maps, overlaid
from vit_transfer.fitting import Fitted
from vit_transfer.saved import FOLDER, load_model

MAPS = 8  # pictures with a heat-map


def finish_report(
    run: Run,
    config: TrainConfig,
    splits: Mapping[str, LabelledPictures],
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
    results = results_of(run, config, fitted, scored, seconds)
    own = scored["this run"]
    said = {"classes": list(splits["test"].classes), "labels": own.labels.tolist(), "said": own.said.tolist()}
    run.save_json("predictions.json", said)
    run.save_json("results.json", results)
    for name, found in results["test"].items():
        low, high = found["interval"]
        console.print(f"{name}: test accuracy {found['accuracy']:.3f} ({low:.3f} to {high:.3f})")
    print(f"model: {run.path / FOLDER}")
    if not config.run.report:
        return
    cost = cost_section(run, "pictures", seconds)
    cost.blocks.append(Table(("", ""), [(name, value) for name, value in results["cost"].items()]))
    body = [
        asked_section(config),
        class_data_section(splits),
        structure_section(run, fitted),
        _curves(run),
        numbers_section(run, results, compared),
        *more,
        *class_sections(run, splits["test"], own),
        heat_map_section(run, splits["test"], fitted.transform, own),
        cost,
        rerun_section(run),
    ]
    others = ", ".join(f"{name} {found.accuracy:.1%}" for name, found in scored.items() if name != "this run")
    summary = f"Test accuracy {own.accuracy:.1%} with {fitted.structure.trainable:,} trained parameters" + (
        f"; {others}." if others else "."
    )
    path = write_report(run, title, summary, body)
    print(f"report: {path}")


def results_of(
    run: Run,
    config: TrainConfig,
    fitted: Fitted,
    scored: Mapping[str, Predictions],
    by_part: Mapping[str, float],
) -> dict[str, Any]:
    """Gathers what a comparison needs of a run: its config, scores, costs, machine and versions."""
    evaluations = [line for line in run.lines("metrics.jsonl") if "validation/loss" in line]
    # With --patience the run went back to its best weights.
    kept = min(evaluations, key=lambda line: line["validation/loss"]) if config.training.patience else evaluations[-1]
    return {
        "config": to_plain(config),
        "validation": {"loss": kept["validation/loss"], "accuracy": kept["validation/accuracy"]},
        "test": {
            name: {
                "accuracy": found.accuracy,
                "interval": list(wilson_interval(found.accuracy, len(found.labels))),
                "loss": found.loss,
                "pictures": len(found.labels),
            }
            for name, found in scored.items()
        },
        "cost": {
            **cost_of(run, "pictures"),
            "preparation seconds": by_part["prepared"],
            "trainable": fitted.structure.trainable,
            "parameters": fitted.structure.parameters,
            "optimizer bytes": fitted.optimizer_bytes,
            "cache bytes": fitted.cache_bytes,
        },
        "environment": machine_of(run, ("torch", "timm", "accelerate")),
    }


def structure_section(run: Run, fitted: Fitted) -> Section:
    """Shows what trained: the audit's verdict and table, and the network drawn with what is fixed and what trains."""
    section = trained_section(fitted.audit)
    structure = fitted.structure
    drawing = save_figure(run, "architecture", architecture_figure(structure.rows))
    caption = (
        f"{structure.name}, input below: {structure.trainable:,} of {structure.parameters:,} parameters train. The "
        "statistics of a fixed batch normalisation stay fixed too: they are among the verified tensors."
    )
    section.blocks.insert(1, Figure(drawing, caption))
    return section


def numbers_section(run: Run, results: Mapping[str, Any], compared: str) -> Section:
    """Shows the accuracy on the test pictures, beside what it is compared with."""
    rows = [
        (name, found["accuracy"], "{:.3f} to {:.3f}".format(*found["interval"]), found["loss"])
        for name, found in results["test"].items()
    ]
    section = Section("Numbers", [Table(("", "test accuracy", "95 % interval", "test loss"), rows)])
    if len(rows) > 1:
        bars = {name: {"test accuracy": found["accuracy"]} for name, found in results["test"].items()}
        figure = save_figure(run, "baselines", bar_figure(bars, "test accuracy", 1.0))
        section.blocks.append(Figure(figure, compared))
    note = (
        "Measured once, on the network read back from disk and run whole on the test pictures; the interval is "
        "Wilson's score interval."
    )
    section.blocks.append(Text(note))
    return section


def heat_map_section(run: Run, test: LabelledPictures, transform: Transform, found: Predictions) -> Section:
    """Shows heat-maps of the saved network, on test pictures spread over the classes and on the first mistakes."""
    wrong = np.flatnonzero(found.said != found.labels)[: MAPS // 4]
    right = [np.flatnonzero((found.labels == place) & (found.said == place))[:1] for place in range(len(test.classes))]
    places = [int(place) for place in np.concatenate([*right, wrong])[-MAPS:]]
    model = load_model(run.path / FOLDER)
    images = Tensors(test, transform).batch(0, places)
    method, maps = heat_maps(model, images, torch.from_numpy(found.said[places]))
    shown = [
        (overlaid(_seen(test.image(place), transform), heat), said_line(test.classes, found, place))
        for place, heat in zip(places, maps, strict=True)
    ]
    caption = f"Test pictures and, beside each, its map by {method}: bright is what counted for the prediction."
    return Section("Where it looked", [Gallery(shown, caption)])


def _curves(run: Run) -> Section:
    """Adds accuracies, and the numbers of every evaluation, to the curves that every lab shows."""
    section = curves_section(run, ("training/loss", "validation/loss"))
    lines = [line for line in run.lines("metrics.jsonl") if "validation/accuracy" in line]
    epochs = [line["step"] for line in lines]
    accuracies = {name: (epochs, [line[f"{name}/accuracy"] for line in lines]) for name in ("training", "validation")}
    svg = save_figure(run, "accuracy", curve_figure(accuracies, "optimizer step", "accuracy"))
    caption = (
        "Accuracy by epoch: on the training pictures as they were trained on, and on the validation pictures after it."
    )
    section.blocks.insert(0, Figure(svg, caption))
    keys = ("step", "training/loss", "training/accuracy", "validation/loss", "validation/accuracy")
    rows = [tuple(line[key] for key in keys) for line in lines]
    columns = tuple(key.replace("/", " ") for key in keys)
    section.blocks.append(Table(columns, rows, "every evaluation", folded=True))
    return section


def _seen(image: Image.Image, transform: Transform) -> Image.Image:
    """Cuts out the picture's middle square, which is what the network sees."""
    levels = dataclasses.replace(transform, size=min(image.size)).levels(image, 0, 0)
    return Image.fromarray(levels.transpose(1, 2, 0))
