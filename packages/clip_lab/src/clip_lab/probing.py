"""The few-shot curve, and what a probe leaves behind."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from clip_lab.classes import Features
from clip_lab.command_config import ProbeConfig
from clip_lab.encoder import Encoder
from clip_lab.published import MEASURED, PROBED, REFERENCE
from labs_common.cli import to_plain
from labs_common.data import LabelledPictures
from labs_common.freezing import FrozenAudit
from labs_common.logistic import COARSE, Layer, fitted_layers
from labs_common.progress import console, tracked
from labs_common.report import (
    Figure,
    Section,
    Table,
    Text,
    asked_section,
    curve_figure,
    rerun_section,
    save_figure,
    trained_section,
    write_report,
)
from labs_common.report.classes import Predictions, class_data_section, class_sections, wilson_interval
from labs_common.run import Run


def few_shot_curve(
    config: ProbeConfig, features: dict[str, Features], classes: int, device: torch.device, counts: Sequence[int],
    penalty: float,
) -> dict[str, list[float]]:  # fmt: skip
    """Test accuracies by training pictures per class, one for each draw; the penalty is found for each count anew.

    With all pictures it is that of the probe itself.
    """
    test, validation = features["test"].to(device), features["validation"].to(device)
    found: dict[str, list[float]] = {}
    for count in tracked(counts, "few-shot curve", len(counts)):
        name, draws = str(count or "all"), range(config.draws if count else 1)
        for draw in draws:
            chosen = features["train"].few(count, config.seed + draw) if count else features["train"]
            train = chosen.to(device)
            penalties = COARSE if count else (penalty,)
            layers = fitted_layers(*train, classes, penalties)
            right = [accuracy(layer, validation) for layer in layers]
            found.setdefault(name, []).append(accuracy(layers[int(np.argmax(right))], test))
    return found


def accuracy(layer: Layer, data: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Share of pictures whose most probable class is theirs."""
    return float((layer.logits(data[0]).argmax(1) == data[1]).double().mean())


def finish_probe(
    run: Run,
    config: ProbeConfig,
    encoder: Encoder,
    splits: Mapping[str, LabelledPictures],
    audit: FrozenAudit,
    layer: Layer,
    found: Predictions,
    penalty: float,
    tried: Mapping[float, float],
    curve: Mapping[str, Sequence[float]],
) -> None:
    """Writes layer.safetensors, results.json and the report, and prints the main numbers."""
    save_file({"weight": layer.weight.cpu().contiguous(), "bias": layer.bias.cpu().contiguous()},
              run.path / "layer.safetensors")  # fmt: skip
    interval = wilson_interval(found.accuracy, len(found.labels))
    run.save_json("results.json", {
        "config": to_plain(config), "checkpoint": encoder.name, "accuracy": found.accuracy, "interval": interval,
        "loss": found.loss, "penalty": penalty, "tried": {f"{key:.6g}": value for key, value in tried.items()},
        "few-shot": {name: list(values) for name, values in curve.items()}, "pictures": len(found.labels),
    })  # fmt: skip
    low, high = interval
    said = f"test accuracy {found.accuracy:.4f} ({low:.4f} to {high:.4f}) on {len(found.labels):,} pictures"
    console.print(f"{encoder.name}: {said}")
    numbers: list[Any] = [
        Table(("", "test accuracy", "95 % interval", "test loss"),
              [(encoder.name, found.accuracy, f"{low:.3f} to {high:.3f}", found.loss)]),
        Text(f"One layer on --features {config.features}, by --solver {config.solver}, penalty {penalty:.3g}; measured "
             "once. The interval is Wilson's score interval."),
    ]  # fmt: skip
    sections = [
        asked_section(config),
        class_data_section(splits),
        trained_section(audit),
        Section("Numbers", numbers),
        few_shot_section(run, curve),
        *([_penalty_section(run, tried)] if tried else []),
        *class_sections(run, splits["test"], found),
        published_section({"linear probe": found.accuracy}, encoder.name, config.data.data),
        rerun_section(run),
    ]
    sections[2].blocks.insert(0, Text("The model is frozen; only the layer on its features is fitted."))
    path = write_report(run, f"Linear probe of {encoder.name}", said[0].upper() + said[1:] + ".", sections)
    print(f"layer: {run.path / 'layer.safetensors'}")
    print(f"report: {path}")


def few_shot_section(run: Run, curve: Mapping[str, Sequence[float]]) -> Section:
    """Accuracy by training pictures per class."""
    rows: list[tuple[Any, ...]] = []
    for name, values in curve.items():
        spread = statistics.stdev(values) if len(values) > 1 else None
        rows.append((name, statistics.fmean(values), spread, len(values)))
    if not rows:
        return Section("Few pictures", [Text("--shots names none.")])
    table = Table(("pictures per class", "test accuracy", "standard deviation", "draws"), rows)
    few = [(int(name), mean) for name, mean, *_ in rows if name != "all"]
    if len(few) < 2:
        return Section("Few pictures", [table])
    curves = {"test accuracy": ([float(count) for count, _ in few], [mean for _, mean in few])}
    svg = save_figure(run, "few-shot", curve_figure(curves, "training pictures per class", "test accuracy"))
    note = "The mean over draws. The penalty is chosen on all validation pictures, also where few are trained on."
    return Section("Few pictures", [Figure(svg, note), table])


def _penalty_section(run: Run, tried: Mapping[float, float]) -> Section:
    curves = {"validation accuracy": ([float(np.log10(key)) for key in tried], list(tried.values()))}
    svg = save_figure(run, "penalty", curve_figure(curves, "log10 of the L2 penalty", "validation accuracy"))
    return Section("Penalty", [Figure(svg, "Found as the paper does: powers of a hundred, then closer and closer.")])


def published_section(ours: Mapping[str, float], checkpoint: str, data: str | None) -> Section:
    """Ours beside what is published for CIFAR-10."""
    here = f"here, {checkpoint} on {data or 'drawn things: not to be compared'}"
    rows: list[tuple[Any, ...]] = [(name, value, here) for name, value in ours.items()]
    rows += [(f"{name}, linear probe", value / 100, PROBED) for name, (value, _) in REFERENCE.items()]
    rows += [(f"{name}, zero-shot", value / 100, MEASURED) for name, (_, value) in REFERENCE.items()]
    return Section("Beside published figures", [Table(("", "accuracy", "source"), rows, "CIFAR-10, test pictures.")])
