"""Conversations to train on, to validate with and to test on: read once, kept on disk, drawn by hash and seed.

What a source holds is read once per machine: its usable rows, normalised, are lines of a file in the cache, which every
process opens and none holds. Rows that cannot be used are counted by reason, and the first few are named by file and
line.
"""

import hashlib
import json
import os
import random
from abc import abstractmethod
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import numpy as np

from labs_common.cache import cached_directory, file_sum, path_name
from labs_common.errors import LabError, reason_of, text_of
from labs_common.progress import ProgressLine
from llm_peft_fa import sources, spelling
from llm_peft_fa.config import DataOptions, OnBadData, ReadingOptions, TrainConfig
from llm_peft_fa.persian import conversations, held_out_conversations, plain_text
from llm_peft_fa.sources import UnusableRowError
from llm_peft_fa.spelling import Message

Item = TypeVar("Item")
SHORT_ANSWER = 5  # words; a longer right answer is seldom the reference word for word
PARAGRAPHS = 200  # of plain text, which is measured at every evaluation: it must take seconds
PLAIN_TEXT_SEED = 2  # the tiny base was pre-trained on that of seed 1
SHOWN_EVERY = 1000  # rows read between looks at the clock


@dataclass(frozen=True)
class Conversation:
    """Messages that alternate user and assistant, perhaps after a system message, and end with an answer."""

    messages: list[Message]
    where: str
    """File and line, for errors."""
    verifiable: bool = False
    """Whether the last answer can be compared word for word."""


class OneByOne(Sequence[Item]):
    """Items that `item` reads one at a time; a slice is a list of them."""

    @overload
    def __getitem__(self, place: int) -> Item: ...
    @overload
    def __getitem__(self, place: slice) -> list[Item]: ...
    def __getitem__(self, place: int | slice) -> Item | list[Item]:
        chosen = range(len(self))[place]
        return self.item(chosen) if isinstance(chosen, int) else [self.item(one) for one in chosen]

    @abstractmethod
    def item(self, place: int) -> Item:
        """Reads the item at a place from 0 on."""


class View(Sequence[Item], Generic[Item]):
    """Items at some places of several sequences one after the other, without a copy of them."""

    def __init__(self, parts: Sequence[Sequence[Item]], places: np.ndarray | None = None) -> None:
        self.parts = list(parts)
        self.begins = np.cumsum([0, *map(len, self.parts)])
        self.places = np.arange(self.begins[-1]) if places is None else places

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, place: int) -> Item: ...
    @overload
    def __getitem__(self, place: slice) -> "View[Item]": ...
    def __getitem__(self, place: int | slice) -> "Item | View[Item]":
        if isinstance(place, slice):
            return self.at(np.arange(len(self))[place])
        number = int(self.places[place])
        part = int(np.searchsorted(self.begins, number, "right")) - 1
        return self.parts[part][number - int(self.begins[part])]

    def at(self, chosen: np.ndarray) -> "View[Item]":
        """Returns the items at these places of this view."""
        return View(self.parts, self.places[chosen])


