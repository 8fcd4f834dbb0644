"""Pictures in, batches out: the three splits, the tensors that a network sees, and the rows of its frozen front."""

import math
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image, ImageOps
from timm.data import resolve_model_data_config
from timm.data.auto_augment import RandAugment, rand_augment_transform

from labs_common.data.classes import LabelledPictures, read_classes, stratified_parts
from labs_common.data.images import RESAMPLING, decoding_threads
from labs_common.device import constant, each_tensor, pinned
from labs_common.frozen.cache import ComputedRows, Rows, front_rows
from labs_common.options import CacheOptions
from labs_common.scenes.files import cached_parquet
from labs_common.steps import own_part
from vit_transfer.config import Augment, DataOptions
from vit_transfer.model import Transfer, input_size

Splits = Mapping[str, LabelledPictures]  # the pictures of "train", "validation" and "test"
# The offline data: few enough pictures to train on that what was learnt before has to help.
DEMO_TASK, DEMO_SIDE = "count", 48
DEMO_SPLITS: dict[str, Sequence[int]] = {"train": range(400), "validation": range(400, 600), "test": range(600, 1600)}

RANDAUGMENT, ERASING = "rand-m9-mstd0.5-inc1", 0.25  # Touvron et al. 2021 (DeiT), table 9; the second a probability
_drawing = threading.Lock()


@dataclass(frozen=True)
class Transform:
    """A picture as the network sees it: its middle square, resized, in the network's own mean and deviation."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    augment: Augment
    seed: int

    def levels(self, image: Image.Image, view: int, place: int) -> np.ndarray:
        """Returns (3, size, size) in 0 to 255; view 0 is plain, others are augmentations of picture `place`."""
        side: float = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        mirrored = self.augment == "mirror" and view % 2 == 1
        if view and self.augment != "mirror":
            generator = np.random.default_rng([self.seed, view, place])
            mirrored = generator.random() < 0.5
            if self.augment in ("crop", "deit"):
                cut = side * generator.uniform(0.7, 1.0)  # of at least half the area
                left, top = left + generator.uniform(0, side - cut), top + generator.uniform(0, side - cut)
                side = cut
        box = (left, top, left + side, top + side)
        resized = image.resize((self.size, self.size), RESAMPLING[self.interpolation], box)
        seen = ImageOps.mirror(resized) if mirrored else resized
        if view and self.augment == "deit":
            return erased(np.asarray(rand_augmented(seen, generator)).transpose(2, 0, 1), generator)
        return np.asarray(seen).transpose(2, 0, 1)

    def normalised(self, levels: torch.Tensor) -> torch.Tensor:
        """Turns levels (batch, 3, size, size) of 0 to 255 into what the network reads."""
        mean, std = (constant(values, levels.device)[:, None, None] for values in (self.mean, self.std))
        return (levels.float() / 255 - mean) / std


@cache
def _policy(side: int) -> RandAugment:
    return rand_augment_transform(RANDAUGMENT, {"translate_const": int(0.45 * side), "img_mean": (128, 128, 128)})


def rand_augmented(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Applies timm's RandAugment (Cubuk et al. 2020) as DeiT does; what is drawn depends on `generator` alone."""
    with _drawing:  # timm draws from Python's and NumPy's own generators, which all threads share
        before = random.getstate(), np.random.get_state()
        random.seed(int(generator.integers(2**32)))
        np.random.seed(int(generator.integers(2**32)))
        try:
            augmented: Image.Image = _policy(image.width)(image)
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
    return augmented


