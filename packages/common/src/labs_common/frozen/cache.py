"""The output of a frozen front, computed once and kept on disk: what does not train gives the same every epoch.

```
rows = front_rows("vit-train", cut.front, compute, len(pictures), 197 * 384, recipe, options, accelerator, views=2)
rows.rows(view=0, places=[3, 1, 4])  # (3, 75648)
```
Files lie under the user's cache directory, one memory-mapped array per view, next to four bytes per chunk: the check
sum of its bytes once it is done. A process claims a chunk by a lock on those four, so any number of them, of one run or
of several, share the work; what a killed one had claimed is free again. Only whole chunks count as done, and one that
was damaged since is computed again.
"""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from labs_common.cache import REMEDY, cache_directory, cached_directory, path_name
from labs_common.device import free_bytes, pinned, to_device
from labs_common.errors import LabError
from labs_common.frozen.audit import state_hash
from labs_common.options import CacheOptions, RowPrecision
from labs_common.progress import ProgressLine, console

KeptPrecision = Literal[RowPrecision, "uint8"]  # decoded pictures are kept as bytes
# numpy has no bfloat16: its bits are kept as 16-bit integers
DTYPES: dict[str, tuple[torch.dtype, type[np.generic]]] = {
    "bf16": (torch.bfloat16, np.int16),
    "fp16": (torch.float16, np.float16),
    "fp32": (torch.float32, np.float32),
    "uint8": (torch.uint8, np.uint8),
}
# What a process computes before it writes: little enough that a kill loses seconds, much enough that check sums and
# locks cost nothing beside it.
CHUNK_ROWS, CHUNK_BYTES = 256, 32 * 2**20
FRONT_BATCH = 64  # samples through the front at once: fills a GPU, and needs no memory for gradients
# Rows are held in a GPU's memory if they take at most this share of what is free there: the rest is for training.
HELD_SHARE = 0.25
MANY, TRIED = 1000, 16  # samples of which the time is told before; samples that tell it
SUM = 4  # bytes of a check sum
VERSIONS = ("torch", "timm", "transformers", "open-clip-torch")  # libraries whose releases may compute otherwise
# Gives the front's output (places, width) for these places of the data, in a view.
Compute = Callable[[int, Sequence[int]], torch.Tensor]


class Rows(Protocol):
    """The front's output for any place of the data."""

    def rows(self, view: int, places: Sequence[int]) -> torch.Tensor:
        """Returns a tensor (places, width) in the precision of the boundary.

        It is on the CPU if it was cached, unless all rows are held in the memory of the GPU.
        """


class ComputedRows:
    """The plain way: the front runs whenever it is asked. Rounds as the cache does, so that both give the same."""

    def __init__(self, compute: Compute, precision: KeptPrecision) -> None:
        self.compute, self.dtype = compute, DTYPES[precision][0]

    def rows(self, view: int, places: Sequence[int]) -> torch.Tensor:
        """Runs the front for these places; see `Rows`."""
        return self.compute(view, places).to(self.dtype)


class CachedRows:
    """The front's output, read from a directory that `cached_rows` filled."""

    def __init__(self, folder: Path, views: int, shape: tuple[int, int], precision: KeptPrecision) -> None:
        self.folder, self.dtype = folder, DTYPES[precision][0]
        self._held: list[torch.Tensor] = []  # of each view, on a device
        self._views = [np.load(_file(folder, view), mmap_mode="r") for view in range(views)]
        for view, array in enumerate(self._views):
            if array.shape != shape or array.dtype != DTYPES[precision][1]:
                raise ValueError(f"{_file(folder, view).name} holds {array.dtype} {array.shape}, not {shape}")

    def rows(self, view: int, places: Sequence[int]) -> torch.Tensor:
        """Reads the rows of these places; see `Rows`."""
        if self._held:
            index = torch.tensor(places, dtype=torch.int64)
            return self._held[view][to_device(pinned(index, self._held[view].device), self._held[view].device)]
        return torch.from_numpy(self._views[view][np.asarray(places, dtype=np.int64)]).view(self.dtype)

    def hold(self, device: torch.device) -> None:
        """Copies all rows to a device's memory, from which they are read from now on."""
        held = [torch.empty(array.shape, dtype=self.dtype, device=device) for array in self._views]
        for view, array in zip(held, self._views, strict=True):
            each = max(1, CHUNK_BYTES // max(1, array.strides[0]))
            for first in range(0, len(array), each):  # in parts, so that the CPU never holds all of them
                part = torch.from_numpy(np.array(array[first : first + each])).view(self.dtype)
                view[first : first + each].copy_(part)
        self._held = held

    @property
    def bytes_on_disk(self) -> int:
        """Of all views."""
        return sum(view.nbytes for view in self._views)


def front_key(front: torch.nn.Module, accelerator: Accelerator | None = None) -> dict[str, Any]:
    """Returns all that the output of a frozen `front` depends on besides its input, as JSON values.

    That is its architecture (kinds and settings of its modules, the traced code of a cut one, the configuration of one
    of transformers), its weights, the arithmetic, and the libraries that compute it. Without an `accelerator` that is
    plain arithmetic on the device of its weights.
    """
    modules = [
        f"{name}: {type(module).__name__}({module.extra_repr()}) {_settings(module)}"
        for name, module in front.named_modules()
    ]
    traced = [module.code for module in front.modules() if isinstance(module, torch.fx.GraphModule)]
    config: Any = getattr(front, "config", None)
    settings = repr(config.to_dict() if hasattr(config, "to_dict") else config)
    return {
        "architecture": hashlib.sha256("\n".join([*modules, *traced, settings]).encode()).hexdigest(),
        "weights": state_hash(front),
        "precision": accelerator.mixed_precision if accelerator else "no",
        "device": (accelerator or next(front.parameters())).device.type,
        "versions": {name: _version(name) for name in VERSIONS},
    }


def _settings(module: torch.nn.Module) -> dict[str, Any]:
    """Returns the plain values that a module holds, such as a number of heads, which its description may leave out."""
    held = {name: value for name, value in vars(module).items() if name != "training" and not name.startswith("_")}
    return {name: held[name] for name in sorted(held) if isinstance(held[name], (bool, int, float, str))}


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution).split("+")[0]  # +cpu and +cu130 are the same release
    except importlib.metadata.PackageNotFoundError:
        return None


