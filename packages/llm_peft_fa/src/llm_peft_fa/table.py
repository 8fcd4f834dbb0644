"""Conversations as tokens on disk: made once, by all cores, opened by every process, held by none.

The tokens of all rows of a source are one array of int32 in a file; those that are learnt are kept as their complement
(-1 - token). It is keyed by the conversations, the tokenizer and its template, so the runs of a comparison
share it, and `--max-length` and the split only choose from it.
"""

import gc
import multiprocessing
import os
import signal
import time
import zlib
from array import array
from collections.abc import Iterable, Sequence
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary
from zipfile import BadZipFile

import numpy as np
from transformers import PreTrainedTokenizerBase

from labs_common.cache import cache_directory, cached_by_one, file_sum, path_name, recipe_key
from labs_common.cli import STOPPING
from labs_common.errors import LabError
from labs_common.progress import ProgressLine
from llm_peft_fa import pieces, templates
from llm_peft_fa.config import OnTooLong
from llm_peft_fa.data import Chats, Conversation, OneByOne, Parts, Reading, View
from llm_peft_fa.templates import THINKING, Encoded, encode_batch

CHUNK = 2000  # conversations tokenized before they are written: a kill loses seconds, a process needs some 100 MB
BATCH = 100  # conversations given to the tokenizer at a time
COLUMNS = {"tokens": np.int32, "lengths": np.int64, "learnt": np.int32, "sums": np.uint32, "rows": np.int64,
           "where": np.uint8, "where_lengths": np.int64}  # fmt: skip


class Tokens(OneByOne[Encoded]):
    """The rows of a source, in a directory that `_merge` filled.

    Attributes:
        lengths, learnt, sums: (rows,) tokens of a row, those learnt but for the first, and its CRC-32.
        rows: (conversations,) how many rows each has become.
    """

    def __init__(self, folder: Path) -> None:
        self.lengths, self.learnt, self.sums, self.rows, where_lengths = (
            np.fromfile(folder / name, COLUMNS[name]) for name in ("lengths", "learnt", "sums", "rows", "where_lengths")
        )
        self._tokens, self._where = Parts(folder / "tokens"), Parts(folder / "where")
        self._ends, self._where_ends = self.lengths.cumsum(), where_lengths.cumsum()

    def __len__(self) -> int:
        return len(self.lengths)

    def item(self, place: int) -> Encoded:
        """Reads the row at a place."""
        where = self._where.read(int(self._where_ends[place - 1]) if place else 0, int(self._where_ends[place]))
        end, size = int(self._ends[place]), np.dtype(COLUMNS["tokens"]).itemsize
        kept = np.frombuffer(self._tokens.read((end - int(self.lengths[place])) * size, end * size), COLUMNS["tokens"])
        learnt = kept < 0
        return Encoded(np.where(learnt, ~kept, kept).tolist(), learnt.tolist(), where.decode())


TABLES = WeakValueDictionary[str, Tokens]()  # which are open: training, validation and test are often of one


class Rows(OneByOne[Encoded]):
    """The rows that a run trains or measures on, of one table or several, each cut after `most` tokens.

    Attributes:
        lengths, learnt: (rows,) tokens of each, and those that are learnt but for the first.
        sums: (rows,) CRC-32 of each.
    """

    def __init__(self, view: View[Encoded], most: int) -> None:
        self.view, self.most = view, most
        self.lengths, self.learnt, self.sums = (
            np.concatenate([getattr(part, name) for part in view.parts])[view.places]
            for name in ("lengths", "learnt", "sums")
        )
        for place in np.flatnonzero(self.lengths > most):
            item = self[int(place)]
            self.learnt[place], self.sums[place] = sum(item.learnt[1:]), row_sum(item)
        self.lengths = np.minimum(self.lengths, most)

    def __len__(self) -> int:
        return len(self.view)

    def item(self, place: int) -> Encoded:
        """Reads the row at a place."""
        item = self.view[place]
        return Encoded(item.ids[: self.most], item.learnt[: self.most], item.where)


