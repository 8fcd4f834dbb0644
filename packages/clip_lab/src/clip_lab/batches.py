"""What a training step reads: pictures as they are kept, augmented by chance, with some of their captions each."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator

from clip_lab.config import Augment, CacheOptions, ImageOptions
from clip_lab.image import ImageTower
from clip_lab.model import ClipModel, Model, rows_of
from clip_lab.tokens import Words
from labs_common.cache import path_name
from labs_common.data import CaptionedPictures
from labs_common.data.described import PictureTensors
from labs_common.features import CachedRows, ComputedRows, Rows, cached_rows
from labs_common.freezing import state_hash
from labs_common.training import read_ahead

FRONT_BATCH = 64
LEAST_AREA, COLOUR = 0.7, 0.25


class Part(NamedTuple):
    """Pictures that go through the towers at once, with their captions.

    Attributes:
        pictures: 0 to 255 (pictures, 3, size, size), or what the frozen tower made of them (pictures, width).
        crops: how each is augmented (pictures, 5), see `augmented`; None if nothing is.
        words: (pictures × captions of each, length), padded; of a frozen text tower its features.
        ids: the number of each picture, the same for copies of one (pictures,).
        prefix: how many words of each caption are given and not predicted, the start among them (captions,).
        of_words: what a mean over this part's words is multiplied by, so that shares add up in a process and average
            over processes to the mean over all words of the step.
    """

    pictures: torch.Tensor
    crops: torch.Tensor | None
    words: torch.Tensor
    ids: torch.Tensor
    prefix: torch.Tensor
    of_words: float


@dataclass
class Step:
    """A process's share of an optimizer step; what its first part finds out for the others is kept in `known`."""

    parts: list[Part]
    known: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class Pairs:
    """A split: its pictures as they are read, and its captions as numbers.

    Attributes:
        rows: of the pictures; of the frozen tower's output if `frozen`.
        words: the numbers of every picture's captions.
        ids: the number of each picture, the same for copies of one (pictures,).
        text_rows: what the frozen text tower made of each caption, in their order.
    """

    rows: Rows
    size: int
    frozen: bool
    words: list[list[list[int]]]
    ids: np.ndarray
    text_rows: Rows | None = None

    def pictures(self, places: Sequence[int], view: int = 0) -> torch.Tensor:
        """See `Part.pictures`."""
        found = self.rows.rows(view, places)
        return found.float() if self.frozen else found.unflatten(1, (3, self.size, self.size))


