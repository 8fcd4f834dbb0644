"""Everything that a training loop needs around the loss; the loop itself stays in the lab.

```
loop = Loop(run, accelerator, model, optimizer, source, options)
for batch in loop.batches():
    loss = model(**batch)
    loop.step(loss, count=tokens)
    if loop.evaluation_due:
        loop.evaluated({"validation/loss": ...}, watch="validation/loss")
```
"""

import contextlib
import math
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from labs_common.checkpoint import Stateful, checkpoints, load_checkpoint, save_checkpoint
from labs_common.cli import STOPPING, is_ignored
from labs_common.errors import Interrupted, LabError, RunStopped
from labs_common.options import Precision, Schedule, TrainingOptions
from labs_common.progress import ProgressLine, console
from labs_common.run import Run
from labs_common.sharding import check_sharding
from labs_common.steps import Source


def learning_rate_share(step: int, total: int, warmup: float, schedule: Schedule) -> float:
    """Returns the share of the highest learning rate that optimizer step `step` (from 0) of `total` uses.

    It rises linearly over the first `warmup` share of the steps, then stays, falls linearly to zero, falls along half
    a cosine (Loshchilov & Hutter 2017, eq. 5, one cycle), or falls in steps: to a tenth after two thirds of all and
    to a hundredth after eleven twelfths, as detectors do after 8 and 11 of 12 epochs.
    """
    rise = round(warmup * total)
    if step < rise:
        return (step + 1) / (rise + 1)
    fallen = (step - rise) / max(1, total - rise)
    if schedule == "steps":
        return 0.1 ** ((3 * step >= 2 * total) + (12 * step >= 11 * total))
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * fallen))
    return 1 - fallen if schedule == "linear" else 1.0


def total_steps(options: TrainingOptions, source: Source) -> int:
    """Counts the optimizer steps of a whole run."""
    total = options.epochs * len(source)
    return total if options.max_steps is None else min(total, options.max_steps)


# The least and the most of each number of a training; None stands for no limit.
RANGES: dict[str, tuple[float, float | None]] = {
    "epochs": (1, None),
    "max_steps": (1, None),
    "batch_size": (1, None),
    "learning_rate": (0, None),
    "warmup": (0, 1),
    "weight_decay": (0, None),
    "clip_norm": (0, None),
    "evaluate_every": (0, None),
    "patience": (0, None),
    "save_every": (1, None),
    "keep": (1, None),
}


def check_training_options(options: TrainingOptions) -> None:
    """Makes sure that each number can be worked with.

    Raises:
        LabError: one is out of its range, or is no number; the message names the option.
    """
    for name, (least, most) in RANGES.items():
        value = getattr(options, name)
        if value is None:  # --max-steps, which is not asked for
            continue
        if not (math.isfinite(value) and least <= value and (most is None or value <= most)):
            said = f"at least {least}" if most is None else f"between {least} and {most}"
            raise LabError(f"--{name.replace('_', '-')} {value}: must be {said}")


def make_accelerator(options: TrainingOptions) -> Accelerator:
    """Makes an Accelerator for the process layout that the launcher set up, with the wanted precision.

    Raises:
        LabError: the machine cannot compute in that precision, or the launch shards in a way that is not supported.
    """
    precision = mixed_precision(options.precision)
    if precision == "fp16" and not torch.cuda.is_available():
        raise LabError("--precision fp16: needs a GPU; use bf16 or fp32 here")
    accelerator = Accelerator(mixed_precision=precision)
    check_sharding(accelerator)
    if accelerator.state.deepspeed_plugin is not None:
        # Micro-batches come ready-made, and clipping happens inside DeepSpeed's own step.
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"] = 1
        config["gradient_clipping"] = options.clip_norm
    return accelerator


def mixed_precision(precision: Precision) -> str:
    """Returns Accelerate's name for `--precision`; auto is bf16 on a GPU that computes in it, else none."""
    if precision == "auto":
        return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"
    return "no" if precision == "fp32" else precision


def peak_memory() -> int:
    """Returns the most bytes that the GPU's allocator held; on a CPU, the largest resident set of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # getrusage there also counts what the program that started this one held
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Counts the bytes that the optimizer keeps in this process (AdamW: two moments for each trained value)."""
    kept = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in kept)


def training_means(run: Run, unit: str, names: Sequence[str]) -> dict[str, float]:
    """Averages metrics of the steps since the last evaluation, weighted by their `unit`s, from metrics.jsonl.

    Returns {"training/NAME": mean}; nothing in other processes than the main one, or if there was no step.
    """
    counts: list[float] = []
    values: list[list[float]] = []
    before = 0
    for line in run.lines("metrics.jsonl") if run.is_main else ():
        if "loss" not in line:
            counts, values = [], []
        else:
            counts.append(line[unit] - before)
            values.append([line[name] for name in names])
            before = line[unit]
    if not sum(counts):
        return {}
    columns = zip(names, zip(*values, strict=True), strict=True)
    return {
        f"training/{name}": sum(count * value for count, value in zip(counts, column, strict=True)) / sum(counts)
        for name, column in columns
    }


