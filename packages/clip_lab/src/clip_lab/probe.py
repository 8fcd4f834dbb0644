"""One layer on a frozen image tower: `python -m clip_lab.probe --checkpoint RN50:openai --data cifar-10-batches-py`."""

from clip_lab import commands

if __name__ == "__main__":  # before the imports below: --help and a wrong option answer at once
    commands.probe()

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from clip_lab.config import FrozenOptions, ProbeConfig
from clip_lab.data import COLOURS, DEMO_SIDE, RADII, SHAPES
from clip_lab.encoder import Encoder, load_encoder
from clip_lab.report import published_section
from labs_common.cache import cached_directory
from labs_common.cli import to_plain
from labs_common.data.classes import LabelledPictures, read_classes
from labs_common.data.images import decoding_threads, record_splits
from labs_common.errors import LabError
from labs_common.fitting import write_results
from labs_common.frozen.audit import FrozenAudit
from labs_common.frozen.cache import front_rows
from labs_common.logistic import COARSE, Layer, best_penalty, fitted_by_sgd, fitted_layers
from labs_common.options import CacheOptions, ClassDataOptions, RunOptions
from labs_common.progress import console, tracked
from labs_common.report.classes import Predictions, class_data_section, class_sections, wilson_interval
from labs_common.report.figures import curve_figure
from labs_common.report.page import Figure, Section, Table, Text, save_figure
from labs_common.report.sections import asked_section, rerun_section, trained_section
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
    check_run_options(RunOptions(output=config.output))
    encoder = load_encoder(config.checkpoint)
    study = Study.start("probe", config, encoder, read_splits(config.data, config.seed), config.features)
    layer, penalty, tried = fitted_layer(config, study)
    found = study.predictions(layer.probabilities(study.features["test"].values))
    curve = few_shot_curve(config, study, counts, penalty)
    file = study.run.path / "layer.safetensors"
    save_file({"weight": layer.weight.cpu().contiguous(), "bias": layer.bias.cpu().contiguous()}, file)
    low, high = wilson_interval(found.accuracy, len(found.labels))
    said = f"test accuracy {found.accuracy:.4f} ({low:.4f} to {high:.4f}) on {len(found.labels):,} pictures"
    console.print(f"{encoder.name}: {said}")
    print(f"layer: {file}")
    results = {
        "accuracy": found.accuracy, "interval": (low, high), "loss": found.loss, "penalty": penalty,
        "tried": {f"{key:.6g}": value for key, value in tried.items()}, "few-shot": curve,
    }  # fmt: skip

    def sections() -> list[Section]:
        row = (encoder.name, found.accuracy, f"{low:.3f} to {high:.3f}", found.loss)
        note = (
            f"One layer on --features {config.features}, by --solver {config.solver}, penalty {penalty:.3g}; measured "
            "once. The interval is Wilson's score interval."
        )
        numbers = Section("Numbers", [Table(("", "test accuracy", "95 % interval", "test loss"), [row]), Text(note)])
        return [numbers, few_shot_section(study.run, curve), *penalty_sections(study.run, tried)]

    summary = said[0].upper() + said[1:] + "."
    frozen = "The model is frozen; only the layer on its features is fitted."
    study.write_results(f"Linear probe of {encoder.name}", summary, frozen, results, sections, {"linear probe": found})


def shots_of(config: ProbeConfig) -> list[int]:
    """Returns the few-shot counts in order; 0 stands for all.

    Raises:
        LabError: one of them is no count.
    """
    found = []
    for part in filter(None, config.shots.split(",")):
        # Python reads no number of 5,000 digits.
        if part != "all" and not (part.isdecimal() and len(part) < 10 and int(part)):
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


