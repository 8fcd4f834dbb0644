"""Signals to a training, and a terminal that is closed: it saves, and says how to go on."""

import contextlib
import fcntl
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pytest
import toy.training
from test_training import HERE, OPTIONS, finish, wait_for_steps, whole_run

__all__ = ["whole_run"]  # a fixture


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_interrupted_it_saves_and_says_how_to_go_on(whole_run: Path, tmp_path: Path, number: int) -> None:
    run = tmp_path / "interrupted"
    handler = signal.getsignal(number)
    said = finish("--output", run, "--signal-at", 16, "--signal-number", int(number), *OPTIONS, code=130)
    assert f"--resume {run}" in said.splitlines()[-1]
    assert (run / "checkpoints" / "step-00000017").exists(), "the step under way ends and is saved"
    assert signal.getsignal(number) == handler
    finish("--resume", run)
    expected = (whole_run / "metrics.jsonl").read_bytes()
    assert (run / "metrics.jsonl").read_bytes() == expected


def test_a_hangup_that_is_ignored_does_not_stop_it(whole_run: Path, tmp_path: Path) -> None:
    """As `nohup` starts it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        finish("--output", tmp_path / "run", "--signal-at", 16, "--signal-number", int(signal.SIGHUP), *OPTIONS)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (whole_run / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGHUP, signal.SIGTERM])
def test_a_warning_before_the_loop_is_one_line_and_nothing_is_lost(
    whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    run, handler = tmp_path / "early", signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(toy.training, "train_only", lambda *_: signal.raise_signal(number))
        said = finish("--output", run, *OPTIONS, code=130)
    (line,) = said.splitlines()
    assert line.startswith(signal.Signals(number).name)
    assert f"--resume {run}" in line
    assert signal.getsignal(number) == handler
    finish("--resume", run)
    assert (run / "metrics.jsonl").read_bytes() == (whole_run / "metrics.jsonl").read_bytes()


@pytest.mark.kills
def test_a_closed_terminal_saves(tmp_path: Path) -> None:
    """Whatever is written to it from then on fails, also what an evaluation says before the next checkpoint."""
    run = tmp_path / "run"
    ours, its = pty.openpty()
    options = ("--output", run, "--track", "none", "--evaluate-every", "1", "--seconds-per-step", "0.05")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE}:{os.environ.get('PYTHONPATH', '')}"}
    process = subprocess.Popen(
        [sys.executable, "-m", "toy.training", *map(str, options)],
        stdin=its, stdout=its, stderr=its, env=environment, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(its)
    reader = threading.Thread(target=read_all, args=(ours,))
    reader.start()
    wait_for_steps(run, 6)
    os.close(ours)
    reader.join()
    assert process.wait(120) == 130
    assert list((run / "checkpoints").glob("step-*"))


def read_all(terminal: int) -> None:
    with contextlib.suppress(OSError):
        while True:
            if select.select([terminal], [], [], 0.05)[0]:
                os.read(terminal, 65536)
