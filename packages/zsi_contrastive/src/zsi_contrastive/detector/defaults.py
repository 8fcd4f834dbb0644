"""Defaults that depend on the backbone and the data, and options that contradict each other."""

import dataclasses
from typing import Any

from labs_common.errors import LabError
from zsi_contrastive import TINY
from zsi_contrastive.detector.config import HEADS, OWN_SHARES, PUBLISHED, SCENES, DataOptions, ModelOptions, TrainConfig


def complete(config: TrainConfig) -> TrainConfig:
    """Fills in the defaults that depend on the backbone and the data, and checks that the options fit together.

    For photographs they are those of Zheng et al. 2021 and their published code; those of `tiny` were found on drawn
    scenes (docs/zsi_contrastive.md).

    Raises:
        LabError: options contradict each other.
    """
    data = complete_data(config.data)
    split = data.split
    vectors = config.words.word_vectors or ("attributes" if split == SCENES else "")
    if config.data.data is None and split != SCENES:
        raise LabError(f"--split {split}: drawn scenes have classes of their own; name pictures with --data")
    if not vectors:
        raise LabError(f"--word-vectors: name those of {split}: a matrix, a file of GloVe or fastText, or clip:NAME")
    check(config)
    tiny, similarity = config.model.backbone == TINY, config.model.similarity
    if similarity == "auto":
        similarity = "cosine" if vectors.startswith("clip:") else "product"
    rule = "things" if tiny else "direct" if similarity == "cosine" else "code"
    # The learning rate of 65/15 is the lower one of the published configurations.
    rate = 3e-3 if tiny else 0.0075 if split == "65_15" else 0.01
    model, detection, training = config.model, config.detection, config.training
    filled: dict[str, dict[str, Any]] = {
        "model": {
            "frozen_stages": (0 if tiny else 1) if model.frozen_stages < 0 else model.frozen_stages,
            "min_side": model.min_side or (96 if tiny else 800),
            "max_side": model.max_side or (160 if tiny else 1333),
            "similarity": similarity,
            # In one place each, so that a flag over a run's config.yaml changes it, and a run of before has the same.
            "contrastive": tuple(name for name in contrastive_of(model) if name not in OWN_SHARES),
            **{name: name in contrastive_of(model) for name in OWN_SHARES},
        },
        "detection": {
            "transfer": rule if detection.transfer == "auto" else detection.transfer,
            "temperature": detection.temperature or (4.0 if tiny else 1.0),
        },
        "training": {
            "epochs": training.epochs or (6 if tiny else 12),
            "batch_size": training.batch_size or (16 if tiny else 8),
            "optimizer": ("adamw" if tiny else "sgd") if training.optimizer == "auto" else training.optimizer,
            "learning_rate": training.learning_rate or rate,
            "schedule": ("cosine" if tiny else "steps") if training.schedule == "auto" else training.schedule,
            "reconstruction": training.reconstruction or (0.05 if tiny else 0.5),
            "save_every": 200 if tiny and training.save_every < 0 else training.save_every,
            "clip_norm": (5.0 if tiny else 35.0) if training.clip_norm < 0 else training.clip_norm,
        },
        "words": {"word_vectors": vectors},
    }
    groups = {name: dataclasses.replace(getattr(config, name), **values) for name, values in filled.items()}
    return dataclasses.replace(config, data=data, **groups)


def complete_data(data: DataOptions) -> DataOptions:
    """Fills in what says which pictures are the test, where it is not asked for."""
    split = data.split or (SCENES if data.data is None else PUBLISHED[0])
    protocol, share = "zsi" if data.protocol == "auto" else data.protocol, data.validation_fraction
    return dataclasses.replace(data, split=split, protocol=protocol, validation_fraction=0.3 if share < 0 else share)


def contrastive_of(model: ModelOptions) -> tuple[str, ...]:
    """Returns the contrastive heads that are asked for in either way, in the order of their table."""
    return tuple(name for name in HEADS if name in model.contrastive or (name in OWN_SHARES and getattr(model, name)))


def check(config: TrainConfig) -> None:
    """Checks options that do not depend on the data.

    Raises:
        LabError: options contradict each other.
    """
    model, training = config.model, config.training
    if model.sync_background and not model.background_rpn:
        raise LabError("--sync-background: nothing to take over without --background-rpn; add --no-sync-background")
    for name, file in (("backbone", model.backbone_weights), ("greedy", model.greedy_weights)):
        if file is not None and file.suffix != ".safetensors":
            raise LabError(f"--{name}-weights {file}: must be a .safetensors file")
    if model.greedy_weights is not None and "greedy_infomax" not in contrastive_of(model):
        raise LabError("--greedy-weights: there is no such head; add --greedy-infomax")
    if model.thumbnail % 8:
        raise LabError(f"--thumbnail {model.thumbnail}: must be a multiple of 8, as half a patch is an eighth of it")
    if model.patch_size % 2 == 0:
        raise LabError(f"--patch-size {model.patch_size}: must be odd, for a place in the middle")
    if training.patience and not config.data.validation_fraction:
        raise LabError("--patience: there is nothing to watch with --validation-fraction 0")