@dataclass
class ClipSteps:
    """Training data for `labs_common.training.Loop`: pictures shuffled every epoch by the seed, captions drawn.

    Augmentation, captions and prefixes of a picture depend on the seed, the epoch and the picture alone, not on the
    process that has it. With `prefixes`, some first words of each caption are given (SimVLM); else the start alone.
    """

    data: Pairs
    collate: Words
    batch_size: int
    captions: int
    augment: Augment
    chunk: int
    seed: int
    views: int = 1
    prefixes: bool = False
    rank: int = 0
    processes: int = 1

    def __post_init__(self) -> None:
        count = min(self.batch_size, len(self.data.words))
        self.batch_size = count // self.processes * self.processes
        self._first = np.cumsum([0, *(len(captions) for captions in self.data.words)])  # of each picture, its captions

    def __len__(self) -> int:
        """Optimizer steps in an epoch; pictures that fill no batch are left out."""
        return len(self.data.words) // self.batch_size

    def steps(self, epoch: int, start: int) -> Iterator[list[tuple[Step, int]]]:
        """Yields this process's parts of each step of the epoch, read while the step before is computed."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.data.words)).tolist()

        def read(step: int) -> list[tuple[Step, int]]:
            whole = self.step(order[step * self.batch_size : (step + 1) * self.batch_size], epoch)
            return [(whole, number) for number in range(len(whole.parts))]

        return read_ahead(read, range(start, len(self)))

    def step(self, places: Sequence[int], epoch: int) -> Step:
        """This process's share of the step of which `places` are all pictures."""
        drawn = [self._drawn(place, epoch) for place in places]
        counts = [sum(len(words) - prefix for words, prefix in zip(d.words, d.prefix, strict=True)) for d in drawn]
        per_process = len(places) // self.processes
        mine = range(self.rank * per_process, (self.rank + 1) * per_process)
        size = self.chunk or per_process
        parts = []
        for first in range(0, len(mine), size):
            at = mine[first : first + size]
            share = sum(counts[place] for place in at) * self.processes / sum(counts)
            parts.append(self._part([places[place] for place in at], [drawn[place] for place in at], epoch, share))
        return Step(parts)

    def _part(self, places: list[int], drawn: "list[_Drawn]", epoch: int, share: float) -> Part:
        view = 0 if self.views == 1 else epoch % self.views
        prefix = torch.tensor([value for one in drawn for value in one.prefix])
        if self.data.text_rows is None:
            words = self.collate.together([row for one in drawn for row in one.words])
        else:
            captions = [self._first[place] + chosen for place, one in zip(places, drawn, strict=True)
                        for chosen in one.chosen]  # fmt: skip
            words = self.data.text_rows.rows(0, captions).float()
        crops = None
        if self.augment != "none" and not self.data.frozen:
            crops = torch.from_numpy(np.stack([one.crop for one in drawn]))
        return Part(self.data.pictures(places, view), crops, words, torch.from_numpy(self.data.ids[places]), prefix,
                    share)  # fmt: skip

    def _drawn(self, place: int, epoch: int) -> "_Drawn":
        generator = np.random.default_rng([self.seed, epoch, place])
        captions = self.data.words[place]
        chosen = np.resize(generator.permutation(len(captions)), self.captions).tolist()
        crop = drawn_crop(generator, self.augment)
        words = [captions[number] for number in chosen]
        prefix = [1 + int(generator.integers(len(row) - 1)) if self.prefixes else 1 for row in words]
        return _Drawn(chosen, words, prefix, crop)


class _Drawn(NamedTuple):
    chosen: list[int]
    words: list[list[int]]
    prefix: list[int]
    crop: np.ndarray


def drawn_crop(generator: np.random.Generator, augment: Augment) -> np.ndarray:
    """Side of the part, its middle across and down (-1 to 1), brightness and contrast: what `augmented` does."""
    side = np.sqrt(generator.uniform(LEAST_AREA, 1.0)) if augment != "none" else 1.0
    middle = generator.uniform(-1, 1, 2) * (1 - side)
    colour = generator.uniform(1 - COLOUR, 1 + COLOUR, 2) if augment == "crop+colour" else np.ones(2)
    return np.array([side, *middle, *colour], dtype=np.float32)


def augmented(pictures: torch.Tensor, crops: torch.Tensor | None) -> torch.Tensor:
    """Pictures of 0 to 255 (pictures, 3, size, size), each cropped and coloured as its row of `crops` says; floats."""
    pictures = pictures.float()
    if crops is None:
        return pictures
    side, across, down, brightness, contrast = crops.unbind(1)
    zero = torch.zeros_like(side)
    theta = torch.stack([side, zero, across, zero, side, down], 1).unflatten(1, (2, 3))
    grid = F.affine_grid(theta, list(pictures.shape), align_corners=False)
    found = F.grid_sample(pictures, grid, padding_mode="reflection", align_corners=False)
    mean = found.mean((1, 2, 3), keepdim=True)
    return ((found - mean) * contrast[:, None, None, None] + mean * brightness[:, None, None, None]).clamp(0, 255)


def normalised(pictures: torch.Tensor, tower: ImageTower) -> torch.Tensor:
    """Pictures of 0 to 255 as the tower reads them."""
    mean, std = (torch.tensor(values, device=pictures.device)[:, None, None] for values in (tower.mean, tower.std))
    return (pictures.float() / 255 - mean) / std


def picture_rows(name: str, tensors: PictureTensors, options: CacheOptions, shown: bool) -> Rows:
    """A split's pictures at the tower's size, 0 to 255, decoded once and kept on disk if asked.

    Raises:
        LabError: the cache's disk is full or broken.
    """

    def compute(_: int, places: Sequence[int]) -> torch.Tensor:
        return tensors.levels(places).flatten(1)

    if not options.cache:
        return ComputedRows(compute, "uint8")
    recipe = tensors.recipe() | {"mean": None, "std": None}  # levels do not depend on them
    width = 3 * tensors.transform.size**2
    return cached_rows(f"pictures-{name}", recipe, len(tensors.pictures), 1, width, "uint8", compute, shown)


