"""Pictures and captions in: the three splits, recorded, and pictures as the encoder sees them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from caption_lab.config import DataOptions
from caption_lab.encoder import Encoder
from caption_lab.tiny import RECIPE, demo_scene
from labs_common.cache import cached_directory
from labs_common.data import CaptionedPictures, caption_splits, print_left_out, read_captioned
from labs_common.data.images import RESAMPLING, decoding_threads
from labs_common.progress import console
from labs_common.scenes import Scene

# The offline data. The numbers of its scenes are others than those that the encoder was pre-trained on: its seed is 0.
DEMO_SIDE, DEMO_COUNT = 64, 9000


@dataclass(frozen=True)
class Transform:
    """A picture as the encoder sees it: the whole of it, squeezed into a square, in the encoder's mean and deviation.

    Nothing is cut off, because captions speak of all of it, and nothing is mirrored, because they say left and right.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str

    def levels(self, image: Image.Image) -> np.ndarray:
        """(size, size, 3) of 0 to 255."""
        how = RESAMPLING.get(self.interpolation, Image.Resampling.BICUBIC)
        return np.asarray(image.resize((self.size, self.size), how))

    def normalised(self, levels: Sequence[np.ndarray]) -> torch.Tensor:
        """Pictures (batch, 3, size, size) as the encoder reads them."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (torch.from_numpy(np.stack(levels)).permute(0, 3, 1, 2).float() / 255 - mean) / std


def transform_of(encoder: Encoder) -> Transform:
    """What the encoder was trained on."""
    return Transform(encoder.size, encoder.mean, encoder.std, encoder.interpolation)


@dataclass(frozen=True)
class PictureTensors:
    """The pictures of a split as tensors, decoded in threads."""

    pictures: CaptionedPictures
    transform: Transform

    def batch(self, places: Sequence[int]) -> torch.Tensor:
        """Pictures (places, 3, size, size)."""
        levels = decoding_threads().map(lambda place: self.transform.levels(self.pictures.image(place)), places)
        return self.transform.normalised(list(levels))

    def recipe(self) -> dict[str, Any]:
        """All that the tensors depend on, as JSON values."""
        return asdict(self.transform) | {"pictures": self.pictures.fingerprint()}


@dataclass(frozen=True)
class Captions:
    """The three splits, and what drawn pictures show.

    Attributes:
        splits: by name.
        truth: the scene of each picture by its name; empty for photographs.
    """

    splits: dict[str, CaptionedPictures]
    truth: dict[str, Scene]

    @property
    def left_out(self) -> dict[str, int]:
        """How many pictures and captions were left out, by reason."""
        return dict(self.splits["train"].left_out)


def read_data(options: DataOptions, seed: int, shown: bool) -> Captions:
    """Training, validation and test pictures, every one decoded once; what was left out is printed if `shown`.

    Raises:
        LabError: the data cannot be read, or some of it and --on-bad-data says so, or it is too small.
    """
    folder = read_folder(options)
    pictures = read_captioned(folder, options.on_bad_data, shown)
    if options.data is None:
        pictures = replace(pictures, source="drawn scenes")
    splits = caption_splits(pictures, options.splits or folder, seed=seed)
    if options.limit:
        most = {"train": options.limit, "validation": -(-options.limit // 8), "test": -(-options.limit // 8)}
        splits = {name: at_most(part, most[name], seed) for name, part in splits.items()}
    if shown:
        print_left_out(splits)
    return Captions(splits, truth_of(folder, list(splits.values())))


def read_folder(options: DataOptions) -> Path:
    """The directory that --data names, or that of the drawn scenes, made now if never before."""
    return Path(options.data) if options.data else _demo_data()


def truth_of(folder: Path, parts: Sequence[CaptionedPictures]) -> dict[str, Scene]:
    """What the pictures show, where that is known."""
    from labs_common.scenes.files import read_truth

    known = read_truth(folder)
    return {name: known[name] for part in parts for name in part.names if name in known}


def at_most(pictures: CaptionedPictures, count: int, seed: int) -> CaptionedPictures:
    """`count` of the pictures by chance, in their order, or all if there are no more."""
    if len(pictures) <= count:
        return pictures
    return pictures.subset(np.sort(np.random.default_rng([seed, 3]).permutation(len(pictures))[:count]))


def _demo_data() -> Path:
    """Drawn scenes with five captions each, as Flickr8k is laid out."""
    from labs_common.scenes.files import write_flickr8k

    def make(folder: Path) -> None:
        console.print(f"drawing {DEMO_COUNT} scenes with captions")
        write_flickr8k(folder, range(DEMO_COUNT), seed=0, side=DEMO_SIDE, sample=demo_scene)

    return cached_directory(
        "captioned-scenes", {"side": DEMO_SIDE, "count": DEMO_COUNT, "scenes": RECIPE, "format": 1}, make
    )
