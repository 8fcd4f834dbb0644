"""Runs a lab's commands, in this process or as a user does: for the tests of all labs."""

import contextlib
import gc
import io
import json
import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from pyarrow import parquet

from labs_common.cli import command_of
from labs_common.compare.processes import start_server, stop_as_usual
from labs_testing.sharded import FORCED, force_deepspeed, force_fsdp

# Beside the project; read from where the tests start, as the package may be installed elsewhere.
REAL_DATA = Path("../shared/data").resolve()


@dataclass
class Done:
    """What a command wrote."""

    stdout: str
    stderr: str
    code: int = 0

    @property
    def errors(self) -> list[str]:
        """The lines that say what was wrong."""
        return [line for line in self.stderr.splitlines() if line.startswith("error")]


def here(module: str, *arguments: object, code: int | None = 0, typed: str = "") -> Done:
    """Runs `python -m MODULE` in this process: importing everything anew for each would take minutes.

    It must end with the exit code `code`, if one is given.
    """
    out, err = io.StringIO(), io.StringIO()
    found = 0
    main = command_of(module)
    before = sys.argv, sys.stdin
    sys.argv, sys.stdin = [module.replace(".", "-").replace("_", "-"), *map(str, arguments)], io.StringIO(typed)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as stop:
        found = int(stop.code or 0)
    finally:
        sys.argv, sys.stdin = before
    assert code in (found, None), err.getvalue()
    return Done(out.getvalue(), err.getvalue(), found)


def forked(module: str, libraries: list[str], *arguments: object, said: Path | None = None, **more: str) -> BaseProcess:
    """Starts a command in a process of its own, forked from the server that `compare` uses too.

    Its errors go to the file `said`, if one is named.
    """
    start_server(None, libraries)
    process = multiprocessing.get_context("forkserver").Process(
        target=_run, args=(module, [*map(str, arguments)], more, said)
    )
    process.start()
    return process


def in_two_processes(
    module: str, libraries: list[str], *arguments: object, codes: tuple[int, int] = (0, 0), **more: str
) -> None:
    """Runs a command in two processes, which must end with `codes`; see `two_processes`."""
    ended_with(two_processes(module, libraries, *arguments, **more), codes)


def ended_with(processes: Sequence[BaseProcess], codes: Sequence[int]) -> None:
    """Waits for processes, which must end with `codes`."""
    for process in processes:
        process.join(240)
        if process.exitcode is None:
            process.kill()
    assert [process.exitcode for process in processes] == [*codes]


def two_processes(module: str, libraries: list[str], *arguments: object, **more: str) -> list[BaseProcess]:
    """Starts a command in two processes that find each other as those of torchrun do.

    They are forked from the server that `compare` uses: importing everything in both would take half a minute. That
    torchrun itself starts them is for the core's own tests.
    """
    both = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(),
            "ACCELERATE_USE_CPU": "true"} | more  # fmt: skip
    own: list[dict[str, Any]] = [both | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    return [forked(module, libraries, *arguments, **variables) for variables in own]


def launch_values(file: Path) -> dict[str, Any]:
    """What a launch configuration says, which must be what Accelerate knows, under a comment on when to use it."""
    text = file.read_text()
    assert text.startswith("# "), "a comment says when to use it"
    values: dict[str, Any] = yaml.safe_load(text)
    assert values.keys() <= ClusterConfig.__dataclass_fields__.keys()
    return values


def with_deepspeed(
    file: Path, folder: Path, module: str, libraries: list[str], *arguments: object, ranks: int = 1, code: int = 0
) -> None:
    """Runs a command under a DeepSpeed configuration, in `ranks` processes on a CPU, in which nothing is imported anew.

    Its environment is that in which `accelerate launch` would start it; that this does is for tests/test_gpu_benchmarks.py.
    """
    asked = launch_command_parser().parse_args(["--config_file", str(one_cpu(file, folder)), "train.py"])
    launch, defaults, _ = _validate_launch_command(asked)
    launch.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    _, variables = prepare_deepspeed_cmd_env(launch)
    # No LOCAL_WORLD_SIZE: several processes of a machine without a GPU would be refused.
    each = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "DS_ACCELERATOR": "cpu",
            "XDG_CACHE_HOME": str(folder)}  # fmt: skip
    own: list[dict[str, Any]] = [
        variables | each | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)
    ]
    ended_with([forked(module, libraries, *arguments, **one) for one in own], [code] * ranks)


def _run(module: str, arguments: list[str], more: dict[str, str], said: Path | None) -> None:
    gc.freeze()  # as a comparison does it
    stop_as_usual()
    os.environ.update(more)
    if FORCED in os.environ:
        force_fsdp()
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        force_deepspeed()
    if said is not None:
        sys.stderr = said.open("w")
    torch.set_num_threads(1)  # as in the other processes: the same bytes need the same threads
    sys.argv = [module, *arguments]
    command_of(module)()


def command(*arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
    """Runs `python -m …` as a user does."""
    done = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        env=os.environ | more, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


def losses(run: Path) -> list[float]:
    """The training loss of each step."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def one_cpu(config: Path, folder: Path) -> Path:
    """A launch configuration for one process on a CPU."""
    local = folder / config.name
    values = yaml.safe_load(config.read_text()) | {"num_processes": 1, "use_cpu": True}
    local.write_text(yaml.safe_dump(values))
    return local


def free_port() -> str:
    """A port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def real_data(name: str) -> Path:
    """A directory of real data that some tests read; they are skipped on a machine that does not have it."""
    folder = REAL_DATA / name
    if not folder.is_dir():
        pytest.skip(f"no real data here (looked for ../shared/data/{name})")
    return folder


def first_rows(tables: Path, folder: Path, count: int) -> Path:
    """Writes the first rows of each parquet file: every picture of them is checked, also those that --limit leaves out."""
    for file in tables.glob("*.parquet"):
        parquet.write_table(parquet.read_table(file).slice(0, count), folder / file.name)
    return folder
