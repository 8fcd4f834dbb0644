import errno
import multiprocessing
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from labs_common.errors import LabError
from llm_peft_fa import table
from llm_peft_fa.base import load_tokenizer
from llm_peft_fa.data import Conversation, Reading, View
from llm_peft_fa.packing import Packing
from llm_peft_fa.persian import conversations
from llm_peft_fa.table import encode_all, text_sum
from llm_peft_fa.templates import Encoded, encode

FORK = multiprocessing.get_context("fork")
THINKS = [{"role": "user", "content": "؟"}, {"role": "assistant", "content": "<think>چه؟</think>این."}]


@pytest.fixture
def tokenizer(llama_dir: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(llama_dir))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own cache, and chunks of five conversations."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(table, "CHUNK", 5)
    monkeypatch.setattr(table, "BATCH", 2)
    return tmp_path / "foundation-labs"


def talks(count: int = 23, seed: int = 1) -> list[Conversation]:
    return [Conversation(messages, f"گفت‌وگو {n}") for n, messages in enumerate(conversations(count, seed))]


def recorded(file: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int | None = None) -> None:
    """Writes down, over all processes, which conversations are tokenized; it hangs at one."""
    usual = table.encode_batch

    def slow(tokenizer: PreTrainedTokenizerBase, batch: list[Conversation]) -> list[list[Encoded]]:
        with file.open("a") as out:
            out.write("".join(f"{one.where.split()[-1]}\n" for one in batch))
        time.sleep(3600 if stop_at in [int(one.where.split()[-1]) for one in batch] else 0.01)
        return usual(tokenizer, batch)

    monkeypatch.setattr(table, "encode_batch", slow)


