"""Labelled pictures in each published layout: `read_pictures` finds out which one a path or name is."""

import itertools
import json
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from labs_common.data.classes import LabelledPictures, at_most, checked, stratified_parts
from labs_common.data.images import SUFFIXES
from labs_common.data.splits import print_left_out
from labs_common.errors import LabError
from labs_common.options import ClassDataOptions

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
IMAGE_COLUMNS, LABEL_COLUMNS = ("img", "image", "picture", "pixel_values"), ("label", "labels", "fine_label", "class")
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip")


@dataclass(frozen=True)
class PictureSplits:
    """What a data set calls its training, validation and test pictures; the latter two may be missing."""

    train: LabelledPictures
    validation: LabelledPictures | None = None
    test: LabelledPictures | None = None


def read_pictures(data: str) -> PictureSplits:
    """Reads CIFAR-10 (python batches or binary), class folders of image files, parquet, or a Hugging Face data set.

    `data` is a file, a directory, a directory that `datasets` saved, or a Hugging Face id. Nothing is decoded yet.

    Raises:
        LabError: it is none of those, or a file of it is broken; the file is named.
    """
    path = Path(data).expanduser()
    if not path.exists():
        return _from_datasets(data, path)
    if path.is_file():
        if path.name.endswith(ARCHIVES):
            raise LabError(f"--data {data}: is an archive; unpack it and name the directory")
        if path.suffix != ".parquet":
            raise LabError(f"--data {data}: name a directory or a .parquet file")
        return _splits(data, {"train": _parquet(data, [path])})
    for folder in (path, path / "cifar-10-batches-py", path / "cifar-10-batches-bin"):
        if (folder / "data_batch_1").exists() or (folder / "test_batch").exists():
            return _splits(data, python_batches(data, folder))
        if (folder / "data_batch_1.bin").exists() or (folder / "test_batch.bin").exists():
            return _splits(data, binary_batches(data, folder))
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return _from_datasets(data, path)
    for folder in (path, path / "data"):
        if files := sorted(folder.glob("*.parquet")):
            return _parquet_files(data, files)
    return _image_folders(data, path)


def _parquet_files(data: str, files: Sequence[Path]) -> PictureSplits:
    """Files named by their split: train.parquet, train-00000-of-00002.parquet; without such names all is training."""
    groups: dict[str, list[Path]] = {}
    for file in files:
        word = file.stem.split("-")[0].split("_")[0].lower()
        split = next((split for split, words in SPLITS.items() if word in words), "")
        groups.setdefault(split, []).append(file)
    if set(groups) == {""}:
        groups = {"train": groups[""]}
    elif "" in groups:
        raise LabError(f"--data {data}: {groups[''][0].name} is of no split; name files train*, validation* or test*")
    return _splits(data, {split: _parquet(data, group) for split, group in groups.items()})


def _parquet(data: str, files: Sequence[Path]) -> LabelledPictures:
    import pyarrow as pa
    from pyarrow import parquet

    tables = []
    for file in files:
        try:
            tables.append(parquet.read_table(file))
        except (OSError, pa.ArrowException) as error:
            raise LabError(f"--data {data}: {file.name} cannot be read ({str(error).splitlines()[0]})") from error
    schema = tables[0].schema
    if any(table.schema.names != schema.names for table in tables):
        raise LabError(f"--data {data}: its parquet files have different columns")
    image, label = (_column(data, schema.names, known) for known in (IMAGE_COLUMNS, LABEL_COLUMNS))
    try:
        info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        names = info["info"]["features"][label]["names"]
    except (ValueError, KeyError, TypeError):
        names = None
    pictures = [picture for table in tables for picture in table[image].to_pylist()]
    labels = [value for table in tables for value in table[label].to_pylist()]
    return _from_columns(data, pictures, labels, names, files[0].parent)


def _column(data: str, names: Sequence[str], known: Sequence[str]) -> str:
    for name in known:
        if name in names:
            return name
    raise LabError(f"--data {data}: no column {' or '.join(known)}; it has {', '.join(names)}")


def _from_columns(
    data: str, pictures: Sequence[Any], labels: Sequence[Any], names: Sequence[str] | None, folder: Path
) -> LabelledPictures:
    """Pictures as {bytes, path} or bytes, and labels as numbers or words."""
    contents: list[bytes | Path] = []
    items = []
    for place, picture in enumerate(pictures):
        record = picture if isinstance(picture, dict) else {"bytes": picture}
        content, file = record.get("bytes"), record.get("path")
        if content is not None and not isinstance(content, bytes):
            raise LabError(f"--data {data}: row {place} holds no bytes of a picture file")
        contents.append(content if content is not None else folder / file if file else b"")
        items.append(f"row {place}" + (f" ({file})" if file else ""))
    if any(isinstance(label, str) for label in labels):
        names = names or sorted({label for label in labels if label is not None})
        numbers = [names.index(label) if label in names else -1 for label in labels]
    else:
        numbers = [label if isinstance(label, int) else -1 for label in labels]
        names = names or [str(number) for number in range(max(numbers, default=-1) + 1)]
    return LabelledPictures(data, tuple(names), np.array(numbers, dtype=np.int64), contents, items)


