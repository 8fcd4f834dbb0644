import json
import shutil
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from labs_common.errors import LabError
from llm_peft_fa import sources
from llm_peft_fa.config import DataOptions, EvaluateConfig, ReadingOptions
from llm_peft_fa.data import read_conversations, splits
from llm_peft_fa.evaluate import _readings
from llm_peft_fa.sources import UnusableRowError, columns_of, messages_of, own_splits

EXPECTED = [
    {"role": "system", "content": "س"},
    {"role": "user", "content": "پ"},
    {"role": "assistant", "content": "ج"},
]
SHAREGPT = {
    "conversations": [{"from": "system", "value": "س"}, {"from": "human", "value": "پ"}, {"from": "gpt", "value": "ج"}]
}
MESSAGES = {"messages": EXPECTED}
ALPACA = {"system": "س", "instruction": "پ", "input": "", "output": "ج"}


@pytest.mark.parametrize(
    "row",
    [
        SHAREGPT, MESSAGES, ALPACA, {"message": EXPECTED}, {"id": 3, "tags": [], "dialogue": SHAREGPT["conversations"]},
        {"message": [{"from": turn["role"], "content": turn["content"]} for turn in EXPECTED]},
        {"talk": {key: [turn[key] for turn in EXPECTED] for key in ("role", "content")}},
        {"prompt": EXPECTED[:2], "completion": EXPECTED[2:]}, {"prompt": EXPECTED[:2], "completion": "ج"},
        {"conversations": None, "messages": EXPECTED}, {"conversations": None, "message": None, **ALPACA} | MESSAGES,
        {"messages": [{"from": None, "value": None} | turn for turn in EXPECTED], "prompt": None, "completion": None},
        SHAREGPT | {"messages": None}, {"messages": None, "prompt": EXPECTED[:2], "completion": "ج"},
        {"conversations": None, "prompt": None, "completion": None, "dialogue": EXPECTED},
        {"conversations": [{"role": None, "content": None} | turn for turn in SHAREGPT["conversations"]]},
    ],
)  # fmt: skip
def test_every_shape_of_row_gives_the_same_messages(row: dict[str, Any]) -> None:
    assert messages_of(row) == EXPECTED


def test_alpaca_input_follows_the_instruction() -> None:
    row = {"instruction": "جمع کن", "input": "۱ و ۲", "output": "۳"}
    for nothing in ({}, {"messages": None}, {"prompt": None, "completion": None}):
        assert messages_of(row | nothing)[0]["content"] == "جمع کن\n\n۱ و ۲"


def test_prompt_and_completion_are_texts_or_lists_of_turns() -> None:
    assert messages_of({"prompt": "پ", "completion": "ج"}) == EXPECTED[1:]
    named = columns_of(ReadingOptions(columns=("prompt=a", "answer=b", "system=c")))
    assert messages_of({"a": EXPECTED[1:2], "b": EXPECTED[2:], "c": "س"}, named) == EXPECTED
    for row, reason in (
        ({"prompt": None, "completion": "ج"}, r"unknown columns: prompt \(null\), completion;"),
        ({"prompt": [], "completion": EXPECTED[2:]}, "roles out of order"),
        ({"prompt": EXPECTED, "completion": EXPECTED[2:]}, "roles out of order"),
        ({"conversations": None}, r"unknown columns: conversations \(null\)"),
        ({"conversations": []}, "no turns"),
    ):
        with pytest.raises(UnusableRowError, match=reason):
            messages_of(row)


@pytest.mark.parametrize(("said", "expected"), [("null", True), ("false", False), ("true", True), (None, True)])
def test_a_short_answer_can_be_verified_unless_the_row_says_so(
    said: str | None, expected: bool, tmp_path: Path
) -> None:
    row = '{"instruction": "a", "output": "b"' + (f', "verifiable": {said}' if said else "") + "}"
    (tmp_path / "a.jsonl").write_text(row)
    (found,) = read_conversations(str(tmp_path / "a.jsonl"), "train", ReadingOptions()).conversations
    assert found.verifiable is expected


