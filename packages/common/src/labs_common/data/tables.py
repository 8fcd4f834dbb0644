"""Rows of pictures in tables, from parquet files or a Hugging Face data set, by split; what splits are called."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from pyarrow import parquet

from labs_common.data.images import BadPictureError, Content, within
from labs_common.errors import LabError, reason_of

# What others call the splits, in the names of files, folders and tables.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
IMAGE_COLUMNS = ("img", "image", "picture", "pixel_values")


def split_of(word: str) -> str:
    """Returns the split that others call so; "" if it is none."""
    return next((split for split, words in SPLITS.items() if word in words), "")


class Columns(NamedTuple):
    """The rows of a split: tables that follow each other, and the folders in which files that they name must lie."""

    tables: list[pa.Table]
    folders: list[Path]

    @property
    def names(self) -> list[str]:
        """Of the columns."""
        return list(self.tables[0].schema.names)

    def values(self, data: str, name: str) -> list[Any]:
        """Reads a column.

        Raises:
            LabError: it holds text that is not UTF-8.
        """
        try:
            return [value for table in self.tables for value in table[name].to_pylist()]
        except ValueError as error:
            raise LabError(f"--data {data}: column {name} holds what cannot be read ({reason_of(error)})") from error

    def pictures(self, data: str) -> tuple[list[Content], list[str]]:
        """Reads the pictures and a name for each: a row has {bytes, path} or bytes.

        Raises:
            LabError: there is no such column, or it names files elsewhere.
        """
        contents: list[Content] = []
        names = []
        for place, picture in enumerate(self.values(data, column_of(data, self.names, IMAGE_COLUMNS))):
            record = picture if isinstance(picture, dict) else {"bytes": picture}
            content, file = record.get("bytes"), record.get("path")
            if content is not None and not isinstance(content, bytes):
                raise LabError(f"--data {data}: row {place} holds no bytes of a picture file")
            try:
                contents.append(content if content is not None else within(file, *self.folders) if file else b"")
            except BadPictureError as error:
                raise LabError(f"--data {data}: row {place} ({file}): {error}") from error
            names.append(f"row {place}" + (f" ({file})" if file else ""))
        return contents, names


def read_tables(data: str) -> dict[str, Columns]:
    """Reads .parquet files, what `datasets` saved, or a Hugging Face id, by split; nothing if a directory has neither.

    Raises:
        LabError: a file is broken, or there is no such data set.
    """
    path = Path(data).expanduser()
    if not path.exists() or (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _from_datasets(data, path)
    if not path.is_dir():
        return {"train": _parquet(data, [path])}
    for folder in (path, path / "data"):
        if files := sorted(folder.glob("*.parquet")):
            return {split: _parquet(data, group) for split, group in by_split(data, files).items()}
    return {}


def by_split(data: str, files: Sequence[Path]) -> dict[str, list[Path]]:
    """Groups files by the split that a word of their names says; if none does, all is training.

    So do train.parquet, train-00000-of-00002.parquet, cc3m-train-0000.tar, and the names of folders in `data`.

    Raises:
        LabError: some are named so, and others not.
    """
    groups: dict[str, list[Path]] = {}
    for file in files:
        named = next(filter(None, map(split_of, re.split(r"[\W\d_]+", file.stem.lower()))), "")
        within = "" if file.parent == Path(data).expanduser() else split_of(file.parent.name)
        groups.setdefault(named or within, []).append(file)
    if set(groups) == {""}:
        return {"train": groups[""]}
    if "" in groups:
        raise LabError(f"--data {data}: {groups[''][0].name} is of no split; name files train*, validation* or test*")
    return groups


def _parquet(data: str, files: Sequence[Path]) -> Columns:
    tables = []
    for file in files:
        if not file.is_file():
            raise LabError(f"--data {data}: {file.name} is a directory, pipe or device")
        try:
            tables.append(parquet.read_table(file))
        except (OSError, pa.ArrowException) as error:
            raise LabError(f"--data {data}: {file.name} cannot be read ({reason_of(error)})") from error
    if any(table.schema.names != tables[0].schema.names for table in tables):
        raise LabError(f"--data {data}: its parquet files have different columns")
    return Columns(tables, [files[0].parent])


def _from_datasets(data: str, path: Path) -> dict[str, Columns]:
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
        if split := split_of(name):
            rows = table.with_format("arrow")[:]  # pictures as they are stored, and the names of classes beside them
            found[split] = Columns([rows.replace_schema_metadata(table.features.arrow_schema.metadata)], folders)
    return found


def column_of(data: str, names: Sequence[str], known: Sequence[str]) -> str:
    """Finds the first of the `known` names among a table's.

    Raises:
        LabError: there is none.
    """
    for name in known:
        if name in names:
            return name
    raise LabError(f"--data {data}: no column {' or '.join(known)}; it has {', '.join(names)}")
