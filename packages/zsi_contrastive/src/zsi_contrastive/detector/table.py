"""Rows of annotations: what of them can be used, columns to choose by, and a table on disk that processes share."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from labs_common.cache import cached_by_one
from labs_common.errors import LabError, json_of, reason_of
from labs_common.progress import console

ROWS, COLUMNS, REST = "rows.jsonl", "columns.npz", "rest.json"  # of a table
Json = dict[str, Any]
Again = tuple[Callable[..., "StoredRows"], tuple[Any, ...]]  # how another process opens a table


@dataclass(frozen=True)
class Rows(Sequence[Json]):
    """Some annotations of a file, in its order; each row is read when it is asked for.

    Attributes:
        source: all rows of the file.
        places: which of them these are (n,).
        image_ids: (n,).
        category_ids: (n,).
        crowds: (n,), bool.
        boxes: left, top, width and height (n, 4).
    """

    source: Sequence[Json]
    places: np.ndarray
    image_ids: np.ndarray
    category_ids: np.ndarray
    crowds: np.ndarray
    boxes: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[Json]) -> "Rows":
        """Makes columns of rows in memory."""
        images, kinds = (np.array([row[name] for row in rows], dtype=np.int64) for name in ("image_id", "category_id"))
        crowds = np.array([row.get("iscrowd", 0) for row in rows], dtype=bool)
        boxes = np.array([row["bbox"] for row in rows], dtype=np.float64).reshape(-1, 4)
        return cls(rows, np.arange(len(rows)), images, kinds, crowds, boxes)

    def take(self, chosen: np.ndarray) -> "Rows":
        """Takes the rows that a mask or places (n,) choose."""
        columns = (self.places, self.image_ids, self.category_ids, self.crowds, self.boxes)
        return Rows(self.source, *(column[chosen] for column in columns))

    def texts(self) -> Iterator[str]:
        """Writes each row as JSON."""
        stored = self.source.text if isinstance(self.source, StoredRows) else None
        return (stored(place) if stored else json.dumps(self.source[place]) for place in self.places.tolist())

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[Json]:
        return (self.source[place] for place in self.places.tolist())

    @overload
    def __getitem__(self, place: int) -> Json: ...
    @overload
    def __getitem__(self, place: slice) -> "Rows": ...
    def __getitem__(self, place: int | slice) -> "Json | Rows":
        return self.source[self.places[place]] if isinstance(place, int) else self.take(np.arange(len(self))[place])


class StoredRows(Sequence[Json]):
    """The rows of a table on disk, which is mapped into memory; another process gets them by `again`, not by value."""

    def __init__(self, folder: Path, ends: np.ndarray, again: Again) -> None:
        self._text, self._ends, self._again = np.memmap(folder / ROWS, mode="r"), ends, again

    def __reduce__(self) -> Again:
        return self._again

    def __len__(self) -> int:
        return len(self._ends)

    def text(self, place: int) -> str:
        """Returns a row as JSON."""
        first = self._ends[place - 1] if place else 0
        return self._text[first : self._ends[place] - 1].tobytes().decode()  # without the end of the line

    def __getitem__(self, place: Any) -> Any:
        return json.loads(self.text(int(place)))


def fault_of(annotation: Mapping[str, Any], height: int, width: int) -> str:
    """Says why an annotation of a picture of that size cannot be used; empty if it can."""
    outline = annotation.get("segmentation")
    if reason := box_fault(annotation["bbox"]):
        return reason
    if not is_number(annotation.get("area", 0)) or annotation.get("iscrowd", 0) not in (0, 1):
        return "area that is no number, or iscrowd neither 0 nor 1"
    if isinstance(outline, list):
        # A polygon is x, y, x, y, …: three points are six numbers.
        polygons = [part for part in outline if isinstance(part, list) and len(part) >= 6 and len(part) % 2 == 0]
        if not polygons:
            return "outline of fewer than three points"
        near = 10 * max(height, width)  # a line to a point far away would be drawn pixel by pixel
        try:
            fine = all(math.isfinite(sum(part)) and -near < min(part) <= max(part) < near for part in polygons)
        except (TypeError, OverflowError):
            fine = False
        return "" if fine else "outline of something other than points near the picture"
    if isinstance(outline, dict):
        return "" if is_run_lengths(outline, height, width) else "run lengths that are not COCO's"
    return "no outline"


def box_fault(box: Any) -> str:
    """Says why a value is no box (left, top, width, height); empty if it is one."""
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
        return "box that is not four numbers"
    return "box without area" if box[2] <= 0 or box[3] <= 0 else ""


def is_number(value: Any) -> bool:
    """Says whether a value of a JSON file is a number that can be computed with in float32."""
    return isinstance(value, (int, float)) and -1e30 < value < 1e30


def is_run_lengths(outline: Mapping[str, Any], height: int, width: int) -> bool:
    """Says whether COCO's run lengths, plain or compressed, are of a picture of that size: its library reads any."""
    counts = outline.get("counts")
    if outline.get("size") != [height, width] or not isinstance(counts, (list, str)):
        return False
    found: list[Any] = counts if isinstance(counts, list) else []
    value = shift = 0
    for letter in counts if isinstance(counts, str) else "":
        # Six bits of a letter from "0" on: five of the number, the lowest first, and whether more follow.
        bits = ord(letter) - 48
        if not 0 <= bits < 64 or shift > 60:
            return False
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16) << (shift - 4)  # the highest bit is the sign
            found.append(value + (found[-2] if len(found) > 2 else 0))  # but for the first three, a difference
            value = shift = 0
    whole = all(isinstance(run, int) and run >= 0 for run in found)
    return whole and not shift and sum(found) == height * width


def digest_of(path: Path) -> str:
    """Returns 32 hexadecimal digits that change with a file's content.

    Raises:
        LabError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError as error:
        raise LabError(f"{path}: cannot be read ({reason_of(error)})") from error


def stored(path: Path, digest: str, make: Callable[[], tuple[Sequence[Json], Json]]) -> Path:
    """Returns the directory of a file's table: `make` gives its rows and the rest of it, where there is no table yet.

    The cache keeps it by the file's `digest`: one process makes it, and all others of the machine read it.
    """

    def write(folder: Path, parts: Path) -> None:
        console.print(f"{path.name}: is put into a table in the cache (once)")
        rows, rest = make()
        columns = Rows.of(rows)
        ends, end = [], 0
        with (folder / ROWS).open("wb") as file:
            for row in rows:
                end += file.write(json.dumps(row).encode() + b"\n")
                ends.append(end)
        np.savez(
            folder / COLUMNS, ends=ends, image_ids=columns.image_ids, category_ids=columns.category_ids,
            crowds=columns.crowds, boxes=columns.boxes,
        )  # fmt: skip
        (folder / REST).write_text(json.dumps(rest), encoding="utf-8")

    return cached_by_one("zsi-annotations", {"digest": digest, "version": 1}, write)


def read_stored(folder: Path, again: tuple[Callable[..., StoredRows], tuple[Any, ...]]) -> tuple[Rows, Json]:
    """Reads what `stored` wrote, all but the rows themselves."""
    with np.load(folder / COLUMNS) as columns:
        names = ("image_ids", "category_ids", "crowds", "boxes")
        rows = Rows(
            StoredRows(folder, columns["ends"], again), np.arange(len(columns["ends"])), *(columns[n] for n in names)
        )
    return rows, json_of(folder / REST, str(folder / REST))