def test_columns_can_be_named() -> None:
    row = {"a": EXPECTED, "b": EXPECTED[1:], "question": "پ", "reply": "ج", "rules": "س"}
    with pytest.raises(UnusableRowError, match="several columns of turns: a, b; name one"):
        messages_of(row)
    named = {"conversations=b": EXPECTED[1:], "prompt=question answer=reply system=rules": EXPECTED,
             "prompt=question answer=reply": EXPECTED[1:]}  # fmt: skip
    for option, messages in named.items():
        assert messages_of(row, columns_of(ReadingOptions(columns=tuple(option.split())))) == messages
    with pytest.raises(UnusableRowError, match="no column c; it has a, b"):
        messages_of(row, {"conversations": "c"})
    for wrong in (("prompt=question",), ("question",), ("reply=answer",), ("answer=",)):
        with pytest.raises(LabError, match="--columns"):
            columns_of(ReadingOptions(columns=wrong))


def write_all_formats(folder: Path, rows: list[dict[str, Any]]) -> list[Path]:
    lines = folder / "a.jsonl"
    lines.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    listed, wrapped, loose = folder / "b.json", folder / "c.json", folder / "d.json"
    listed.write_text(json.dumps(rows), encoding="utf-8-sig")
    wrapped.write_text(json.dumps({"data": rows}))
    loose.write_text(lines.read_text(encoding="utf-8"), encoding="utf-8")  # JSON lines under the name .json
    datasets.Dataset.from_list(rows).to_parquet(folder / "e.parquet")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(folder / "f")
    (folder / "g").mkdir()
    (folder / "g" / "train-00.jsonl").write_text(lines.read_text(encoding="utf-8"), encoding="utf-8")
    (folder / "g" / "test.jsonl").write_text("", encoding="utf-8")
    return [lines, listed, wrapped, loose, folder / "e.parquet", folder / "f", folder / "g"]


def test_every_container_gives_the_same_conversations(tmp_path: Path) -> None:
    for path in write_all_formats(tmp_path, [SHAREGPT, SHAREGPT]):
        reading = read_conversations(str(path), "train", ReadingOptions())
        assert [item.messages for item in reading.conversations] == [EXPECTED, EXPECTED], path


def turn(role: str, text: Any) -> dict[str, Any]:
    return {"from": role, "value": text}


BAD = {
    "empty answer": [turn("human", "a"), turn("gpt", "  ")],
    "empty question": [turn("human", ""), turn("gpt", "b")],
    "unknown role": [turn("human", "a"), turn("robot", "b")],
    "roles out of order": [turn("gpt", "b"), turn("human", "a")],
    "ends without an answer": [turn("human", "a"), turn("gpt", "b"), turn("human", "c")],
    "not text": [turn("human", "a"), turn("gpt", 3)],
    "a turn without a role": [{"value": "a"}],
    "no turns": [],
}


