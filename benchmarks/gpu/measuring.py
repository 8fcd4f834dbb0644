"""What a measurement's own process does: its rows are written one by one, so that whatever stops it leaves them."""

import gc
import importlib
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from benchmarks.gpu.parts import Measurement
from benchmarks.gpu.rows import ROOT, Record, Row

from labs_common.cli import command_of
from labs_common.compare.processes import stop_as_usual
from labs_common.errors import reason_of

VERSIONS = (
    "torch", "transformers", "accelerate", "peft", "trl", "timm", "open_clip_torch", "lightly", "deepspeed",
    "bitsandbytes", "liger_kernel",
)  # fmt: skip
INTERRUPTED = 130


class Skipped(Exception):
    """This machine lacks something that the measurement needs; the message says what."""


class Stopped(Exception):
    """The measurement was asked to end and has saved what it did; the next start goes on."""


@dataclass(frozen=True)
class Setting:
    """What every measurement gets.

    Attributes:
        tiny: sizes that a CPU does in seconds.
        work: a directory that is there for the next start too.
        cifar: CIFAR-10, or None.
        facts: see `machine`.
    """

    tiny: bool
    work: Path
    cifar: Path | None
    facts: dict[str, Any]


Measure = Callable[..., Iterator[Row]]


def machine() -> dict[str, Any]:
    """Describes device, versions and commit, after the device has computed something."""
    device = f"CPU, {os.cpu_count()} cores, {platform.machine()}"
    if torch.cuda.is_available():
        assert float(torch.ones(2, device="cuda").sum()) == 2
        device = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return {"device": device, "versions": {name: _version(name) for name in VERSIONS},
            "commit": found.stdout.strip() or None}  # fmt: skip


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def measure(part: str, measurement: Measurement, setting: Setting, file: Path) -> None:
    """Runs a measurement in this process and keeps its file up to date; what it prints goes to a log beside the file.

    Failures are recorded, not raised: the other measurements go on.
    """
    gc.freeze()  # every training collects garbage at its end; it need not go through all that the server imported
    os.setsid()  # what it starts is stopped with it
    stop_as_usual()
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_suffix(".log").open("w", encoding="utf-8") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    facts, began = setting.facts, time.perf_counter()
    record = Record(part, measurement.name, device=facts["device"], tiny=setting.tiny)
    record.write(file)
    folder = setting.work / file.parent.name / file.stem
    if not measurement.long:  # which goes on with what it did
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    # The labs' cache is of this measurement alone; what DeepSpeed compiles, a minute's work, is not.
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path.home() / ".cache" / "torch_extensions"))
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    module, _, function = measurement.target.partition(":")
    try:
        work: Measure = getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)
        for row in work(setting, folder, *measurement.arguments):
            row.seconds = record.seconds = round(time.perf_counter() - began, 1)
            row.device, row.versions, row.commit = facts["device"], facts["versions"], facts["commit"]
            record.rows.append(row)
            record.write(file)
        record.state = "done"
    except Skipped as error:
        record.state, record.message = "skipped", str(error)
    except (Stopped, KeyboardInterrupt) as error:
        record.state, record.message = "stopped", str(error) or "its time was up"
    except Exception as error:
        traceback.print_exc()
        record.state, record.message = "failed", _said(error, file.with_suffix(".log"))
    record.seconds = round(time.perf_counter() - began, 1)
    record.write(file)
    if record.state != "stopped":
        shutil.rmtree(folder, ignore_errors=True)


def _said(error: Exception, log: Path) -> str:
    """Returns what a command said of its end, or else the error's first line."""
    lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.startswith("error: ")]
    return lines[-1] if lines else f"{type(error).__name__}: {reason_of(error)}"


@dataclass
class Trouble:
    """What went wrong in another process."""

    said: str


def separate(work: Callable[..., Any], *arguments: Any) -> Any:
    """Runs `work` in a process forked from this one, so that its peak of memory is its own; returns what it returns.

    This process must not have used the device, nor have computed anything: threads of OpenMP do not survive a fork.

    Raises:
        RuntimeError: it failed; the message is the failure's.
    """
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sending, work, arguments))
    process.start()
    sending.close()
    try:
        answer = receiving.recv()
    except EOFError:
        answer = None
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{_name(work)}: its process ended with code {process.exitcode}")
    if isinstance(answer, Trouble):
        raise RuntimeError(answer.said)
    return answer


def _answer(sending: Any, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    gc.freeze()  # as above
    try:
        sending.send(work(*arguments))
    except Exception as error:
        traceback.print_exc()
        sending.send(
            Trouble(
                reason_of(error) if isinstance(error, RuntimeError) else f"{type(error).__name__}: {reason_of(error)}"
            )
        )


def _name(work: Callable[..., Any]) -> str:
    return getattr(work, "__name__", type(work).__name__)


def command(module: str, *arguments: object) -> None:
    """Runs `python -m MODULE` in this process.

    Raises:
        RuntimeError: it did not end well; its own line is in the log.
        Stopped: it was interrupted and saved what it had.
    """
    sys.argv = [f"python -m {module}", *map(str, arguments)]
    try:
        command_of(module)()
    except SystemExit as end:
        if end.code == INTERRUPTED:
            raise Stopped(f"{module} was interrupted and has saved itself") from None
        if end.code:
            raise RuntimeError(f"{module} ended with code {end.code}; see the log") from None


def wait_for_device() -> None:
    """Returns when the device has done everything."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def clock() -> float:
    """Returns seconds, after the device has done everything."""
    wait_for_device()
    return time.perf_counter()
