"""Pictures and captions in, batches of a training step out: read, augmented by chance, with some captions each."""

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator

from clip_lab.config import BatchOptions, CacheOptions, TrainConfig
from clip_lab.image import ImageTower
from clip_lab.model import Model, tower_rows
from clip_lab.tokens import Words
from labs_common.data.captions import (
    CaptionedPictures,
    Captions,
    PictureTensors,
    Transform,
    augmented,
    drawn_crop,
    read_captions,
)
from labs_common.device import CPU, constant, pinned
from labs_common.errors import LabError, text_of
from labs_common.frozen.cache import Rows, front_rows
from labs_common.options import CaptionDataOptions
from labs_common.scenes.files import cached_flickr8k
from labs_common.scenes.world import Scene, random_scene
from labs_common.steps import ShuffledSteps

# The offline world: so small that relations have to be learnt as well, not only what there is.
SHAPES, COLOURS, RADII = ("circle", "square", "triangle"), ("red", "yellow", "green", "blue"), (0.15, 0.19)
TWO = 0.85  # share of the scenes with two things, whose relation is told
DEMO_SIDE, DEMO_COUNT = 32, 9000  # pixels; 7,200 scenes to train on are enough for relations to be learnt


def demo_scene(generator: np.random.Generator) -> Scene:
    """Draws one plain thing, or two of them in most scenes."""
    count = 1 + int(generator.random() < TWO)
    looks = [
        (SHAPES[generator.integers(len(SHAPES))], COLOURS[generator.integers(len(COLOURS))], "plain")
        for _ in range(count)
    ]
    return random_scene(generator, count, (RADII,), looks)


def drawn_scenes() -> Path:
    """Returns the directory of drawn scenes with five captions each; they are made now if never before."""
    recipe: dict[str, Any] = {"shapes": SHAPES, "colours": COLOURS, "radii": RADII, "two": TWO, "side": DEMO_SIDE}
    recipe |= {"count": DEMO_COUNT, "format": 1}
    return cached_flickr8k("clip-scenes", recipe, DEMO_COUNT, DEMO_SIDE, demo_scene)


def read_data(options: CaptionDataOptions, seed: int, shown: bool) -> Captions:
    """Reads the splits of --data, or of the drawn scenes; see `read_captions`."""
    return read_captions(options, seed, shown, drawn_scenes)


def lines_of(file: Path, option: str) -> list[str]:
    """Reads the lines of a text file that hold something.

    Raises:
        LabError: it cannot be read, or holds none.
    """
    found = [line.strip() for line in text_of(file, f"{option} {file}").split("\n") if line.strip()]
    if not found:
        raise LabError(f"{option} {file}: holds no line of text")
    return found


def transform_of(tower: ImageTower) -> Transform:
    """Returns the transform of a picture into the tower's square: the whole of it, squeezed; a released one's own."""
    return getattr(tower, "view", None) or Transform(tower.size, tower.mean, tower.std, tower.interpolation)


@dataclass(frozen=True)
class Pairs:
    """A split: its pictures as they are read, and its captions as numbers.

    Attributes:
        rows: of the pictures; of the frozen tower's output if `frozen`.
        size: the side of the pictures.
        words: the numbers of every picture's captions.
        ids: the number of each picture, the same for copies of one (pictures,).
        text_rows: the frozen text tower's feature of each caption, in their order.
    """

    rows: Rows
    size: int
    frozen: bool
    words: list[list[list[int]]]
    ids: np.ndarray
    text_rows: Rows | None = None

    def pictures(self, places: Sequence[int], view: int = 0) -> torch.Tensor:
        """Reads the pictures at these places; see `Part.pictures`."""
        found = self.rows.rows(view, places)
        return found.float() if self.frozen else found.unflatten(1, (3, self.size, self.size))

    def captions(self, chosen: Sequence[tuple[int, int]], words: Words) -> torch.Tensor:
        """Reads captions, each by its picture and its number among that picture's; see `Part.words`."""
        if self.text_rows is None:
            return words.together([self.words[place][caption] for place, caption in chosen])
        return self.text_rows.rows(0, [self._first[place] + caption for place, caption in chosen]).float()

    @cached_property
    def _first(self) -> list[int]:
        """The row of each picture's first caption."""
        return list(itertools.accumulate(map(len, self.words), initial=0))


