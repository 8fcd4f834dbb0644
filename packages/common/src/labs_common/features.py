"""The output of a frozen front, computed once and kept on disk: what does not train gives the same every epoch.

```
rows = cached_rows("vit-small", recipe, len(pictures), views=2, width=197 * 384, precision="bf16", compute=compute)
rows.rows(view=0, places=[3, 1, 4])  # (3, 75648)
```
Files lie under the user's cache directory, one memory-mapped array per view, next to four bytes per chunk: the check
sum of its bytes once it is done. A process claims a chunk by a lock on those four, so any number of them, of one run or
of several, share the work; what a killed one had claimed is free again. Only whole chunks count as done, and one that
was damaged since is computed again.
"""

import contextlib
import fcntl
import os
import shutil
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

import numpy as np
import torch

from labs_common.cache import cache_directory, cached_directory
from labs_common.errors import LabError
from labs_common.progress import ProgressLine, console

RowPrecision = Literal["bf16", "fp16", "fp32", "uint8"]
# numpy has no bfloat16: its bits are kept as 16-bit integers
DTYPES: dict[str, tuple[torch.dtype, type[np.generic]]] = {
    "bf16": (torch.bfloat16, np.int16),
    "fp16": (torch.float16, np.float16),
    "fp32": (torch.float32, np.float32),
    "uint8": (torch.uint8, np.uint8),  # decoded pictures
}
CHUNK_BYTES = 32 * 2**20
SUM = 4  # bytes of a check sum
# Gives the front's output (places, width) for these places of the data, in a view.
Compute = Callable[[int, Sequence[int]], torch.Tensor]


class Rows(Protocol):
    """The front's output for any place of the data."""

    def rows(self, view: int, places: Sequence[int]) -> torch.Tensor:
        """Tensor (places, width) in the precision of the boundary, on the CPU if it was cached."""


class ComputedRows:
    """The plain way: the front runs whenever it is asked. Rounds as the cache does, so that both give the same."""

    def __init__(self, compute: Compute, precision: RowPrecision) -> None:
        self.compute, self.dtype = compute, DTYPES[precision][0]

    def rows(self, view: int, places: Sequence[int]) -> torch.Tensor:
        """See `Rows`."""
        return self.compute(view, places).to(self.dtype)


class CachedRows:
    """The front's output, read from a directory that `cached_rows` filled."""

    def __init__(self, folder: Path, views: int, shape: tuple[int, int], precision: RowPrecision) -> None:
        self.folder, self.dtype = folder, DTYPES[precision][0]
        self._views = [np.load(_file(folder, view), mmap_mode="r") for view in range(views)]
        for view, array in enumerate(self._views):
            if array.shape != shape or array.dtype != DTYPES[precision][1]:
                raise ValueError(f"{_file(folder, view).name} holds {array.dtype} {array.shape}, not {shape}")

    def rows(self, view: int, places: Sequence[int]) -> torch.Tensor:
        """See `Rows`."""
        return torch.from_numpy(self._views[view][np.asarray(places, dtype=np.int64)]).view(self.dtype)

    @property
    def bytes_on_disk(self) -> int:
        """Of all views."""
        return sum(view.nbytes for view in self._views)


