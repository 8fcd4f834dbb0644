"""Pictures in: read and checked, kept as pixels on the device that trains, and handed out in batches."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from labs_common.cache import cached_directory
from labs_common.data.classes import LabelledPictures, stratified_parts
from labs_common.data.images import SUFFIXES, checked, decoding_threads
from labs_common.data.readers import read_classes
from labs_common.data.splits import print_left_out
from labs_common.errors import LabError
from labs_common.progress import console, tracked
from labs_common.scenes.files import TASKS, write_parquet
from labs_common.steps import ShuffledSteps
from zsi_contrastive.ssl.config import PretrainDataOptions

DEMO_TASK, DEMO_SIDE = "look", 32
DEMO_SPLITS: dict[str, Sequence[int]] = {
    "train": range(4000),
    "validation": range(4000, 4500),
    "test": range(4500, 5500),
}
HELD = 8 << 30  # bytes of pixels that are kept in memory; larger data is decoded for each step
STORED = 8 / 7  # times the side of a view: as 256 is to 224
UNLABELLED = "picture"


def read_splits(options: PretrainDataOptions, seed: int, shown: bool) -> dict[str, LabelledPictures]:
    """Reads training, validation and test pictures; those of a directory without classes are all of class "picture".

    Raises:
        LabError: they cannot be read, or are too few.
    """
    folder = Path(options.data).expanduser() if options.data else None
    files = sorted(folder.iterdir()) if folder is not None and folder.is_dir() else []
    files = [file for file in files if file.suffix.lower() in SUFFIXES]
    if not files:
        return read_classes(options, seed, shown, drawn_scenes)
    labels = np.zeros(len(files), dtype=np.int64)
    whole = LabelledPictures(source=str(options.data), contents=files, names=[file.name for file in files],
                             classes=(UNLABELLED,), labels=labels)  # fmt: skip
    if options.limit:
        whole = whole.subset(np.sort(np.random.default_rng([seed, 1]).permutation(len(whole))[: options.limit]))
    whole = checked(whole, options.on_bad_data, shown)
    if len(whole) < 3:
        raise LabError(f"--data {options.data}: {len(whole)} pictures are too few")
    rest, test = stratified_parts(whole.labels, options.test_fraction, seed)
    train, validation = stratified_parts(whole.labels[rest], options.validation_fraction, seed)
    if shown:
        print_left_out({"all": whole})
    return {"train": whole.subset(rest[train]), "validation": whole.subset(rest[validation]),
            "test": whole.subset(test)}  # fmt: skip


def drawn_scenes() -> Path:
    """Draws scenes of five things that share a colour and a texture, unless they were drawn before."""
    splits = {name: [part[0], len(part)] for name, part in DEMO_SPLITS.items()}
    recipe = {"task": DEMO_TASK, "side": DEMO_SIDE, "splits": splits, "format": 1}

    def make(folder: Path) -> None:
        count = sum(map(len, DEMO_SPLITS.values()))
        console.print(f"drawing {count:,} scenes in {len(TASKS[DEMO_TASK].classes)} looks")
        write_parquet(folder, DEMO_TASK, DEMO_SPLITS, seed=0, side=DEMO_SIDE)

    return cached_directory("look-scenes", recipe, make)


class Pixels:
    """The pictures of a split as 8-bit pixels, each squeezed into a square, with its own proportions beside it.

    Attributes:
        pictures: the pictures that they are from.
        aspects: width by height of each (n,), on the CPU.
    """

    def __init__(self, pictures: LabelledPictures, side: int, device: torch.device, shown: bool) -> None:
        """`side` is that of a full view; pictures are kept a little larger, if the first one is."""
        self.pictures, self.device = pictures, device
        self.side = side if max(pictures.image(0).size) <= side else round(side * STORED)
        sizes = np.empty((len(pictures), 2))
        kept = len(pictures) * 3 * self.side**2 <= HELD
        held = torch.empty(len(pictures) if kept else 0, 3, self.side, self.side, dtype=torch.uint8)

        def read(place: int) -> None:
            image = pictures.image(place)
            sizes[place] = image.size
            if kept:
                held[place] = torch.from_numpy(self._squeezed(image))

        places = decoding_threads().map(read, range(len(pictures)))
        for _ in tracked(places, "decoding pictures", len(pictures), shown):
            pass
        self.aspects = torch.from_numpy(sizes[:, 0] / sizes[:, 1]).float()
        self.held = held.to(device) if kept else None

    def __len__(self) -> int:
        return len(self.pictures)

    def batch(self, places: torch.Tensor) -> torch.Tensor:
        """Pixels (places, 3, s, s) from 0 to 255 on the device."""
        if self.held is not None:
            return self.held[places.to(self.held.device)]
        read = decoding_threads().map(lambda place: self._squeezed(self.pictures.image(place)), places.tolist())
        return torch.from_numpy(np.stack(list(read))).to(self.device)

    def _squeezed(self, image: Image.Image) -> np.ndarray:
        """The pixels (3, s, s) of an image, whatever its proportions."""
        size = (self.side, self.side)
        squeezed = image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)
        return np.array(squeezed).transpose(2, 0, 1)


class Batch(NamedTuple):
    """This process's part of a step.

    Attributes:
        pixels: (own, 3, s, s).
        aspects: width by height of the whole step's pictures (n,).
        own: this process's part of the whole step.
        step: number of the optimizer step in the run.
    """

    pixels: torch.Tensor
    aspects: torch.Tensor
    own: slice
    step: int


def training_steps(data: Pixels, batch_size: int, seed: int, rank: int, processes: int) -> ShuffledSteps:
    """Cuts the pictures into steps of whole batches: the losses compare as many pictures in every step."""

    def batch(places: list[int], epoch: int, step: int) -> list[Batch]:
        each = len(places) // processes
        own = slice(rank * each, (rank + 1) * each)
        whole = torch.tensor(places)
        return [Batch(data.batch(whole[own]), data.aspects[whole], own, step)]

    return ShuffledSteps(len(data), batch_size, seed, batch, whole=True)
