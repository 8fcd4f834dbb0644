"""Pictures with captions as labs use them: three splits, what drawn pictures show, and tensors of a network's size."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from labs_common.data.captions import CaptionedPictures, caption_splits, read_captioned
from labs_common.data.images import RESAMPLING, decoding_threads
from labs_common.data.splits import print_left_out
from labs_common.options import CaptionDataOptions
from labs_common.scenes import Scene


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


@dataclass(frozen=True)
class PictureTensors:
    """The pictures of a split as tensors, decoded in threads."""

    pictures: CaptionedPictures
    transform: Transform

    def batch(self, places: Sequence[int]) -> torch.Tensor:
        """Pictures (places, 3, size, size) as the network reads them."""
        return self.transform.normalised(self._levels(places))

    def levels(self, places: Sequence[int]) -> torch.Tensor:
        """Pictures (places, 3, size, size) of 0 to 255."""
        return torch.from_numpy(np.stack(self._levels(places))).permute(0, 3, 1, 2).contiguous()

    def _levels(self, places: Sequence[int]) -> list[np.ndarray]:
        return list(decoding_threads().map(lambda place: self.transform.levels(self.pictures.image(place)), places))

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


def read_captions(options: CaptionDataOptions, seed: int, shown: bool, drawn: Callable[[], Path]) -> Captions:
    """Training, validation and test pictures, every one decoded once; what was left out is printed if `shown`.

    `drawn` gives the directory of the scenes that are read without --data.

    Raises:
        LabError: the data cannot be read, or some of it and --on-bad-data says so, or it is too small.
    """
    folder = Path(options.data) if options.data else drawn()
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
