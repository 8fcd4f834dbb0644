"""Pictures with classes, checked once, split with a seed."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from labs_common.data.images import NAMED, digests_of, examined, named_picture, refusal
from labs_common.errors import LabError
from labs_common.options import OnBadData


@dataclass(frozen=True)
class LabelledPictures:
    """Pictures with one class each.

    Attributes:
        source: where they are from, for messages and reports.
        classes: the names of the classes.
        labels: class number of each picture (pictures,), int64; outside of the classes is a fault of the data.
        contents: what each was stored as: levels (height, width, 3), the bytes of a picture file, or its path.
        names: a name for each, for messages and for the record of the splits.
        digests: a hash of each one's content, after `checked`.
        left_out: reasons why pictures were left out, with counts; `examples` names the first of them.
    """

    source: str
    classes: tuple[str, ...]
    labels: np.ndarray
    contents: Sequence[np.ndarray | bytes | Path]
    names: Sequence[str]
    digests: tuple[bytes, ...] = ()
    left_out: Counter[str] = field(default_factory=Counter)
    examples: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, place: int) -> Image.Image:
        """Picture `place` in RGB.

        Raises:
            LabError: it cannot be decoded; it is named.
        """
        return named_picture(self.contents[place], self.source, self.names[place])

    def subset(self, places: Sequence[int] | np.ndarray) -> "LabelledPictures":
        """The pictures at these places, in this order."""
        return replace(
            self,
            labels=self.labels[np.asarray(places, dtype=np.int64)],
            contents=[self.contents[place] for place in places],
            names=[self.names[place] for place in places],
            digests=tuple(self.digests[place] for place in places) if self.digests else (),
        )

    def fingerprint(self) -> str:
        """Twenty-four hexadecimal digits that change with any picture or their order (labels do not count).

        Raises:
            ValueError: the pictures have not been `checked`, which computes their digests.
        """
        if len(self.digests) != len(self):
            raise ValueError("pictures have a fingerprint only after checked()")
        return digests_of(self.digests)


def checked(pictures: LabelledPictures, on_bad_data: OnBadData, shown: bool = True) -> LabelledPictures:
    """Decodes every picture once and hashes it, in threads; returns those that can be used.

    Raises:
        LabError: some cannot and `on_bad_data` is "error" (the first five are named), or none can.
    """
    if len(pictures) == 0:
        raise LabError(f"--data {pictures.source}: holds no pictures")
    outcomes = examined(pictures.contents, f"checking {pictures.source}", shown)
    digests = tuple(digest for digest, _ in outcomes)
    reasons = [reason for _, reason in outcomes]
    for place, label in enumerate(pictures.labels):
        if not 0 <= label < len(pictures.classes):
            reasons[place] = f"label {label} is outside of the {len(pictures.classes)} classes"
    bad = [(pictures.names[place], reason) for place, reason in enumerate(reasons) if reason]
    if not bad:
        return replace(pictures, digests=digests)
    if on_bad_data == "error" or len(bad) == len(pictures):
        remedy = "mend them, or leave them out with --on-bad-data skip" if len(bad) < len(pictures) else "none is left"
        raise LabError(refusal(pictures.source, bad, remedy, len(pictures)))
    kept = replace(pictures, digests=digests).subset([place for place, reason in enumerate(reasons) if not reason])
    examples = tuple(f"{name}: {reason}" for name, reason in bad[:NAMED])
    return replace(kept, left_out=Counter(reason for _, reason in bad), examples=examples)


def stratified_parts(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Places to keep and places to set aside: `share` of every class, at least one of a class with two or more.

    Both are in rising order, and the same for the same seed.
    """
    generator = np.random.default_rng([seed, 0])
    aside: list[int] = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = round(share * len(members))
        if share > 0 and len(members) > 1:
            count = min(max(count, 1), len(members) - 1)
        aside += generator.permutation(members)[:count].tolist()
    chosen = np.zeros(len(labels), dtype=bool)
    chosen[aside] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def at_most(pictures: LabelledPictures, limit: int, seed: int) -> LabelledPictures:
    """At most `limit` pictures, evenly over the classes, in an order that does not change."""
    generator = np.random.default_rng([seed, 1])
    shuffled = generator.permutation(len(pictures))
    turn = np.zeros(len(pictures), dtype=np.int64)  # how many of its class come before each
    for label in np.unique(pictures.labels):
        members = shuffled[pictures.labels[shuffled] == label]
        turn[members] = np.arange(len(members))
    return pictures.subset(np.sort(shuffled[np.argsort(turn[shuffled], kind="stable")[:limit]]))


def __getattr__(name: str) -> Any:  # moved: to go when no lab asks for it here
    if name == "read_classes":
        from labs_common.data.readers import read_classes

        return read_classes
    raise AttributeError(name)
