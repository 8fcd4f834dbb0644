"""Conversations from files: ShareGPT, `messages` and Alpaca rows in JSON, JSON lines, parquet or a dataset.

A row is used as it is or not at all. Rows that cannot be used are counted by reason, and the first few are named
by file and line. Persian text gets one spelling for what a keyboard can type in several ways:

| written | becomes |
|---|---|
| Arabic yeh and alef maksura (ي ى), kaf (ك) | Persian yeh (ی), kaf (ک) |
| Arabic-Indic digits (٠-٩) | Persian digits (۰-۹); ASCII digits stay, since code and formulas use them |
| zero-width non-joiner | kept between letters; dropped at spaces, at line ends, and when doubled |
| zero-width space, byte-order marks, soft hyphens, tatweel (ـ) | dropped |
| no-break space | space |
| diacritics, everything else | left alone |

The libraries for this rewrite more: hazm changes ASCII digits, punctuation, spacing and diacritics and brings a tagger
along; parsivar and piraye rewrite or depend as much.
"""

import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from labs_common.errors import LabError, reason_of, text_of
from llm_peft_fa.config import DataOptions, OnBadData, ReadingOptions, TrainConfig
from llm_peft_fa.persian import conversations, held_out_conversations, plain_text

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": ...}

ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
}
FILE_KINDS = (".json", ".jsonl", ".parquet")
SHORT_ANSWER = 5  # words; a longer right answer is seldom the reference word for word
PARAGRAPHS = 200  # of plain text, which is measured at every evaluation: it must take seconds
PLAIN_TEXT_SEED = 2  # the tiny base was pre-trained on that of seed 1

LETTERS = str.maketrans(
    {"ي": "ی", "ى": "ی", "ك": "ک", "\u00a0": " "}
    | {chr(0x0660 + digit): chr(0x06F0 + digit) for digit in range(10)}
    | dict.fromkeys("\u200b\ufeff\u00ad\u0640", None)
)
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
# A non-joiner does nothing beside a space, a line's end or another one.
IDLE_NON_JOINER = re.compile("(?<![^\\s\u200c])\u200c+|\u200c+(?=\\s|$)|(?<=\u200c)\u200c+")


@dataclass(frozen=True)
class Conversation:
    """Messages that alternate user and assistant, perhaps after a system message, and end with an answer."""

    messages: list[Message]
    where: str
    """File and line, for errors."""
    verifiable: bool = False
    """Whether the last answer can be compared word for word."""


@dataclass
class Reading:
    """The conversations of one source, and the rows that could not be used."""

    source: str
    conversations: list[Conversation] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    """The first few unusable rows: file, line and reason."""

    def refuse(self, where: str, reason: str) -> None:
        """Counts a row that cannot be used."""
        self.reasons[reason.split(":")[0]] += 1
        if len(self.examples) < 5:
            self.examples.append(f"{where}: {reason}")


class UnusableRowError(Exception):
    """The reason why a row cannot be used; rows are counted by the part before a colon."""


def normalise(text: str) -> str:
    """Returns the text in one spelling, see the table above. Twice gives the same as once."""
    return IDLE_NON_JOINER.sub("", text.translate(LETTERS))


def training_and_validation(options: DataOptions, seed: int) -> tuple[Reading, Reading]:
    """Reads or generates the conversations to train on and those to validate with.

    Generated: validation asks held-out items only. From --data: --validation-data, or a seeded share.

    Raises:
        LabError: see `read_conversations`; or the share leaves one side empty.
    """
    if options.data is None:
        if options.validation_data is not None:
            raise LabError("--validation-data: needs --data; the generated tasks bring their own validation")
        made = conversations(options.conversations, seed)
        kept = held_out_conversations(300, seed)  # the test prompts are drawn from them: 150 by default
        return _generated("generated Persian tasks", made), _generated("held-out tasks", kept)
    training = read_conversations(options.data, options.split, options)
    if options.validation_data is not None:
        return training, read_conversations(options.validation_data, options.validation_split, options)
    count = round(options.validation_fraction * len(training.conversations))
    if not 0 < count < len(training.conversations):
        raise LabError(
            f"--validation-fraction {options.validation_fraction}: leaves {count} of "
            f"{len(training.conversations)} conversations for validation; change it or give --validation-data"
        )
    shuffled = random.Random(f"validation {seed}").sample(training.conversations, len(training.conversations))
    validation = Reading(f"{count} of {options.data}", shuffled[:count])
    training.conversations = shuffled[count:]
    return training, validation


