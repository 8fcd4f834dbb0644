"""One layer on a frozen image tower: `python -m clip_lab.probe --checkpoint RN50:openai --data cifar-10-batches-py`."""

from clip_lab import commands

if __name__ == "__main__":  # before the imports below: --help and a wrong option answer at once
    commands.probe()

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from clip_lab.config import ProbeConfig
from clip_lab.data import COLOURS, DEMO_SIDE, RADII, SHAPES
from clip_lab.encoder import Encoder, load_encoder
from clip_lab.report import published_section
from labs_common.cache import cached_directory
from labs_common.cli import to_plain
from labs_common.data.classes import LabelledPictures
from labs_common.data.images import decoding_threads
from labs_common.data.readers import read_classes
from labs_common.data.splits import record_splits
from labs_common.errors import LabError
from labs_common.fitting import leave
from labs_common.frozen.audit import FrozenAudit
from labs_common.frozen.cache import front_rows
from labs_common.logistic import COARSE, Layer, best_penalty, fitted_by_sgd, fitted_layers
from labs_common.options import CacheOptions, ClassDataOptions, RunOptions
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
)
from labs_common.report.pictures import Predictions, class_data_section, class_sections, wilson_interval
from labs_common.run import Run, check_run_options
from labs_common.scenes.files import encoded
from labs_common.scenes.world import picture, random_scene, scene_generator

DEMO_COUNTS = {"train": 40, "validation": 20, "test": 40}  # of each class
SGD_PENALTY = 1e-4  # of --solver sgd, for which none is searched
AT_ONCE = 256  # rows of features read at once


def probe(config: ProbeConfig) -> None:
    """Walks the road: pictures, frozen features, one layer, test, few-shot curve, report.

    Raises:
        LabError: the model or the pictures cannot be had.
        RunStopped: the frozen model has moved.
    """
    counts = shots_of(config)
    options = RunOptions(output=config.output, track="none")
    check_run_options(options)
    encoder = load_encoder(config.checkpoint)
    splits = read_splits(config.data, config.seed)
    audit = FrozenAudit(encoder.module)
    features = features_of(encoder, splits, config.features, config.batch_size, config.cache)
    audit.check()
    run = Run.start(config, options, "probe", Accelerator())
    record_splits(run, splits)
    classes = len(splits["train"].classes)
    layer, penalty, tried = fitted_layer(config, features, classes, encoder.device)
    test = features["test"]
    found = Predictions(layer.probabilities(test.values), test.labels.numpy())
    curve = few_shot_curve(config, features, classes, encoder.device, counts, penalty)
    finish_probe(run, config, encoder, splits, audit, layer, found, penalty, tried, curve)


def shots_of(config: ProbeConfig) -> list[int]:
    """Returns the few-shot counts in order; 0 stands for all.

    Raises:
        LabError: one of them is no count, or another option is out of range.
    """
    if config.penalty < 0 or min(config.epochs, config.batch_size, config.draws) < 1 or config.learning_rate <= 0:
        raise LabError("--penalty must not be negative; --epochs, --batch-size, --draws and --learning-rate above 0")
    found = []
    for part in filter(None, config.shots.split(",")):
        if part != "all" and not (part.isdigit() and int(part)):
            raise LabError(f"--shots {config.shots}: must be numbers from 1, or all, with commas between")
        found.append(0 if part == "all" else int(part))
    return found


def read_splits(options: ClassDataOptions, seed: int) -> dict[str, LabelledPictures]:
    """Reads the splits of --data, or drawn things to be named by colour and shape; see `read_classes`."""
    return read_classes(options, seed, True, drawn_things)


def drawn_things() -> Path:
    """Returns a folder per split, in it one per class, of pictures of one thing each; made now if never before."""
    names = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]

    def make(folder: Path) -> None:
        console.print(f"drawing {len(names) * sum(DEMO_COUNTS.values())} things to be named")
        number = 0
        for split, count in DEMO_COUNTS.items():
            for name in names:
                (folder / split / name).mkdir(parents=True)
                colour, shape = name.split()
                for _ in range(count):
                    number += 1
                    scene = random_scene(scene_generator(2, number), 1, (RADII,), [(shape, colour, "plain")])
                    (folder / split / name / f"{number:05d}.png").write_bytes(encoded(picture(scene, DEMO_SIDE)))

    recipe = {"names": names, "counts": DEMO_COUNTS, "side": DEMO_SIDE, "format": 1}
    return cached_directory("clip-things", recipe, make)