@dataclass(frozen=True)
class Study:
    """A frozen model and its features of pictures with classes: a probe and zero-shot both go on from here.

    Attributes:
        audit: of the model, passed once its features were computed.
        features: by split.
    """

    config: FrozenOptions
    run: Run
    encoder: Encoder
    splits: dict[str, LabelledPictures]
    audit: FrozenAudit
    features: dict[str, Features]

    @classmethod
    def start(
        cls,
        name: str,
        config: FrozenOptions,
        encoder: Encoder,
        splits: dict[str, LabelledPictures],
        what: str,
        wanted: Sequence[str] = ("train", "validation", "test"),
    ) -> "Study":
        """Computes features of the splits `wanted`, checks that the model stayed as it was, and starts the run.

        `what` is of `features_of`, `name` that of the run.

        Raises:
            LabError: the model has no embeddings, the cache cannot be written, or the directory --output.
            RunStopped: the frozen model has moved.
        """
        audit = FrozenAudit(encoder.module)
        chosen = {part: splits[part] for part in wanted}
        features = features_of(encoder, chosen, what, config.batch_size, config.cache)
        audit.check()
        run = Run.start(config, RunOptions(output=config.output, track="none"), name, encoder.accelerator)
        record_splits(run, splits)
        return cls(config, run, encoder, splits, audit, features)

    def predictions(self, probabilities: np.ndarray) -> Predictions:
        """Puts probabilities of the classes of the test pictures (pictures, classes) beside their labels."""
        return Predictions(probabilities, self.features["test"].labels.numpy())

    def write_results(
        self,
        title: str,
        summary: str,
        trained: str,
        results: dict[str, Any],
        sections: Callable[[], list[Section]],
        found: Mapping[str, Predictions],
    ) -> None:
        """Writes results.json and the report; `trained` tells what trained; `found` are predictions by method."""
        run, test = self.run, self.splits["test"]
        shared = {"config": to_plain(self.config), "checkpoint": self.encoder.name, "pictures": len(test)}

        def page() -> tuple[str, list[Section]]:
            audited = trained_section(self.audit)
            audited.blocks.insert(0, Text(trained))
            accuracies = {name: predictions.accuracy for name, predictions in found.items()}
            return summary, [
                asked_section(self.config),
                class_data_section(self.splits),
                audited,
                *sections(),
                *class_sections(run, test, next(iter(found.values()))),
                published_section(accuracies, self.encoder.name, self.config.data.data),
                rerun_section(run),
            ]

        write_results(run, shared | results, True, title, page)


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
    title, options, count = f"{encoder.name}-{name}", CacheOptions(cache=cache), len(pictures)
    rows = front_rows(
        title, encoder.module, compute, count, width, recipe, options, encoder.accelerator, batch=batch_size
    )
    parts = torch.arange(count).split(AT_ONCE)
    shown = tracked(parts, f"features of the {name} pictures", len(parts), not cache)
    values = torch.cat([rows.rows(0, part.tolist()).float().cpu() for part in shown])
    return Features(values, torch.from_numpy(pictures.labels))


def fitted_layer(config: ProbeConfig, study: Study) -> tuple[Layer, float, dict[float, float]]:
    """Fits the layer; returns its penalty too, and the validation accuracy of every penalty that was tried.

    With the penalty found, the layer is fitted once more on training and validation pictures, as the paper does.
    """
    classes = len(study.splits["train"].classes)
    train, validation = (study.features[name].to(study.encoder.device) for name in ("train", "validation"))
    whole = (torch.cat([train[0], validation[0]]), torch.cat([train[1], validation[1]]))
    if config.solver == "sgd":
        penalty = config.penalty or SGD_PENALTY
        epochs, batch, rate = config.epochs, config.batch_size, config.learning_rate
        return fitted_by_sgd(*whole, classes, penalty, epochs, batch, rate, config.seed), penalty, {}
    tried: dict[float, float] = {}
    penalty = config.penalty
    if not penalty:
        penalty, tried = best_penalty(train, validation, classes, console.print)
    return fitted_layers(*whole, classes, [penalty])[0], penalty, tried


def few_shot_curve(config: ProbeConfig, study: Study, counts: Sequence[int], penalty: float) -> dict[str, list[float]]:
    """Measures test accuracies by training pictures per class, one for each draw; each has a penalty of its own.

    With all pictures it is that of the probe itself.
    """
    device, features, classes = study.encoder.device, study.features, len(study.splits["train"].classes)
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


def penalty_sections(run: Run, tried: Mapping[float, float]) -> list[Section]:
    """Shows the validation accuracy of every penalty, if several were tried."""
    if not tried:
        return []
    curves = {"validation accuracy": ([float(np.log10(key)) for key in tried], list(tried.values()))}
    svg = save_figure(run, "penalty", curve_figure(curves, "log10 of the L2 penalty", "validation accuracy"))
    return [Section("Penalty", [Figure(svg, "Found as the paper does: powers of a hundred, then closer and closer.")])]
