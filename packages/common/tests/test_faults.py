"""What is broken in other ways than usual: one line, quickly, and nothing lost."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
from accelerate import Accelerator
from PIL import Image
from safetensors import SafetensorError

from labs_common.cache import path_name
from labs_common.cli import begun, config_from_yaml, parse, run_command
from labs_common.data.images import BadPictureError, decoded, examined, record_splits
from labs_common.errors import LabError, bytes_of, json_of, text_of
from labs_common.fitting import write_results
from labs_common.lock import LOCK, check_new, lock
from labs_common.options import ClassDataOptions, PageOptions, RunOptions, TrainingOptions
from labs_common.pages import check_page, serve
from labs_common.report.figures import bar_figure, curve_figure, map_figure, matrix_figure, scatter_figure
from labs_common.report.page import Gallery, Section, Text, write_report
from labs_common.run import Run, cost_of, training_means

pytestmark = pytest.mark.quick
# Each alias stands for nine of the one before: 9**11 values.
BOMB = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i}\n  <<: [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))


@dataclass
class Config:
    """Does nothing."""

    training: TrainingOptions = field(default_factory=TrainingOptions)
    run: RunOptions = field(default_factory=RunOptions)


@pytest.mark.parametrize(
    "text",
    [BOMB, MERGES, "training: &a {b: *a}", "a: " + "[" * 100_000, "seed: 2020-13-45", "seed: !!int abc", "{}", "",
     "help: true", "tyro_write_completion: [bash, written]", "seed: [1, --help]", "seed: " + "1" * 5000, "output: " + "x" * 300, "seed: 1\0", "? [a]\n: b"],
)  # fmt: skip
def test_configs_that_are_refused_at_once(tmp_path: Path, text: str) -> None:
    file, start = tmp_path / "config.yaml", time.process_time()
    file.write_text(text)
    with pytest.raises(LabError) as error:
        parse(Config, "test", ["--config", str(file)])
    assert len(str(error.value).splitlines()) == 1
    assert time.process_time() - start < 1.5


def test_what_a_config_may_say_of_resuming(tmp_path: Path) -> None:
    """`resume` in a file would go on with a run under another config; of two on the command line the last counts."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(f"training: {{epochs: {len(name) + (name == 'two')}}}\n")
    (tmp_path / "config.yaml").write_text(f"run: {{resume: {tmp_path / 'one'}}}\n")
    with pytest.raises(LabError, match=r"config\.yaml: says resume"):
        parse(Config, "test", ["--config", str(tmp_path / "config.yaml")])
    both = parse(Config, "test", ["--resume", str(tmp_path / "one"), "--resume", str(tmp_path / "two")])
    assert (both.run.resume, both.training.epochs) == (tmp_path / "two", 4)
    with pytest.raises(LabError, match="--output: has a name of more than 255 bytes"):
        parse(Config, "test", ["--output", str(tmp_path / ("ن" * 128))])
    with pytest.raises(LabError, match="--output: has a name that is not UTF-8"):
        parse(Config, "test", ["--output", os.fsdecode(b"caf\xe9")])
    with pytest.raises(LabError, match="--data: holds a byte that is not UTF-8"):
        parse(ClassDataOptions, "test", ["--data", os.fsdecode(b"caf\xe9")])


@pytest.mark.parametrize("error", [OSError(errno.EIO, "any"), OSError(errno.EFBIG, "any"), SafetensorError(
    f"I/O error: {os.strerror(errno.EFBIG)} (os error 27)")])  # fmt: skip
