"""Captions of a whole split by a model, and how good they are."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from caption_lab.config import DecodingOptions
from caption_lab.decoding import write
from caption_lab.metrics import caption_metrics
from caption_lab.vocabulary import SPECIAL, UNK, Vocabulary
from labs_common.data import CaptionedPictures
from labs_common.progress import tracked


def captions_of(
    decoder: Any,
    features: Callable[[Sequence[int]], torch.Tensor],
    count: int,
    vocabulary: Vocabulary,
    options: DecodingOptions,
    accelerator: Accelerator | None = None,
    batch_size: int = 64,
    task: str = "",
) -> list[str]:
    """A caption for each of `count` pictures; `features` gives what the decoder reads for their places.

    The processes of `accelerator` share the pictures; every one gets all captions. With a `task` it shows how far it
    has come. `top_p` draws from the process's generator.
    """
    rank, processes = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    mine = range(rank, count, processes)
    found: list[tuple[int, str]] = []
    starts = range(0, len(mine), batch_size)
    for first in tracked(starts, task, len(starts), bool(task) and rank == 0):
        places = list(mine[first : first + batch_size])
        written = write(decoder, features(places), vocabulary.length + 1, options)
        found += zip(places, map(vocabulary.decode, written.words), strict=True)
    everyone = gather_object(found) if processes > 1 else found
    return [caption for _, caption in sorted(everyone)]


def references_of(pictures: CaptionedPictures, vocabulary: Vocabulary) -> list[list[list[str]]]:
    """The words of every true caption of every picture, cleaned as the model's own are."""
    cleaned = [[vocabulary.cleaning.words(caption) for caption in captions] for captions in pictures.captions]
    return [[words for words in captions if words] or [[SPECIAL[UNK]]] for captions in cleaned]


def scored(captions: Sequence[str], references: Sequence[Sequence[Sequence[str]]]) -> dict[str, float]:
    """All metrics of captions, one for each picture."""
    return caption_metrics([caption.split() for caption in captions], references)