def encode_all(tokenizer: PreTrainedTokenizerBase, reading: Reading, max_length: int, on_too_long: OnTooLong) -> Rows:
    """Encodes what was read, or opens what was encoded before; rows that are left out are counted in `reading`.

    Raises:
        LabError: see `templates.encode`; one is longer than `max_length` tokens and `on_too_long` is error;
            nothing is left.
    """
    talks = reading.conversations if isinstance(reading.conversations, View) else View([reading.conversations])
    tables = [tokens_of(tokenizer, part) for part in talks.parts]
    counts = np.concatenate([table.rows for table in tables])
    firsts = counts.cumsum() - counts
    counts, firsts = counts[talks.places], firsts[talks.places]
    places = np.repeat(firsts - (counts.cumsum() - counts), counts) + np.arange(counts.sum())
    rows = Rows(View(tables, places), np.iinfo(np.int64).max)
    too_long = rows.lengths > max_length
    for place in map(int, np.flatnonzero(too_long)):
        where, reason = rows[place].where, f"too long: {rows.lengths[place]} tokens, at most {max_length} can be"
        if on_too_long == "error":
            raise LabError(f"{where}: {reason}; raise --max-length if the model reads more, or choose "
                           "--on-too-long truncate or skip")  # fmt: skip
        if on_too_long == "skip":
            reading.refuse(where, reason)
        else:
            too_long[place] = not any(rows[place].learnt[:max_length])
            if too_long[place]:
                reading.refuse(where, "answer truncated away: nothing is left to learn")
    if too_long.all():
        raise LabError(f"{reading.source}: every conversation was left out; first: {reading.examples[0]}")
    return Rows(rows.view.at(np.flatnonzero(~too_long)), max_length)


def row_sum(item: Encoded) -> int:
    """Returns the CRC-32 of a row's tokens and of which are learnt."""
    return zlib.crc32(bytes(item.learnt), zlib.crc32(array("i", item.ids).tobytes()))


def text_sum(texts: Iterable[Sequence[Encoded]]) -> int:
    """Returns a CRC-32 of all rows: another one if data, template or tokenizer are others."""
    crc = 0
    for rows in texts:
        sums = rows.sums if isinstance(rows, Rows) else np.array([row_sum(item) for item in rows], np.uint32)
        crc = zlib.crc32(sums.tobytes(), crc)
    return crc


def check_before_training(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[Sequence[Encoded]], stop_ids: set[int]
) -> None:
    """Refuses, before a long run, data and templates whose fault would only show after it.

    Raises:
        LabError: a conversation has nothing to learn; no token that ends generation is ever learnt; the
            sequence begins with two BOS tokens.
    """
    for rows in texts:
        learnt = rows.learnt if isinstance(rows, Rows) else np.array([sum(item.learnt[1:]) for item in rows])
        for place in np.flatnonzero(learnt == 0)[:1]:  # the first token has nothing before it that could predict it
            raise LabError(
                f"{rows[int(place)].where}: the chat template marks nothing in it to learn; try --template plain, or "
                "look with --show-batch"
            )
    if not any(
        token in stop_ids and is_learnt
        for rows in texts for item in rows for token, is_learnt in zip(item.ids, item.learnt, strict=True)
    ):  # fmt: skip
        names = ", ".join(sorted(tokenizer.convert_ids_to_tokens(sorted(stop_ids))))
        raise LabError(
            f"the chat template never lets the model learn to stop: no answer ends with {names}, so answers would "
            "never end; use --template plain, or a template that ends answers with that token"
        )
    bos = tokenizer.bos_token_id
    if bos is not None and texts[0][0].ids[:2] == [bos, bos]:
        raise LabError(f"the chat template writes {tokenizer.bos_token} twice; take one out of it")


def tokens_of(tokenizer: PreTrainedTokenizerBase, talks: Sequence[Conversation]) -> Tokens:
    """Opens the table of these conversations; what it lacks is made now, by all cores that this process may use.

    Raises:
        LabError: see `templates.encode`; or the disk is full.
    """
    recipe = {
        "conversations": talks.meta["sum"] if isinstance(talks, Chats) else _sum(talks),
        "tokenizer": sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "template": tokenizer.get_chat_template(),
        "thinking": tokenizer.init_kwargs.get(THINKING),
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "versions": [version(name) for name in ("transformers", "tokenizers", "jinja2")],
        "code": [file_sum(Path(file)) for file in (__file__, str(templates.__file__), str(pieces.__file__))],
    }

    def make(folder: Path, parts: Path) -> None:
        chunks = range(0, len(talks), CHUNK)
        _fill(parts, tokenizer, talks, chunks)
        _merge(parts, folder, chunks)

    key = f"{cache_directory()} {recipe_key(recipe)}"
    if (table := TABLES.get(key)) is None:
        TABLES[key] = table = Tokens(cached_by_one(f"tokens-{path_name(tokenizer.name_or_path)}", recipe, make))
    return table


