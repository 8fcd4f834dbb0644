"""Pictures with classes, and how they are divided with a seed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from labs_common.data.images import Pictures


@dataclass(frozen=True, kw_only=True)
class LabelledPictures(Pictures):
    """Pictures with one class each.

    Attributes:
        classes: the names of the classes.
        labels: class number of each picture (pictures,), int64; outside of the classes is a fault of the data.
    """

    classes: tuple[str, ...]
    labels: np.ndarray

    def fault(self, place: int) -> str:
        """Says so when the label of picture `place` is of no class."""
        label = self.labels[place]
        known = 0 <= label < len(self.classes)
        return "" if known else f"label {label} is outside of the {len(self.classes)} classes"

    def subset(self, places: Sequence[int] | np.ndarray) -> Self:
        """Takes the pictures at these places, in this order."""
        return replace(super().subset(places), labels=self.labels[np.asarray(places, dtype=np.int64)])

    def at_most(self, count: int, seed: int) -> Self:
        """Takes at most `count` pictures, evenly over the classes, in an order that does not change."""
        shuffled = np.random.default_rng([seed, 1]).permutation(len(self))
        turn = np.zeros(len(self), dtype=np.int64)  # how many of its class come before each
        for label in np.unique(self.labels):
            members = shuffled[self.labels[shuffled] == label]
            turn[members] = np.arange(len(members))
        return self.subset(np.sort(shuffled[np.argsort(turn[shuffled], kind="stable")[:count]]))


def stratified_parts(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns places to keep and places to set aside: `share` of each class, at least one of a class with two or more.

    Both are in rising order, and the same for the same seed.
    """
    generator = np.random.default_rng([seed, 0])
    chosen = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = round(share * len(members))
        if share > 0 and len(members) > 1:
            count = min(max(count, 1), len(members) - 1)
        chosen[generator.permutation(members)[:count]] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)