def cached_rows(
    name: str,
    recipe: Any,
    count: int,
    views: int,
    width: int,
    precision: RowPrecision,
    compute: Compute,
    shown: bool = True,
) -> CachedRows:
    """The cache for exactly this `recipe`, with whatever it still lacked computed now.

    `recipe` (JSON values) must tell everything that the rows depend on: the front's weights, the transform, the data.
    Every process that will read calls this; together they compute each chunk once, and wait for each other.

    Raises:
        LabError: the disk is too small or fails; a file of the cache is broken.
    """
    row_bytes = width * DTYPES[precision][1]().itemsize
    chunk = max(1, min(count, CHUNK_BYTES // row_bytes))
    chunks = -(-count // chunk)
    whole = {
        "recipe": recipe,
        "count": count,
        "views": views,
        "width": width,
        "precision": precision,
        "chunk": chunk,
        "check sums": SUM,
    }
    need = count * views * row_bytes

    def make(folder: Path) -> None:
        _check_disk(folder, need)
        for view in range(views):
            np.lib.format.open_memmap(_file(folder, view), "w+", DTYPES[precision][1], (count, width)).flush()
        (folder / "done").write_bytes(bytes(SUM * views * chunks))

    folder = cached_directory(f"features-{name}", whole, make, changes=True)
    try:
        rows = CachedRows(folder, views, (count, width), precision)
        # One descriptor for the whole time: closing any of a file drops all locks that this process holds on it.
        with (folder / "done").open("r+b", buffering=0) as done:
            missing = _missing(rows, done, count, chunk)
            if missing:
                _check_disk(folder, len(missing) * chunk * row_bytes)
                if shown:
                    console.print(f"frozen features: {_size(need)} in {folder}")
                _fill(rows, done.fileno(), missing, count, chunk, compute, shown)
    except (OSError, ValueError) as error:
        raise LabError(f"the feature cache {folder} cannot be used ({error}); delete it, or add --no-cache") from error
    return rows


def _missing(rows: CachedRows, done: BinaryIO, count: int, chunk: int) -> list[int]:
    """The chunks that are not there, or are damaged."""
    chunks = -(-count // chunk)
    missing = []
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(_file(rows.folder, view).open("rb")) for view in range(len(rows._views))]
        for place in range(len(files) * chunks):
            said, array = done.read(SUM), rows._views[place // chunks]
            if said != bytes(SUM):
                first = place % chunks * chunk
                files[place // chunks].seek(array.offset + first * array.strides[0])
                if _check_sum(files[place // chunks].read(min(chunk, count - first) * array.strides[0])) == said:
                    continue
                console.print(f"a part of {_file(rows.folder, place // chunks)} is damaged: it is computed again")
                os.pwrite(done.fileno(), bytes(SUM), SUM * place)
            missing.append(place)
    return missing


def _check_sum(content: bytes | memoryview) -> bytes:
    """CRC-32; never four zeros, which say that nothing is there."""
    return (zlib.crc32(content) or 1).to_bytes(SUM, "little")


def _fill(
    rows: CachedRows, done: int, missing: Sequence[int], count: int, chunk: int, compute: Compute, shown: bool
) -> None:
    """Computes the missing chunks that nobody else holds, then waits for the others and does what they left."""
    chunks = -(-count // chunk)
    files = [os.open(_file(rows.folder, view), os.O_RDWR) for view in range(len(rows._views))]

    def ensured(place: int, wait: bool) -> bool:
        try:
            fcntl.lockf(done, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), SUM, SUM * place)
        except BlockingIOError:
            return False
        try:
            if os.pread(done, SUM, SUM * place) == bytes(SUM):
                view, first = place // chunks, place % chunks * chunk
                value = compute(view, range(first, min(first + chunk, count))).to(rows.dtype).cpu().contiguous()
                array = rows._views[view]
                if value.shape != (min(chunk, count - first), array.shape[1]):
                    raise AssertionError(f"the front gave {tuple(value.shape)}, the cache has rows of {array.shape[1]}")
                content = value.view(torch.uint8).numpy().data.cast("B")
                _write(files[view], content, array.offset + first * array.strides[0])
                os.fsync(files[view])  # before the sum that vouches for it
                os.pwrite(done, _check_sum(content), SUM * place)
        finally:
            fcntl.lockf(done, fcntl.LOCK_UN, SUM, SUM * place)
        return True

    try:
        with ProgressLine("frozen features, chunk", len(missing), shown=shown) as line:
            left = []
            for place in missing:
                if ensured(place, wait=False):
                    line.advance()
                else:
                    left.append(place)
            for place in left:
                ensured(place, wait=True)
                line.advance()
    finally:
        for file in files:
            os.close(file)


def _write(file: int, content: memoryview, offset: int) -> None:
    while content:
        written = os.pwrite(file, content, offset)
        content, offset = content[written:], offset + written


def _file(folder: Path, view: int) -> Path:
    return folder / f"view-{view}.npy"


def _check_disk(folder: Path, need: int) -> None:
    free = shutil.disk_usage(folder).free
    if need > free:
        raise LabError(
            f"frozen features need {_size(need)} in {cache_directory()}, where {_size(free)} are free: make room, name "
            "a larger disk in XDG_CACHE_HOME, or add --no-cache"
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
