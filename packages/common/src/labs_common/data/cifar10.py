"""CIFAR-10 as its authors publish it: python batches, through an unpickler that makes arrays only, and binary."""

import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from labs_common.data.pictures import LabelledPictures
from labs_common.errors import LabError

SIDE = 32
PIXELS = 3 * SIDE**2  # bytes of a picture: all red levels, then green, then blue
CLASSES: tuple[str, ...] = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
Batch = tuple[np.ndarray, np.ndarray, list[str]]  # levels (n, 3072), labels (n,), names


def python_batches(data: str, folder: Path) -> dict[str, LabelledPictures]:
    """The splits in `folder` (data_batch_1 to 5, test_batch, batches.meta).

    Raises:
        LabError: a file is missing, broken, no batch, or asks for more than arrays.
    """
    classes = CLASSES
    if (meta := folder / "batches.meta").exists():
        names = _unpickled(data, meta).get(b"label_names")
        if not isinstance(names, list) or not all(isinstance(name, (bytes, str)) for name in names):
            raise LabError(f"--data {data}: {meta.name} has no list label_names")
        classes = tuple(map(_text, names))

    def read(name: str) -> Batch:
        batch = _unpickled(data, folder / name)
        levels, labels = batch.get(b"data"), _numbers(batch.get(b"labels"))
        good = isinstance(levels, np.ndarray) and levels.dtype == np.uint8 and labels.ndim == 1
        if not isinstance(levels, np.ndarray) or not good or levels.shape != (len(labels), PIXELS):
            raise LabError(
                f"--data {data}: {name} is no CIFAR-10 batch: expected data (n, {PIXELS}) of bytes and n labels"
            )
        names = batch.get(b"filenames")
        if not isinstance(names, list) or len(names) != len(labels):
            names = [f"{name}/{place}" for place in range(len(labels))]
        return levels, labels, list(map(_text, names))

    return _splits(data, folder, "", classes, read)


def binary_batches(data: str, folder: Path) -> dict[str, LabelledPictures]:
    """The splits in `folder` (data_batch_1.bin to 5, test_batch.bin, batches.meta.txt).

    Raises:
        LabError: a file is missing or truncated.
    """
    classes = CLASSES
    if (meta := folder / "batches.meta.txt").exists():
        classes = tuple(meta.read_text("utf-8", errors="replace").split())

    def read(name: str) -> Batch:
        content = np.fromfile(folder / name, dtype=np.uint8)
        if len(content) == 0 or len(content) % (PIXELS + 1):
            raise LabError(
                f"--data {data}: {name} is truncated: {len(content):,} bytes are not a multiple of {PIXELS + 1}"
            )
        rows = content.reshape(-1, PIXELS + 1)
        return rows[:, 1:], rows[:, 0].astype(np.int64), [f"{name}/{place}" for place in range(len(rows))]

    return _splits(data, folder, ".bin", classes, read)


def _splits(
    data: str, folder: Path, suffix: str, classes: tuple[str, ...], read: Callable[[str], Batch]
) -> dict[str, LabelledPictures]:
    found = {}
    for split, wanted in {"train": [f"data_batch_{n}" for n in range(1, 6)], "test": ["test_batch"]}.items():
        names = [name + suffix for name in wanted if (folder / (name + suffix)).exists()]
        if split == "train" and 0 < len(names) < len(wanted):
            missing = [name + suffix for name in wanted if name + suffix not in names]
            raise LabError(f"--data {data}: {', '.join(missing)} is missing; download the data set again")
        if names:
            levels, labels, items = zip(*(read(name) for name in names), strict=True)
            images = np.concatenate(levels).reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
            found[split] = LabelledPictures(
                data, classes, np.concatenate(labels), list(np.ascontiguousarray(images)),
                list(itertools.chain.from_iterable(items)),
            )  # fmt: skip
    return found


class _ArraysOnly(pickle.Unpickler):
    """Makes numpy arrays and plain values; any other name in the pickle is refused before it is looked up."""

    ALLOWED = frozenset({
        ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"),
    })  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no data file needs")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _unpickled(data: str, file: Path) -> dict[bytes, Any]:
    try:
        with file.open("rb") as stream:
            content = _ArraysOnly(stream, encoding="bytes").load()
    except Exception as error:  # a broken pickle can raise anything
        raise LabError(f"--data {data}: {file.name} cannot be read ({error}); download the data set again") from error
    if not isinstance(content, dict):
        raise LabError(f"--data {data}: {file.name} is no CIFAR-10 batch")
    return content


def _numbers(values: Any) -> np.ndarray:
    try:
        return np.asarray(values, dtype=np.int64)
    except (TypeError, ValueError, OverflowError):
        return np.zeros(())


def _text(name: Any) -> str:
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)
