"""The page for people, as a browser meets it, and what their ratings say."""

import csv
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode

import pytest
from commands import here

from llm_peft_fa.rate import page_of, sign_test, wilson, write_judge_file

pytestmark = pytest.mark.quick


@pytest.fixture
def table(tmp_path: Path) -> Path:
    file = tmp_path / "to_rate.csv"
    said = {"base": [f"پاسخ {n}" for n in range(20)], "tuned": [f"<b>پاسخ</b> دیگر {n}" for n in range(20)]}
    write_judge_file(file, [f"پرسش {n}؟" for n in range(20)], said, 0)
    return file


@pytest.fixture
def address(table: Path) -> Iterator[str]:
    with page_of(table, 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def opened(address: str, headers: dict[str, str] | None = None, **form: object) -> str:
    body = urlencode(form).encode() if form else None
    with urllib.request.urlopen(urllib.request.Request(address, body, headers or {})) as answer:
        return str(answer.read().decode())


def ratings(table: Path) -> list[str]:
    with table.open(encoding="utf-8-sig", newline="") as stream:
        return [row[4] for row in csv.reader(stream)][1:]


def test_each_choice_is_kept_and_the_next_pair_shown(table: Path, address: str) -> None:
    first = opened(address)
    assert "پرسش 0؟" in first
    assert "&lt;b&gt;پاسخ&lt;/b&gt; دیگر 0" in first, "an answer is text, whatever is in it"
    assert 'dir="rtl"' in first
    assert not {"base", "tuned", "http", "<script", "@import"} & {
        word for word in ("base", "tuned", "http", "<script", "@import") if word in first
    }
    assert "پرسش 1؟" in opened(address, row=0, better="B")
    assert "پرسش 2؟" in opened(address, row=1, better="=")
    assert ratings(table) == ["B", "="] + [""] * 18
    assert "پرسش 0؟" in opened(f"{address}/?row=0")
    opened(address, row=0, better="A")
    assert ratings(table)[0] == "A", "a choice can be changed"
    for row in range(20):
        last = opened(address, row=row, better="A")
    assert "سپاس" in last
    assert not list(table.parent.glob(".*")), "nothing half written is left"


@pytest.mark.parametrize(
    ("headers", "form", "code"),
    [
        ({"Host": "evil.example"}, {}, 403), ({"Origin": "http://evil.example"}, {"row": 0, "better": "A"}, 403),
        ({}, {"row": 20, "better": "A"}, 400), ({}, {"row": 0, "better": "C"}, 400), ({}, {"row": "x", "better": "A"}, 400),
    ],
)  # fmt: skip
def test_what_another_site_or_a_broken_form_asks_is_refused(
    table: Path, address: str, headers: dict[str, str], form: dict[str, object], code: int
) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        opened(address, headers, **form)
    assert refused.value.code == code
    assert ratings(table) == [""] * 20


def rated(table: Path, *better: str) -> None:
    """Rates the first pairs by names, as a spreadsheet in Persian saves it: with semicolons and in lower case."""
    key = json.loads((table.parent / "to_rate.csv.key.json").read_text())
    text = table.read_text(encoding="utf-8-sig")
    rows = list(csv.reader(text.splitlines(), delimiter=";" if ";" in text else ","))
    for row in rows[1:]:
        row[4] = ""
    for row, sides, name in zip(rows[1:], key, better, strict=False):
        row[4] = next((side.lower() for side in "AB" if sides[side] == name), name)
    with table.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream, delimiter=";").writerows(rows)


def test_a_table_that_was_cut_or_is_gone_is_said_on_the_page(
    table: Path, address: str, capfd: pytest.CaptureFixture[str]
) -> None:
    table.write_text(table.read_text(encoding="utf-8")[:200], encoding="utf-8")
    with pytest.raises(urllib.error.HTTPError) as cut:
        opened(address)
    table.unlink()
    with pytest.raises(urllib.error.HTTPError) as gone:
        opened(address, row=0, better="A")
    for error in (cut, gone):
        assert "to_rate.csv" in error.value.read().decode()
    assert "Traceback" not in capfd.readouterr().err


def test_pairs_that_are_missing_or_twice_are_not_counted_as_all(table: Path) -> None:
    rated(table, *["tuned"] * 12)
    lines = table.read_text(encoding="utf-8").splitlines(keepends=True)
    for spoiled in (lines[:-4], [*lines, lines[3]]):
        table.write_text("".join(spoiled), encoding="utf-8", newline="")
        assert "missing or twice" in here("rate", table, "--read-ratings", code=2).stderr


def test_ratings_are_read(table: Path) -> None:
    rated(table, *["tuned"] * 12, *["base"] * 3, "=", "=")
    done = here("rate", table, "--read-ratings")
    found = json.loads((table.parent / "to_rate.csv.ratings.json").read_text())
    assert {name: found[name] for name in ("rated", "won", "lost", "equal")} == {
        "rated": 17,
        "won": 12,
        "lost": 3,
        "equal": 2,
    }
    assert found["win rate"] == 0.8
    assert "tuned better 12 times" in done.stdout
    assert "the two differ" in done.stdout
    rated(table, *["tuned"] * 5, *["base"] * 3)
    assert "cannot be told apart" in here("rate", table, "--read-ratings").stdout
    rated(table, *["="] * 20)
    assert "None was decided" in here("rate", table, "--read-ratings").stdout


@pytest.mark.parametrize(("won", "of"), [(0, 1), (7, 10), (15, 15), (40, 90)])
def test_interval_and_test_are_those_of_scipy(won: int, of: int) -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy is the peer")
    expected = stats.binomtest(won, of)
    assert sign_test(won, of) == pytest.approx(expected.pvalue)
    interval = expected.proportion_ci(0.95, "wilson")
    assert wilson(won, of) == pytest.approx((interval.low, interval.high), abs=1e-6)


@pytest.mark.parametrize(
    ("better", "spoiled", "with_text", "said"),
    [
        (["tuned"], "", "a,b\n1,2\n", "to_rate.csv: is not a table to rate"),
        (["tuned"], "", None, "to_rate.csv: cannot be read"),
        (["tuned", "maybe"], "", "", "pair 2 is rated 'MAYBE'"),
        (["tuned"], ".key.json", None, "key.json: cannot be read"),
        (["tuned"], ".key.json", "[]", "is not the key of"),
        ([], "", "", "nothing is rated yet"),
    ],
)
def test_bad_input_is_one_line(better: list[str], spoiled: str, with_text: str | None, said: str, table: Path) -> None:
    rated(table, *better)
    file = table.with_name(f"to_rate.csv{spoiled}")
    if with_text is None:
        file.unlink()
    elif with_text:
        file.write_text(with_text)
    done = here("rate", table, "--read-ratings", code=2)
    assert said in done.stderr
    assert len(done.errors) == 1
