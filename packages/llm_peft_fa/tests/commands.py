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
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from labs_common.own_process import start_server
from llm_peft_fa.compare import LIBRARIES

LAUNCH = Path(__file__).parents[1] / "launch"
SMALL = (
    "--conversations", "60", "--batch-size", "8", "--epochs", "2", "--test-prompts", "6", "--max-new-tokens", "6",
    "--rank", "4", "--track", "none", "--tokens-per-batch", "300",
)  # fmt: skip


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
    start_server(None, LIBRARIES)
    process = multiprocessing.get_context("forkserver").Process(target=_train, args=([*map(str, arguments)], more))
    process.start()
    return process


def _train(arguments: list[str], more: dict[str, str]) -> None:
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


def without_rank(options: tuple[str, ...]) -> list[str]:
    place = options.index("--rank")
    return [*options[:place], *options[place + 2 :]]


def trained(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def one_cpu(config: Path, folder: Path) -> Path:
    """A launch configuration for one process on a CPU."""
    local = folder / config.name
    values = yaml.safe_load(config.read_text()) | {"num_processes": 1, "use_cpu": True, "mixed_precision": "no"}
    local.write_text(yaml.safe_dump(values))
    return local