def test_unusable_rows_are_counted_by_reason_and_named(tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    lines = [
        json.dumps(SHAREGPT),
        "{broken",
        '"text"',
        '{"question": "a"}',
        *(json.dumps({"conversations": t}) for t in BAD.values()),
    ]
    file.write_text("\n".join(lines))
    reading = read_conversations(str(file), "train", ReadingOptions(on_bad_data="skip"))
    assert len(reading.conversations) == 1
    assert reading.reasons == dict.fromkeys(["bad JSON", "not an object", "unknown columns", *BAD], 1)
    assert reading.examples[0].startswith(f"{file}:2: bad JSON")
    with pytest.raises(LabError) as error:
        read_conversations(str(file), "train", ReadingOptions())
    assert f"{file}:2: bad JSON" in str(error.value)
    assert "11 rows cannot be used" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("empty.jsonl", "", "is empty"),
        ("prose.json", "this is not JSON", "no usable row"),
        ("none.jsonl", '{"a": 1}\n', "no usable row"),
        ("fake.parquet", "not parquet", "is not a parquet file"),
        ("binary.jsonl", None, "UTF-8"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, text: str | None, says: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"\xff\xfe\x00") if text is None else path.write_text(text)
    for on_bad_data in ("error", "skip"):
        with pytest.raises(LabError, match=says) as error:
            read_conversations(str(path), "train", ReadingOptions(on_bad_data=on_bad_data))
        assert name in str(error.value)


def test_missing_files_splits_and_directories(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "test.jsonl").write_text(json.dumps(SHAREGPT))
    for source in (tmp_path / "no.jsonl", tmp_path / "no", tmp_path / "empty", tmp_path / "only"):
        with pytest.raises(LabError, match=source.name):
            read_conversations(str(source), "train", ReadingOptions())


def test_validation_is_a_seeded_share(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": f"پرسش {n}"}, {"role": "assistant", "content": "پاسخ"}]}
        for n in range(40)
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    options = DataOptions(data=str(file), validation_fraction=0.1)
    sides, again, other = (
        {name: [talk.where for talk in reading.conversations] for name, reading in splits(options, seed).items()}
        for seed in (3, 3, 4)
    )
    assert sides == again
    assert [len(side) for side in sides.values()] == [32, 4, 4]
    assert len({where for side in sides.values() for where in side}) == 40
    assert sides["test"] == other["test"], "no seed chooses on what another one is tested with"
    assert sides["validation"] != other["validation"]
    with pytest.raises(LabError, match="--validation-fraction"):
        splits(DataOptions(data=str(file), validation_fraction=0.001), 3)


def test_equal_conversations_are_on_one_side(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"پرسش {n % 12}"}, {"role": "assistant", "content": "پاسخ"}]}
        for n in range(60)
    ]
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    found = sides_of(data=str(file), validation_fraction=0.1)
    assert [len(side) for side in found.values()] == [40, 10, 10], "five of each, and at least a tenth"
    assert len({*found["training"]} | {*found["validation"]} | {*found["test"]}) == 12
    assert sum(len({*side}) for side in found.values()) == 12
    file.write_text("\n".join([json.dumps(rows[0])] * 20))
    with pytest.raises(LabError, match="too few different"):
        sides_of(data=str(file), validation_fraction=0.1)


def write_chats(file: Path, name: str, count: int) -> str:
    rows = [
        {"messages": [{"role": "user", "content": f"{name} {n}"}, {"role": "assistant", "content": "پاسخ"}]}
        for n in range(count)
    ]
    file.parent.mkdir(exist_ok=True)
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


def sides_of(seed: int = 0, **options: Any) -> dict[str, list[str]]:
    found = splits(DataOptions(**options), seed)
    return {name: [talk.messages[0]["content"] for talk in reading.conversations] for name, reading in found.items()}


def test_files_of_a_split_are_held_out_and_halved_where_there_is_no_test(tmp_path: Path) -> None:
    data = str(tmp_path / "data")
    write_chats(tmp_path / "data" / "train.jsonl", "a", 20)
    write_chats(tmp_path / "data" / "valid.jsonl", "b", 9)
    one, other = sides_of(data=data), sides_of(data=data, seed=1)
    assert one == other, "drawn by hash"
    assert one["training"] == [f"a {n}" for n in range(20)]
    assert (len(one["validation"]), len(one["test"])) == (5, 4)
    assert {*one["validation"], *one["test"]} == {f"b {n}" for n in range(9)}
    write_chats(tmp_path / "data" / "test.jsonl", "c", 3)
    assert sides_of(data=data)["test"] == ["c 0", "c 1", "c 2"]
    assert sides_of(data=data)["validation"] == [f"b {n}" for n in range(9)]
    assert len(sides_of(data=data, validation_limit=4)["validation"]) == 4
    write_chats(tmp_path / "data" / "testimonials.jsonl", "t", 3)
    assert sides_of(data=data)["test"] == ["c 0", "c 1", "c 2"], "whole words are a split's name"
    named = sides_of(data=data, test_data=write_chats(tmp_path / "d.jsonl", "d", 2))
    assert named["test"] == ["d 0", "d 1"]