@pytest.mark.parametrize("column", table.COLUMNS)
def test_a_cut_column_is_noticed_without_check_sums_too(
    column: str, tokenizer: PreTrainedTokenizerBase, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    whole = list(table.tokens_of(tokenizer, talks(3)))
    (folder,) = cache.glob("tokens-*")
    (folder / ".check-sums.json").unlink()
    os.truncate(folder / column, (folder / column).stat().st_size // 2 // 8 * 8)
    assert list(table.tokens_of(tokenizer, talks(3))) == whole


@pytest.mark.parametrize("cores", [1, 3])
def test_a_table_holds_the_rows_of_its_conversations_in_their_order(
    cores: int, tokenizer: PreTrainedTokenizerBase, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    # A template that shows thinking in the last answer alone: each answer is a row of its own.
    tokenizer.chat_template = (
        "{% for m in messages %}<start_of_turn>{{ m['role'] }}\n{{ '=' if loop.last and m['role'] == 'assistant' else '' }}{{ m['content'] }}"
        "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>assistant\n={% endif %}"
    )
    made = talks()
    expected = [encode(tokenizer, talk) for talk in made]
    assert any(len(rows) > 1 for rows in expected)
    found = encode_all(tokenizer, Reading("a", made), 10**6, "error")
    flat = [row for rows in expected for row in rows]
    assert list(found) == flat
    assert found.lengths.tolist() == [len(row.ids) for row in flat]
    assert found.learnt.tolist() == [sum(row.learnt[1:]) for row in flat]
    assert text_sum([found]) == text_sum([flat])
    chosen = np.array([7, 2, 19])
    some = encode_all(tokenizer, Reading("b", View([made[:10], made[10:]], chosen)), 10**6, "error")
    assert list(some) == [row for place in chosen for row in expected[place]]
    assert not list(cache.glob(".*")), "no parts are left"


def test_parts_of_a_source_share_one_open_table(tokenizer: PreTrainedTokenizerBase, cache: Path) -> None:
    first, second = (encode_all(tokenizer, Reading(name, talks(6)), 10**6, "error") for name in ("training", "test"))
    assert first.view.parts[0] is second.view.parts[0]
    assert list(first) == list(second)
    assert encode_all(tokenizer, Reading("other", talks(5)), 10**6, "error").view.parts[0] is not first.view.parts[0]


def test_packing_a_table_is_packing_its_rows(tokenizer: PreTrainedTokenizerBase, cache: Path) -> None:
    found = encode_all(tokenizer, Reading("a", talks()), 10**6, "error")
    sides = [
        [row.input_ids.tolist() for step in Packing(200).steps(rows, 8, seed=3).steps(1, 0) for row in step]
        for rows in (found, list(found))
    ]
    assert sides[0] == sides[1]


def test_cut_rows_have_other_lengths_and_another_sum(tokenizer: PreTrainedTokenizerBase, cache: Path) -> None:
    reading = Reading("a", talks(30))
    whole, cut = (encode_all(tokenizer, reading, most, "truncate") for most in (10**6, 40))
    assert max(cut.lengths) == 40 < max(whole.lengths)
    assert [len(row.ids) for row in cut] == cut.lengths.tolist()
    assert [sum(row.learnt[1:]) for row in cut] == cut.learnt.tolist()
    assert text_sum([cut]) == text_sum([list(cut)]) != text_sum([whole])


def test_a_kill_goes_on_and_what_is_there_is_not_made_again(
    tokenizer: PreTrainedTokenizerBase, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    made, seen = talks(), cache.parent / "seen"
    with monkeypatch.context() as patch:
        recorded(seen, patch, stop_at=16)
        killed = FORK.Process(target=table.tokens_of, args=(tokenizer, made))
        killed.start()
        while not seen.exists() or "16\n" not in seen.read_text():
            time.sleep(0.01)
        killed.kill()
        killed.join()
    recorded(seen, monkeypatch)
    before = len(seen.read_text().split())
    assert list(table.tokens_of(tokenizer, made)) == [row for talk in made for row in encode(tokenizer, talk)]
    assert sorted(map(int, seen.read_text().split()[before:])) == list(range(15, 23)), "three chunks were there"
    before = len(seen.read_text().split())
    assert len(table.tokens_of(tokenizer, made)) == 23
    assert len(seen.read_text().split()) == before, "opened, not made"
    (file,) = cache.glob("tokens-*/tokens")
    content = bytearray(file.read_bytes())
    content[10] ^= 1
    file.write_bytes(content)
    assert table.tokens_of(tokenizer, made)[0] == encode(tokenizer, made[0])[0], "damaged, and made again"


def test_two_processes_share_one_table(
    tokenizer: PreTrainedTokenizerBase, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, sums = cache.parent / "seen", cache.parent / "sums"
    recorded(seen, monkeypatch)

    def process() -> None:
        rows = encode_all(tokenizer, Reading("a", talks()), 10**6, "error")
        with sums.open("a") as out:
            out.write(f"{text_sum([rows])}\n")

    both = [FORK.Process(target=process) for _ in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert sorted(map(int, seen.read_text().split())) == list(range(23)), "each conversation once"
    first, second = sums.read_text().split()
    assert first == second
    assert len(list(cache.glob("tokens-*"))) == 1


def test_what_a_worker_refuses_stops_all_with_its_line(
    tokenizer: PreTrainedTokenizerBase, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    made = [*talks(), Conversation(THINKS, "chats.jsonl:24")]
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message['content']", "message['content'].split('</think>')[-1]"
    )
    with pytest.raises(LabError, match=r"chats\.jsonl:24: an answer thinks"):
        encode_all(tokenizer, Reading("a", made), 10**6, "error")


def test_a_full_disk_is_told_by_whoever_meets_it(
    tokenizer: PreTrainedTokenizerBase, cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(*given: object, **named: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for cores in (1, 2):
        monkeypatch.setattr(os, "sched_getaffinity", lambda process, cores=cores: set(range(cores)))
        with monkeypatch.context() as patch:
            patch.setattr(np, "savez", full)
            with pytest.raises(OSError, match="No space left"):
                table.tokens_of(tokenizer, talks())
    assert "Traceback" not in capfd.readouterr().err
    assert len(table.tokens_of(tokenizer, talks())) == 23


def test_a_damaged_part_is_made_again(
    tokenizer: PreTrainedTokenizerBase, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    table.tokens_of(tokenizer, talks())
    (whole,) = cache.glob("tokens-*")
    parts = whole.with_name(f".{whole.name}.parts")
    for junk in (b"", b"PK junk"):
        shutil.rmtree(whole)
        parts.mkdir()
        (parts / f"{5:012}.npz").write_bytes(junk)
        with pytest.raises(LabError, match=r"5\.npz: was damaged"):
            table.tokens_of(tokenizer, talks())
        assert list(table.tokens_of(tokenizer, talks())) == [row for talk in talks() for row in encode(tokenizer, talk)]
    (whole / ".check-sums.json").write_text("[]")
    assert len(table.tokens_of(tokenizer, talks())) == 23