def front_rows(
    name: str,
    front: torch.nn.Module | None,
    compute: Compute,
    count: int,
    width: int,
    recipe: Any,
    options: CacheOptions,
    accelerator: Accelerator,
    views: int = 1,
    precision: KeptPrecision | None = None,
    batch: int = FRONT_BATCH,
) -> Rows:
    """Returns the output (count, width) of a frozen `front` for every sample; what its cache lacks is computed now.

    `compute(view, places)` reads these samples and runs the front, which is on its device and in evaluation mode; it is
    called for `batch` samples at a time. `recipe` (JSON values) tells everything that its input depends on. Without a
    front (None) it only reads: decoded pictures, say. With `--no-cache` the front runs whenever rows are asked for.

    Raises:
        LabError: the disk is too small or fails; a file of the cache is broken; `--no-cache` under FSDP, whose layers
            are whole in the model's own forward pass alone.
    """
    if front is not None and not options.cache and accelerator.distributed_type == DistributedType.FSDP:
        raise LabError("--no-cache: FSDP shards what is frozen too, and cannot run it apart from the rest; drop "
                       "--no-cache, or launch with multi_gpu.yaml")  # fmt: skip

    @torch.no_grad()
    def in_batches(view: int, places: Sequence[int]) -> torch.Tensor:
        with accelerator.autocast():
            parts = [compute(view, places[at : at + batch]) for at in range(0, len(places), batch)]
        return torch.cat(parts)

    precision = precision or options.boundary_precision
    if not options.cache:
        return ComputedRows(in_batches, precision)
    whole = {"front": None if front is None else front_key(front, accelerator), "input": recipe}
    rows = cached_rows(
        path_name(name), whole, count, views, width, precision, in_batches, accelerator.is_main_process
    )  # fmt: skip
    if rows.bytes_on_disk <= HELD_SHARE * free_bytes(accelerator.device):
        rows.hold(accelerator.device)
    return rows


def disk_bytes(rows: Iterable[Rows | None]) -> int:
    """Adds up the bytes on disk of those rows that are cached."""
    return sum(part.bytes_on_disk for part in rows if isinstance(part, CachedRows))


def cached_rows(
    name: str,
    recipe: Any,
    count: int,
    views: int,
    width: int,
    precision: KeptPrecision,
    compute: Compute,
    shown: bool = True,
) -> CachedRows:
    """Opens the cache for exactly this `recipe`; what it still lacks is computed now.

    `recipe` (JSON values) must tell everything that the rows depend on: the front's weights, the transform, the data.
    Every process that will read calls this; together they compute each chunk once, and wait for each other.

    Raises:
        LabError: the disk is too small or fails; a file of the cache is broken.
    """
    row_bytes = width * DTYPES[precision][1]().itemsize
    chunk = max(1, min(count, CHUNK_ROWS, CHUNK_BYTES // row_bytes))
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
                    console.print(f"frozen features: {_size(need)} in {folder}{_time(compute, count, views)}")
                _fill(rows, done.fileno(), missing, count, chunk, compute, shown)
                # Opened anew: a network's file system then looks at what other machines wrote.
                rows = CachedRows(folder, views, (count, width), precision)
    except (OSError, ValueError) as error:
        raise LabError(
            f"the feature cache {folder} cannot be used ({error}); delete it, {REMEDY}, or add --no-cache"
        ) from error
    return rows


def _missing(rows: CachedRows, done: BinaryIO, count: int, chunk: int) -> list[int]:
    """Lists the chunks that are not there or are damaged."""
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
    """Returns the CRC-32, but never four zeros, which say that nothing is there."""
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


def _time(compute: Compute, count: int, views: int) -> str:
    """Says how long it will take, by some samples; nothing if there are few."""
    if count * views < MANY:
        return ""
    compute(0, range(2))  # the first call is slower
    began = time.perf_counter()
    compute(0, range(TRIED)).cpu()
    return f", about {(time.perf_counter() - began) / TRIED * count * views / 60:.1f} minutes to compute"


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
