"""Samples in, batches out: pictures with captions, and the steps that the decoder learns from.

A batch has a row of the encoder's frozen front for each picture, computed once and kept for all its captions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator

from caption_lab.config import TrainConfig
from caption_lab.encoder import Encoder
from caption_lab.tiny import RECIPE, demo_scene
from caption_lab.vocabulary import Vocabulary, padded
from labs_common.cli import config_from_yaml
from labs_common.data.captions import CaptionedPictures, Captions, PictureTensors, read_captions
from labs_common.device import CPU, each_tensor, pinned
from labs_common.errors import LabError, json_of
from labs_common.frozen.cache import ComputedRows, Rows, front_rows
from labs_common.options import CacheOptions, CaptionDataOptions
from labs_common.saved import FOLDER
from labs_common.scenes.files import cached_flickr8k
from labs_common.steps import ShuffledSteps, own_part, shuffled

# The offline data. Its scenes have other seeds than those that the encoder was pre-trained on (0 here, 1 there); 64
# pixels are more than the tiny encoder reads, so that pictures can be looked at; 9,000 scenes make an epoch of 36,000
# captions, of which three take about two minutes on two cores.
DEMO_SIDE, DEMO_COUNT = 64, 9000
Order = Literal["captions", "by picture", "pictures"]


def read_data(options: CaptionDataOptions, seed: int, shown: bool) -> Captions:
    """Reads the splits of --data, or of the drawn scenes; see `read_captions`."""
    return read_captions(options, seed, shown, drawn_scenes)


def drawn_scenes() -> Path:
    """Returns the directory of the drawn scenes with five captions each; draws them if that was never done."""
    recipe = {"side": DEMO_SIDE, "count": DEMO_COUNT, "scenes": RECIPE, "format": 1}
    return cached_flickr8k("captioned-scenes", recipe, DEMO_COUNT, DEMO_SIDE, demo_scene)


def options_of_run(checkpoint: Path) -> TrainConfig | None:
    """Returns what the run of a captioner was asked for; None if it is of no run."""
    file = _run_of(checkpoint) / "config.yaml"
    return config_from_yaml(TrainConfig, file) if file.is_file() else None


def _run_of(checkpoint: Path) -> Path:
    return checkpoint.parent if checkpoint.name == FOLDER else checkpoint


def same_data(one: str | None, other: str | None) -> bool:
    """Tells whether two values of --data name the same pictures."""
    return one == other or (one is not None and other is not None and Path(one).resolve() == Path(other).resolve())


def check_unseen(pictures: CaptionedPictures, checkpoint: Path, data: str | None, option: str) -> None:
    """Makes sure that the captioner that `option` names was not trained on these pictures of `data`.

    Pictures of other data may have the same names and are not asked for.

    Raises:
        LabError: it was: they were divided by another seed or by other lists.
    """
    file, trained = _run_of(checkpoint) / "splits.json", options_of_run(checkpoint)
    if trained is None or not same_data(data, trained.data.data) or not file.is_file():
        return
    try:
        learnt = set(json_of(file, str(file))["train"]["pictures"])
    except (KeyError, TypeError) as error:
        raise LabError(f"{file}: does not say which pictures trained; it is damaged") from error
    known = sum(name in learnt for name in pictures.names)
    if known:
        remedy = f"--seed {trained.run.seed}" + (f" --splits {trained.data.splits}" if trained.data.splits else "")
        raise LabError(f"{option} {checkpoint}: was trained on {known} of these {len(pictures)} pictures; divide them "
                       f"as it did: {remedy}")  # fmt: skip


class Batch(NamedTuple):
    """A process's part of an optimizer step.

    Attributes:
        rows: of the encoder's front (pictures, row width), each picture once however many of its captions are there.
        of_rows: the row of each caption (captions,).
        words: (captions, length), from `<start>` on, padded.
        pictures: each caption's picture, by its place in the split.
        of_words: factor of a mean over this part's words, so that the processes' mean is the mean over all words of
            the step; 0 for a process without a part.
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
        pairs: the picture and the words of each caption.
        views: how many versions of the pictures there are, which take turns by epoch.
    """

    rows: Rows
    pairs: list[tuple[int, list[int]]]
    views: int = 1

    def of_pictures(self, places: Sequence[int], view: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the rows of the pictures that occur (pictures, row width), and the row of each place (places,)."""
        unique, where = np.unique(np.asarray(places), return_inverse=True)
        return self.rows.rows(view, unique.tolist()), torch.from_numpy(where)