def test_a_hub_that_does_not_say_which_splits_there_are_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """With others held out than before, a resumed run would be tested with what it was trained on."""

    def asked(name: str) -> list[str]:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "get_dataset_split_names", asked)
    with pytest.raises(LabError, match=r"a/b: its splits cannot be listed \(.*no route"):
        own_splits("a/b")
    evaluation, model = EvaluateConfig(), SimpleNamespace(trained=None)
    evaluation.reading.data = "a/b"
    with pytest.raises(LabError, match=r"no route.*or name one with --split"):
        _readings(evaluation, cast(Any, model))
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name: ["train", "test"])
    assert own_splits("a/b") == ["test"]


def test_generated_tasks_are_tested_with_others_than_they_are_validated_with() -> None:
    found = {name: set(side) for name, side in sides_of(conversations=50).items()}
    assert not found["validation"] & found["test"]
    assert min(len(found["validation"]), len(found["test"])) > 100


def test_data_are_mixed_by_their_shares(tmp_path: Path) -> None:
    data, more, few = (
        write_chats(tmp_path / f"{name}.jsonl", name, n) for name, n in (("a", 80), ("b", 60), ("c", 20))
    )
    plain, found = sides_of(data=data), sides_of(data=data, mix=(f"{more}:0.3", f"{few}:0.1"))
    assert (found["validation"], found["test"]) == (plain["validation"], plain["test"])
    assert Counter(text[0] for text in found["training"]) == {"a": 72, "b": 36, "c": 12}
    assert len(set(found["training"])) == 120, "nothing is repeated"
    assert found == sides_of(data=data, mix=(f"{more}:0.3", f"{few}:0.1"))
    copied = tmp_path / "d.jsonl"
    shutil.copy(data, copied)
    mixed = splits(DataOptions(data=data, mix=(f"{copied}:0.5",)), 0)
    held = [talk.messages for name in ("validation", "test") for talk in mixed[name].conversations]
    assert len(held) == 8
    assert not [talk for talk in mixed["training"].conversations if talk.messages in held]
    says = {
        f"{few}:0.5": "needs 72 .* and has 20",
        f"{copied}:0.51": "needs 75 .* and has 72 that are not held out",
        few: "SOURCE:SHARE",
        f"{few}:1.2": "between 0 and 1",
    }
    for wrong, said in says.items():
        with pytest.raises(LabError, match=said):
            sides_of(data=data, mix=(wrong,))
    with pytest.raises(LabError, match="nothing for --data"):
        sides_of(data=data, mix=(f"{more}:0.5", f"{few}:0.5"))
    for again in ((f"{more}:0.2", f"{more}:0.1"), (f"{data}:0.2",)):
        with pytest.raises(LabError, match="name each source once"):
            sides_of(data=data, mix=again)
    with pytest.raises(LabError, match="--mix: needs --data"):
        sides_of(mix=(f"{more}:0.5",))


def test_reading_stops_at_the_limit_and_is_not_done_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = Path(write_chats(tmp_path / "a.jsonl", "a", 30))
    file.write_text(file.read_text() + "\n{broken")
    first = read_conversations(str(file), "train", ReadingOptions(limit=7)).conversations
    assert [talk.messages[0]["content"] for talk in first] == [f"a {n}" for n in range(7)]
    rows = sources.rows
    monkeypatch.setattr(sources, "rows", None)
    assert list(read_conversations(str(file), "train", ReadingOptions(limit=7)).conversations) == list(first)
    monkeypatch.setattr(sources, "rows", rows)
    write_chats(file, "b", 30)
    changed = read_conversations(str(file), "train", ReadingOptions(limit=7)).conversations
    assert changed[0].messages[0]["content"] == "b 0"