@dataclass(frozen=True)
class Features:
    """A frozen model's features of a split (pictures, width), with labels (pictures,), on the CPU."""

    values: torch.Tensor
    labels: torch.Tensor

    def to(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns both on a device."""
        return self.values.to(device), self.labels.to(device)

    def few(self, count: int, seed: int) -> "Features":
        """Draws `count` pictures of each class, or takes all of a class that has no more."""
        generator = np.random.default_rng([seed, count])
        places: list[int] = []
        for label in torch.unique(self.labels).tolist():
            members = np.flatnonzero(self.labels.numpy() == label)
            places += generator.permutation(members)[:count].tolist()
        return Features(self.values[sorted(places)], self.labels[sorted(places)])


def features_of(
    encoder: Encoder, splits: Mapping[str, LabelledPictures], what: str, batch_size: int, cache: bool
) -> dict[str, Features]:
    """Computes every split's features, `tower` or `embedding`, once per picture; they are kept in bfloat16 on disk.

    Raises:
        LabError: the model has no embeddings, or the cache's disk is full or broken.
    """
    return {name: _split_features(name, encoder, part, what, batch_size, cache) for name, part in splits.items()}


def _split_features(
    name: str, encoder: Encoder, pictures: LabelledPictures, what: str, batch_size: int, cache: bool
) -> Features:
    def compute(_: int, places: Sequence[int]) -> torch.Tensor:
        seen = torch.stack([*decoding_threads().map(lambda place: encoder.view(pictures.image(place)), places)])
        if what == "embedding":
            return encoder.embedded(seen)
        return encoder.features(seen.to(encoder.device)).float().cpu()

    with torch.no_grad():
        width = compute(0, [0]).shape[1]
    recipe = {"pictures": pictures.fingerprint(), "view": asdict(encoder.view), "what": what}
    rows = front_rows(f"{encoder.name}-{name}", encoder.module, compute, len(pictures), width, recipe,
                      CacheOptions(cache=cache), Accelerator(), batch=batch_size)  # fmt: skip
    starts = range(0, len(pictures), AT_ONCE)
    parts = [rows.rows(0, range(first, min(first + AT_ONCE, len(pictures)))).float().cpu()
             for first in tracked(starts, f"features of the {name} pictures", len(starts), not cache)]  # fmt: skip
    return Features(torch.cat(parts), torch.from_numpy(pictures.labels))


def fitted_layer(
    config: ProbeConfig, features: Mapping[str, Features], classes: int, device: torch.device
) -> tuple[Layer, float, dict[float, float]]:
    """Fits the layer; returns its penalty too, and the validation accuracy of every penalty that was tried.

    With the penalty found, the layer is fitted once more on training and validation pictures, as the paper does.
    """
    train, validation = (features[name].to(device) for name in ("train", "validation"))
    whole = [torch.cat(both) for both in zip(train, validation, strict=True)]
    if config.solver == "sgd":
        penalty = config.penalty or SGD_PENALTY
        layer = fitted_by_sgd(whole[0], whole[1], classes, penalty, config.epochs, config.batch_size,
                              config.learning_rate, config.seed)  # fmt: skip
        return layer, penalty, {}
    tried: dict[float, float] = {}
    penalty = config.penalty
    if not penalty:
        penalty, tried = best_penalty(train, validation, classes, console.print)
    return fitted_layers(whole[0], whole[1], classes, [penalty])[0], penalty, tried


def few_shot_curve(
    config: ProbeConfig, features: Mapping[str, Features], classes: int, device: torch.device, counts: Sequence[int],
    penalty: float,
) -> dict[str, list[float]]:  # fmt: skip
    """Measures test accuracies by training pictures per class, one for each draw; each has a penalty of its own.

    With all pictures it is that of the probe itself.
    """
    test, validation = features["test"].to(device), features["validation"].to(device)
    found: dict[str, list[float]] = {}
    for count in tracked(counts, "few-shot curve", len(counts)):
        for draw in range(config.draws if count else 1):
            chosen = features["train"].few(count, config.seed + draw) if count else features["train"]
            layers = fitted_layers(*chosen.to(device), classes, COARSE if count else (penalty,))
            best = max(layers, key=lambda layer: accuracy(layer, validation))
            found.setdefault(str(count or "all"), []).append(accuracy(best, test))
    return found


def accuracy(layer: Layer, data: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Measures the share of pictures whose most probable class is theirs."""
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
    low, high = wilson_interval(found.accuracy, len(found.labels))
    results = {
        "config": to_plain(config), "checkpoint": encoder.name, "accuracy": found.accuracy, "interval": (low, high),
        "loss": found.loss, "penalty": penalty, "tried": {f"{key:.6g}": value for key, value in tried.items()},
        "few-shot": {name: list(values) for name, values in curve.items()}, "pictures": len(found.labels),
    }  # fmt: skip
    said = f"test accuracy {found.accuracy:.4f} ({low:.4f} to {high:.4f}) on {len(found.labels):,} pictures"
    console.print(f"{encoder.name}: {said}")

    def page() -> tuple[str, list[Section]]:
        trained = trained_section(audit)
        trained.blocks.insert(0, Text("The model is frozen; only the layer on its features is fitted."))
        numbers: list[Any] = [
            Table(("", "test accuracy", "95 % interval", "test loss"),
                  [(encoder.name, found.accuracy, f"{low:.3f} to {high:.3f}", found.loss)]),
            Text(f"One layer on --features {config.features}, by --solver {config.solver}, penalty {penalty:.3g}; "
                 "measured once. The interval is Wilson's score interval."),
        ]  # fmt: skip
        return said[0].upper() + said[1:] + ".", [
            asked_section(config),
            class_data_section(splits),
            trained,
            Section("Numbers", numbers),
            few_shot_section(run, curve),
            *([_penalty_section(run, tried)] if tried else []),
            *class_sections(run, splits["test"], found),
            published_section({"linear probe": found.accuracy}, encoder.name, config.data.data),
            rerun_section(run),
        ]

    print(f"layer: {run.path / 'layer.safetensors'}")
    leave(run, results, True, f"Linear probe of {encoder.name}", page)


def few_shot_section(run: Run, curve: Mapping[str, Sequence[float]]) -> Section:
    """Shows accuracy by training pictures per class."""
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