class Parts:
    """A file of which parts are read: pages of a memory map would add up to all of it in every process."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)

    def read(self, begin: int, end: int) -> bytes:
        """Reads the bytes from `begin` to before `end`."""
        return os.pread(self._file.fileno(), end - begin, begin)

    def __del__(self) -> None:
        if "_file" in vars(self):
            self._file.close()


class Chats(OneByOne[Conversation]):
    """The conversations of a source, in a directory that `_write_chats` filled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.lines = Parts(folder / "chats.jsonl")
        self.starts = np.load(folder / "starts.npy", mmap_mode="r")
        self.hashes = np.load(folder / "hashes.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self.hashes)

    def item(self, place: int) -> Conversation:
        """Reads the conversation at a place."""
        begin, end = self.starts[place : place + 2].tolist()
        return Conversation(**json.loads(self.lines.read(begin, end)))


@dataclass
class Reading:
    """The conversations of one source, and the rows that could not be used."""

    source: str
    conversations: Sequence[Conversation] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    """The first few unusable rows: file, line and reason."""
    normalised: bool = True
    """Whether Persian has one spelling in them."""

    def refuse(self, where: str, reason: str) -> None:
        """Counts a row that cannot be used."""
        self.reasons[reason.split(":")[0]] += 1
        if len(self.examples) < 5:
            self.examples.append(f"{where}: {reason}")


def splits(options: DataOptions, seed: int) -> dict[str, Reading]:
    """Reads or generates the conversations of "training", "validation" and "test".

    Nothing is chosen by the test's. They are the same for every seed: those whose hashes are smallest. Validation is
    drawn by the seed. What is held out already (--validation-data, files of that name) is halved by hash if there is no
    test beside it. Each part of the generated tasks has items of its own.

    Raises:
        LabError: see `read_conversations`; or a share leaves one side empty.
    """
    if options.data is None:
        for name in ("validation_data", "test_data", "mix"):
            if getattr(options, name):
                flag = name.replace("_", "-")
                raise LabError(f"--{flag}: needs --data; the generated tasks bring their own validation and test")
        return {
            "training": _generated("generated Persian tasks", conversations(options.conversations, seed)),
            "validation": _generated("validation tasks", held_out_conversations(300, seed)),
            "test": _generated("test tasks", held_out_conversations(300, seed, "test")),
        }
    training = read_conversations(options.data, options.split, options)
    named = options.validation_data and options.test_data
    own = {*(() if named else sources.own_splits(options.data))} - {options.split}  # what is trained on is not held out
    held: dict[str, Reading] = {}
    for name in ("validation", "test"):
        source = getattr(options, f"{name}_data") or (options.data if name in own else None)
        if source is not None:
            held[name] = read_conversations(source, getattr(options, f"{name}_split"), options, limited=False)
    share, given = options.validation_fraction, held.get("validation")
    if given and "test" not in held:
        first, others = _held_out(given, np.arange(len(given.conversations)), len(given.conversations) // 2)
        held = {
            "validation": replace(given, source=f"half of {given.source}", conversations=_view(given).at(others)),
            "test": _part(given, first, f"the other half of {given.source}"),
        }
    total = len(training.conversations)
    count = min(round(share * total), options.validation_limit or total)
    asked = count * (2 - len(held))
    if len(held) < 2 and not (count and asked < total):
        raise LabError(
            f"--validation-fraction {share}: leaves {count} of {total} conversations for validation and as many for "
            "the test; change it, or give --validation-data and --test-data"
        )
    rest = np.arange(total)
    if "test" not in held:
        chosen, rest = _held_out(training, rest, count)
        held["test"] = _part(training, chosen, f"{len(chosen)} of {options.data}")
    if "validation" not in held:
        chosen, rest = _held_out(training, rest, count, f"validation {seed}")
        held["validation"] = _part(training, chosen, f"{len(chosen)} of {options.data}")
    elif options.validation_limit:
        held["validation"] = _drawn(held["validation"], options.validation_limit, f"validation {seed}")
    training = replace(training, conversations=_view(training).at(rest))
    training = _mixed(training, [*held.values()], options, seed)
    return {"training": training, "validation": held["validation"], "test": held["test"]}


def _view(reading: Reading) -> View[Conversation]:
    found = reading.conversations
    return found if isinstance(found, View) else View([found])


def _part(reading: Reading, places: np.ndarray, name: str) -> Reading:
    """Takes some conversations of a reading; what could not be read is told with the rest."""
    return Reading(name, _view(reading).at(places))


def _held_out(
    reading: Reading, places: np.ndarray, count: int, seed: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Parts places of conversations into about `count`, equal ones on one side, and the others, both in order.

    Those with the smallest hashes are taken, or what the seed draws.

    Raises:
        LabError: no others are left.
    """
    _, group, sizes = np.unique(_hashes(reading)[places], return_inverse=True, return_counts=True)
    order = np.arange(len(sizes))
    if seed is not None:
        order = np.array(random.Random(seed).sample(range(len(sizes)), len(sizes)))
    taken = np.isin(group, order[: np.searchsorted(sizes[order].cumsum(), count) + 1])
    if taken.all():
        raise LabError(f"{reading.source}: has too few different conversations to hold some out; name "
                       "--validation-data and --test-data")  # fmt: skip
    return places[taken], places[~taken]


def _hashes(reading: Reading) -> np.ndarray:
    view = _view(reading)
    return np.concatenate([part.hashes for part in view.parts if isinstance(part, Chats)])[view.places]


def _drawn(reading: Reading, count: int, seed: str) -> Reading:
    total = len(reading.conversations)
    if count >= total:
        return reading
    places = np.sort(random.Random(seed).sample(range(total), count))
    return replace(reading, conversations=_view(reading).at(places))


def _mixed(training: Reading, held: Sequence[Reading], options: DataOptions, seed: int) -> Reading:
    """Adds of each source of --mix as many conversations, drawn by the seed, as make its share of all.

    What is equal to a conversation that is `held` out is left out.

    Raises:
        LabError: an entry is not SOURCE:SHARE, the shares leave nothing, or a source has too few.
    """
    shares: dict[str, float] = {}
    for entry in options.mix:
        source, _, said = entry.rpartition(":")
        if source in (options.data, *shares):
            raise LabError(f"--mix {entry}: is --data itself, or named twice; name each source once")
        try:
            shares[source] = float(said)
        except ValueError:
            shares[source] = 0.0
        if not source or not 0 < shares[source] < 1:
            raise LabError(f"--mix {entry}: write SOURCE:SHARE, with a share between 0 and 1")
    if (own := 1 - sum(shares.values())) <= 0:
        raise LabError(f"--mix: the shares are {1 - own:g} together, which leaves nothing for --data")
    parts, names, total = list(_view(training).parts), [training.source], len(training.conversations)
    places = [_view(training).places]
    for source, share in shares.items():
        found = read_conversations(source, options.split, options)
        count = round(share / own * total)
        apart = np.flatnonzero(~np.isin(_hashes(found), np.concatenate([_hashes(part) for part in held])))
        if count > len(apart):
            raise LabError(f"--mix {source}:{share:g}: needs {count} conversations beside {total} of --data, and has "
                           f"{len(apart)} that are not held out; lower its share, or change --limit")  # fmt: skip
        drawn = apart[random.Random(f"mix {seed}").sample(range(len(apart)), count)]
        places.append(drawn + sum(map(len, parts)))
        parts += _view(found).parts
        names.append(f"{count} of {source}")
        training.reasons += found.reasons
        training.examples += found.examples
    return replace(training, source=", ".join(names), conversations=View(parts, np.concatenate(places)))


def read_conversations(source: str, split: str, options: ReadingOptions, limited: bool = True) -> Reading:
    """Reads every usable conversation of `source`, or opens what was read of it before.

    Raises:
        LabError: the source is missing, empty or not readable; a row cannot be used and --on-bad-data is
            error; no row can be used.
    """
    limit = options.limit if limited else 0
    files = sources.files_of(source, split)
    columns = sources.columns_of(options)
    recipe: dict[str, Any] = {
        "source": source, "split": split, "columns": columns, "limit": limit, "normalise": options.normalise,
        "code": [file_sum(Path(module.__file__ or "")) for module in (sources, spelling)] + [CHATS],
    }  # fmt: skip
    if files is None and not options.streaming:
        recipe["dataset"] = sources.dataset_of(source, split)._fingerprint
    for file in files or []:
        said = file.stat()
        recipe.setdefault("files", []).append([str(file.absolute()), said.st_size, said.st_mtime_ns])

    def make(folder: Path) -> None:
        _write_chats(folder, source, split, options, columns, limit)

    chats = Chats(cached_directory(f"chats-{path_name(source)}", recipe, make))
    reading = Reading(source, View([chats]), Counter(chats.meta["reasons"]), list(chats.meta["examples"]),
                      options.normalise)  # fmt: skip
    check_bad_data(reading, options.on_bad_data)
    return reading


CHATS = 2  # of the files that are written below; another number reads all data again


def _write_chats(
    folder: Path, source: str, split: str, options: ReadingOptions, columns: dict[str, str], limit: int
) -> None:
    """Reads the source row by row into chats.jsonl, with where each line begins and a hash of its messages."""
    reading, starts, hashes, total = Reading(source), array("q", [0]), array("Q"), 0
    summed, to_json = hashlib.sha256(), json.JSONEncoder(ensure_ascii=False).encode
    with (folder / "chats.jsonl").open("wb") as out, ProgressLine(f"reading {source}, thousand rows", None) as line:
        for total, (where, row) in enumerate(sources.rows(source, split, options.streaming), 1):
            try:
                if isinstance(row, Exception):
                    raise UnusableRowError(f"bad JSON: {reason_of(row)}")
                messages = sources.messages_of(row, columns)
            except UnusableRowError as reason:
                reading.refuse(where, str(reason))
                continue
            messages = spelling.in_one_spelling(messages) if options.normalise else messages
            said_so, short = row.get("verifiable"), len(messages[-1]["content"].split()) <= SHORT_ANSWER
            kept = Conversation(messages, where, short if said_so is None else bool(said_so))
            content = to_json(vars(kept)).encode() + b"\n"
            out.write(content)
            starts.append(starts[-1] + len(content))
            said = "\0".join(text for message in messages for text in message.values())
            hashes.append(int.from_bytes(hashlib.blake2b(said.encode(), digest_size=8).digest()))
            summed.update(content)
            if len(hashes) == limit:
                break
            if total % SHOWN_EVERY == 0:
                line.advance()
    if total == 0:
        raise LabError(f"{source}: is empty; expected conversations, one per row")
    np.save(folder / "starts.npy", np.array(starts))
    np.save(folder / "hashes.npy", np.array(hashes))
    meta = {"sum": summed.hexdigest(), "reasons": reading.reasons, "examples": reading.examples}
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


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
    found = [line.strip() for line in text_of(file, f"{option} {file}").split("\n") if line.strip()]
    if not found:
        raise LabError(f"{option} {file}: is empty; write {what} per line")
    return found


def _generated(name: str, made: Iterable[list[Message]]) -> Reading:
    return Reading(name, [Conversation(messages, f"{name} {n}", verifiable=True) for n, messages in enumerate(made, 1)])