def read_conversations(source: str, split: str, options: ReadingOptions) -> Reading:
    """Reads every usable conversation of `source`.

    Raises:
        LabError: the source is missing, empty or not readable; a row cannot be used and --on-bad-data is
            error; no row can be used.
    """
    reading = Reading(source)
    total = 0
    for where, row in rows(source, split):
        total += 1
        try:
            if isinstance(row, Exception):
                raise UnusableRowError(f"bad JSON: {reason_of(row)}")
            messages = messages_of(row)
        except UnusableRowError as reason:
            reading.refuse(where, str(reason))
            continue
        if options.normalise:
            messages = [message | {"content": normalise(message["content"])} for message in messages]
        short = len(messages[-1]["content"].split()) <= SHORT_ANSWER
        reading.conversations.append(Conversation(messages, where, bool(row.get("verifiable", short))))
    if total == 0:
        raise LabError(f"{source}: is empty; expected conversations, one per row")
    check_bad_data(reading, options.on_bad_data)
    return reading


def check_bad_data(reading: Reading, on_bad_data: OnBadData) -> None:
    """Applies --on-bad-data to the rows that were refused.

    Raises:
        LabError: rows were refused and they are errors, or nothing else is left.
    """
    refused = sum(reading.reasons.values())
    counts = ", ".join(f"{count} × {reason}" for reason, count in reading.reasons.most_common())
    if not reading.conversations:
        raise LabError(f"{reading.source}: no usable row ({counts}); first: {reading.examples[0]}")
    if refused and on_bad_data == "error":
        first = "; ".join(reading.examples[:3])
        raise LabError(
            f"{reading.source}: {refused} rows cannot be used ({counts}); first: {first}; "
            "mend them or leave them out with --on-bad-data skip"
        )


def rows(source: str, split: str) -> Iterator[tuple[str, Any]]:
    """Yields (place, row) from a file, a directory or a Hugging Face dataset.

    A row that cannot be read comes as the error.

    Raises:
        LabError: nothing is there, or it is in no format that is read.
    """
    path = Path(source)
    if path.is_file():
        yield from _file_rows(path)
    elif path.is_dir():
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            yield from _dataset_rows(source, split, from_disk=True)
        else:
            for file in _files_of_split(path, split):
                yield from _file_rows(file)
    elif path.suffix in FILE_KINDS or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise LabError(f"{source}: no such file or directory")
    else:
        yield from _dataset_rows(source, split, from_disk=False)


def messages_of(row: Any) -> list[Message]:
    """Reads the messages of a ShareGPT, `messages` or Alpaca row.

    Raises:
        UnusableRowError: the row cannot be used, and why.
    """
    if not isinstance(row, dict):
        raise UnusableRowError(f"not an object: {type(row).__name__}")
    if "conversations" in row:
        turns = [_turn(turn, "from", "value") for turn in _turns(row["conversations"])]
    elif "messages" in row:
        turns = [_turn(turn, "role", "content") for turn in _turns(row["messages"])]
    elif "instruction" in row and "output" in row:
        parts = [row["instruction"], row.get("input")]
        asked = "\n\n".join(str(part).strip() for part in parts if part)
        said = [("system", row.get("system") or ""), ("user", asked), ("assistant", row["output"])]
        turns = [_turn({"role": role, "content": text}, "role", "content") for role, text in said]
    else:
        raise UnusableRowError(f"unknown columns: {', '.join(map(str, list(row)[:5]))}")
    if turns[0]["role"] == "system" and not turns[0]["content"].strip():  # says nothing, and some templates refuse it
        turns = turns[1:]
    _check_order(turns)
    return turns


def _turns(value: Any) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise UnusableRowError("no turns: expected a list of them")
    return value


