"""Pictures with classes in each published layout, and how they are divided; `read_pictures` finds out which it is."""

import json
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from labs_common.data.images import SUFFIXES, BadPictureError, Pictures, checked, print_refused, within
from labs_common.data.tables import SPLITS, Columns, column_of, read_tables, split_of
from labs_common.errors import LabError
from labs_common.options import ClassDataOptions

LABEL_COLUMNS = ("label", "labels", "fine_label", "class")
MOST_CLASSES = 100_000  # several times the largest published data set's
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip")
SIDE = 32  # of CIFAR-10's pictures
PIXELS = 3 * SIDE**2  # bytes of one: all red levels, then green, then blue
CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


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


@dataclass(frozen=True)
class PictureSplits:
    """Training, validation and test pictures, as the data set divides them; the latter two may be missing."""

    train: LabelledPictures
    validation: LabelledPictures | None = None
    test: LabelledPictures | None = None


def read_classes(
    options: ClassDataOptions, seed: int, shown: bool, drawn: Callable[[], Path]
) -> dict[str, LabelledPictures]:
    """Reads training, validation and test pictures, each decoded once; splits that the data lacks are set aside.

    What was left out is printed if `shown`; `drawn` gives the directory of the scenes that are read without --data. A
    split that the data lacks and of which the options ask for a share of 0 is left out.

    Raises:
        LabError: the data cannot be read, or some of it and --on-bad-data says so, or it is too small.
    """
    data = options.data or str(drawn())
    found = read_pictures(data)
    splits = {}
    for name, part in (("train", found.train), ("validation", found.validation), ("test", found.test)):
        if part is not None:
            part = part if options.data else replace(part, source="drawn scenes")
            splits[name] = checked(part, options.on_bad_data, shown)
    for name, share in (("test", options.test_fraction), ("validation", options.validation_fraction)):
        if name not in splits and share:
            train = splits["train"]
            kept, aside = stratified_parts(train.labels, share, seed)
            if not len(aside):
                raise LabError(f"--data {data}: {len(train)} pictures are too few for a {name} split: no class has two")
            splits |= {"train": train.subset(kept), name: train.subset(aside)}
    if options.limit:
        splits = {name: part.at_most(options.limit, seed) for name, part in splits.items()}
    train = splits["train"]
    if missing := sorted(set(range(len(train.classes))) - set(train.labels.tolist())):
        raise LabError(
            f"--data {data}: no training picture of class {train.classes[missing[0]]}; take a larger --limit or other "
            "data"
        )
    if shown:
        print_refused(splits)
    return {name: splits[name] for name in SPLITS if name in splits}


def read_pictures(data: str) -> PictureSplits:
    """Reads CIFAR-10 (python batches or binary), class folders of image files, parquet, or a Hugging Face data set.

    `data` is a file, a directory, a directory that `datasets` saved, or a Hugging Face id. Nothing is decoded yet.

    Raises:
        LabError: it is none of those, or a file of it is broken; the file is named.
    """
    path = Path(data).expanduser()
    if path.exists() and not path.is_dir() and path.suffix != ".parquet":
        if path.name.endswith(ARCHIVES):
            raise LabError(f"--data {data}: is an archive; unpack it and name the directory")
        raise LabError(f"--data {data}: name a directory or a .parquet file")
    for folder in (path, path / "cifar-10-batches-py", path / "cifar-10-batches-bin"):
        for suffix in ("", ".bin"):
            if (folder / f"data_batch_1{suffix}").is_file() or (folder / f"test_batch{suffix}").is_file():
                return _splits(data, _cifar10(data, folder, suffix))
    if tables := read_tables(data):
        return _splits(data, {split: _labelled(data, table) for split, table in tables.items()})
    return _image_folders(data, path)


def _splits(data: str, found: dict[str, LabelledPictures]) -> PictureSplits:
    if "train" not in found:
        raise LabError(f"--data {data}: has no training pictures; found only {', '.join(found) or 'nothing'}")
    train = found["train"]
    for name, other in found.items():
        if other.classes != train.classes:
            differing = sorted(set(other.classes) ^ set(train.classes))[:3] or ["their order"]
            raise LabError(f"--data {data}: train and {name} have different classes ({', '.join(differing)})")
    return PictureSplits(train, found.get("validation"), found.get("test"))


def _cifar10(data: str, folder: Path, suffix: str) -> dict[str, LabelledPictures]:
    """Reads CIFAR-10 as its authors publish it: data_batch_1 to 5, test_batch and batches.meta; .bin if binary."""
    classes, meta = CIFAR10, folder / ("batches.meta.txt" if suffix else "batches.meta")
    if meta.is_file():
        classes = meta.read_text("utf-8", errors="replace").split() if suffix else _label_names(data, meta)
    read = _binary_batch if suffix else _python_batch
    found = {}
    for split, stems in {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}.items():
        files = [folder / (stem + suffix) for stem in stems]
        there = [file for file in files if file.is_file()]
        if split == "train" and 0 < len(there) < len(files):
            missing = ", ".join(file.name for file in files if file not in there)
            raise LabError(f"--data {data}: {missing} is missing; download the data set again")
        if there:
            levels, labels, names = zip(*(read(data, file) for file in there), strict=True)
            images = np.concatenate(levels).reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)  # (n, height, width, 3)
            found[split] = LabelledPictures(
                source=data,
                contents=list(np.ascontiguousarray(images)),
                names=[name for part in names for name in part],
                classes=tuple(classes),
                labels=np.concatenate(labels),
            )
    return found


