"""What the decoder reads: a row of the encoder's frozen front for each picture, kept once for all its captions."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import timm
import torch
from accelerate import Accelerator

from caption_lab.config import CacheOptions
from caption_lab.encoder import Encoder
from caption_lab.vocabulary import Vocabulary, padded
from labs_common.cache import path_name
from labs_common.data import CaptionedPictures
from labs_common.data.described import PictureTensors
from labs_common.features import CachedRows, ComputedRows, Rows, cached_rows
from labs_common.freezing import state_hash
from labs_common.training import read_ahead

FRONT_BATCH = 64
Order = Literal["captions", "by picture", "pictures"]


class Batch(NamedTuple):
    """A process's part of an optimizer step.

    Attributes:
        rows: of the encoder's front (pictures, width), each picture once however many of its captions are there.
        of_rows: which of them belongs to each caption (captions,).
        words: (captions, length), from `<start>` on, padded.
        pictures: each caption's picture, by its place in the split.
        of_words: what a mean over this part's words is multiplied by, so that the processes' mean is the mean over all
            words of the step; 0 for a process without a part.
        of_captions: the same for a mean over captions.
    """

    rows: torch.Tensor
    of_rows: torch.Tensor
    words: torch.Tensor
    pictures: list[int]
    of_words: float
    of_captions: float


@dataclass(frozen=True)
class CaptionRows:
    """A split: the front's output for its pictures, and its captions as numbers.

    Attributes:
        pairs: of each caption its picture and its words.
    """

    rows: Rows
    pairs: list[tuple[int, list[int]]]

    def of_pictures(self, places: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of the pictures that occur (pictures, width), and which of them each place is (places,)."""
        unique, where = np.unique(np.asarray(places), return_inverse=True)
        return self.rows.rows(0, unique.tolist()), torch.from_numpy(where)


@dataclass
class CaptionSteps:
    """Training data for `labs_common.training.Loop`: shuffled every epoch by the seed.

    `order` shuffles captions; pictures, of which all captions follow each other ("by picture"); or pictures of which
    only the first caption comes ("pictures").
    """

    data: CaptionRows
    batch_size: int
    seed: int
    order: Order = "captions"
    rank: int = 0
    processes: int = 1

    def __post_init__(self) -> None:
        of_picture: dict[int, list[int]] = {}
        for number, (picture, _) in enumerate(self.data.pairs):
            of_picture.setdefault(picture, []).append(number)
        of_each = list(of_picture.values())
        # What stays together when the order is drawn.
        self._parts = {
            "captions": [[number] for numbers in of_each for number in numbers],
            "by picture": of_each,
            "pictures": [numbers[:1] for numbers in of_each],
        }[self.order]

    def __len__(self) -> int:
        """Optimizer steps in an epoch; the last may be smaller."""
        return -(-sum(map(len, self._parts)) // self.batch_size)

    def steps(self, epoch: int, start: int) -> Iterator[list[Batch]]:
        """Yields this process's part of each step of the epoch, read while the step before is computed.

        The reading thread computes nothing with torch: threads of its own would take the time of the computing ones.
        """
        shuffled = np.random.default_rng([self.seed, epoch]).permutation(len(self._parts)).tolist()
        order = [number for part in shuffled for number in self._parts[part]]

        def read(step: int) -> Batch:
            return self.batch(order[step * self.batch_size : (step + 1) * self.batch_size])

        return ([batch] for batch in read_ahead(read, range(start, len(self))))

    def batch(self, numbers: list[int]) -> Batch:
        """This process's part of one step, of which `numbers` are all captions."""
        mine = numbers[self.rank :: self.processes]
        lengths = {number: len(self.data.pairs[number][1]) - 1 for number in numbers}  # words that are predicted
        of_words = sum(lengths[number] for number in mine) * self.processes / sum(lengths.values())
        of_captions = len(mine) * self.processes / len(numbers)
        chosen = [self.data.pairs[number] for number in mine or numbers[:1]]  # every process takes part in every step
        pictures = [picture for picture, _ in chosen]
        return Batch(*self.data.of_pictures(pictures), padded([words for _, words in chosen])[0], pictures,
                     of_words, of_captions)  # fmt: skip


def encoded_pairs(pictures: CaptionedPictures, vocabulary: Vocabulary) -> list[tuple[int, list[int]]]:
    """Every caption of every picture as its picture's place and its words' numbers."""
    return [
        (place, words)
        for place, captions in enumerate(pictures.captions)
        for words in map(vocabulary.encode, captions)
        if len(words) > 2  # of punctuation alone nothing is left
    ]


def front_rows(
    name: str, tensors: PictureTensors, encoder: Encoder, options: CacheOptions, accelerator: Accelerator
) -> Rows:
    """The front's output for a split called `name`, with whatever its cache lacks computed now.

    The encoder is on its device. Where nothing of it is frozen, the rows are the pictures.

    Raises:
        LabError: the cache's disk is full or broken.
    """
    if not encoder.has_front:
        return ComputedRows(lambda _, places: tensors.batch(places), "fp32")

    def compute(_: int, places: Sequence[int]) -> torch.Tensor:
        parts = []
        for first in range(0, len(places), FRONT_BATCH):
            pictures = tensors.batch(places[first : first + FRONT_BATCH]).to(accelerator.device)
            with torch.no_grad(), accelerator.autocast():
                parts.append(encoder.front(pictures))
        return torch.cat(parts)

    precision = options.boundary_precision
    if not options.cache:
        return ComputedRows(compute, precision)
    recipe = {"front": _front_recipe(encoder, accelerator), "tensors": tensors.recipe()}
    return cached_rows(f"{path_name(encoder.architecture)}-{name}", recipe, len(tensors.pictures), 1, encoder.row_width,
                       precision, compute, accelerator.is_main_process)  # fmt: skip


def _front_recipe(encoder: Encoder, accelerator: Accelerator) -> dict[str, Any]:
    """All that the front's output depends on besides the pictures: its code, its weights, the arithmetic."""
    front = encoder.front_module
    modules = [f"{name}: {type(layer).__name__}({layer.extra_repr()})" for name, layer in front.named_modules()]
    code = getattr(getattr(front, "graph_module", None), "code", "")
    return {
        "encoder": encoder.architecture,
        "pool": encoder.pool,
        "code": hashlib.sha256("\n".join([code, *modules]).encode()).hexdigest(),
        "weights": state_hash(front),
        "precision": accelerator.mixed_precision,
        "torch": torch.__version__.split("+")[0],
        "timm": timm.__version__,
    }


def disk_bytes(rows: Sequence[Rows]) -> int:
    """Bytes of the caches."""
    return sum(part.bytes_on_disk for part in rows if isinstance(part, CachedRows))