def _sum(talks: Sequence[Conversation]) -> str:
    return sha256(repr([(talk.messages, talk.where) for talk in talks]).encode()).hexdigest()


def _fill(parts: Path, tokenizer: PreTrainedTokenizerBase, talks: Sequence[Conversation], chunks: range) -> None:
    """Tokenizes the chunks that an earlier process, which was killed, did not."""
    missing = [first for first in chunks if not _part(parts, first).exists()]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = min(len(missing), cores)
    with ProgressLine(
        f"tokenizing, {CHUNK:,} conversations", len(chunks), len(chunks) - len(missing), shown=len(missing) > 4
    ) as line:
        if count < 2:
            for first in missing:
                _write(parts, first, tokenizer, talks)
                line.advance()
            return
        # Forked, they have the tokenizer and the libraries without loading them; torch they do not use.
        fork = multiprocessing.get_context("fork")
        workers = [
            fork.Process(target=_work, args=(parts, missing[place::count], tokenizer, talks, os.getpid()), daemon=True)
            for place in range(count)
        ]
        working, failed = True, None
        try:
            for worker in workers:
                worker.start()
            while working:
                time.sleep(0.05)
                failed = next((one.exitcode for one in workers if one.exitcode), None)
                working = failed is None and any(one.is_alive() for one in workers)
                while line.done < len(chunks) - sum(not _part(parts, first).exists() for first in missing):
                    line.advance()
        finally:
            for worker in workers:
                worker.kill()
                worker.join()
    for first in missing:
        if not _part(parts, first).exists():
            if failed is not None and failed < 0:
                raise LabError(f"a process that tokenizes ended with exit code {failed} (-9: too little memory); "
                               "the same command goes on from there")  # fmt: skip
            _write(parts, first, tokenizer, talks)  # meets what a process met, and says it


def _work(
    parts: Path, firsts: Sequence[int], tokenizer: PreTrainedTokenizerBase, talks: Sequence[Conversation], parent: int
) -> None:
    """Tokenizes its chunks in a process of its own, until the one that started it is gone."""
    for number in STOPPING:  # the parent's handlers would save a run
        signal.signal(number, signal.SIG_IGN)
    gc.freeze()  # a collection over all that was imported would copy its memory
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each core has a process already
    for first in firsts:
        if os.getppid() != parent:
            return
        try:
            _write(parts, first, tokenizer, talks)
        except Exception:  # of a row, or a full disk: the parent meets it too
            os._exit(1)


def _part(parts: Path, first: int) -> Path:
    return parts / f"{first:012}.npz"


def _write(parts: Path, first: int, tokenizer: PreTrainedTokenizerBase, talks: Sequence[Conversation]) -> None:
    """Tokenizes a chunk into a file that is there whole or not at all."""
    found: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    last = min(first + CHUNK, len(talks))
    for at in range(first, last, BATCH):
        for rows in encode_batch(tokenizer, [talks[place] for place in range(at, min(at + BATCH, last))]):
            found["rows"].append(len(rows))
            for item in rows:
                ids, learnt = np.array(item.ids, np.int32), np.array(item.learnt)
                where = np.frombuffer(item.where.encode(), np.uint8)
                found["tokens"].append(np.where(learnt, ~ids, ids))
                found["lengths"].append(len(ids))
                found["learnt"].append(int(learnt[1:].sum()))
                found["sums"].append(zlib.crc32(learnt.tobytes(), zlib.crc32(ids.tobytes())))
                found["where"].append(where)
                found["where_lengths"].append(len(where))
    for name in ("tokens", "where"):
        found[name] = [np.concatenate(found[name])]
    content: dict[str, Any] = {name: np.ravel(np.array(values, COLUMNS[name])) for name, values in found.items()}
    part = _part(parts, first)
    with part.with_suffix(".new").open("wb") as file:
        np.savez(file, **content)
        file.flush()
        os.fsync(file.fileno())
    part.with_suffix(".new").rename(part)


def _merge(parts: Path, folder: Path, chunks: range) -> None:
    """Puts the chunks one after the other, a file for each column."""
    for name in COLUMNS:
        with (folder / name).open("wb") as out:
            for first in chunks:
                part = _part(parts, first)
                try:
                    with np.load(part) as chunk:
                        column = chunk[name]
                except (OSError, ValueError, EOFError, KeyError, BadZipFile) as error:
                    part.unlink(missing_ok=True)
                    raise LabError(f"{part}: was damaged, and is gone now; the same command makes it again") from error
                column.tofile(out)
