import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from accelerate import Accelerator
from test_checkpoint import locked as locked_elsewhere

from labs_common.cache import cached_directory
from labs_common.cli import config_from_yaml, held
from labs_common.errors import LabError
from labs_common.lock import new_directory, new_folder
from labs_common.options import RunOptions
from labs_common.run import Run, _installed, check_run_options, environment, keep, write_atomically

pytestmark = pytest.mark.quick


@dataclass
class Config:
    width: int = 3
    run: RunOptions = field(default_factory=RunOptions)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    options = RunOptions(output=tmp_path / "run", track="none")
    return Run.start(Config(5, options), options, "test", Accelerator(cpu=True))


def test_a_new_run_says_what_it_is(run: Run) -> None:
    assert config_from_yaml(Config, run.path / "config.yaml").width == 5
    environment = run.load_json("environment.json")
    assert environment["packages"]["torch"]
    assert environment["cpu_count"] == os.cpu_count()


def test_a_commit_that_cannot_be_had_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Git waits for a slow disk, or says what is no text."""
    monkeypatch.setenv("PATH", str(tmp_path))
    git = tmp_path / "git"
    git.write_text("#!/bin/sh\nprintf '\\377'\n")
    git.chmod(0o755)
    assert environment()["git_commit"] is None

    def slow(*given: object, **more: object) -> None:
        raise subprocess.TimeoutExpired("git", 5)

    monkeypatch.setattr(subprocess, "run", slow)
    assert environment()["git_commit"] is None


def test_a_broken_installation_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in {
        "a": b"Name: \xff\nVersion: 1",
        "b": b"Name: torch\n",
        "c": b"",
        "d": b"Name: D\nVersion: 2",
    }.items():
        (tmp_path / f"{name}-1.dist-info").mkdir()
        (tmp_path / f"{name}-1.dist-info" / "METADATA").write_bytes(content)
    monkeypatch.syspath_prepend(tmp_path)
    _installed.cache_clear()
    found = environment()["packages"]
    _installed.cache_clear()
    assert found["d"] == "2"
    assert found["torch"]


def test_what_a_resumed_run_depends_on_is_as_it_was(tmp_path: Path) -> None:
    keep(Run(tmp_path), "teacher.json", {"weights": 1, "old": 2}, "the teacher")
    again = Run(tmp_path, resumed=True)
    keep(again, "teacher.json", {"weights": 1, "new": 3}, "the teacher")
    with pytest.raises(LabError, match="the teacher changed"):
        keep(again, "teacher.json", {"weights": 4}, "the teacher")
    keep(again, "other.json", {"weights": 5}, "the other")  # of a run that began before it was kept
    assert again.load_json("other.json") == {"weights": 5}


def test_rewind_drops_later_lines_and_a_cut_one(run: Run) -> None:
    for step in range(5):
        run.append("metrics.jsonl", {"step": step, "loss": 1 / (step + 1)})
    with (run.path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 5, "lo')
    run.rewind(3)
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert lines[2]["loss"] == 1 / 3


def test_a_line_is_there_at_once_also_after_the_file_was_written_anew(run: Run) -> None:
    for step in (1, 2, 3):
        run.append("metrics.jsonl", {"step": step, "said": "سلام"})
        assert [line["step"] for line in Run(run.path).lines("metrics.jsonl")] == list(range(1, step + 1))
    run.rewind(1)
    run.append("metrics.jsonl", {"step": 2})
    assert list(Run(run.path).lines("metrics.jsonl")) == [{"step": 1, "said": "سلام"}, {"step": 2}]


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    run = Run(tmp_path, is_main=False)
    run.append("metrics.jsonl", {"step": 1})
    run.save_json("results.json", {})
    assert not list(tmp_path.iterdir())


def test_runs_of_one_second_have_names_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where another process makes its directory between the look and the making: here all look before any makes."""
    monkeypatch.chdir(tmp_path)
    made = set()
    with ThreadPoolExecutor(8) as pool:
        for path in pool.map(lambda _: new_directory(Path("runs/name")), range(8)):
            made.add(path.name)
    assert made == {"name", *(f"name-{number}" for number in range(2, 9))}
    (tmp_path / "runs" / "link").symlink_to("nowhere")
    assert new_directory(Path("runs/link")) == Path("runs/link-2")
    with pytest.raises(FileExistsError):  # and is not tried for ever
        new_directory(Path("runs/link/below"))
    options, stamps = RunOptions(track="none"), set()
    for _ in range(2):
        with held:
            stamps.add(Run.start(Config(5, options), options, "test", Accelerator(cpu=True)).path)
    assert len(stamps) == 2


def test_what_is_evaluated_twice_at_once_has_two_directories(tmp_path: Path) -> None:
    """An unused one goes again; one that the user names is for one process alone."""
    with held:
        first, second = (new_folder(None, tmp_path / "evaluation") for _ in range(2))
        assert [first.name, second.name] == ["evaluation", "evaluation-2"]
        (second / "evaluation.json").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation-2"]
    with locked_elsewhere(tmp_path / "named"), pytest.raises(LabError, match="at work there"):
        new_folder(tmp_path / "named", tmp_path)


def test_output_must_be_new(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(LabError, match="--output"):
            check_run_options(RunOptions(output=path))
    check_run_options(RunOptions(output=tmp_path / "new" / "er"))
    assert not (tmp_path / "new").exists()


def test_a_tracker_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(LabError, match=r"--track wandb.*\[wandb\]"):
        check_run_options(RunOptions(track="wandb"))


def test_atomic_write_keeps_the_old_on_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_atomically(path, "old")

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new")
    assert path.read_text() == "old"


def test_cached_directory_is_made_once_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = []

    def make(folder: Path) -> None:
        made.append(folder)
        (folder / "a").write_text("a")
        if len(made) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_directory("thing", {"x": 1}, make)
    assert not list((tmp_path / "foundation-labs").iterdir()), "an interrupted one leaves nothing"
    first = cached_directory("thing", {"x": 1}, make)
    assert cached_directory("thing", {"x": 1}, make) == first
    assert len(made) == 2
    assert cached_directory("thing", {"x": 2}, make) != first


@pytest.mark.parametrize("path", [Path(), Path("/"), Path("/dev/null")])
def test_what_is_no_file_is_not_replaced(path: Path) -> None:
    """As root a text would take the place of the device."""
    with pytest.raises(LabError, match=r"is no file that could be written"):
        write_atomically(path, "text")
    assert Path("/dev/null").is_char_device()