class Part(NamedTuple):
    """Pictures that go through the towers at once, with their captions.

    Attributes:
        pictures: 0 to 255 (pictures, 3, size, size), or the frozen tower's output for them (pictures, width).
        crops: how each is augmented (pictures, 5), see `augmented`; None if nothing is.
        words: (pictures × captions of each, length), padded; of a frozen text tower its features.
        ids: the number of each picture, the same for copies of one (pictures,).
        prefix: how many words of each caption are given and not predicted, the start among them (captions,).
        of_words: the factor of a mean over this part's words, so that shares add up in a process and average over
            processes to the mean over all words of the step.
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
class Batches:
    """Makes the batches of `labs_common.steps.ShuffledSteps`: this process's parts of each step.

    Augmentation, captions and prefixes of a picture depend on the seed, the epoch and the picture alone, not on the
    process that has it. With `prefixes`, some first words of each caption are given (SimVLM); else the start alone.
    `device` is the one that will compute with them.
    """

    data: Pairs
    words: Words
    options: BatchOptions
    seed: int
    views: int = 1
    prefixes: bool = False
    rank: int = 0
    processes: int = 1
    device: torch.device = CPU

    def steps(self, batch_size: int) -> ShuffledSteps:
        """Cuts the data into steps of `batch_size` pictures over all processes; those that fill none are left out."""
        count = len(self.data.words)
        size = min(batch_size, count) // self.processes * self.processes
        return ShuffledSteps(count, size, self.seed, lambda places, epoch, _: self(places, epoch), whole=True)

    def __call__(self, places: Sequence[int], epoch: int) -> list[tuple[Step, int]]:
        """Returns this process's share of the step whose pictures are at `places`, once with each part's number."""
        drawn = [self._drawn(place, epoch) for place in places]
        predicted = sum(one.predicted for one in drawn)
        count = len(places) // self.processes  # every process has as many
        mine, size = drawn[self.rank * count : (self.rank + 1) * count], self.options.chunk or count
        step = Step([self._part(mine[first : first + size], epoch, predicted) for first in range(0, count, size)])
        return [(step, number) for number in range(len(step.parts))]

    def _part(self, drawn: list["_Drawn"], epoch: int, predicted: int) -> Part:
        places = [one.place for one in drawn]
        chosen = [(one.place, caption) for one in drawn for caption in one.captions]
        crops, device = None, self.device
        if self.options.augment not in (None, "none") and not self.data.frozen:
            crops = pinned(torch.from_numpy(np.stack([one.crop for one in drawn])), device)
        return Part(
            pinned(self.data.pictures(places, epoch % self.views), device),
            crops,
            pinned(self.data.captions(chosen, self.words), device),
            pinned(torch.from_numpy(self.data.ids[places]), device),
            pinned(torch.tensor([value for one in drawn for value in one.prefix]), device),
            sum(one.predicted for one in drawn) * self.processes / predicted,
        )

    def _drawn(self, place: int, epoch: int) -> "_Drawn":
        generator = np.random.default_rng([self.seed, epoch, place])
        captions = self.data.words[place]
        chosen = np.resize(generator.permutation(len(captions)), self.options.captions_per_picture).tolist()
        crop = drawn_crop(generator, self.options.augment)
        lengths = [len(captions[number]) for number in chosen]
        prefix = [1 + int(generator.integers(length - 1)) if self.prefixes else 1 for length in lengths]
        return _Drawn(place, chosen, prefix, sum(lengths) - sum(prefix), crop)


class _Drawn(NamedTuple):
    """A picture of a step with the numbers of its captions, their prefixes, and how many words are predicted."""

    place: int
    captions: list[int]
    prefix: list[int]
    predicted: int
    crop: np.ndarray


def normalised(pictures: torch.Tensor, tower: ImageTower) -> torch.Tensor:
    """Turns pictures of 0 to 255 into the tower's input."""
    mean, std = (constant(values, pictures.device)[:, None, None] for values in (tower.mean, tower.std))
    return (pictures.float() / 255 - mean) / std


