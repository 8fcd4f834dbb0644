"""Runs a lab's commands on a pretended GPU, and counts what each optimizer step did there.

```
train, again = on_pretended_gpu(["clip_lab.train"], folder, Asked("clip_lab.train", ...), Asked("clip_lab.probe", ...))
assert_within(train, Budget(operators=900, syncs=5, copies=4))
```
"""

import gc
import io
import json
import multiprocessing
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from labs_common.cli import command_of
from labs_common.compare import processes
from labs_common.compare.processes import start_server, stop_as_usual
from labs_common.training import Loop
from labs_testing.pretended import Gpu, pretended_gpu

COUNTS = ("operators", "syncs", "copies")


@dataclass
class Budget:
    """The most that a step of a training may do on a GPU: a limit for regressions, measured and a little more."""

    operators: int
    syncs: int
    copies: int


@dataclass
class Asked:
    """A command."""

    module: str
    arguments: tuple[object, ...]
    typed: str = ""


@dataclass
class Ran:
    """What a command did on the device."""

    stdout: str
    stderr: str
    peak: int
    """Bytes."""
    seconds: float = 0.0
    """Of one core."""
    products: dict[str, int] = field(default_factory=dict)
    """Matrix products and convolutions by their precision."""
    steps: list[dict[str, dict[str, int]]] = field(default_factory=list)
    """Of each optimizer step but the first and those after an evaluation or a checkpoint: operators by name, syncs and
    copies by line."""


def assert_within(ran: Ran, budget: Budget) -> None:
    """No step did more than the budget allows; if one did, the lines are shown that did it."""
    assert ran.steps, "no step was counted: give the training more steps between evaluations and checkpoints"
    for name in COUNTS:
        worst = max((step[name] for step in ran.steps), key=lambda counts: sum(counts.values()))
        total, most = sum(worst.values()), getattr(budget, name)
        lines = "\n".join(f"{count:6} {line}" for line, count in Counter(worst).most_common(30))
        assert total <= most, f"{total} {name} in a step; the budget is {most}:\n{lines}"


def assert_in_bf16(*ran: Ran) -> None:
    """Most products of each command are computed in bf16: not the scores of a detector, nor the state of an LSTM."""
    for one in ran:
        total = sum(one.products.values())
        assert one.products.get("torch.bfloat16", 0) > 0.7 * total > 0, one.products


def on_pretended_gpu(libraries: list[str], folder: Path, *asked: Asked) -> list[Ran]:
    """Runs commands one after the other in one process, which is forked from the server that `compare` uses too.

    A comparison's runs are run in it too. `folder` keeps what was said. The process is one of its own because torch is
    patched in all of it.
    """
    start_server(None, libraries)
    folder.mkdir(parents=True, exist_ok=True)
    process = multiprocessing.get_context("forkserver").Process(target=_run, args=(asked, folder))
    process.start()
    process.join(600)
    if process.exitcode is None:
        process.kill()
    failed = folder / "failed.txt"
    assert process.exitcode == 0, failed.read_text() if failed.exists() else f"ended with {process.exitcode}"
    return [Ran(**ran) for ran in json.loads((folder / "ran.json").read_text())]


def _run(asked: tuple[Asked, ...], folder: Path) -> None:
    gc.freeze()
    stop_as_usual()
    torch.set_num_threads(1)  # as in the other processes: the same bytes need the same threads
    ran = []
    with pretended_gpu() as gpu, pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "_forked", _compared)
        patch.setattr(processes.forkserver, "ensure_running", lambda: None)
        for one in asked:
            out, errors = sys.stdout, sys.stderr = io.StringIO(), io.StringIO()
            sys.argv, sys.stdin = [one.module, *map(str, one.arguments)], io.StringIO(one.typed)
            gpu.peak, start = gpu.allocated, time.process_time()
            gpu.products.clear()
            try:
                with counted_steps(gpu) as steps:
                    command_of(one.module)()
            except BaseException:
                said = (" ".join(sys.argv), errors.getvalue(), traceback.format_exc())
                (folder / "failed.txt").write_text("\n".join(said))
                raise
            AcceleratorState._reset_state(reset_partial_state=True)
            seconds = time.process_time() - start
            ran.append(asdict(Ran(out.getvalue(), errors.getvalue(), gpu.peak, seconds, dict(gpu.products), steps)))
    (folder / "ran.json").write_text(json.dumps(ran))


def _compared(module: str, arguments: list[str]) -> int:
    """Does what a process of its own does, which has an Accelerator of its own.

    Without the run's report: that of each training command is made on the device by `TrainingPromises`.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    sys.argv = [f"python -m {module}", *arguments, "--no-report"]
    command_of(module)()
    AcceleratorState._reset_state(reset_partial_state=True)
    return 0


@contextmanager
def counted_steps(gpu: Gpu) -> Iterator[list[dict[str, dict[str, int]]]]:
    """Fills a list with what happened from the end of each step to that of the next: see `Ran.steps`."""
    steps: list[dict[str, dict[str, int]]] = []
    plain, before = Loop.step, dict[str, Counter[str]]()

    def step(loop: Loop, loss: torch.Tensor, count: int, **metrics: float) -> None:
        number = loop.step_number
        plain(loop, loss, count, **metrics)
        if loop.step_number == number:  # there are more micro-batches
            return
        now = {name: Counter(getattr(gpu, name)) for name in COUNTS}
        if before:
            steps.append({name: dict(now[name] - before[name]) for name in COUNTS})
        before.clear()
        if not loop.evaluation_due and loop.step_number % loop.options.save_every:
            before.update(now)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "step", step)
        yield steps
