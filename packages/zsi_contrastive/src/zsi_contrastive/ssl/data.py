"""Pictures in: read and checked, then kept as levels on the device that trains, or decoded as they are needed."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from labs_common.cache import cached_directory
from labs_common.data import LabelledPictures
from labs_common.data.classes import read_classes
from labs_common.data.images import SUFFIXES, decoding_threads
from labs_common.data.pictures import checked, stratified_parts
from labs_common.data.splits import print_left_out
from labs_common.errors import LabError
from labs_common.progress import console, tracked
from labs_common.scenes import TASKS
from labs_common.training import read_ahead
from zsi_contrastive.ssl.config import PretrainDataOptions

DEMO_TASK, DEMO_SIDE = "look", 32
DEMO_SPLITS: dict[str, Sequence[int]] = {
    "train": range(4000),
    "validation": range(4000, 4500),
    "test": range(4500, 5500),
}
HELD = 8 << 30  # bytes of levels that are kept in memory; what is more is decoded anew
STORED = 8 / 7  # times the side of a view: as 256 is to 224
UNLABELLED = "picture"


def read_splits(options: PretrainDataOptions, seed: int, shown: bool) -> dict[str, LabelledPictures]:
    """Training, validation and test pictures; those of a directory without classes are all of class "picture".

    Raises:
        LabError: they cannot be read, or are too few.
    """
    folder = Path(options.data).expanduser() if options.data else None
    if folder is None or not folder.is_dir() or not any(file.suffix.lower() in SUFFIXES for file in folder.iterdir()):
        return read_classes(options, seed, shown, drawn_scenes)
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
    labels = np.zeros(len(files), dtype=np.int64)
    found = LabelledPictures(str(options.data), (UNLABELLED,), labels, files, [file.name for file in files])
    if options.limit:
        found = found.subset(np.sort(np.random.default_rng([seed, 1]).permutation(len(found))[: options.limit]))
    found = checked(found, options.on_bad_data, shown)
    if len(found) < 3:
        raise LabError(f"--data {options.data}: {len(found)} pictures are too few")
    kept, test = stratified_parts(found.labels, options.test_fraction, seed)
    train, validation = stratified_parts(found.labels[kept], options.validation_fraction, seed)
    parts = {"train": kept[train], "validation": kept[validation], "test": test}
    if shown:
        print_left_out({"all": found})
    return {name: found.subset(places) for name, places in parts.items()}


def drawn_scenes() -> Path:
    """Scenes of five things that share a colour and a texture; made now if never before."""
    from labs_common.scenes.files import write_parquet

    recipe = {"task": DEMO_TASK, "side": DEMO_SIDE, "splits": {name: [part[0], len(part)] for name, part in
                                                               DEMO_SPLITS.items()}, "format": 1}  # fmt: skip

    def make(folder: Path) -> None:
        console.print(
            f"drawing {sum(map(len, DEMO_SPLITS.values())):,} scenes in {len(TASKS[DEMO_TASK].classes)} looks"
        )
        write_parquet(folder, DEMO_TASK, DEMO_SPLITS, seed=0, side=DEMO_SIDE)

    return cached_directory("look-scenes", recipe, make)


class Levels:
    """The pictures of a split, each squeezed into a square, with its own proportions beside it.

    Attributes:
        pictures: what they are from.
        aspects: width by height of each (n,), on the CPU.
    """

    def __init__(self, pictures: LabelledPictures, side: int, device: torch.device, shown: bool) -> None:
        """`side` is that of a full view; pictures are kept a little larger, where the first one is."""
        self.pictures, self.device = pictures, device
        self.side = side if max(pictures.image(0).size) <= side else round(side * STORED)
        self.held: torch.Tensor | None = None
        sizes = np.empty((len(pictures), 2))
        kept = len(pictures) * 3 * self.side**2 <= HELD
        held = torch.empty(len(pictures) if kept else 0, 3, self.side, self.side, dtype=torch.uint8)

        def read(place: int) -> int:
            image = pictures.image(place)
            sizes[place] = image.size
            if kept:
                held[place] = torch.from_numpy(_levels(image, self.side))
            return place

        places = decoding_threads().map(read, range(len(pictures)))
        for _ in tracked(places, "decoding pictures", len(pictures), shown):
            pass
        self.aspects = torch.from_numpy(sizes[:, 0] / sizes[:, 1]).float()
        if kept:
            self.held = held.to(device)

    def __len__(self) -> int:
        return len(self.pictures)

    def batch(self, places: torch.Tensor) -> torch.Tensor:
        """Levels (places, 3, s, s) from 0 to 255 on the device."""
        if self.held is not None:
            return self.held[places.to(self.held.device)]

        def one(place: int) -> np.ndarray:
            return _levels(self.pictures.image(place), self.side)

        return torch.from_numpy(np.stack(list(decoding_threads().map(one, places.tolist())))).to(self.device)


def _levels(image: Image.Image, side: int) -> np.ndarray:
    squeezed = image if image.size == (side, side) else image.resize((side, side), Image.Resampling.BICUBIC)
    return np.array(squeezed).transpose(2, 0, 1)


class Batch(NamedTuple):
    """This process's part of a step.

    Attributes:
        pictures: levels (own, 3, s, s).
        aspects: of the whole step's pictures (n,).
        own: which of the whole step's these are.
        step: number of the optimizer step in the run.
    """

    pictures: torch.Tensor
    aspects: torch.Tensor
    own: slice
    step: int


@dataclass(frozen=True)
class Steps:
    """A `Source` of batches: every epoch in an order of its own; what is left over for a whole batch is left out."""

    levels: Levels
    batch_size: int
    seed: int
    process: int
    processes: int

    def __len__(self) -> int:
        return len(self.levels) // self.batch_size

    def steps(self, epoch: int, start: int) -> Iterator[list[Batch]]:
        """From step `start` of the epoch on; the next one is read while the caller computes."""
        order = torch.from_numpy(np.random.default_rng([self.seed, epoch]).permutation(len(self.levels)))
        each = self.batch_size // self.processes
        own = slice(self.process * each, (self.process + 1) * each)

        def read(step: int) -> list[Batch]:
            whole = order[step * self.batch_size : (step + 1) * self.batch_size]
            return [Batch(self.levels.batch(whole[own]), self.levels.aspects[whole], own, epoch * len(self) + step)]

        yield from read_ahead(read, range(start, len(self)))


def held_levels(
    splits: Mapping[str, LabelledPictures], side: int, device: torch.device, shown: bool
) -> dict[str, Levels]:
    """The levels of each split."""
    return {name: Levels(part, side, device, shown) for name, part in splits.items()}