def _from_datasets(data: str, path: Path) -> PictureSplits:
    if not path.exists() and (path.is_absolute() or data.startswith((".", "~")) or data.count("/") > 1):
        raise LabError(f"--data {data}: no such file or directory")
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path)) if path.exists() else datasets.load_dataset(data)
    except Exception as error:  # the libraries below raise many kinds, for a missing name as for no network
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise LabError(
            f"--data {data}: neither a path here nor a data set that could be loaded ({reason}); check the name and "
            "the network, or name a directory"
        ) from error
    whole = loaded if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}
    found = {}
    for name, table in whole.items():
        split = next((split for split, words in SPLITS.items() if name in words), None)
        if split is not None:
            image, label = (_column(data, table.column_names, known) for known in (IMAGE_COLUMNS, LABEL_COLUMNS))
            raw = table.cast_column(image, datasets.Image(decode=False)).with_format(None)
            names = getattr(table.features[label], "names", None)
            found[split] = _from_columns(data, list(raw[image]), list(raw[label]), names, path)
    return _splits(data, found)


def _image_folders(data: str, path: Path) -> PictureSplits:
    """`SPLIT/CLASS/*.png`, or `CLASS/*.png` without splits."""
    folders = sorted(folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    by_split = {split: next((f for f in folders if f.name.lower() in words), None) for split, words in SPLITS.items()}
    if by_split["train"] is None:
        return _splits(data, {"train": _class_folders(data, path)})
    return _splits(data, {split: _class_folders(data, folder) for split, folder in by_split.items() if folder})


def _class_folders(data: str, folder: Path) -> LabelledPictures:
    classes = sorted(child.name for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
    files: list[Path] = []
    labels: list[int] = []
    for number, name in enumerate(classes):
        there = sorted(file for file in (folder / name).rglob("*") if file.suffix.lower() in SUFFIXES)
        if not there:
            raise LabError(f"--data {data}: {name} holds no pictures; expected CLASS/*.jpg or train/CLASS/*.jpg")
        files += there
        labels += [number] * len(there)
    if len(classes) < 2:
        raise LabError(f"--data {data}: expected CIFAR-10 batches, .parquet files, or a directory for each class "
                       f"(CLASS/*.jpg, or train/CLASS/*.jpg and test/CLASS/*.jpg)")  # fmt: skip
    names = [str(file.relative_to(folder)) for file in files]
    return LabelledPictures(data, tuple(classes), np.array(labels, dtype=np.int64), files, names)


def _splits(data: str, found: dict[str, LabelledPictures]) -> PictureSplits:
    if "train" not in found:
        raise LabError(f"--data {data}: has no training pictures; found only {', '.join(found) or 'nothing'}")
    train = found["train"]
    for name, other in found.items():
        if other.classes != train.classes:
            differing = sorted(set(other.classes) ^ set(train.classes))[:3] or ["their order"]
            raise LabError(f"--data {data}: train and {name} have different classes ({', '.join(differing)})")
    return PictureSplits(train, found.get("validation"), found.get("test"))


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

    return _cifar10_splits(data, folder, "", classes, read)


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

    return _cifar10_splits(data, folder, ".bin", classes, read)


def _cifar10_splits(
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


def read_classes(
    options: ClassDataOptions, seed: int, shown: bool, drawn: Callable[[], Path]
) -> dict[str, LabelledPictures]:
    """Training, validation and test pictures by name, every one decoded once; splits that the data lacks are set aside.

    What was left out is printed if `shown`; `drawn` gives the directory of the scenes that are read without --data.

    Raises:
        LabError: the data cannot be read, or some of it and --on-bad-data says so, or it is too small.
    """
    data = options.data or str(drawn())
    found = read_pictures(data)
    parts = {"train": found.train, "validation": found.validation, "test": found.test}
    if options.data is None:
        parts = {name: replace(part, source="drawn scenes") if part else None for name, part in parts.items()}
    splits = {name: checked(part, options.on_bad_data, shown) for name, part in parts.items() if part is not None}
    for name, share in (("test", options.test_fraction), ("validation", options.validation_fraction)):
        if name not in splits:
            kept, aside = stratified_parts(splits["train"].labels, share, seed)
            if not len(aside):
                raise LabError(f"--data {data}: {len(splits['train'])} pictures are too few for a {name} split: no "
                               "class has two")  # fmt: skip
            splits[name] = splits["train"].subset(aside)
            splits["train"] = splits["train"].subset(kept)
    if options.limit:
        splits = {name: at_most(part, options.limit, seed) for name, part in splits.items()}
    missing = sorted(set(range(len(splits["train"].classes))) - set(splits["train"].labels.tolist()))
    if missing:
        raise LabError(f"--data {data}: no training picture of class {splits['train'].classes[missing[0]]}; take a "
                       "larger --limit or other data")  # fmt: skip
    if shown:
        print_left_out(splits)
    return {name: splits[name] for name in SPLITS}