def test_a_disk_that_fails_is_one_line_with_how_to_go_on(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a quota of a file's size does (`ulimit -f`), or a network's disk: the errors name no file."""

    def write(config: Config) -> None:
        begun(Path("run"))
        raise error

    monkeypatch.setattr(sys.modules[__name__], "written", write, raising=False)
    with pytest.raises(SystemExit, match="1"):
        run_command(f"{__name__}:written", Config, arguments=[])
    begun(None)
    said = capsys.readouterr().err
    assert said.startswith("error: the disk ")
    assert said.endswith("go on with --resume run\n")


@pytest.mark.parametrize("host", ["nowhere.invalid", "256.1.1.1", "a" * 70 + ".x", "::1"])
def test_a_page_at_no_address_is_one_line(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    with pytest.raises(LabError, match="--host"):
        check_page(PageOptions(host=host, port=0), "extra")

    def launch(**given: object) -> None:
        raise OSError("Cannot find empty port")

    with pytest.raises(LabError, match="--host"):
        serve(SimpleNamespace(launch=launch), PageOptions())


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for path, said in ((tmp_path / "pipe.png", "pipe"), (tmp_path, "directory"), (Path("/dev/zero"), "device")):
        for read in (bytes_of, text_of, json_of):
            with pytest.raises(LabError, match=f"^--x: cannot be read .*{said}"):
                read(path, "--x")
        with pytest.raises(BadPictureError, match=said):
            decoded(path)
        assert said in examined([path], "", shown=False)[0][1]
    assert [reason for _, reason in examined([Path("a\0b"), Path("\ud800")], "", shown=False)] == [
        "has a name that no file can have"
    ] * 2
    with pytest.raises(LabError, match="pipe"):
        config_from_yaml(Config, tmp_path / "pipe.png")
    with pytest.raises(LabError, match="File name too long"):
        text_of(tmp_path / ("x" * 300), "--x")
    with pytest.raises(LabError, match="null"):
        text_of(Path("a\0b"), "--x")
    for content, said in ((b"\xff", "UTF-8"), (b"[" * 100_000, "JSON"), (b"1" * 5000, "JSON"), (b"{", "JSON")):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(LabError, match=said):
            json_of(tmp_path / "file", "--x")


def test_a_model_in_a_deep_directory_still_names_a_run() -> None:
    name = path_name("/home/" + "نام/" * 100)
    assert len(name.encode()) <= 120
    assert name.endswith("-نام")
    assert path_name("google/gemma-2-2b") == "google-gemma-2-2b"


def test_names_survive_whatever_they_hold(tmp_path: Path) -> None:
    """Separators of lines that JSON leaves alone; half a character, as Python reads a name that is not UTF-8."""
    run, names = Run(tmp_path), ["a\u2028b", "c\x85d", "\udce9.png", "نام", "e\x0bf"]
    for step, name in enumerate(names):
        run.append("samples.jsonl", {"step": step, "picture": name})
    run.save_json("names.json", names)
    assert [line["picture"] for line in run.lines("samples.jsonl")] == names
    assert run.load_json("names.json") == names
    with (tmp_path / "samples.jsonl").open("ab") as file:
        file.write('{"step": 9, "picture": "ن'.encode()[:-1])  # a kill in the middle of a letter
    run.rewind(2)
    assert [line["picture"] for line in run.lines("samples.jsonl")] == names[:3]
    write_report(
        run, names[2], "", [Section(names[0], [Text(names[2]), Gallery([(Image.new("RGB", (2, 2)), names[2])], "")])]
    )
    assert "\\udce9.png" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"null\n", b"[]\n", b'{"step": "1"}\n', b"\xff\n", b"[" * 100_000 + b"\n", b"1\n"]
)
def test_files_of_a_run_that_are_of_something_else(tmp_path: Path, content: bytes) -> None:
    run = Run(tmp_path, resumed=True)
    (tmp_path / "metrics.jsonl").write_bytes(content)
    (tmp_path / "splits.json").write_bytes(content)
    if content.endswith(b"\n"):  # else it is a line that a kill has cut
        with pytest.raises(LabError, match=r"metrics\.jsonl:1: is no line of a run"):
            list(run.lines("metrics.jsonl"))
    with pytest.raises(LabError, match=r"splits\.json: .*; bring the file back"):
        run.load_json("splits.json", "train")
    with pytest.raises(LabError, match=r"--resume|bring the file back"):
        record_splits(run, {"train": _Nothing()})  # type: ignore[dict-item]


class _Nothing:
    names = ()

    def fingerprint(self) -> str:
        return ""


def test_a_directory_that_a_kill_left_before_its_config_is_new(tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()
    (tmp_path / "environment.json").write_text('{"run": "a", "command": "b"}')
    (tmp_path / ".config.yaml.part").write_text("")
    check_new(tmp_path)
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(LabError, match="is not empty"):
        check_new(tmp_path)


@pytest.mark.parametrize("name", ["a$\\frac{a$", "x\u2028y\udce9\x00<&>\\", "x" * 3000])
def test_figures_take_any_name(name: str) -> None:
    """As text: no formulas."""
    for svg in (
        bar_figure({name: {"one": 1, name + "!": 2}}, ""),
        matrix_figure([[1, 0], [0, 1]], [name, "other"], "", ""),
        curve_figure({name: ([1, 2], [1e-3, 1e-5]), "other": ([1], [1])}, "", "", log_up=True),
        scatter_figure({name: (1, 1), "other": (1e5, 2)}, "", "", log_across=True),
        map_figure([(1, 2), (2, 3)], [0, 1], [name, "other"]),
    ):
        said = "".join(ElementTree.fromstring(svg.encode()).itertext())
        assert "mathdefault" not in said
        assert "frac" not in name or name in said


@dataclass
class OutputConfig:
    """Goes on with nothing."""

    output: Path | None = None


@pytest.mark.parametrize(("config_type", "processes"), [(Config, 1), (Config, 2), (OutputConfig, 1)])
def test_a_report_that_fails_says_which_command_makes_it_again(
    config_type: type,
    processes: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def page() -> tuple[str, list[Section]]:
        raise KeyError("whatever")

    def body(config: Config | OutputConfig) -> None:
        options = config.run if isinstance(config, Config) else RunOptions(output=config.output, track="none")
        run = Run.start(config, options, "test", Accelerator(cpu=True))
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        write_results(run, {"cost": 1}, True, "", page)

    monkeypatch.setitem(sys.modules, "made", SimpleNamespace(body=body))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    output = tmp_path / "a run"
    track = ["--track", "none"] if config_type is Config else []
    with pytest.raises(SystemExit) as stop:
        run_command("made:body", config_type, "lab.train", ["--output", str(output), *track])
    assert stop.value.code == 1
    said = capsys.readouterr().err
    start = "python -m lab.train" if processes == 1 else "launched as before, python -m lab.train"
    again = f"{start} --resume '{output}' --report" if track else "the same command with another --output"
    assert f"KeyError: 'whatever'); all else is saved: {again} makes it again" in said
    assert json.loads((output / "results.json").read_text()) == {"cost": 1}


COMMAND = """
import os, sys, time, types
from dataclasses import dataclass
from labs_common.cli import run_command
@dataclass
class Config:
    wait: bool = False
def body(config):
    print("started", flush=True)
    if config.wait:
        time.sleep(60)
    for line in range(20000):
        print("نام", line)
        print("also", line, file=sys.stderr)
    open("saved", "w").close()
sys.modules["made"] = types.SimpleNamespace(body=body)
run_command("made:body", Config)
"""


@pytest.mark.parametrize("shell", ["2>&1 | head -1; exit ${PIPESTATUS[0]}", ">&- 2>&- <&-", ">/dev/null 2>&1"])
def test_nobody_has_to_listen(tmp_path: Path, shell: str) -> None:
    """A reader that leaves, streams that are closed, an encoding that lacks the letters."""
    (tmp_path / "command.py").write_text(COMMAND)
    asked = f"PYTHONIOENCODING=ascii {sys.executable} command.py {shell}"
    done = subprocess.run(["bash", "-c", asked], cwd=tmp_path, timeout=60, check=False)
    assert done.returncode == 0
    assert (tmp_path / "saved").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_before_anything_began_is_one_line(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "command.py").write_text(COMMAND)
    command = [sys.executable, "command.py", "--wait"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert said.count("\n") == 1
    assert "nothing was saved" in said


@pytest.mark.parametrize("content", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"])
def test_no_picture_is_a_program(content: bytes) -> None:
    with pytest.raises(BadPictureError, match="PostScript"):
        decoded(content)


def test_whatever_a_decoder_raises_is_a_bad_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "open", lambda source: [].pop())
    with pytest.raises(BadPictureError, match="truncated or broken"):
        decoded(b"picture")


def test_a_picture_with_too_long_a_name_is_one_of_the_bad(tmp_path: Path) -> None:
    assert "too long" in examined([tmp_path / f"{'a' * 300}.png"], "checking", shown=False)[0][1]


def test_what_others_call_as_a_run_does_stays(tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text("{}")
    with pytest.raises(LabError, match="not empty"):
        check_new(tmp_path)
    (tmp_path / "environment.json").write_text('{"run": "a", "command": "b"}')
    (tmp_path / "figures").mkdir()
    check_new(tmp_path)
    (tmp_path / "figures" / "own.svg").touch()
    with pytest.raises(LabError, match="not empty"):
        check_new(tmp_path)


def test_a_lock_is_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("all of it")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).symlink_to(tmp_path / "precious")
    with pytest.raises(LabError, match="is a link"):
        lock(tmp_path / "run", is_main=True)
    assert (tmp_path / "precious").read_text() == "all of it"


def test_a_run_that_ended_meanwhile_is_not_written_over(tmp_path: Path) -> None:
    """Both were started with one --output, and passed the first look at it; the other was quicker."""
    options = RunOptions(output=tmp_path, track="none")
    (tmp_path / "config.yaml").write_text("seed: 1")
    with pytest.raises(LabError, match="not empty"):
        Run.start(Config(run=options), options, "test", Accelerator(cpu=True))
    assert (tmp_path / "config.yaml").read_text() == "seed: 1"


@pytest.mark.parametrize("line", [{}, {"seconds": "a", "samples": 1, "peak_memory": 1}])
def test_lines_without_what_a_step_took(tmp_path: Path, line: dict[str, object]) -> None:
    run = Run(tmp_path)
    run.append("timing.jsonl", {"step": 1, **line})
    with pytest.raises(LabError, match=r"timing\.jsonl"):
        cost_of(run, "samples")
    run.append("metrics.jsonl", {"step": 1, "loss": 1, "samples": 1, "accuracy": "a"})
    with pytest.raises(LabError, match=r"metrics\.jsonl"):
        training_means(run, "samples", ["accuracy"])
