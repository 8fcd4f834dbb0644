"""The search page, and what commands say of bad input."""

import subprocess
import sys
from pathlib import Path

import pytest
from labs_testing import commands as lab_commands
from PIL import Image

from clip_lab.config import DemoConfig
from clip_lab.demo import search_page


def test_the_page_searches_both_ways(run: Path) -> None:
    pytest.importorskip("gradio", reason="needs the extra clip-lab[demo]")
    functions = {
        function.name: function.fn for function in search_page(DemoConfig(checkpoint=str(run), top=3)).fns.values()
    }
    assert len(functions["by_sentence"]("one circle")) == 3
    assert functions["by_sentence"]("  ") == []
    rows, tiles = functions["by_picture"](Image.new("RGB", (50, 30), "red"))
    assert (len(rows), len(tiles)) == (3, 3)
    assert functions["by_picture"](None) == ([], [])


@pytest.mark.parametrize(
    ("module", "arguments", "names"),
    [
        ("retrieve", (), "say what to look for"),
        ("retrieve", ("a dog", "--checkpoint", "missing"), "missing"),
        ("retrieve", ("a dog", "--top", "0"), "--top"),
        ("probe", ("--shots", "1,some"), "--shots"),
        ("probe", ("--penalty", "-1"), "--penalty"),
        ("zero_shot", ("--templates", "missing.txt"), "missing.txt"),
        ("export", ("--checkpoint", "missing"), "missing"),
        ("compare", ("--objectives", "clip,clip"), "occurs twice"),
        ("compare", ("--ranked", "1"), "--ranked"),
        ("demo", ("--top", "0"), "--top"),
    ],
)
def test_bad_input_is_one_line(
    module: str, arguments: tuple[str, ...], names: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = lab_commands.here(f"clip_lab.{module}", *arguments, code=2)
    assert len(done.errors) == 1, done.stderr
    assert names in done.errors[0]
    assert not list(tmp_path.iterdir())


def test_of_two_exports_to_one_directory_the_second_is_refused(tmp_path: Path) -> None:
    held = "import fcntl, sys, time; file = open(sys.argv[1], 'a'); fcntl.lockf(file, fcntl.LOCK_EX)"
    code = f"{held}; print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, tmp_path / ".lock"], stdout=subprocess.PIPE) as first:
        assert first.stdout is not None
        first.stdout.readline()
        done = lab_commands.here("clip_lab.export", "--output", tmp_path, code=2)
        first.kill()
    assert "at work there" in done.errors[0]