class Loop:
    """Optimizer steps with accumulation, clipping, schedule, progress, checkpoints, resume and early stopping.

    Losses: `step` receives this micro-batch's share of the step's loss, such that the shares add up within
    a process and average over processes.

    Attributes:
        step_number: optimizer steps done so far, over all epochs.
        total: optimizer steps of the whole run.
        evaluation_due: whether the step that just ended should be followed by an evaluation.
    """

    def __init__(
        self,
        run: Run,
        accelerator: Accelerator,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        source: Source,
        options: TrainingOptions,
        seed: int = 0,
        unit: str = "samples",
        also: Stateful | None = None,
    ) -> None:
        """Model and optimizer as `accelerator.prepare` returned them; `unit` names what `step` counts.

        `also` is saved and resumed with them.

        Raises:
            LabError: the run is being resumed and its checkpoint cannot be read.
        """
        self.run, self.accelerator, self.model, self.optimizer = run, accelerator, model, optimizer
        self.source, self.options, self.unit, self.also = source, options, unit, also
        self.total = total_steps(options, source)
        self.step_number = 0
        self.count = 0  # tokens or samples so far, over all processes
        self.evaluation_due = False
        self._best: dict[str, float] = {}  # the best watched score, its step, and evaluations waited since
        self._rates = [group["lr"] for group in optimizer.param_groups]
        self._signal = 0  # the number of the signal that this process received
        self._stop = 0  # the signal that any process received, agreed on with each step
        self._share: dict[str, float] = {}  # loss, count and further metrics of the open step, this process
        self._closing = False
        set_seed(seed, device_specific=True)
        if run.resumed:
            if saved := checkpoints(run.path / "checkpoints"):
                position = load_checkpoint(saved[-1], accelerator, model, optimizer, also)
                self.step_number, self.count, self._best = position["step"], position["count"], position["best"]
            # Killed before its first checkpoint it starts anew, with the evaluation before the first step.
            run.rewind(self.step_number if saved else -1)

    def batches(self) -> Iterator[Any]:
        """Yields this process's micro-batches, from where a resumed run stopped, until the run is over.

        Raises:
            RunStopped: the loss or its gradient is not a number.
            Interrupted: one of the signals `STOPPING`; the step under way was finished and saved.
        """
        length = len(self.source)
        shown = self.accelerator.is_main_process
        with _signals(self):
            with ProgressLine("training", self.total, self.step_number, shown) as self._line:
                self._clock = time.perf_counter()
                while self.step_number < self.total and not self._patience_is_over():
                    epoch, start = divmod(self.step_number, length)
                    for micro_batches in self.source.steps(epoch, start):
                        yield from self._micro_batches(micro_batches)
                        self._save_if_due()
                        if self.step_number >= self.total or self._patience_is_over():
                            break
            if self._signal:
                self._stop_interrupted(self._signal)
        if self._best:
            load_checkpoint(self._best_path(), self.accelerator, self.model, self.optimizer, self.also)

    def step(self, loss: torch.Tensor, count: int, **metrics: float) -> None:
        """Back-propagates a micro-batch's share of the loss; with the last one, moves the weights.

        `count` is the number of samples or tokens of this micro-batch in this process. `metrics` are this
        micro-batch's shares of other means (an accuracy); they are added up as the loss is, and logged.
        """
        for name, value in {"loss": float(loss.detach()), "count": count, **metrics}.items():
            self._share[name] = self._share.get(name, 0.0) + value
        if not self._closing:
            self.accelerator.backward(loss)
            return
        rate = self._set_learning_rate()
        means, count_all, stop = self._over_processes()
        value = means["loss"]
        if not math.isfinite(value):
            self._stop_not_finite("the loss", value)
        self.accelerator.backward(loss)
        norm = self._clipped_norm()
        if not math.isfinite(norm) and self.accelerator.scaler is None:
            self._stop_not_finite("the gradient's norm", norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._stop = stop
        self.step_number += 1
        self.count += count_all
        self._share = {}
        self.evaluation_due = self._is_evaluation_step()
        self._log(means, rate, norm, count_all)

    def evaluated(self, metrics: dict[str, float], watch: str | None = None, higher_is_better: bool = False) -> None:
        """Logs an evaluation and, with `--patience`, keeps the weights if `watch` is the best so far."""
        self.run.append("metrics.jsonl", {"step": self.step_number, **metrics})
        self.accelerator.log(metrics, step=self.step_number)
        if self.accelerator.is_main_process:
            said = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            console.print(f"step {self.step_number}: {said}")
        if watch is not None and self.options.patience:
            score = -metrics[watch] if higher_is_better else metrics[watch]
            if not self._best or score < self._best["score"]:
                self._best = {"score": score, "step": self.step_number, "waited": 0}
                self._save(self._best_path())
            else:
                self._best["waited"] += 1
        self.evaluation_due = False
        self._clock = time.perf_counter()

    def _micro_batches(self, micro_batches: list[Any]) -> Iterator[Any]:
        before = self.step_number
        for place, batch in enumerate(micro_batches, 1):
            self._closing = place == len(micro_batches)
            self.accelerator.sync_gradients = self._closing
            with contextlib.nullcontext() if self._closing else self.accelerator.no_sync(self.model):
                yield batch
        if self.step_number == before:
            raise AssertionError("the training loop did not call Loop.step for every batch")

    def _set_learning_rate(self) -> float:
        share = learning_rate_share(self.step_number, self.total, self.options.warmup, self.options.schedule)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * share
        return self.options.learning_rate * share

    def _over_processes(self) -> tuple[dict[str, float], int, int]:
        """Brings loss and metrics (mean), count (sum) and the signal (any) together over all processes."""
        mine = torch.tensor([*self._share.values(), float(self._signal)], dtype=torch.float64)
        if self.accelerator.num_processes == 1:
            everyone = mine.unsqueeze(0)
        else:
            gathered = self.accelerator.gather(mine.to(self.accelerator.device)[None])
            everyone = gathered.cpu()
        means = dict(zip(self._share, everyone.mean(0).tolist(), strict=False))
        del means["count"]
        return means, int(everyone[:, 1].sum()), int(everyone[:, -1].max())

    def _clipped_norm(self) -> float:
        limit = self.options.clip_norm or math.inf
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        norm = self.accelerator.clip_grad_norm_(parameters, limit)
        if norm is None:  # DeepSpeed has clipped already, inside its own step
            return 0.0
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP: a DTensor
        return float(norm)

    def _is_evaluation_step(self) -> bool:
        every = self.options.evaluate_every or len(self.source)
        return self.step_number % every == 0 or self.step_number == self.total

    def _log(self, means: dict[str, float], rate: float, norm: float, count: int) -> None:
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        finite_norm = norm if math.isfinite(norm) else None  # fp16: the step was skipped and the scale halved
        metrics = {**means, "learning_rate": rate, "gradient_norm": finite_norm, self.unit: self.count}
        self.run.append(
            "metrics.jsonl",
            {"step": self.step_number, "epoch": self.step_number / len(self.source), **metrics},
        )
        timing = {
            "seconds": seconds,
            f"{self.unit}_per_second": count / seconds,
            "peak_memory": peak_memory(),
        }
        self.run.append("timing.jsonl", {"step": self.step_number, self.unit: count, **timing})
        shown = {name: value for name, value in (metrics | timing).items() if value is not None}
        self.accelerator.log(shown, step=self.step_number)
        self._line.advance(f"loss {means['loss']:.3f}  lr {rate:.1e}  {count / seconds:,.0f} {self.unit}/s")

    def _save_if_due(self) -> None:
        if self._stop or self.step_number == self.total or self.step_number % self.options.save_every == 0:
            self._save(self.run.path / "checkpoints" / f"step-{self.step_number:08d}")
            self._clock = time.perf_counter()
        if self._stop:
            self._stop_interrupted(self._stop)

    def _save(self, path: Path) -> None:
        position = {"step": self.step_number, "count": self.count, "best": self._best}
        save_checkpoint(path, self.accelerator, self.model, self.optimizer, position, self.also)
        if self.accelerator.is_main_process:
            old_best = [best for best in path.parent.glob("best-*") if best != self._best_path()]
            for old in [*checkpoints(path.parent)[: -self.options.keep], *old_best]:
                shutil.rmtree(old)

    def _best_path(self) -> Path:
        return self.run.path / "checkpoints" / f"best-{self._best.get('step', 0):08d}"

    def _patience_is_over(self) -> bool:
        return bool(self.options.patience and self._best and self._best["waited"] >= self.options.patience)

    def _stop_interrupted(self, number: int) -> NoReturn:
        raise Interrupted(
            f"{signal.Signals(number).name} after step {self.step_number}; everything is saved: "
            f"go on with --resume {self.run.path}"
        )

    def _stop_not_finite(self, what: str, value: float) -> NoReturn:
        saved = checkpoints(self.run.path / "checkpoints")
        kept = f"the last good checkpoint is {saved[-1]}" if saved else "no checkpoint was due yet"
        raise RunStopped(
            f"{what} became {value} at step {self.step_number + 1} ({kept}); "
            "try a lower --learning-rate, a longer --warmup or --clip-norm 1"
        )


@contextlib.contextmanager
def _signals(loop: Loop) -> Iterator[None]:
    """Lets the signals `STOPPING` only leave a note; the loop stops after the step.

    One more stops at once if a second has passed: a launcher passes on what its group has already received.
    """
    noted = 0.0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal noted
        if not loop._signal:
            loop._signal, noted = number, time.monotonic()
        elif time.monotonic() - noted > 1:
            signal.signal(number, before[number])
            signal.raise_signal(number)

    before: dict[int, Any] = {number: signal.getsignal(number) for number in STOPPING if not is_ignored(number)}
    try:
        for number in before:
            signal.signal(number, note)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
