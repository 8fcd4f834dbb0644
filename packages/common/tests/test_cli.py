import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest

from labs_common.cli import config_from_yaml, config_to_yaml, flat_options, parse, run_command
from labs_common.errors import LabError
from labs_common.options import RunOptions, TrainingOptions, names_in, one_of

pytestmark = pytest.mark.quick


@dataclass
class Inner:
    names: tuple[str, ...] = ("a", "b")
    kind: Literal["x", "y"] = "x"
    where: Path | None = None


@dataclass
class Config:
    """Does nothing."""

    inner: Inner = field(default_factory=Inner)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    run: RunOptions = field(default_factory=RunOptions)


def test_flags_have_no_prefix() -> None:
    config = parse(Config, "test", ["--names", "c", "--learning-rate", "3", "--no-report", "--where", "here"])
    assert config.inner == Inner(("c",), "x", Path("here"))
    assert config.training.learning_rate == 3.0
    assert not config.run.report


def test_a_command_without_options_has_the_defaults() -> None:
    assert parse(Config, "test", []) == Config()


def test_yaml_goes_around(tmp_path: Path) -> None:
    config = parse(Config, "test", ["--names", "نام", "--kind", "y", "--max-steps", "7", "--schedule", "linear"])
    file = tmp_path / "config.yaml"
    file.write_text(config_to_yaml(config), encoding="utf-8")
    assert config_from_yaml(Config, file) == config
    assert parse(Config, "test", ["--config", str(file), "--kind", "x"]).inner == Inner(("نام",), "x")


def test_part_of_a_config_is_enough(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("training: {epochs: 9}\n")
    assert config_from_yaml(Config, file).training == TrainingOptions(epochs=9)


@pytest.mark.parametrize(
    "text",
    ["training: {epoch: 9}", "inner: {kind: z}", "[1, 2]", "a: [", "training: {epochs: x}", "training: {warmup: .nan}"],
)
def test_a_bad_config_names_its_file(tmp_path: Path, text: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(LabError, match=r"config\.yaml"):
        config_from_yaml(Config, file)


def test_resume_takes_the_saved_config_and_refuses_another(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(config_to_yaml(Config(training=TrainingOptions(epochs=9))))
    resumed = parse(Config, "test", ["--resume", str(tmp_path), "--keep", "5"])
    assert (resumed.training.epochs, resumed.training.keep, resumed.run.resume) == (9, 5, tmp_path)
    with pytest.raises(LabError, match="--epochs"):
        parse(Config, "test", ["--resume", str(tmp_path), "--epochs", "3"])
    with pytest.raises(LabError, match="--config"):
        parse(Config, "test", ["--resume", str(tmp_path), "--config", "x.yaml"])


def test_flat_options_are_the_flags() -> None:
    assert {"names", "kind", "epochs", "seed", "resume"} <= flat_options(Config()).keys()


def test_import_is_fast() -> None:
    # The promise is 1.5 s; what decides it is that torch stays out.
    code = "import labs_common, labs_common.cli, labs_common.options, sys; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


def test_a_command_is_imported_after_its_command_line_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "late_lab.py").write_text("imported = True\ndef body(config):\n    print(config.inner.kind)\n")
    monkeypatch.syspath_prepend(tmp_path)
    for arguments, code in ((["--help"], 0), (["--nothing"], 2)):
        with pytest.raises(SystemExit) as stop:
            run_command("late_lab:body", Config, arguments=arguments)
        assert stop.value.code == code
        assert "late_lab" not in sys.modules
    run_command("late_lab:body", Config, "other.name", ["--kind", "y"])
    assert "late_lab" in sys.modules
    assert capsys.readouterr().out.endswith("y\n")


def test_choices_are_the_keys_of_a_table_that_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "late_table.py").write_text(
        "import nothing_there\nTABLE: dict = {'one': 1, 'two': f(2)}\nOTHER = [1]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert names_in("late_table:TABLE") == ("one", "two")

    @dataclass
    class Choosing:
        which: Annotated[str, one_of("late_table:TABLE")] = "one"
        """Which of them."""

    assert parse(Choosing, "test", ["--which", "two"]).which == "two"
    with pytest.raises(LabError, match=r"'three' .*'one', 'two'"):
        parse(Choosing, "test", ["--which", "three"])
    assert config_to_yaml(Choosing()) == "which: one\n"
    with pytest.raises(SystemExit):
        parse(Choosing, "test", ["--help"])
    assert "{one,two}" in capsys.readouterr().out
    (tmp_path / "late_parts.py").write_text("A = {'one': 1}\nTABLE = {**A, 'two': 2}\nOTHER = {f(1): 1}\n")
    for table in ("late_table:OTHER", "no_such_module:TABLE", "late_parts:TABLE", "late_parts:OTHER"):
        with pytest.raises(ValueError, match=table):
            names_in(table)


def test_a_command_runs_in_a_thread_of_a_program(tmp_path: Path) -> None:
    """Which may set no handlers of signals."""
    codes: list[object] = []

    def call() -> None:
        try:
            run_command("labs_common.nothing:run", Config, arguments=["--learnin-rate", "1"])
        except SystemExit as stop:
            codes.append(stop.code)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert codes == [2]