def _turn(turn: Any, role_key: str, content_key: str) -> Message:
    # Both spellings occur under both column names in the wild.
    if isinstance(turn, dict) and role_key not in turn:
        role_key, content_key = ("role", "content") if "role" in turn else ("from", "value")
    if not isinstance(turn, dict) or role_key not in turn:
        raise UnusableRowError("a turn without a role")
    role = ROLES.get(str(turn[role_key]).lower())
    if role is None:
        raise UnusableRowError(f"unknown role: {turn[role_key]!r}")
    content = turn.get(content_key)
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


def plain_paragraphs(config: TrainConfig) -> list[str]:
    """Returns the paragraphs on which forgetting is measured: how well a model still predicts its base's world.

    They are those of --plain-text, or generated ones for the tiny base; none for another base without the option.

    Raises:
        LabError: the file cannot be read or is empty.
    """
    file = config.data.plain_text
    if file is None:
        made = plain_text(PARAGRAPHS, PLAIN_TEXT_SEED)
        return [text.strip() for text in made] if config.model.model == "tiny" else []
    return text_lines("--plain-text", file, "a paragraph")[:PARAGRAPHS]


def text_lines(option: str, file: Path, what: str) -> list[str]:
    """Reads the lines of a text file that are not empty; `what` says what each holds.

    Raises:
        LabError: the file cannot be read or is empty.
    """
    lines = text_of(file, f"{option} {file}").split("\n")
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise LabError(f"{option} {file}: is empty; write {what} per line")
    return found


def _generated(name: str, made: Iterable[list[Message]]) -> Reading:
    return Reading(name, [Conversation(messages, f"{name} {n}", verifiable=True) for n, messages in enumerate(made, 1)])


def _file_rows(path: Path) -> Iterator[tuple[str, Any]]:
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    text = text_of(path, str(path))
    if path.suffix == ".json" and (whole := _whole_json(path, text)) is not None:
        for number, row in enumerate(whole, 1):
            yield f"{path}, row {number}", row
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # also of 5,000 digits or 100,000 brackets
                row = error
            yield f"{path}:{number}", row


def _whole_json(path: Path, text: str) -> list[Any] | None:
    """Returns the rows of a JSON file: a list, or an object that holds one list; None if it is JSON lines.

    Raises:
        LabError: it begins as a list and cannot be read: where its rows end is not known then.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("["):
            said = f"{path}: is no JSON ({reason_of(error)})"
            raise LabError(f"{said}; mend it, or write one row per line (.jsonl), to skip bad ones") from error
        return None
    if isinstance(value, dict):
        lists = [item for item in value.values() if isinstance(item, list)]
        return lists[0] if len(lists) == 1 and "conversations" not in value and "messages" not in value else [value]
    return value if isinstance(value, list) else [value]


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise LabError(f"{path}: is not a parquet file ({reason_of(error)})") from error
    for number in range(table.num_rows):
        try:
            (row,) = table.slice(number, 1).to_pylist()
        except ValueError as error:  # text that is not UTF-8
            row = error
        yield f"{path}, row {number + 1}", row


def _files_of_split(folder: Path, split: str) -> list[Path]:
    files = sorted(file for file in folder.iterdir() if file.suffix in FILE_KINDS and file.is_file())
    named = [file for file in files if file.name.startswith(split)]
    if named:
        return named
    splits = ("train", "validation", "valid", "val", "dev", "test")
    if not files or any(file.name.startswith(splits) for file in files):
        raise LabError(f"{folder}: has no .json, .jsonl or .parquet file of the split {split!r}")
    return files


def _dataset_rows(source: str, split: str, from_disk: bool) -> Iterator[tuple[str, Any]]:
    import datasets  # here: it takes two seconds to import, and files do not need it

    try:
        if from_disk:
            loaded = datasets.load_from_disk(source)
            data = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            data = datasets.load_dataset(source, split=split)
    except Exception as error:  # the library raises whatever its network and file layers do
        raise LabError(f"{source}: the dataset or its split {split!r} cannot be loaded ({reason_of(error)})") from error
    for number, row in enumerate(data, 1):
        yield f"{source} ({split}), row {number}", row
