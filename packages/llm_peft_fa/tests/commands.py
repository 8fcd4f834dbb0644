"""Runs the lab's commands, in this process or as a user does."""

import contextlib
import importlib
import io
import multiprocessing
import os
import subprocess
import sys
from dataclasses import dataclass
from multiprocessing.process import BaseProcess

from llm_peft_fa.own_process import start_server


@dataclass
class Done:
    """What a command wrote."""

    stdout: str
    stderr: str


def here(name: str, *arguments: object, code: int = 0, typed: str = "") -> Done:
    """Runs a command in this process: importing everything anew for each would take minutes."""
    out, err = io.StringIO(), io.StringIO()
    found = 0
    main = importlib.import_module(f"llm_peft_fa.{name}").main
    before = sys.argv, sys.stdin
    sys.argv, sys.stdin = [f"llm-peft-fa-{name}", *map(str, arguments)], io.StringIO(typed)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as stop:
        found = int(stop.code or 0)
    finally:
        sys.argv, sys.stdin = before
    assert found == code, err.getvalue()
    return Done(out.getvalue(), err.getvalue())


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""} | more


def forked(*arguments: object, **more: str) -> BaseProcess:
    """Starts `llm_peft_fa.train` in a process of its own, forked from the server that `compare` uses too."""
    start_server(None)
    process = multiprocessing.get_context("forkserver").Process(target=_train, args=([*map(str, arguments)], more))
    process.start()
    return process


def _train(arguments: list[str], more: dict[str, str]) -> None:
    import torch

    from llm_peft_fa.train import main

    os.environ.update(more)
    torch.set_num_threads(1)  # as in the other processes: the same bytes need the same threads
    sys.argv = ["llm-peft-fa-train", *arguments]
    main()


def command(*arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
    """Runs `python -m …` as a user does."""
    done = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        env=environment(**more), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done
