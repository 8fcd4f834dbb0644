"""Rows of conversations from files, directories and Hugging Face datasets, and the messages in a row.

A row is used as it is or not at all.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from labs_common.errors import LabError, bytes_of, reason_of, text_of
from llm_peft_fa.config import ReadingOptions
from llm_peft_fa.spelling import Message

ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
}
ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value")
PARTS = ("conversations", "prompt", "answer", "system")  # of a row, that --columns names
FILE_KINDS = (".json", ".jsonl", ".parquet")
# With what words the names of a split's files begin: train-00000-of-00002.parquet, valid.jsonl; not testimonials.jsonl.
SPLITS = {
    "train": ("train", "training"), "validation": ("validation", "valid", "val", "dev"), "test": ("test", "testing"),
}  # fmt: skip
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
PARQUET_ROWS = 1000  # read at a time: some megabytes


class UnusableRowError(Exception):
    """The reason why a row cannot be used; rows are counted by the part before a colon."""


def rows(source: str, split: str, streaming: bool = False) -> Iterator[tuple[str, Any]]:
    """Yields (place, row) from a file, a directory or a Hugging Face dataset.

    A row that cannot be read comes as the error.

    Raises:
        LabError: nothing is there, or it is in no format that is read.
    """
    files = files_of(source, split)
    if files is None:
        for number, row in enumerate(dataset_of(source, split, streaming), 1):
            yield f"{source} ({split}), row {number}", row
    else:
        for file in files:
            yield from _file_rows(file)


def files_of(source: str, split: str) -> list[Path] | None:
    """Lists the files of a split; None of a dataset, on the hub or saved to disk.

    Raises:
        LabError: nothing is there.
    """
    path = Path(source)
    if path.is_dir() and not _saved(path):
        return _files_of_split(path, split)
    if path.is_dir():
        return None
    if path.exists() or path.suffix in FILE_KINDS or source.startswith((".", "/", "~")) or source.count("/") > 1:
        if not path.exists():
            raise LabError(f"{source}: no such file or directory")
        return [path]
    return None


def own_splits(source: str, remedy: str = "give --validation-data and --test-data") -> list[str]:
    """Lists which of validation and test a directory or dataset has besides what is trained on.

    `remedy` is what the command has to get along without the list.

    Raises:
        LabError: the hub does not say: silently, other conversations would be held out than before.
    """
    path = Path(source)
    if path.is_dir() and not _saved(path):
        names = [file.name for file in path.iterdir() if file.suffix in FILE_KINDS]
        return [split for split in ("validation", "test") if any(_is_of(name, split) for name in names)]
    if path.is_dir() and (path / "dataset_dict.json").exists():
        return [split for split in ("validation", "test") if (path / split).is_dir()]
    if path.exists() or files_of(source, "train") is not None:
        return []
    import datasets  # as below

    try:
        found = datasets.get_dataset_split_names(source)
    except Exception as error:  # of the hub, the network, the library
        said = f"its splits cannot be listed ({reason_of(error)})"
        raise LabError(f"--data {source}: {said}; try again, or {remedy}") from error
    return [split for split in ("validation", "test") if split in found]


def dataset_of(source: str, split: str, streaming: bool = False) -> Any:
    """Loads a Hugging Face dataset, from the hub or from where it was saved.

    Raises:
        LabError: it cannot be loaded.
    """
    import datasets  # here: it takes two seconds to import, and files do not need it

    try:
        if Path(source).is_dir():
            loaded = datasets.load_from_disk(source)
            return loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        return datasets.load_dataset(source, split=split, streaming=streaming)
    except Exception as error:  # the library raises whatever its network and file layers do
        raise LabError(f"{source}: the dataset or its split {split!r} cannot be loaded ({reason_of(error)})") from error


def columns_of(options: ReadingOptions) -> dict[str, str]:
    """Reads --columns: the column of each part of a row.

    Raises:
        LabError: an entry is not PART=COLUMN, or there is no such part, or parts are missing.
    """
    found = {}
    for entry in options.columns:
        part, _, column = entry.partition("=")
        if part not in PARTS or not column:
            raise LabError(f"--columns {entry}: write PART=COLUMN; the parts are {', '.join(PARTS)}")
        found[part] = column
    if found and "conversations" not in found and not {"prompt", "answer"} <= found.keys():
        raise LabError("--columns: name conversations=COLUMN, or prompt=COLUMN and answer=COLUMN")
    return found


def messages_of(row: Any, columns: dict[str, str] | None = None) -> list[Message]:
    """Reads the messages of a row: of a column of turns, whatever its name, of prompt and completion, or of Alpaca's.

    Prompt and answer are texts, or lists of turns as TRL has them. `columns` are of `columns_of`.

    Raises:
        UnusableRowError: the row cannot be used, and why.
    """
    if not isinstance(row, dict):
        raise UnusableRowError(f"not an object: {type(row).__name__}")
    columns = columns or {}
    there = {name: value for name, value in row.items() if value is not None}  # parquet has all columns in all rows
    if not columns and not _named_turns(there) and {"prompt", "completion"} <= there.keys():  # TRL's
        columns = {"prompt": "prompt", "answer": "completion"}
    if missing := [column for column in columns.values() if column not in row]:
        raise UnusableRowError(f"no column {missing[0]}; it has {', '.join(map(str, list(row)[:5]))}")
    if "prompt" in columns:
        turns = _exchange(*(row[columns[part]] if part in columns else "" for part in ("system", "prompt", "answer")))
    elif (column := columns.get("conversations") or turns_column(there)) is not None:
        turns = [_turn(turn) for turn in _turns(row[column])]
    elif {"instruction", "output"} <= there.keys():
        parts = [row["instruction"], row.get("input")]
        asked = "\n\n".join(str(part).strip() for part in parts if part)
        turns = _exchange(row.get("system"), asked, row["output"])
    else:
        names = ", ".join(f"{name}{'' if name in there else ' (null)'}" for name in list(row)[:5])
        raise UnusableRowError(f"unknown columns: {names}; name them with --columns")
    if turns[0]["role"] == "system" and not turns[0]["content"].strip():  # says nothing, and some templates refuse it
        turns = turns[1:]
    _check_order(turns)
    return turns


def turns_column(row: dict[Any, Any]) -> str | None:
    """Finds the column of turns: conversations or messages, or the one that holds a list of role and content.

    Raises:
        UnusableRowError: several do.
    """
    found = _turns_columns(row)
    if len(found) > 1:
        raise UnusableRowError(f"several columns of turns: {', '.join(found)}; name one with --columns conversations=…")
    return found[0] if found else None


def _named_turns(row: dict[Any, Any]) -> list[str]:
    return [name for name in ("conversations", "messages") if row.get(name) is not None][:1]


def _turns_columns(row: dict[Any, Any]) -> list[str]:
    return _named_turns(row) or [
        name for name, value in row.items() if _is_turn(value[0] if value and isinstance(value, list) else value)
    ]


def _is_turn(value: Any) -> bool:
    return isinstance(value, dict) and all(any(key in value for key in keys) for keys in (ROLE_KEYS, CONTENT_KEYS))


def _turns(value: Any) -> list[Any]:
    if isinstance(value, dict) and _is_turn(value) and all(isinstance(part, list) for part in value.values()):
        value = [dict(zip(value, parts, strict=False)) for parts in zip(*value.values(), strict=False)]  # as columns
    if not isinstance(value, list) or not value:
        raise UnusableRowError("no turns: expected a list of them")
    return value


def _exchange(system: Any, asked: Any, answer: Any) -> list[Message]:
    said = [("system", system or ""), ("user", asked), ("assistant", answer)]
    parts = [text if isinstance(text, list) else [{"role": role, "content": text}] for role, text in said]
    return [_turn(turn) for part in parts for turn in part]


def _turn(turn: Any) -> Message:
    # Each spelling of one occurs with each of the other in the wild.
    said, content = (
        next((turn[key] for key in keys if turn.get(key) is not None), None) if isinstance(turn, dict) else None
        for keys in (ROLE_KEYS, CONTENT_KEYS)
    )
    if said is None:
        raise UnusableRowError("a turn without a role")
    role = ROLES.get(str(said).lower())
    if role is None:
        raise UnusableRowError(f"unknown role: {said!r}")
    if not isinstance(content, str):
        raise UnusableRowError(f"not text: {role} holds {type(content).__name__}")
    if not content.strip() and role != "system":
        raise UnusableRowError({"assistant": "empty answer", "user": "empty question"}[role])
    if LONE_SURROGATE.search(content):
        raise UnusableRowError(f"half a character: {role} holds a lone surrogate, which no tokenizer reads")
    return {"role": role, "content": content}


def _check_order(messages: list[Message]) -> None:
    talk = messages[1:] if messages and messages[0]["role"] == "system" else messages
    for place, message in enumerate(talk):
        expected = ("user", "assistant")[place % 2]
        if message["role"] != expected:
            raise UnusableRowError(f"roles out of order: {message['role']} where {expected} belongs")
    if len(talk) < 2 or len(talk) % 2:
        raise UnusableRowError("ends without an answer")


def _file_rows(path: Path) -> Iterator[tuple[str, Any]]:
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
    elif path.suffix == ".json" and (whole := _whole_json(path)) is not None:
        for number, row in enumerate(whole, 1):
            yield f"{path}, row {number}", row
    else:
        yield from _line_rows(path)


def _line_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields the rows of JSON lines, without ever holding the file."""
    if not path.is_file():
        bytes_of(path, str(path))  # says what it is
    with path.open("rb") as file:
        for number, content in enumerate(file, 1):
            try:
                line = content.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise LabError(f"{path}: cannot be read (line {number} is not UTF-8)") from error
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:  # also of 5,000 digits or 100,000 brackets
                    row = error
                yield f"{path}:{number}", row