def read_pairs(
    name: str, pictures: CaptionedPictures, config: TrainConfig, model: Model, words: Words, accelerator: Accelerator
) -> Pairs:
    """Reads the split `name` as training does: pictures decoded, frozen towers run, captions as numbers.

    Raises:
        LabError: the cache's disk is full or broken.
    """
    tensors = PictureTensors(pictures, transform_of(model.image))
    rows = picture_rows(name, tensors, config.cache, accelerator)
    if config.image.freeze_image:
        rows = _frozen_rows(name, rows, tensors, config, model, accelerator)
    numbers = [[words.numbers(caption) for caption in captions] for captions in pictures.captions]
    text_rows = None
    if config.text.freeze_text:
        captions = [row for of_picture in numbers for row in of_picture]
        text_rows = _frozen_text_rows(name, captions, words, config, model, accelerator)
    return Pairs(rows, model.image.size, config.image.freeze_image, numbers, picture_ids(pictures), text_rows)


def picture_ids(pictures: CaptionedPictures) -> np.ndarray:
    """Gives each picture a number, the same to copies of one (pictures,)."""
    known: dict[bytes, int] = {}
    return np.array([known.setdefault(digest, len(known)) for digest in pictures.digests], dtype=np.int64)


def picture_rows(name: str, tensors: PictureTensors, options: CacheOptions, accelerator: Accelerator) -> Rows:
    """Returns a split's pictures at the tower's size, 0 to 255, decoded once and kept on disk if asked.

    Raises:
        LabError: the cache's disk is full or broken.
    """

    def compute(_: int, places: Sequence[int]) -> torch.Tensor:
        return tensors.levels(places).flatten(1)

    recipe = tensors.recipe() | {"mean": None, "std": None}  # levels do not depend on them
    count, width = len(tensors.pictures), 3 * tensors.transform.size**2
    return front_rows(f"pictures-{name}", None, compute, count, width, recipe, options, accelerator, precision="uint8")


def _frozen_rows(
    name: str, pictures: Rows, tensors: PictureTensors, config: TrainConfig, model: Model, accelerator: Accelerator
) -> Rows:
    """Returns the frozen image tower's output for a split's pictures.

    Of the training pictures there are `--views` versions; view 0 is plain, every other one augmented by chance.
    """
    tower, augment, seed = model.image.to(accelerator.device).eval(), config.batch.augment, config.run.seed
    views = config.image.views if name == "train" else 1

    def compute(view: int, places: Sequence[int]) -> torch.Tensor:
        crops = None
        if view:
            draws = [drawn_crop(np.random.default_rng([seed, view, place]), augment) for place in places]
            crops = torch.from_numpy(np.stack(draws)).to(accelerator.device)
        levels = pictures.rows(0, places).unflatten(1, (3, tower.size, tower.size)).to(accelerator.device)
        return tower_rows(model, normalised(augmented(levels, crops), tower))

    width = tower.width if model.reads == "feature" else tower.width * tower.count
    recipe = tensors.recipe() | {"reads": model.reads, "stages": tower.stages}
    if views > 1:
        recipe |= {"augment": augment, "seed": seed}
    title, count = f"{tower.architecture}-{name}", len(tensors.pictures)
    return front_rows(title, tower, compute, count, width, recipe, config.cache, accelerator, views)


def _frozen_text_rows(
    name: str, rows: Sequence[Sequence[int]], words: Words, config: TrainConfig, model: Model, accelerator: Accelerator
) -> Rows:
    """Returns the frozen text tower's features of captions as numbers, each computed once."""
    assert not model.writes  # what writes needs a causal tower, and that is never frozen
    whole: Any = model
    tower = whole.text.to(accelerator.device).eval()

    def compute(_: int, places: Sequence[int]) -> torch.Tensor:
        read = words.together([rows[place] for place in places])
        return tower(read.to(accelerator.device)).feature.float()

    captions = hashlib.blake2b(repr([list(row) for row in rows]).encode(), digest_size=16).hexdigest()
    recipe = {"captions": captions, "end": words.end, "pad": words.pad}
    title, count = f"captions-{name}", len(rows)
    return front_rows(title, tower.network, compute, count, tower.width, recipe, config.cache, accelerator)
