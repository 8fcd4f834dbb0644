"""`python -m benchmarks.gpu` on a CPU: its parts run with tiny sizes, go on where they stopped, and become the table."""

import importlib.util
import multiprocessing
import os
import random
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import timm
from benchmarks.gpu import commands, rows, running, sharding, traces
from benchmarks.gpu.measuring import Setting, Skipped
from benchmarks.gpu.options import Options
from benchmarks.gpu.parts import PARTS, Measurement
from benchmarks.gpu.rows import Record, Row
from test_entry_points import ROOT, config_type

from labs_common.cli import flat_options, parse
from labs_common.errors import LabError
from labs_common.training import Loop

# Every function of every part once, and every command once: the others differ in names.
ONLY = (
    "commands/vit_transfer.train",
    "language/llama against TRL", "language/gemma, rows and chunks", "language/llama, QLoRA",
    "traces/llm_peft_fa.train", "traces/caption_lab.train", "traces/clip_lab.train", "traces/zsi_contrastive.train",
    "traces/zsi_contrastive.pretrain", "pictures",
    "sharding/llm_peft_fa.train, fsdp", "sharding/llm_peft_fa.train, deepspeed_zero2", "losses",
)  # fmt: skip
FACTS = {"device": "CPU of a test", "versions": {"torch": "2"}, "commit": "0123456789abcdef"}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The directory of rows that the command wrote, and what it printed."""
    output = tmp_path_factory.mktemp("gpu") / "rows"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--output", str(output), "--only", *ONLY],
        cwd=ROOT, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return output, done.stderr


def records(output: Path) -> dict[str, Record]:
    return {f"{file.parent.name}/{file.stem}": rows.read(file) for file in output.glob("*/*.json")}


def test_every_part_runs_on_a_cpu(measured: tuple[Path, str]) -> None:
    found = records(measured[0])
    skipped = {"sharding/llm_peft_fa.train,-fsdp": ("skipped", "needs CUDA: Accelerate shards by FSDP on GPUs only")}
    if importlib.util.find_spec("deepspeed") is None:
        skipped["sharding/llm_peft_fa.train,-deepspeed_zero2"] = (
            "skipped", "needs deepspeed, which is not installed",
        )  # fmt: skip
    assert {name: (record.state, record.message) for name, record in found.items() if record.state != "done"} == skipped
    assert {record.part for record in found.values()} == set(PARTS)
    for record in found.values():
        assert record.tiny
        assert record.rows or record.state == "skipped"
        for row in record.rows:
            assert row.device == record.device
            assert row.device.startswith("CPU")
            assert row.versions["torch"]
            assert 0 <= row.seconds <= record.seconds
            assert (row.value is None) == row.note.startswith("skipped: needs CUDA"), row
            assert row.value is None or row.value >= 0
            if row.peer_value:
                assert row.ratio == pytest.approx(row.value / row.peer_value)
    assert found["language/llama-against-TRL"].rows[2].peer == "TRL, packing"


def test_a_killed_command_resumes_to_the_same_weights(measured: tuple[Path, str]) -> None:
    killed = [record for record in records(measured[0]).values() if record.part == "commands"]
    assert len(killed) == 1
    for record in killed:
        assert record.rows[-1].value == 0
        assert f"killed after step {commands.KILLED_AFTER} of" in record.rows[-1].note


def test_under_deepspeed_it_computes_the_same(measured: tuple[Path, str]) -> None:
    """`accelerate launch` itself with ZeRO-2, in one process on a CPU; the measurement fails if DeepSpeed takes no part."""
    record = records(measured[0])["sharding/llm_peft_fa.train,-deepspeed_zero2"]
    if record.state == "skipped":
        pytest.skip(record.message)
    assert record.rows[-1].name.endswith("losses apart from those without it")
    assert record.rows[-1].value < 1e-4


def test_traces_are_kept(measured: tuple[Path, str]) -> None:
    for record in records(measured[0]).values():
        if record.part == "traces":
            assert (measured[0] / "traces" / f"{record.measurement}.json.gz").stat().st_size > 1000
            assert 0 <= record.rows[0].value < 1
            assert record.rows[1].value > 100, "a step has more operators than that"


def test_it_says_what_it_will_do(measured: tuple[Path, str]) -> None:
    said = measured[1]
    for number, part in enumerate(PARTS.values(), 1):
        assert f"{number}. {part.title}" in said.replace("\n", " ").replace("  ", " ")
    count = len(list(measured[0].glob("*/*.json")))
    assert f"{count} of {count} measurements to do" in said


def test_what_is_done_is_not_done_again(measured: tuple[Path, str]) -> None:
    options = Options(output=measured[0], only=ONLY)
    device = next(iter(records(measured[0]).values())).device
    assert all(map(running.is_finished, running.plan(options, device, True)))
    for other in (
        running.plan(replace(options, again=True), device, True),
        running.plan(options, "another GPU", True),
        running.plan(options, device, False),
    ):
        assert not any(map(running.is_finished, other))
    long = {one.measurement.name for one in running.plan(replace(options, long=True), device, True)}
    assert long - {one.measurement.name for one in running.plan(options, device, True)} == {"SimCLR, 200 epochs"}


def rows_then(end: str) -> Iterator[Row]:
    """A measurement that yields a row and then ends in this way."""
    yield Row("first", "s", 2.0, "other", 4.0)
    if end == "fails":
        raise ValueError("it broke\nhere")
    if end == "skips":
        raise Skipped("needs a moon")
    if end == "dies":
        os._exit(7)
    if end == "hangs":
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            time.sleep(60)
    if end == "waits":
        time.sleep(60)
    yield Row("second", "s", 1.0)


@pytest.mark.parametrize(
    ("end", "state", "said", "count"),
    [
        ("ends", "done", "", 2),
        ("fails", "failed", "ValueError: it broke", 1),
        ("skips", "skipped", "needs a moon", 1),
        ("dies", "failed", "code 7", 1),
        ("waits", "stopped", "time was up", 1),
        ("hangs", "stopped", "stopped after", 1),
    ],
)
def test_however_it_ends_its_rows_are_kept(
    end: str, state: str, said: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "LAST_SECONDS", 0.5 if end == "hangs" else 30)
    monkeypatch.setattr(sharding, "launched", lambda setting, folder: rows_then(end))
    measurement = Measurement("it", "sharding:launched")
    one = running.Planned("sharding", measurement, tmp_path / "rows" / "sharding" / "it.json", None)
    setting = Setting(True, tmp_path / "work", None, FACTS)
    limit = 3 if state == "stopped" else 30
    running.measured(multiprocessing.get_context("fork"), one, setting, time.monotonic() + limit)
    record = rows.read(one.file)
    assert record == one.there
    assert (record.state, len(record.rows)) == (state, count)
    assert said in record.message
    assert record.rows[0].ratio == 0.5
    assert (record.rows[0].device, record.rows[0].commit) == (FACTS["device"], FACTS["commit"])
    assert running.is_finished(one) == (state in ("done", "skipped"))


def test_the_device_is_idle_where_no_span_is() -> None:
    draw = random.Random(0)
    for _ in range(20):
        spans = [(start, start + draw.randrange(9)) for start in (draw.randrange(50) for _ in range(8))]
        assert traces.busy(spans) == len({moment for start, end in spans for moment in range(start, end)})


def test_waits_are_counted_by_line_of_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's warning, from code that stands in the project and from a library that it calls."""
    monkeypatch.setattr(Loop, "step", Loop.step)  # is put back
    library = compile("def wait(): warn(said)", "/usr/lib/library.py", "exec")
    ours = compile("\n\nwait(); wait()\nwarn(said)", str(ROOT / "packages/common/src/labs_common/training.py"), "exec")

    def run(module: str, arguments: object) -> None:
        names = {"warn": warnings.warn, "said": f"{commands.SYNC} (Triggered internally)"}
        exec(library, names)
        exec(ours, names)

    monkeypatch.setattr(commands, "reproducible", run)
    with warnings.catch_warnings():
        found = commands.watched("any", ())
    assert found["waits"] == {"labs_common/training.py:3": 2, "labs_common/training.py:4": 1}