def erased(levels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Puts noise in a rectangle of levels (3, side, side), with probability `ERASING` (Zhong et al. 2020, algorithm 1).

    It has 2 to 33 % of the area and sides in a ratio of up to 3.3, as in timm.
    """
    if generator.random() >= ERASING:
        return levels
    side, area = levels.shape[1], generator.uniform(0.02, 1 / 3)
    ratio = math.exp(generator.uniform(-math.log(3.3), math.log(3.3)))
    height, width = (min(side, max(1, round(side * math.sqrt(area * part)))) for part in (ratio, 1 / ratio))
    top, left = (int(generator.integers(side - length + 1)) for length in (height, width))
    changed = levels.copy()
    changed[:, top : top + height, left : left + width] = generator.integers(0, 256, (3, height, width))
    return changed


def transform_of(
    model: torch.nn.Module, size: int, augment: Augment, seed: int, interpolation: str = "auto"
) -> Transform:
    """Takes what timm says that the model was trained on, without its crop: small pictures have nothing to spare."""
    known = resolve_model_data_config(model)
    if interpolation == "auto":
        interpolation = known["interpolation"] if known["interpolation"] in RESAMPLING else "bicubic"
    return Transform(size, tuple(known["mean"]), tuple(known["std"]), interpolation, augment, seed)


def saved_transform(model: torch.nn.Module, augment: Augment = "flip", seed: int = 0) -> Transform:
    """Takes what a saved network says that it was trained on."""
    return transform_of(model, input_size(model), augment, seed)


@dataclass(frozen=True)
class Tensors:
    """The pictures of a split as tensors, decoded in threads."""

    pictures: LabelledPictures
    transform: Transform

    def __len__(self) -> int:
        return len(self.pictures)

    @cached_property
    def labels(self) -> torch.Tensor:
        """Class numbers (pictures,)."""
        return torch.from_numpy(self.pictures.labels)

    def batch(self, view: int, places: Sequence[int]) -> torch.Tensor:
        """Returns pictures (places, 3, size, size) as the network reads them."""
        return self.transform.normalised(self.levels(view, places))

    def levels(self, view: int, places: Sequence[int]) -> torch.Tensor:
        """Returns pictures (places, 3, size, size) at the network's size, in 0 to 255."""

        def one(place: int) -> np.ndarray:
            return self.transform.levels(self.pictures.image(place), view, place)

        return torch.from_numpy(np.stack(list(decoding_threads().map(one, places))))

    def recipe(self, views: int) -> dict[str, Any]:
        """Lists all that the tensors depend on, as JSON values."""
        found = asdict(self.transform) | {"pictures": self.pictures.fingerprint()}
        if views == 1:  # nothing is sampled
            found.pop("augment"), found.pop("seed")
        return found


def read_splits(options: DataOptions, seed: int, shown: bool) -> Splits:
    """Reads the splits of --data, or of drawn scenes, and leaves training pictures out by --label-fraction.

    See `labs_common.data.classes.read_classes`.
    """
    splits = read_classes(options, seed, shown, drawn_scenes)
    if options.label_fraction == 1:
        return splits
    labels = splits["train"].labels
    _, labelled = stratified_parts(labels, options.label_fraction, seed)
    single = np.flatnonzero(np.bincount(labels)[labels] == 1)  # the only ones of their classes
    return splits | {"train": splits["train"].subset(np.union1d(labelled, single))}


def drawn_scenes() -> Path:
    """Draws scenes whose things are to be counted, unless they were drawn before."""
    return cached_parquet("counting-scenes", DEMO_TASK, DEMO_SPLITS, DEMO_SIDE)


class Batch(NamedTuple):
    """A process's part of an optimizer step.

    Attributes:
        inputs: rows (pictures, width), or pictures where the network is not cut.
        targets: class numbers (pictures,).
        view: the version of the pictures.
        places: of the pictures in their split.
        share: what the mean loss is multiplied by, so that the step's loss is the mean over all processes' pictures.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    view: int
    places: Sequence[int]
    share: float


@dataclass(frozen=True)
class PictureRows:
    """A split: the rows that the trained part reads, and the labels."""

    rows: Rows
    labels: torch.Tensor

    def batch(self, view: int, places: Sequence[int], share: float = 1.0) -> Batch:
        """Reads the pictures at these places."""
        return Batch(self.rows.rows(view, places), self.labels[list(places)], view, places, share)


def training_batches(
    data: PictureRows, views: int, accelerator: Accelerator
) -> Callable[[list[int], int, int], list[Batch]]:
    """Returns what `ShuffledSteps` calls: it reads this process's part of a step; the views take turns by epoch."""

    def batch(places: list[int], epoch: int, step: int) -> list[Batch]:
        mine, share = own_part(places, accelerator.process_index, accelerator.num_processes)
        return [each_tensor(pinned, data.batch(epoch % views, mine, share), accelerator.device)]

    return batch


def boundary_rows(
    name: str, tensors: Tensors, model: Transfer, options: CacheOptions, views: int, accelerator: Accelerator
) -> PictureRows:
    """Returns the rows of a split called `name`, after computing whatever its cache lacks; the model is on its device.

    Raises:
        LabError: the cache's disk is full or broken.
    """
    cut = model.cut
    if cut is None:
        return PictureRows(ComputedRows(tensors.batch, "fp32"), tensors.labels)

    def compute(view: int, places: Sequence[int]) -> torch.Tensor:
        return cut.front(tensors.batch(view, places).to(accelerator.device))

    rows = front_rows(f"{model.name}-{name}", cut.front, compute, len(tensors), cut.width, tensors.recipe(views),
                      options, accelerator, views)  # fmt: skip
    return PictureRows(rows, tensors.labels)
