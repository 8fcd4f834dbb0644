"""Pictures in: the three splits, checked and recorded, and the tensors that a network sees."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from labs_common.cache import cached_directory
from labs_common.data import LabelledPictures
from labs_common.data.classes import read_classes
from labs_common.data.images import RESAMPLING, decoding_threads
from labs_common.progress import console
from labs_common.scenes import TASKS
from vit_transfer.config import Augment, DataOptions

# The offline data: few enough pictures to train on that what was learnt before has to help.
DEMO_TASK, DEMO_SIDE = "count", 48
DEMO_SPLITS: dict[str, Sequence[int]] = {"train": range(400), "validation": range(400, 600), "test": range(600, 1600)}


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
        """(3, size, size) in 0 to 255; view 0 is plain, every other its own augmentation of picture `place`."""
        side: float = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        mirrored = False
        if view:
            generator = np.random.default_rng([self.seed, view, place])
            mirrored = generator.random() < 0.5
            if self.augment == "crop":
                cut = side * generator.uniform(0.7, 1.0)
                left, top = left + generator.uniform(0, side - cut), top + generator.uniform(0, side - cut)
                side = cut
        box = (left, top, left + side, top + side)
        resized = image.resize((self.size, self.size), RESAMPLING[self.interpolation], box)
        return np.asarray(ImageOps.mirror(resized) if mirrored else resized).transpose(2, 0, 1)

    def normalised(self, levels: torch.Tensor) -> torch.Tensor:
        """Levels (batch, 3, size, size) of 0 to 255 as the network reads them."""
        mean, std = (torch.tensor(values, device=levels.device)[:, None, None] for values in (self.mean, self.std))
        return (levels.float() / 255 - mean) / std


def transform_of(model: torch.nn.Module, size: int, options: DataOptions, seed: int) -> Transform:
    """What timm says that the model was trained on, without its crop: small pictures have nothing to spare."""
    from timm.data import resolve_model_data_config

    known = resolve_model_data_config(model)
    return Transform(
        size, tuple(known["mean"]), tuple(known["std"]),
        known["interpolation"] if known["interpolation"] in RESAMPLING else "bicubic", options.augment, seed,
    )  # fmt: skip


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
        """Pictures (places, 3, size, size) as the network reads them."""
        return self.transform.normalised(self.levels(view, places))

    def levels(self, view: int, places: Sequence[int]) -> torch.Tensor:
        """Pictures (places, 3, size, size) at the network's size, in 0 to 255."""

        def one(place: int) -> np.ndarray:
            return self.transform.levels(self.pictures.image(place), view, place)

        return torch.from_numpy(np.stack(list(decoding_threads().map(one, places))))

    def recipe(self, views: int) -> dict[str, Any]:
        """All that the tensors depend on, as JSON values."""
        said = asdict(self.transform) | {"pictures": self.pictures.fingerprint()}
        if views == 1:  # nothing is drawn by chance
            said.pop("augment"), said.pop("seed")
        return said


def read_splits(options: DataOptions, seed: int, shown: bool) -> dict[str, LabelledPictures]:
    """The splits of --data, or of the drawn scenes; see `read_classes`."""
    return read_classes(options, seed, shown, _demo_data)


def _demo_data() -> Path:
    """Drawn scenes whose things are to be counted, as parquet files."""
    from labs_common.scenes.files import write_parquet

    recipe = {
        "task": DEMO_TASK,
        "side": DEMO_SIDE,
        "splits": {name: [part[0], len(part)] for name, part in DEMO_SPLITS.items()},
    }

    def make(folder: Path) -> None:
        console.print(f"drawing {sum(map(len, DEMO_SPLITS.values()))} scenes ({TASKS[DEMO_TASK].question})")
        write_parquet(folder, DEMO_TASK, DEMO_SPLITS, seed=0, side=DEMO_SIDE)

    return cached_directory("counting-scenes", recipe | {"format": 1}, make)