def frozen_rows(
    name: str, pictures: Rows, model: Model, image: ImageOptions, options: CacheOptions, augment: Augment, seed: int,
    recipe: dict[str, Any], count: int, accelerator: Accelerator,
) -> Rows:  # fmt: skip
    """What the frozen image tower makes of a split's pictures; view 0 is plain, every other one augmented by chance.

    Raises:
        LabError: the cache's disk is full or broken.
    """
    tower = model.image.to(accelerator.device).eval()

    @torch.no_grad()
    def compute(view: int, places: Sequence[int]) -> torch.Tensor:
        parts = []
        for first in range(0, len(places), FRONT_BATCH):
            at = places[first : first + FRONT_BATCH]
            crops = None
            if view:
                draws = [drawn_crop(np.random.default_rng([seed, view, place]), augment) for place in at]
                crops = torch.from_numpy(np.stack(draws)).to(accelerator.device)
            levels = pictures.rows(0, at).unflatten(1, (3, tower.size, tower.size)).to(accelerator.device)
            with accelerator.autocast():
                parts.append(rows_of(model, normalised(augmented(levels, crops), tower)))
        return torch.cat(parts)

    precision = options.boundary_precision
    if not options.cache:
        return ComputedRows(compute, precision)
    width = tower.width if model.reads == "feature" else tower.width * tower.count
    whole = recipe | {
        "architecture": tower.architecture, "arguments": tower.arguments, "weights": state_hash(tower),
        "reads": model.reads, "precision": accelerator.mixed_precision, "timm": timm.__version__,
        "torch": torch.__version__.split("+")[0], "augment": augment if image.views > 1 else None, "seed": seed,
    }  # fmt: skip
    return cached_rows(f"{path_name(tower.architecture)}-{name}", whole, count, image.views, width, precision, compute,
                       accelerator.is_main_process)  # fmt: skip


def frozen_text_rows(
    name: str, words: Sequence[Sequence[int]], collate: Words, model: Model, options: CacheOptions,
    accelerator: Accelerator,
) -> Rows:  # fmt: skip
    """What the frozen text tower makes of captions, each once.

    Raises:
        LabError: the cache's disk is full or broken.
    """
    assert isinstance(model, ClipModel)
    tower = model.text.to(accelerator.device).eval()

    @torch.no_grad()
    def compute(_: int, places: Sequence[int]) -> torch.Tensor:
        parts = []
        for first in range(0, len(places), FRONT_BATCH):
            rows = collate.together([words[place] for place in places[first : first + FRONT_BATCH]])
            with accelerator.autocast():
                parts.append(tower(rows.to(accelerator.device)).feature.float())
        return torch.cat(parts)

    if not options.cache:
        return ComputedRows(compute, options.boundary_precision)
    recipe = {
        "captions": state_of(words), "weights": state_hash(tower), "precision": accelerator.mixed_precision,
        "torch": torch.__version__.split("+")[0],
    }  # fmt: skip
    return cached_rows(f"captions-{name}", recipe, len(words), 1, tower.width, options.boundary_precision, compute,
                       accelerator.is_main_process)  # fmt: skip


def state_of(words: Sequence[Sequence[int]]) -> str:
    """A hash of captions as numbers."""
    return hashlib.blake2b(repr([list(row) for row in words]).encode(), digest_size=16).hexdigest()


def picture_ids(pictures: CaptionedPictures) -> np.ndarray:
    """A number for each picture, the same for copies of one (pictures,)."""
    known: dict[bytes, int] = {}
    return np.array([known.setdefault(digest, len(known)) for digest in pictures.digests], dtype=np.int64)


def disk_bytes(rows: Sequence[Rows | None]) -> int:
    """Bytes of the caches."""
    return sum(part.bytes_on_disk for part in rows if isinstance(part, CachedRows))
