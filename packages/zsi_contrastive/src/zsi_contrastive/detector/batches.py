"""Optimizer steps of pictures with their objects."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from labs_common.data.images import decoding_threads
from labs_common.training import read_ahead
from zsi_contrastive.detector.pictures import InstancePictures, levels_of, mirrored
from zsi_contrastive.detector.regions import Target

KEPT_BYTES = 2**29  # training data that is smaller stays in memory once it is decoded


class Batch(NamedTuple):
    """A process's part of an optimizer step.

    Attributes:
        pictures: each (3, height, width) of 0 to 1.
        targets: boxes, labels and masks of each.
        share: what the mean loss is multiplied by, so that the step's loss is the mean over all processes' pictures.
    """

    pictures: list[torch.Tensor]
    targets: list[Target]
    share: float

    def to(self, device: torch.device) -> "Batch":
        """The same on a device."""
        pictures = [picture.to(device, non_blocking=True) for picture in self.pictures]
        targets = [{name: value.to(device, non_blocking=True) for name, value in one.items()} for one in self.targets]
        return Batch(pictures, targets, self.share)


@dataclass
class PictureSteps:
    """Training data for `labs_common.training.Loop`: shuffled every epoch by the seed, mirrored by chance."""

    pictures: InstancePictures
    batch_size: int
    at_once: int
    flip: bool
    seed: int
    rank: int = 0
    processes: int = 1

    def __post_init__(self) -> None:
        part = self.pictures.part
        self._objects, self._labels = part.by_image(), self.pictures.label_of()
        layers = {row["id"]: 3 + len(self._objects.get(row["id"], ())) for row in part.images}
        small = sum(row["width"] * row["height"] * layers[row["id"]] for row in part.images) < KEPT_BYTES
        self._kept: dict[int, tuple[torch.Tensor, Target]] | None = {} if small else None

    def __len__(self) -> int:
        """Optimizer steps in an epoch; the last may be smaller."""
        return -(-len(self.pictures) // self.batch_size)

    def steps(self, epoch: int, start: int) -> Iterator[list[Batch]]:
        """Yields this process's micro-batches of each step, read while the step before is computed."""
        generator = np.random.default_rng([self.seed, epoch])
        order = generator.permutation(len(self.pictures)).tolist()
        turned = generator.random(len(self.pictures)) < (0.5 if self.flip else 0.0)

        def read(step: int) -> list[Batch]:
            places = order[step * self.batch_size : (step + 1) * self.batch_size]
            mine = places[self.rank :: self.processes]
            if not mine:  # every process takes part in every step
                return [self._batch(places[:1], turned, 0.0)]
            size = self.at_once or len(mine)
            share = self.processes / len(places)
            parts = [mine[first : first + size] for first in range(0, len(mine), size)]
            return [self._batch(part, turned, len(part) * share) for part in parts]

        return read_ahead(read, range(start, len(self)))

    def _batch(self, places: Sequence[int], turned: np.ndarray, share: float) -> Batch:
        def one(place: int) -> tuple[torch.Tensor, Target]:
            levels, target = self._read(place)
            picture = levels.float() / 255
            return mirrored(picture, target) if turned[place] else (picture, target)

        pictures, targets = zip(*decoding_threads().map(one, places), strict=True)
        return Batch(list(pictures), list(targets), share)

    def _read(self, place: int) -> tuple[torch.Tensor, Target]:
        """A picture's levels (3, height, width) of 0 to 255 and its objects; read once if all fit into memory."""
        if self._kept is not None and place in self._kept:
            return self._kept[place]
        found = levels_of(self.pictures.image(place)), self.pictures.target(place, self._objects, self._labels)
        if self._kept is not None:
            self._kept[place] = found
        return found
