"""The result on disk: `zsi.json` and `model.safetensors`, and nothing else is needed to use a detector."""

import dataclasses
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from labs_common.cli import config_from_yaml
from labs_common.errors import LabError
from labs_common.saved import load_model, reading_model, save_model
from zsi_contrastive.detector.annotations import Split
from zsi_contrastive.detector.backbone import make_backbone
from zsi_contrastive.detector.calibration import CALIBRATION, Calibration
from zsi_contrastive.detector.config import PUBLISHED, DataOptions, TrainConfig
from zsi_contrastive.detector.defaults import complete, complete_data
from zsi_contrastive.detector.model import Parts, Sizes, ZeroShotMaskRCNN, channels_of
from zsi_contrastive.detector.options import DetectionOptions
from zsi_contrastive.detector.regions import Sampling
from zsi_contrastive.detector.vectors import PROMPTS, ClassVectors

FILE = "zsi.json"  # beside the weights
# Options whose usual value stands for the run's own, also where a command line says it.
LEFT_TO_RUN = ("split", "protocol", "validation_fraction", "transfer", "temperature")
Options = TypeVar("Options", DataOptions, DetectionOptions)


@dataclass(frozen=True)
class Loaded:
    """A trained detector with the classes that it knows by name."""

    model: ZeroShotMaskRCNN
    split: Split
    vectors: ClassVectors
    detection: DetectionOptions
    protocol: str
    folder: Path
    calibration: Calibration | None = None


def save_detector(
    config: TrainConfig,
    model: ZeroShotMaskRCNN,
    state: Mapping[str, torch.Tensor],
    split: Split,
    vectors: ClassVectors,
    folder: Path,
) -> None:
    """Writes the whole model in one move; `state` are its weights, which may be sharded in `model` itself."""
    words = model.regions.box_head.words
    description = {
        "backbone": config.model.backbone,
        "parts": model.parts.plain(),
        "sizes": asdict(model.sizes),
        "sampling": asdict(model.regions.sampling),
        "detection": asdict(config.detection),
        "split": asdict(split),
        "protocol": config.data.protocol,
        "word_vectors": vectors.source,
        "by_column": vectors.by_column,
        "words": None if words is None else list(words.shape),
        "prompts": list(vectors.prompts),
    }
    mean = {} if vectors.mean is None else {"mean": vectors.mean}
    save_model(folder, FILE, description, {**state, "unseen": vectors.unseen, **mean})


def load_detector(path: Path) -> Loaded:
    """Reads the detector of a finished run, or of the directory that `save_detector` wrote, in evaluation mode.

    Raises:
        LabError: none is there, or it is broken.
    """
    known: dict[str, Any] = {}

    def build(said: dict[str, Any], state: dict[str, torch.Tensor]) -> ZeroShotMaskRCNN:
        unseen, mean = state.pop("unseen"), state.pop("mean", None)  # all others are the model's
        seen, background = state["seen"], state["background.word"]
        split = said["split"]
        known["split"] = Split(split["name"], tuple(split["seen"]), tuple(split["unseen"]))
        prompts = tuple(said.get("prompts", PROMPTS))
        known["vectors"] = ClassVectors(
            said["word_vectors"], background, seen, unseen, said["by_column"], mean=mean, prompts=prompts
        )
        known["detection"] = DetectionOptions(**said["detection"])
        known["protocol"] = said.get("protocol", "zsi")
        sizes: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in said["sizes"].items()
        }
        return ZeroShotMaskRCNN(
            make_backbone(said["backbone"], False, None, 0, channels_of(said["backbone"])),
            background,
            seen,
            Parts.from_plain(said["parts"]),
            Sizes(**sizes),
            Sampling(**said["sampling"]),
            # Random, because a layer behind them starts as their pseudo-inverse; the real ones are loaded over them.
            None if said["words"] is None else torch.randn(said["words"]),
        )

    model, _, folder = load_model(path, FILE, "--checkpoint", build)
    file = folder / CALIBRATION
    if file.is_file():
        with reading_model(path, "--checkpoint"):
            known["calibration"] = Calibration(**json.loads(file.read_text(encoding="utf-8")))
    return Loaded(model, folder=folder, **known)


def chosen_data(
    asked: DataOptions, checkpoint: Path, split: str = "", said: Collection[str] = ()
) -> tuple[DataOptions, int]:
    """Completes data options with what is left to the run, and returns the seed of its splits with them.

    A converted detector has no run: only its published `split` is known. `said` is of `changed`.

    Raises:
        LabError: the run does not say which pictures it had.
    """
    file = checkpoint / "config.yaml"
    if not file.is_file():
        if asked.data is None:
            raise LabError(f"--checkpoint {checkpoint}: holds no config.yaml that names its pictures; name --data")
        known = split if split in PUBLISHED else ""
        return complete_data(dataclasses.replace(asked, split=asked.split or known)), 0
    trained = complete(config_from_yaml(TrainConfig, file))
    own = trained.data
    if asked.data is not None:  # other pictures: of the run's options only the rule by which they are taken
        own = DataOptions(split=own.split, protocol=own.protocol, validation_fraction=own.validation_fraction)
    return changed(own, asked, said), trained.run.seed


def changed(trained: Options, asked: Options, said: Collection[str] = ()) -> Options:
    """Returns the options of a run with those in their place that are asked for.

    These are all that are not usual, and usual ones whose name the command line `said`.
    """
    usual = type(asked)()
    own = {
        name: value
        for name, value in vars(asked).items()
        if value != getattr(usual, name) or (name in said and name not in LEFT_TO_RUN)
    }
    return dataclasses.replace(trained, **own)
