"""Labelled pictures in memory or on disk, checked once, split with a seed."""

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from labs_common.data.images import BadPictureError, decoded
from labs_common.errors import LabError
from labs_common.options import OnBadData
from labs_common.progress import tracked

NAMED = 5  # how many bad pictures an error names


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


def named_picture(content: np.ndarray | bytes | Path, source: str, name: str) -> Image.Image:
    """The picture in RGB.

    Raises:
        LabError: it cannot be decoded; it is named.
    """
    try:
        return decoded(content)
    except BadPictureError as error:
        raise LabError(f"--data {source}: {name}: {error}") from error


def examined(contents: Sequence[np.ndarray | bytes | Path], task: str, shown: bool = True) -> list[tuple[bytes, str]]:
    """Each content's hash, and why it cannot be used ("" if it can); decoded in threads."""
    with ThreadPoolExecutor(max(2, os.cpu_count() or 2)) as pool:
        return list(tracked(pool.map(_examined, contents), task, len(contents), shown))


def refusal(source: str, faults: Sequence[tuple[str, str]], remedy: str, total: int = 0) -> str:
    """The line that names the first of the faults, each a name and a reason, and the remedy."""
    named = "; ".join(f"{name}: {reason}" for name, reason in faults[:NAMED])
    more = f" and {len(faults) - NAMED} more" if len(faults) > NAMED else ""
    of = f"{len(faults)} of {total} pictures" if total else f"{len(faults)} captions or pictures"
    return f"--data {source}: {of} cannot be used: {named}{more}; {remedy}"


def digests_of(digests: Sequence[bytes]) -> str:
    """Twenty-four hexadecimal digits that change with any of the digests or their order."""
    return hashlib.blake2b(b"".join(digests), digest_size=12).hexdigest()


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


def _examined(content: np.ndarray | bytes | Path) -> tuple[bytes, str]:
    """The content's hash, and why it cannot be used ("" if it can)."""
    try:
        data = content.read_bytes() if isinstance(content, Path) else content
    except OSError as error:
        return b"", error.strerror or "cannot be read"
    raw = np.ascontiguousarray(data).data if isinstance(data, np.ndarray) else data
    digest = hashlib.blake2b(raw, digest_size=16).digest()
    try:
        decoded(data)
    except BadPictureError as error:
        return digest, str(error)
    return digest, ""