Batch = tuple[np.ndarray, np.ndarray, list[str]]  # levels (n, 3072), labels (n,), names


def _binary_batch(data: str, file: Path) -> Batch:
    content = np.fromfile(file, dtype=np.uint8)
    if len(content) == 0 or len(content) % (PIXELS + 1):  # a byte for the label, then the picture
        raise LabError(
            f"--data {data}: {file.name} is truncated: {len(content):,} bytes are not a multiple of {PIXELS + 1}"
        )
    rows = content.reshape(-1, PIXELS + 1)
    return rows[:, 1:], rows[:, 0].astype(np.int64), [f"{file.name}/{place}" for place in range(len(rows))]


def _python_batch(data: str, file: Path) -> Batch:
    batch = _unpickled(data, file)
    levels: Any = batch.get(b"data")
    try:
        labels = np.asarray(batch.get(b"labels"), dtype=np.int64)
    except (TypeError, ValueError, OverflowError):
        labels = np.zeros((), dtype=np.int64)
    bytes_ = isinstance(levels, np.ndarray) and levels.dtype == np.uint8
    if not bytes_ or labels.ndim != 1 or levels.shape != (len(labels), PIXELS):
        raise LabError(
            f"--data {data}: {file.name} is no CIFAR-10 batch: expected data (n, {PIXELS}) of bytes and n labels"
        )
    names = batch.get(b"filenames")
    if not isinstance(names, list) or len(names) != len(labels):
        names = [f"{file.name}/{place}" for place in range(len(labels))]
    return levels, labels, list(map(_text, names))


def _label_names(data: str, file: Path) -> list[str]:
    names = _unpickled(data, file).get(b"label_names")
    if not isinstance(names, list) or not all(isinstance(name, (bytes, str)) for name in names):
        raise LabError(f"--data {data}: {file.name} has no list label_names")
    return list(map(_text, names))


class _ArraysOnly(pickle.Unpickler):
    """Makes numpy arrays and plain values; any other name in the pickle is refused before it is looked up."""

    ALLOWED = (
        "numpy.core.multiarray._reconstruct",
        "numpy._core.multiarray._reconstruct",
        "numpy.ndarray",
        "numpy.dtype",
        "_codecs.encode",
    )

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in self.ALLOWED:
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


def _text(name: Any) -> str:
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)


def _labelled(data: str, table: Columns) -> LabelledPictures:
    """Takes labels as numbers or words."""
    contents, names = table.pictures(data)
    column = column_of(data, table.names, LABEL_COLUMNS)
    labels = table.values(data, column)
    try:  # as `datasets` writes the names of classes
        info = json.loads((table.tables[0].schema.metadata or {}).get(b"huggingface", b"{}"))
        classes = info["info"]["features"][column]["names"]
        classes = classes if isinstance(classes, list) and all(isinstance(name, str) for name in classes) else None
    except (ValueError, KeyError, TypeError, RecursionError):
        classes = None
    if any(isinstance(label, str) for label in labels):
        classes = classes or sorted({label for label in labels if label is not None})
        numbers = [classes.index(label) if label in classes else -1 for label in labels]
    else:
        # A class for each number up to the largest: one of 100,000,000 is no class but a fault.
        numbers = [label if isinstance(label, int) and label < MOST_CLASSES else -1 for label in labels]
        classes = classes or [str(number) for number in range(max(numbers, default=-1) + 1)]
    return LabelledPictures(
        source=data, contents=contents, names=names, classes=tuple(classes), labels=np.array(numbers, dtype=np.int64)
    )


def _image_folders(data: str, path: Path) -> PictureSplits:
    """Reads `SPLIT/CLASS/*.png`, or `CLASS/*.png` without splits."""
    folders = {split: folder for folder in reversed(_folders(path)) if (split := split_of(folder.name.lower()))}
    if "train" not in folders:
        return _splits(data, {"train": _class_folders(data, path)})
    return _splits(data, {split: _class_folders(data, folders[split]) for split in SPLITS if split in folders})


def _class_folders(data: str, folder: Path) -> LabelledPictures:
    classes = _folders(folder)
    files: list[Path] = []
    labels: list[int] = []
    for number, of_class in enumerate(classes):
        there = sorted(file for file in of_class.rglob("*") if file.suffix.lower() in SUFFIXES)
        for file in there:
            try:
                within(file.relative_to(of_class), of_class, folder)
            except BadPictureError as error:
                raise LabError(f"--data {data}: {file.relative_to(folder)}: {error}") from error
        if not there:
            raise LabError(
                f"--data {data}: {of_class.name} holds no pictures; expected CLASS/*.jpg or train/CLASS/*.jpg"
            )
        files += there
        labels += [number] * len(there)
    if len(classes) < 2:
        raise LabError(
            f"--data {data}: expected CIFAR-10 batches, .parquet files, or a directory for each class (CLASS/*.jpg, or "
            "train/CLASS/*.jpg and test/CLASS/*.jpg)"
        )
    return LabelledPictures(
        source=data,
        contents=files,
        names=[str(file.relative_to(folder)) for file in files],
        classes=tuple(of_class.name for of_class in classes),
        labels=np.array(labels, dtype=np.int64),
    )


def _folders(path: Path) -> list[Path]:
    return sorted(folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith("."))