def _whole_json(path: Path) -> list[Any] | None:
    """Returns the rows of a JSON file: a list, or an object that holds one list; None if it is JSON lines.

    Raises:
        LabError: it begins as a list and cannot be read: where its rows end is not known then.
    """
    text = text_of(path, str(path))
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("["):
            said = f"{path}: is no JSON ({reason_of(error)})"
            raise LabError(f"{said}; mend it, or write one row per line (.jsonl), to skip bad ones") from error
        return None
    if isinstance(value, dict):
        lists = [item for item in value.values() if isinstance(item, list)]
        return lists[0] if len(lists) == 1 and not _turns_columns(value) else [value]
    return value if isinstance(value, list) else [value]


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(PARQUET_ROWS):
                try:
                    found: list[Any] = batch.to_pylist()
                except ValueError:  # text that is not UTF-8, in one of them
                    found = [_one(batch.slice(place, 1)) for place in range(batch.num_rows)]
                for row in found:
                    number += 1
                    yield f"{path}, row {number}", row
    except (OSError, pyarrow.ArrowException) as error:
        raise LabError(f"{path}: is not a parquet file ({reason_of(error)})") from error


def _one(batch: Any) -> Any:
    try:
        return batch.to_pylist()[0]
    except ValueError as error:
        return error


def _files_of_split(folder: Path, split: str) -> list[Path]:
    files = sorted(file for file in folder.iterdir() if file.suffix in FILE_KINDS and file.is_file())
    named = [file for file in files if _is_of(file.name, split)]
    if named:
        return named
    if not files or any(_is_of(file.name, other) for file in files for other in SPLITS):
        raise LabError(f"{folder}: has no .json, .jsonl or .parquet file of the split {split!r}")
    return files


def _is_of(name: str, split: str) -> bool:
    """Tells whether a file's name begins with a word for the split, and not with a longer one."""
    return re.match(rf"(?:{'|'.join(map(re.escape, SPLITS.get(split, (split,))))})(?![^\W\d_])", name) is not None


def _saved(path: Path) -> bool:
    return (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()
