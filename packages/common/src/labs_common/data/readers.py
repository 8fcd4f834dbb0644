"""Labelled pictures in each published layout: `read_pictures` finds out which one a path or name is."""

import json
import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from labs_common.data.classes import LabelledPictures, stratified_parts
from labs_common.data.images import SUFFIXES, BadPictureError, Content, checked, print_refused, within
from labs_common.errors import LabError, reason_of
from labs_common.options import ClassDataOptions

# What others call the splits, in the names of files, folders and tables.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
IMAGE_COLUMNS, LABEL_COLUMNS = ("img", "image", "picture", "pixel_values"), ("label", "labels", "fine_label", "class")
MOST_CLASSES = 100_000  # several times the largest published data set's
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip")
SIDE = 32  # of CIFAR-10's pictures
PIXELS = 3 * SIDE**2  # bytes of one: all red levels, then green, then blue
CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


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

    What was left out is printed if `shown`; `drawn` gives the directory of the scenes that are read without --data.

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
        if name not in splits:
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
    return {name: splits[name] for name in SPLITS}


def read_pictures(data: str) -> PictureSplits:
    """Reads CIFAR-10 (python batches or binary), class folders of image files, parquet, or a Hugging Face data set.

    `data` is a file, a directory, a directory that `datasets` saved, or a Hugging Face id. Nothing is decoded yet.

    Raises:
        LabError: it is none of those, or a file of it is broken; the file is named.
    """
    path = Path(data).expanduser()
    if not path.exists():
        return _from_datasets(data, path)
    if not path.is_dir():
        if path.name.endswith(ARCHIVES):
            raise LabError(f"--data {data}: is an archive; unpack it and name the directory")
        if path.suffix != ".parquet":
            raise LabError(f"--data {data}: name a directory or a .parquet file")
        return _splits(data, {"train": _parquet(data, [path])})
    for folder in (path, path / "cifar-10-batches-py", path / "cifar-10-batches-bin"):
        for suffix in ("", ".bin"):
            if (folder / f"data_batch_1{suffix}").is_file() or (folder / f"test_batch{suffix}").is_file():
                return _splits(data, _cifar10(data, folder, suffix))
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _from_datasets(data, path)
    for folder in (path, path / "data"):
        if files := sorted(folder.glob("*.parquet")):
            return _parquet_files(data, files)
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


def _split_of(word: str) -> str:
    """Returns the split that others call so; "" if it is none."""
    return next((split for split, words in SPLITS.items() if word in words), "")


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


def _parquet_files(data: str, files: Sequence[Path]) -> PictureSplits:
    """Reads files named by their split: train.parquet, train-00000-of-00002.parquet; if none is, all is training."""
    groups: dict[str, list[Path]] = {}
    for file in files:
        groups.setdefault(_split_of(file.stem.split("-")[0].split("_")[0].lower()), []).append(file)
    if set(groups) == {""}:
        groups = {"train": groups[""]}
    elif "" in groups:
        raise LabError(f"--data {data}: {groups[''][0].name} is of no split; name files train*, validation* or test*")
    return _splits(data, {split: _parquet(data, group) for split, group in groups.items()})


def _parquet(data: str, files: Sequence[Path]) -> LabelledPictures:
    tables = []
    for file in files:
        if not file.is_file():
            raise LabError(f"--data {data}: {file.name} is a directory, pipe or device")
        try:
            tables.append(parquet.read_table(file))
        except (OSError, pa.ArrowException) as error:
            raise LabError(f"--data {data}: {file.name} cannot be read ({reason_of(error)})") from error
    schema = tables[0].schema
    if any(table.schema.names != schema.names for table in tables):
        raise LabError(f"--data {data}: its parquet files have different columns")
    image, label = (_column(data, schema.names, known) for known in (IMAGE_COLUMNS, LABEL_COLUMNS))
    try:  # as `datasets` writes the names of classes
        info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        names = info["info"]["features"][label]["names"]
        names = names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None
    except (ValueError, KeyError, TypeError, RecursionError):
        names = None
    try:
        pictures, labels = ([v for table in tables for v in table[column].to_pylist()] for column in (image, label))
    except ValueError as error:  # text that is not UTF-8
        raise LabError(f"--data {data}: a .parquet file holds what cannot be read ({reason_of(error)})") from error
    return _from_columns(data, pictures, labels, names, files[0].parent)


def _from_datasets(data: str, path: Path) -> PictureSplits:
    if not path.exists() and (path.is_absolute() or data.startswith((".", "~")) or data.count("/") > 1):
        raise LabError(f"--data {data}: no such file or directory")
    import datasets  # takes over a second, and is wanted for saved data sets and ids only

    try:
        loaded = datasets.load_from_disk(str(path)) if path.exists() else datasets.load_dataset(data)
    except Exception as error:  # the libraries below raise many kinds, for a missing name as for no network
        raise LabError(
            f"--data {data}: neither a path here nor a data set that could be loaded ({reason_of(error)}); check the "
            "name and the network, or name a directory"
        ) from error
    whole = loaded if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}
    # What was downloaded lies in the caches: of data sets, and of the hub, which is under the home of both.
    hub = os.environ.get("HF_HUB_CACHE", datasets.config.HF_CACHE_HOME)
    folders = [path] if path.exists() else [Path(datasets.config.HF_DATASETS_CACHE), Path(hub)]
    found = {}
    for name, table in whole.items():
        if split := _split_of(name):
            image, label = (_column(data, table.column_names, known) for known in (IMAGE_COLUMNS, LABEL_COLUMNS))
            raw = table.cast_column(image, datasets.Image(decode=False)).with_format(None)
            names = getattr(table.features[label], "names", None)
            found[split] = _from_columns(data, list(raw[image]), list(raw[label]), names, *folders)
    return _splits(data, found)


def _column(data: str, names: Sequence[str], known: Sequence[str]) -> str:
    for name in known:
        if name in names:
            return name
    raise LabError(f"--data {data}: no column {' or '.join(known)}; it has {', '.join(names)}")


def _from_columns(
    data: str, pictures: Sequence[Any], labels: Sequence[Any], classes: Sequence[str] | None, *folders: Path
) -> LabelledPictures:
    """Takes pictures as {bytes, path} or bytes, and labels as numbers or words; paths must lie in one of `folders`."""
    contents: list[Content] = []
    names = []
    for place, picture in enumerate(pictures):
        record = picture if isinstance(picture, dict) else {"bytes": picture}
        content, file = record.get("bytes"), record.get("path")
        if content is not None and not isinstance(content, bytes):
            raise LabError(f"--data {data}: row {place} holds no bytes of a picture file")
        try:
            contents.append(content if content is not None else within(file, *folders) if file else b"")
        except BadPictureError as error:
            raise LabError(f"--data {data}: row {place} ({file}): {error}") from error
        names.append(f"row {place}" + (f" ({file})" if file else ""))
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
    folders = {split: folder for folder in reversed(_folders(path)) if (split := _split_of(folder.name.lower()))}
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