@pytest.mark.parametrize("tiny", [True, False])
@pytest.mark.parametrize("module", commands.TRAININGS)
def test_its_options_exist(module: str, tiny: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In real sizes too, which no machine without a GPU runs."""
    for name in ("write_flickr8k", "write_parquet", "write_coco", "LlamaForCausalLM"):
        monkeypatch.setattr(commands, name, Mock())
    asked = [*commands.TRAININGS[module].make(tmp_path, tiny), *commands.COMMON, "--output", tmp_path / "run"]
    flat = flat_options(parse(config_type(module), module, list(map(str, asked))))
    assert flat["precision"] == "bf16"
    networks = [flat[name] for name in ("image", "encoder", "backbone") if name in flat]
    networks += [flat["model"]] if module == "vit_transfer.train" else []
    assert all(timm.is_model(name) or name in ("tiny", "tiny-cnn", "tiny-vit") for name in networks)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (Options(only=("7",)), "--only 7: is no part; there are 1 or commands"),
        (Options(cifar=Path("nowhere")), "--cifar nowhere"),
        (Options(minutes=0), "--minutes 0"),
        (Options(rows=(Path("nowhere.json"),)), "nowhere.json: is no file of rows"),
        (Options(rows=(Path("docs"),)), "--rows docs: no file of rows is there"),
        (Options(rows=(Path("pyproject.toml"),)), "pyproject.toml: is no file of rows"),
    ],
)
def test_bad_input_is_one_line(options: Options, said: str) -> None:
    with pytest.raises(LabError, match=said) as caught:
        running.run(options)
    assert "\n" not in str(caught.value)


def made_up(device: str = "a GPU") -> Record:
    row = Row("a step | of it", "s", 0.5, "the other", 2.0, note="why", seconds=12.3, device=device, commit="abc" * 9,
              versions={"torch": "2.15", "trl": None})  # fmt: skip
    return Record("pictures", "it", "failed", "no memory\nleft", device, False, 20.0, [row])


def test_rows_become_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = tmp_path / "performance.md"
    document.write_text(f"before\n{rows.BEGIN}\nold\n{rows.END}\nafter\n")
    monkeypatch.setattr(rows, "DOCUMENT", document)
    monkeypatch.setattr(rows, "KEPT", tmp_path / "kept.json")
    made_up().write(tmp_path / "out" / "pictures" / "it.json")
    (tmp_path / "out" / "machine").write_text("{}")
    for _ in range(2):
        running.run(Options(rows=(tmp_path / "out",)))
        lines = document.read_text().splitlines()
        assert lines[:3] == ["before", rows.BEGIN, "a GPU; commit abcabcabca; torch 2.15."]
        assert lines[-2:] == [rows.END, "after"]
        assert "| a step / of it (why) | s | 0.5 | the other | 2 | 0.25 × | 12 |" in lines
        assert "| it: failed: no memory left | | | | | | |" in lines
        assert "old" not in lines
    assert rows.kept() == [made_up()]
    made_up("CPU, 2 cores").write(tmp_path / "cpu.json")
    with pytest.raises(LabError, match="on a CPU"):
        running.run(Options(rows=(tmp_path / "cpu.json",)))


def test_the_table_in_the_documents_is_what_the_rows_give() -> None:
    text = rows.DOCUMENT.read_text(encoding="utf-8")
    _, _, rest = text.partition(rows.BEGIN)
    table, end, _ = rest.partition(rows.END)
    assert end
    assert table.strip() == rows.section(rows.kept())
    assert rows.section([]) == rows.NOTHING
    assert "not measured on a GPU" in rows.NOTHING
