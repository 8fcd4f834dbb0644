"""The result on disk: `zsi.json` and `model.safetensors`, and nothing else is needed."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from labs_common.networks import load_exactly, read_weights, reading_model, saved_folder
from labs_common.run import written_whole
from zsi_contrastive.detector.backbone import make_backbone
from zsi_contrastive.detector.config import FINISHED, TINY, DetectionOptions, TrainConfig
from zsi_contrastive.detector.model import Parts, Sizes, ZeroShotMaskRCNN
from zsi_contrastive.detector.regions import Sampling
from zsi_contrastive.detector.splits import Split
from zsi_contrastive.detector.vectors import ClassVectors

FOLDER, WEIGHTS = "model", "model.safetensors"
TINY_CHANNELS, CHANNELS = 48, 256
TINY_ANCHORS = (16, 28, 48)


@dataclass(frozen=True)
class Loaded:
    """A trained detector with the classes that it knows by name."""

    model: ZeroShotMaskRCNN
    split: Split
    vectors: ClassVectors
    detection: DetectionOptions


def sizes_of(config: TrainConfig) -> tuple[Sizes, Sampling]:
    """Widths and numbers for a completed config's backbone."""
    model = config.model
    if model.backbone == TINY:
        sizes = Sizes(256, 48, 2, TINY_ANCHORS, model.min_side, model.max_side, 64, (100, 200, 50, 100), 16, (5, 7), 1,
                      True)  # fmt: skip
        return sizes, Sampling(per_picture=24)
    return Sizes(min_side=model.min_side, max_side=model.max_side), Sampling()


def make_model(config: TrainConfig, vectors: ClassVectors, words: torch.Tensor | None) -> ZeroShotMaskRCNN:
    """The untrained detector that a completed config describes.

    Raises:
        LabError: the backbone cannot be had, or weights do not fit.
    """
    options = config.model
    backbone = make_backbone(
        options.backbone, options.backbone_pretrained, options.backbone_weights, options.frozen_stages,
        TINY_CHANNELS if options.backbone == TINY else CHANNELS,
    )  # fmt: skip
    parts = Parts(options.mask_head, options.decoders, options.background_rpn, options.sync_background,
                  options.greedy_infomax, options.patch_infonce)  # fmt: skip
    sizes, sampling = sizes_of(config)
    model = ZeroShotMaskRCNN(backbone, vectors.background, vectors.seen, parts, sizes, sampling, words)
    if options.greedy_weights is not None:
        assert model.greedy is not None
        state = read_weights(options.greedy_weights, "--greedy-weights")
        load_exactly(model.greedy.isolated, state, f"--greedy-weights {options.greedy_weights}")
    return model


def save_model(
    config: TrainConfig,
    model: ZeroShotMaskRCNN,
    state: Mapping[str, torch.Tensor],
    split: Split,
    vectors: ClassVectors,
    folder: Path,
) -> None:
    """Writes the whole model in one move; `state` are its weights, which may be sharded in `model` itself."""
    sizes, sampling = sizes_of(config)
    words = model.regions.box_head.words
    said = {
        "backbone": config.model.backbone,
        "parts": asdict(model.parts),
        "sizes": asdict(sizes),
        "sampling": asdict(sampling),
        "detection": asdict(config.detection),
        "split": asdict(split),
        "word_vectors": vectors.source,
        "by_column": vectors.by_column,
        "words": None if words is None else list(words.shape),
    }
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with written_whole(folder) as part:
        save_file(kept | {"unseen": vectors.unseen.contiguous()}, part / WEIGHTS, {"format": "pt"})
        (part / FINISHED).write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")


def load_model(path: Path, option: str = "--checkpoint") -> Loaded:
    """The model of a finished run, or of the directory that `save_model` wrote; in evaluation mode.

    Raises:
        LabError: none is there, or it is broken.
    """
    folder = saved_folder(path, (FINISHED, WEIGHTS), option)
    with reading_model(path, option):
        said = json.loads((folder / FINISHED).read_text(encoding="utf-8"))
        state = load_file(folder / WEIGHTS)
        unseen = state.pop("unseen")
        seen, background = state["seen"], state["background.word"]
        wide: dict[str, Any] = said["sizes"]
        tuples: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in wide.items()
        }
        sizes = Sizes(**tuples)
        channels = TINY_CHANNELS if said["backbone"] == TINY else CHANNELS
        backbone = make_backbone(said["backbone"], False, None, 0, channels)
        words = None if said["words"] is None else torch.randn(said["words"])
        model = ZeroShotMaskRCNN(
            backbone, background, seen, Parts(**said["parts"]), sizes, Sampling(**said["sampling"]), words
        )
        model.load_state_dict(state)
        split = Split(said["split"]["name"], tuple(said["split"]["seen"]), tuple(said["split"]["unseen"]))
        vectors = ClassVectors(said["word_vectors"], background, seen, unseen, said["by_column"])
        detection = DetectionOptions(**said["detection"])
    model.requires_grad_(False)
    return Loaded(model.eval(), split, vectors, detection)
