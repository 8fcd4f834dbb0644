import json
import struct
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from labs_common.errors import LabError
from llm_peft_fa.config import DataOptions, ReadingOptions
from llm_peft_fa.data import read_conversations, splits
from llm_peft_fa.sources import messages_of
from llm_peft_fa.spelling import normalise

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


@pytest.mark.parametrize("row", [SHAREGPT, MESSAGES, ALPACA])
def test_every_shape_of_row_gives_the_same_messages(row: dict[str, Any]) -> None:
    assert messages_of(row) == EXPECTED


def test_alpaca_input_follows_the_instruction() -> None:
    assert messages_of({"instruction": "جمع کن", "input": "۱ و ۲", "output": "۳"})[0]["content"] == "جمع کن\n\n۱ و ۲"


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


@pytest.mark.parametrize(
    ("written", "becomes"),
    [
        ("علي و كتاب و موسى", "علی و کتاب و موسی"),
        ("٠١٢٣٤٥٦٧٨٩ ۰۱۲ 012", "۰۱۲۳۴۵۶۷۸۹ ۰۱۲ 012"),
        ("می\u200cروم", "می\u200cروم"),
        ("می\u200c\u200c\u200cروم", "می\u200cروم"),
        ("می\u200c روم", "می روم"),
        ("می \u200cروم", "می روم"),
        ("\u200cسلام\u200c\n\u200cسلام", "سلام\nسلام"),
        ("کتـــاب", "کتاب"),
        ("سلام\u00a0بر\ufeff تو", "سلام بر تو"),
        ("مُحَمَّد؛ خانهٔ ما؟", "مُحَمَّد؛ خانهٔ ما؟"),
        ("print(x[0])  # 3.14", "print(x[0])  # 3.14"),
    ],
)
def test_one_spelling(written: str, becomes: str) -> None:
    assert normalise(written) == becomes
    assert normalise(becomes) == becomes


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