def test_a_dataset_is_streamed_as_far_as_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(source: str, split: str, streaming: bool) -> Iterator[dict[str, Any]]:
        assert (source, split, streaming) == ("someone/chats", "train", True)
        for number in range(10**6):
            asked.append(number)
            yield {"message": EXPECTED}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    options = ReadingOptions(streaming=True, limit=5)
    for _ in range(2):  # the second time what was read is there
        found = read_conversations("someone/chats", "train", options).conversations
        assert [talk.messages for talk in found] == [EXPECTED] * 5
    assert asked == list(range(5))


def test_normalisation_can_be_switched_off(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"instruction": "كتاب", "output": "علي"}))
    texts = {}
    for switched_on in (True, False):
        reading = read_conversations(str(file), "train", ReadingOptions(normalise=switched_on))
        texts[switched_on] = [message["content"] for message in reading.conversations[0].messages]
    assert texts == {True: ["کتاب", "علی"], False: ["كتاب", "علي"]}


def test_real_persian_conversations(real_chats: Path) -> None:
    reading = read_conversations(str(real_chats / "train.jsonl"), "train", ReadingOptions())
    assert len(reading.conversations) == 552
    assert not reading.reasons
    assert {message["role"] for item in reading.conversations for message in item.messages} == {
        "system",
        "user",
        "assistant",
    }


def test_rows_that_are_broken_in_other_ways_than_json_are_counted(tmp_path: Path) -> None:
    good, bad = json.dumps(MESSAGES), {"role": "assistant", "content": "\ud83d"}
    broken = {
        "half a character": json.dumps({"messages": [EXPECTED[1], bad]}),
        "bad JSON": '{"messages": [], "id": ' + "1" * 5000 + "}",
        "no turns": '{"messages": []}',
    }
    lines = [good, *broken.values(), "[" * 100_000, good.replace("س", "a\u2028b").replace("\\u0633", "a\u2028b")]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(LabError, match=r"4 rows cannot be used.*chats\.jsonl:2: half a character"):
        read_conversations(str(tmp_path / "chats.jsonl"), "train", ReadingOptions())
    found = read_conversations(str(tmp_path / "chats.jsonl"), "train", ReadingOptions(on_bad_data="skip"))
    assert found.reasons == {"half a character": 1, "bad JSON": 2, "no turns": 1}
    assert found.conversations[1].messages[0]["content"] == "a\u2028b"
    for text in ("[" * 100_000, '[{"id": ' + "1" * 5000 + "}]", f"[{good},"):
        (tmp_path / "chats.json").write_text(text)
        with pytest.raises(LabError, match=r"chats\.json: is no JSON .*one row per line"):
            read_conversations(str(tmp_path / "chats.json"), "train", ReadingOptions(on_bad_data="skip"))
    text = pyarrow.StringArray.from_buffers(
        2, pyarrow.py_buffer(struct.pack("<3i", 0, 1, 3)), pyarrow.py_buffer(b"a\xff\xfe")
    )
    pyarrow.parquet.write_table(pyarrow.table({"instruction": text, "output": ["b", "c"]}), tmp_path / "chats.parquet")
    found = read_conversations(str(tmp_path / "chats.parquet"), "train", ReadingOptions(on_bad_data="skip"))
    assert (len(found.conversations), found.reasons.total()) == (1, 1)


def test_a_split_that_is_trained_on_is_not_the_test(tmp_path: Path) -> None:
    for name in ("train", "test"):
        rows = [{"instruction": f"{name} {number}", "output": "x"} for number in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = splits(DataOptions(data=str(tmp_path), split="test", validation_fraction=0.1), 0)
    asked = [{talk.messages[0]["content"] for talk in found[name].conversations} for name in ("training", "test")]
    assert [len(part) for part in asked] == [32, 4]
    assert not asked[0] & asked[1]
