"""A training command with a small finished run, and how it is started, watched and killed."""

import os
import random
import signal
import time
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from labs_common.checkpoint import checkpoints
from labs_common.run import Run
from labs_testing.commands import Done, forked, here, losses
from labs_testing.pretended_runs import Budget


@dataclass
class Otherwise:
    """The same training run in another way: more options, and how near it comes (None: is not compared)."""

    options: tuple[object, ...] = ()
    losses: float = 1e-4
    weights: float | None = 1e-3
    same: tuple[str, ...] = ()
    first: float | None = None
    """If given, only the first step's loss is compared, with this relative tolerance: the others depend on chance."""


@dataclass
class Training:
    """A training command, and a whole small run of it that was made in this process."""

    module: str
    libraries: list[str]
    options: tuple[object, ...]
    whole: Path
    weights: str
    """The file of weights in a run."""
    same: tuple[str, ...] = ()
    """Further files of a run that are the same bytes in each."""
    frozen: tuple[object, ...] | None = ()
    """Options under which something is frozen; None if there are none."""
    two: Otherwise = field(default_factory=Otherwise)
    launch: Path | None = None
    """The directory of launch configurations."""
    zero: tuple[object, ...] | None = None
    """More options under a ZeRO configuration."""
    zero_stage: int = 2
    sharded: Otherwise | None = None
    """Under launch/fsdp.yaml."""
    planned: bool = False
    """Whether the command has --plan and prints the peak of its batch."""
    gpu: Budget = field(kw_only=True)
    """The most that a step may do on a GPU."""

    def here(self, *arguments: object, code: int | None = 0) -> Done:
        """Runs the command in this process."""
        return here(self.module, *arguments, code=code)

    def assert_same(self, run: Path) -> None:
        """The run has the very bytes of the whole one."""
        for name in ("metrics.jsonl", self.weights, *self.same):
            assert (run / name).read_bytes() == (self.whole / name).read_bytes(), name

    def assert_near(self, run: Path, how: Otherwise) -> None:
        """The run comes as near to the whole one as `how` says."""
        if how.first is not None:
            assert losses(run)[0] == pytest.approx(losses(self.whole)[0], rel=how.first)
        else:
            assert losses(run) == pytest.approx(losses(self.whole), abs=how.losses)
        if how.weights is not None:
            expected = load_file(self.whole / self.weights)
            for name, tensor in load_file(run / self.weights).items():
                torch.testing.assert_close(tensor, expected[name], atol=how.weights, rtol=0)
        for name in how.same:
            assert (run / name).read_bytes() == (self.whole / name).read_bytes(), name


def killed_and_resumed(training: Training, folder: Path, kills: int) -> Path:
    """`kills` times SIGKILL at random steps, then Ctrl-C, and then the run may end; returns its directory."""
    chance, last = random.Random(), step_of(training.whole)
    run, killed, ended = folder / "killed-0", 0, 0
    while killed < kills:
        done = step_of(checkpoint) if (checkpoint := newest(run)) else 0
        wanted = chance.randint(min(done + 1, last - 1), last - 1)
        process = started(training, run)
        if reaches(process, run, wanted):
            time.sleep(chance.random() / 20)
            process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        if process.exitcode == 0:  # it was too fast: again, from the beginning
            ended += 1
            run = folder / f"killed-{ended}"
        assert process.exitcode in (0, -signal.SIGKILL)
        assert ended < 10, "it always ends before it can be killed"
    said = folder / "said.txt"
    process = started(training, run, said)
    checkpoint = newest(run)
    if reaches(process, run, min(last - 1, step_of(checkpoint) + 1 if checkpoint else 1)):
        assert process.pid is not None
        os.kill(process.pid, signal.SIGINT)
    process.join()
    if process.exitcode:
        assert process.exitcode == 130, said.read_text()
        assert f"--resume {run}" in said.read_text().splitlines()[-1]
        training.here("--resume", run, "--no-report")
    assert not list((run / "checkpoints").glob(".*")), "no half-written checkpoint is left"
    return run


def step_of(path: Path) -> int:
    """The last step of a run, or that of a checkpoint."""
    if path.name.startswith("step-"):
        return int(path.name.removeprefix("step-"))
    return max((line["step"] for line in Run(path).lines("metrics.jsonl")), default=0)


def newest(run: Path) -> Path | None:
    """The newest checkpoint."""
    return next(reversed(checkpoints(run / "checkpoints")), None)


def started(training: Training, run: Path, said: Path | None = None) -> BaseProcess:
    """The process that begins the run, or goes on with it."""
    begun = (run / "config.yaml").exists()
    asked = ("--resume", run) if begun else (*training.options, "--save-every", 2, "--output", run)
    return forked(training.module, training.libraries, *asked, "--no-report", said=said)


def reaches(process: BaseProcess, run: Path, step: int) -> bool:
    """Waits until the process has done `step`; False if it ended before."""
    file = run / "metrics.jsonl"
    before = file.stat().st_ino if file.exists() else None  # a resumed run writes the file anew
    for _ in range(24_000):
        if not process.is_alive():
            return False
        if file.exists() and file.stat().st_ino != before and step_of(run) >= step:
            return True
        time.sleep(0.005)
    raise AssertionError(f"{run} never reached step {step}")
