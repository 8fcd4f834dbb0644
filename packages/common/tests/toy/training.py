"""A small training run, started by the tests as a process of its own so that it can be killed."""

import copy
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from labs_common.fitting import Fitting, begin
from labs_common.frozen.audit import train_only
from labs_common.options import RunOptions, TrainingOptions
from labs_common.run import Run


@dataclass
class ToyConfig:
    training: TrainingOptions = field(default_factory=TrainingOptions)
    run: RunOptions = field(default_factory=RunOptions)
    seconds_per_step: float = 0.0
    dropout: float = 0.2
    nan_at: int = -1
    signal_at: int = -1
    signal_number: int = int(signal.SIGINT)
    move_frozen: bool = False
    micro_batches: int = 2
    remembers: bool = False
    keep_best: bool = False
    seeded_bug: Literal["", "left on the CPU", "waits in each step"] = ""


@dataclass
class ToyData:
    """Random regression; each step has `micro_batches` parts for each process."""

    micro_batches: int
    rank: int
    processes: int

    def __len__(self) -> int:
        return 10

    def steps(self, epoch: int, start: int) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
        for step in range(start, len(self)):
            generator = torch.Generator().manual_seed(1000 * epoch + step)
            x = torch.randn(8, 4, generator=generator)
            y = x.sum(1, keepdim=True)
            mine = zip(x[self.rank :: self.processes].chunk(self.micro_batches),
                       y[self.rank :: self.processes].chunk(self.micro_batches), strict=True)  # fmt: skip
            yield list(mine)


class Memory:
    """What self-supervised methods remember: a teacher that follows (BYOL, DINO) and a queue of its outputs (MoCo)."""

    def __init__(self, head: torch.nn.Module) -> None:
        self.teacher, self.queue = copy.deepcopy(head), torch.zeros(24)

    def state_dict(self) -> dict[str, Any]:
        return {"teacher": self.teacher.state_dict(), "queue": self.queue}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.teacher.load_state_dict(state["teacher"])
        self.queue = state["queue"]

    @torch.no_grad()
    def targets(self, features: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.teacher(features)
        self.queue = torch.cat([found.flatten(), self.queue])[:24]
        return found + self.queue.mean()

    @torch.no_grad()
    def follow(self, head: torch.nn.Module) -> None:
        for mine, learnt in zip(self.teacher.parameters(), head.parameters(), strict=True):
            mine.lerp_(learnt, 0.1)


def train(config: ToyConfig) -> None:
    accelerator = begin(config.run, config.training)
    run = Run.start(config, config.run, "toy", accelerator)
    torch.manual_seed(config.run.seed)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 16),
        torch.nn.Dropout(config.dropout),
        torch.nn.BatchNorm1d(16, affine=False),
        torch.nn.Linear(16, 1),
    )
    train_only(model, lambda name: name.startswith("3."))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=config.training.learning_rate)
    source = ToyData(config.micro_batches, accelerator.process_index, accelerator.num_processes)
    memory = Memory(model[3]) if config.remembers else None
    fitting = Fitting.start(
        run, accelerator, model, optimizer, source, config.training, config.run.seed, "samples", memory
    )
    loop = fitting.loop
    model[2].eval()
    if loop.step_number == 0:
        loop.evaluated({"validation/loss": 9.0})
    for x, y in loop.batches():
        time.sleep(config.seconds_per_step)
        share = len(x) / 8 * accelerator.num_processes
        if config.seeded_bug != "left on the CPU":
            x, y = x.to(accelerator.device), y.to(accelerator.device)
        if memory is not None:
            y = y + 0.1 * memory.targets(model[:3](x))
        loss = ((fitting.model(x) - y) ** 2).mean() * share
        if config.seeded_bug == "waits in each step":
            loss = loss + 0 * loss.item()
        if loop.step_number == config.nan_at:
            loss = loss * float("nan")
        if loop.step_number == config.signal_at and config.run.resume is None:
            config.signal_at = -1  # once: the second one would not wait for the step
            signal.raise_signal(config.signal_number)
        loop.step(loss, len(x))
        if memory is not None:
            memory.follow(model[3])
        if config.move_frozen:
            with torch.no_grad():
                model[0].bias += 1
        if loop.evaluation_due:
            with torch.no_grad():
                model[1].eval()  # draws nothing
                fitting.model(x)  # as an evaluation does: it leaves the root of a sharded model whole
                model[1].train()
                weight = model[3].weight
                weight = weight.full_tensor() if hasattr(weight, "full_tensor") else weight  # sharded by FSDP
                weight = float(weight.double().sum())
            loop.evaluated({"validation/loss": abs(weight - 1)}, watch="validation/loss", keep_best=config.keep_best)
    fitted = fitting.finish(lambda state: save_file(state, run.path / "model.safetensors"))
    run.save_json("results.json", {"done": True, "trained": fitted.trained, "parameters": fitted.parameters})


if __name__ == "__main__":
    from toy import commands

    commands.training()