def caption_steps(
    data: CaptionRows, batch_size: int, seed: int, order: Order = "captions", rank: int = 0, processes: int = 1,
    device: torch.device = CPU,
) -> ShuffledSteps:  # fmt: skip
    """Cuts training data into optimizer steps of `batch_size` captions, of which each process gets one batch.

    `order` shuffles captions; pictures, of which all captions follow each other ("by picture"); or pictures of which
    only the first caption comes ("pictures"). `device` is the one that will compute with them.
    """
    of_picture: dict[int, list[int]] = {}
    for number, (picture, _) in enumerate(data.pairs):
        of_picture.setdefault(picture, []).append(number)
    of_each = list(of_picture.values())
    # Captions that stay together when the order is drawn.
    parts = {
        "captions": [[number] for numbers in of_each for number in numbers],
        "by picture": of_each,
        "pictures": [numbers[:1] for numbers in of_each],
    }[order]

    def numbers_of(epoch: int) -> list[int]:
        return [number for part in shuffled(seed, epoch, len(parts)) for number in parts[part]]

    def batch(numbers: list[int], epoch: int, step: int) -> list[Batch]:
        mine, of_captions = own_part(numbers, rank, processes)
        words = [data.pairs[number][1] for number in mine]
        pictures = [data.pairs[number][0] for number in mine]
        predicted = sum(map(len, words)) - len(words)  # every word but <start>
        of_all = sum(len(data.pairs[number][1]) - 1 for number in numbers)
        of_words = predicted * processes / of_all if of_captions else 0.0
        found = Batch(
            *data.of_pictures(pictures, epoch % data.views), padded(words)[0], pictures, of_words, of_captions
        )
        return [each_tensor(pinned, found, device)]

    return ShuffledSteps(sum(map(len, parts)), batch_size, seed, batch, numbers_of)


def encoded_pairs(pictures: CaptionedPictures, vocabulary: Vocabulary) -> list[tuple[int, list[int]]]:
    """Returns every caption of every picture as its picture's place and its words' numbers."""
    return [
        (place, words)
        for place, captions in enumerate(pictures.captions)
        for words in map(vocabulary.encode, captions)
        if len(words) > 2  # of punctuation alone nothing is left
    ]


def caption_rows(
    name: str,
    pictures: CaptionedPictures,
    encoder: Encoder,
    vocabulary: Vocabulary,
    options: CacheOptions,
    accelerator: Accelerator,
    views: int = 1,
    seed: int = 0,
) -> CaptionRows:
    """Returns a split called `name` with the front's output, of which whatever its cache lacks is computed now.

    The encoder is on its device. Where nothing of it is frozen, the rows are the pictures. There are `views` of each
    picture; the first is plain, of the others a part is cut out by the `seed`.

    Raises:
        LabError: the cache's disk is full or broken.
    """
    tensors = PictureTensors(pictures, encoder.transform)
    pairs = encoded_pairs(pictures, vocabulary)
    if not encoder.has_front:
        return CaptionRows(ComputedRows(lambda view, places: tensors.view(view, places, seed), "fp32"), pairs, views)

    def compute(view: int, places: Sequence[int]) -> torch.Tensor:
        return encoder.front(tensors.view(view, places, seed).to(accelerator.device))

    recipe = {"tensors": tensors.recipe(), "pool": encoder.pool} | ({"seed": seed} if views > 1 else {})
    front = encoder.cuts[0].front if encoder.cuts else encoder
    rows = front_rows(f"{encoder.architecture}-{name}", front, compute, len(pictures),
                      encoder.row_width, recipe, options, accelerator, views)  # fmt: skip
    return CaptionRows(rows, pairs, views)
