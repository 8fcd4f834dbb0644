"""Everything that a training loop needs around the loss; the loop itself stays in the lab.

```
loop = Loop(run, accelerator, model, optimizer, source, options)
for batch in loop.batches():
    loop.step(model(**batch), count=tokens)
    if loop.evaluation_due:
        loop.evaluated({"validation/loss": ...}, watch="validation/loss")
```
"""

import contextlib
import datetime
import math
import shutil
import signal
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, set_seed

from labs_common.checkpoint import Stateful, best_checkpoints, checkpoints, load_checkpoint, save_checkpoint
from labs_common.cli import STOPPING, is_ignored
from labs_common.device import (
    Later,
    begin_fast_arithmetic,
    mixed_precision,
    on_gpu,
    peak_memory,
    reset_peak_memory,
    widest_float,
)
from labs_common.errors import Interrupted, LabError, RunStopped
from labs_common.options import Schedule, TrainingOptions
from labs_common.progress import ProgressLine, console
from labs_common.run import Run, cost_of
from labs_common.sharding import check_sharding
from labs_common.steps import Source

# Processes wait for what the main one does alone: reading all of COCO, scoring a test, writing a report. NCCL's own ten
# minutes would end a training that is done; a process that died is noticed by the launcher at once.
WAIT = datetime.timedelta(hours=4)
PLATEAU_FACTOR, PLATEAU_FLOOR = 0.6, 1e-7  # of --schedule plateau, the second a learning rate: arXiv 2110.05270


def learning_rate_share(step: int, total: int, warmup: float, schedule: Schedule, start: float = 0.0) -> float:
    """Returns the share of the highest learning rate that optimizer step `step` (from 0) of `total` uses.

    It rises linearly from `start` over the first `warmup` share of the steps, then stays, falls linearly to zero, falls
    along half a cosine (Loshchilov & Hutter 2017, eq. 5, one cycle), or falls in steps: to a tenth after two thirds of
    all and to a hundredth after eleven twelfths, as detectors do after 8 and 11 of 12 epochs.
    """
    rise = round(warmup * total)
    if step < rise:
        return start + (1 - start) * step / rise if start else (step + 1) / (rise + 1)
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


def identity(run: Run, options: TrainingOptions, source: Source) -> dict[str, Any]:
    """Returns what makes a run the one that it is; its checkpoints hold it, and it is compared on resume."""
    steps = {"steps": total_steps(options, source), "epoch": len(source)}
    return {"run": run.id, "options": run.options, "data": run.data, **steps}


def make_accelerator(options: TrainingOptions) -> Accelerator:
    """Makes an Accelerator for the process layout that the launcher set up, with the wanted precision.

    Raises:
        LabError: the machine cannot compute in that precision, or the launch shards in a way that is not supported.
    """
    precision = mixed_precision(options.precision)
    if precision == "fp16" and not on_gpu():
        raise LabError("--precision fp16: needs a GPU; use bf16 or fp32 here")
    patience = InitProcessGroupKwargs(timeout=WAIT)
    accelerator = Accelerator(mixed_precision=precision, kwargs_handlers=[patience])
    check_sharding(accelerator)
    begin_fast_arithmetic(accelerator.device)
    if accelerator.state.deepspeed_plugin is not None:
        # Micro-batches come ready-made, and clipping happens inside DeepSpeed's own step.
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"] = 1
        config["gradient_clipping"] = options.clip_norm
    return accelerator


@dataclass(frozen=True)
class _Sent:
    """A step whose figures are on their way from the device.

    Attributes:
        rate: its learning rate.
        names: of the loss and the further metrics.
        figures: (processes, these, the gradient's norm, count and signal of each process).
    """

    step: int
    rate: float
    names: list[str]
    figures: Later


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
        self._identity = identity(run, options, source)
        self.step_number = self.count = 0  # so far: steps; and tokens or samples, over all processes
        self.evaluation_due = False
        self._best: dict[str, float] = {}  # the watched score, its step if kept, evaluations since, all worse ones
        self._rates = [group["lr"] for group in optimizer.param_groups]
        self._signal = 0  # the number of the signal that this process received
        self._stop = 0  # the signal that any process received, agreed on with the figures of each step
        self._share: dict[str, torch.Tensor | float] = {}  # loss and further metrics of the open step, this process
        self._own_count = 0  # of the open step, this process
        self._sent: deque[_Sent] = deque()  # steps whose figures have not been read yet, oldest first
        # A GPU's newest step is not waited for: it would have nothing to do until the next one is asked of it.
        self._kept = 1 if accelerator.device.type == "cuda" else 0
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._closing = False
        set_seed(seed, device_specific=True)
        if run.resumed:
            if saved := checkpoints(run.path / "checkpoints"):
                position = load_checkpoint(saved[-1], accelerator, model, optimizer, also)
                self.step_number, self.count, self._best = position["step"], position["count"], position["best"]
                # In all processes, so that none is left waiting; and now, not after all the training.
                run.check_records(self.step_number, position.get("metrics"))  # no sum in those of earlier versions
                cost_of(run, unit)
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
                reset_peak_memory()
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
        if "step" in self._best:
            load_checkpoint(self._best_path(), self.accelerator, self.model, self.optimizer, self.also)

    def step(self, loss: torch.Tensor, count: int, **metrics: torch.Tensor | float) -> None:
        """Back-propagates a micro-batch's share of the loss; with the last one, moves the weights.

        `count` is the number of samples or tokens of this micro-batch in this process. `metrics` are this
        micro-batch's shares of other means (an accuracy), best as tensors on the device, which is not waited for; they
        are added up as the loss is, and logged. A loss that is no number is found when the figures are read: at the
        latest before an evaluation and before anything is saved.
        """
        for name, value in {"loss": loss, **metrics}.items():
            value = value.detach() if isinstance(value, torch.Tensor) else value
            self._share[name] = self._share[name] + value if name in self._share else value
        self._own_count += count
        if not self._closing:
            self.accelerator.backward(loss)
            return
        rate = self._set_learning_rate()
        self.accelerator.backward(loss)
        norm = self._clipped_norm()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step_number += 1
        self._send(rate, norm)
        every = self.options.evaluate_every or len(self.source)
        self.evaluation_due = self.step_number % every == 0 or self.step_number == self.total
        if self.evaluation_due:
            self._read_figures(kept=0)
        elif self.step_number % self.options.log_every == 0:
            self._read_figures(self._kept)

    def evaluated(self, metrics: dict[str, float], watch: str | None = None, higher_is_better: bool = False,
                  keep_best: bool = False) -> None:  # fmt: skip
        """Logs an evaluation; with `--patience` or `keep_best` keeps the best weights by `watch`, to end with them."""
        self.run.append("metrics.jsonl", {"step": self.step_number, **metrics})
        self.accelerator.log(metrics, step=self.step_number)
        if self.accelerator.is_main_process:
            said = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            console.print(f"step {self.step_number}: {said}")
        keeps = bool(self.options.patience or keep_best)
        if watch is not None and (keeps or self.options.schedule == "plateau"):
            score = -metrics[watch] if higher_is_better else metrics[watch]
            if not self._best or score < self._best["score"]:
                self._best |= {"score": score, "waited": 0} | ({"step": self.step_number} if keeps else {})
                if keeps:
                    self._save(self._best_path())
            else:
                self._best |= {"waited": self._best["waited"] + 1, "worse": self._best.get("worse", 0) + 1}
        self.evaluation_due = False
        reset_peak_memory()
        self._clock = time.perf_counter()

    def _micro_batches(self, micro_batches: list[Any]) -> Iterator[Any]:
        before = self.step_number
        for place, batch in enumerate(micro_batches, 1):
            self._closing = place == len(micro_batches)
            self.accelerator.sync_gradients = self._closing
            # FSDP would keep whole gradients in every process; its parts of them add up as well.
            at_once = self._closing or self.accelerator.distributed_type == DistributedType.FSDP
            with contextlib.nullcontext() if at_once else self.accelerator.no_sync(self.model):
                yield batch
        if self.step_number == before:
            raise AssertionError("the training loop did not call Loop.step for every batch")

    def _set_learning_rate(self) -> float:
        options = self.options
        share = learning_rate_share(self.step_number, self.total, options.warmup, options.schedule, options.warmup_from)
        if options.schedule == "plateau":
            share *= max(
                PLATEAU_FACTOR ** self._best.get("worse", 0), PLATEAU_FLOOR / max(PLATEAU_FLOOR, options.learning_rate)
            )
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * share
        return self.options.learning_rate * share

    def _send(self, rate: float, norm: torch.Tensor | float) -> None:
        """Brings the step's figures together over all processes, on the device, and sends them to the CPU."""
        device, dtype = self.accelerator.device, widest_float(self.accelerator.device)

        def on_device(value: torch.Tensor | float) -> torch.Tensor:
            # A number is filled in by a kernel; its copy would be waited for.
            if isinstance(value, torch.Tensor):
                return value.reshape(()).to(dtype)
            return torch.full((), value, dtype=dtype, device=device)

        figures = (*self._share.values(), norm, self._own_count, self._signal)
        mine = torch.stack([on_device(figure) for figure in figures])[None]
        everyone = self.accelerator.gather(mine) if self.accelerator.num_processes > 1 else mine
        self._sent.append(_Sent(self.step_number, rate, list(self._share), Later(everyone)))
        self._share, self._own_count = {}, 0

    def _read_figures(self, kept: int = 0) -> None:
        """Checks and logs all steps that have not been yet, but for the newest `kept`.

        All processes do so after the same steps: they find the same loss and the same signal, and stop together.
        """
        there = [self._sent.popleft() for _ in range(len(self._sent) - kept)]
        if there:
            there[-1].figures.read()  # then all are there
            now = time.perf_counter()
            seconds, self._clock = (now - self._clock) / len(there), now
        for sent in there:
            everyone = sent.figures.read()  # (processes, names + norm, count, signal)
            means = dict(zip(sent.names, everyone.mean(0).tolist(), strict=False))
            norm, count = float(everyone[0, -3]), int(everyone[:, -2].sum())
            if not math.isfinite(means["loss"]):
                self._stop_not_finite("the loss", means["loss"], sent.step)
            if not math.isfinite(norm) and self.accelerator.scaler is None:
                self._stop_not_finite("the gradient's norm", norm, sent.step)
            self._stop = self._stop or int(everyone[:, -1].max())
            self.count += count
            self._log(sent, means, norm, count, seconds)

    def _clipped_norm(self) -> torch.Tensor | float:
        limit = self.options.clip_norm or math.inf
        if self.accelerator.distributed_type == DistributedType.FSDP:
            # Accelerate's own unscales fp16's gradients twice for a model that it did not prepare itself.
            self.accelerator.unscale_gradients()
            norm = torch.nn.utils.clip_grad_norm_(self._trained, limit)
        else:
            norm = self.accelerator.clip_grad_norm_(self._trained, limit)
        if norm is None:  # DeepSpeed has clipped already, inside its own step
            return 0.0
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP: a DTensor

    def _log(self, sent: "_Sent", means: dict[str, float], norm: float, count: int, seconds: float) -> None:
        finite_norm = norm if math.isfinite(norm) else None  # fp16: the step was skipped and the scale halved
        metrics = {**means, "learning_rate": sent.rate, "gradient_norm": finite_norm, self.unit: self.count}
        self.run.append("metrics.jsonl", {"step": sent.step, "epoch": sent.step / len(self.source), **metrics})
        timing = {"seconds": seconds, f"{self.unit}_per_second": count / seconds, "peak_memory": peak_memory()}
        self.run.append("timing.jsonl", {"step": sent.step, self.unit: count, **timing})
        shown = {name: value for name, value in (metrics | timing).items() if value is not None}
        self.accelerator.log(shown, step=sent.step)
        self._line.advance(f"loss {means['loss']:.3f}  lr {sent.rate:.1e}  {count / seconds:,.0f} {self.unit}/s")

    def _save_if_due(self) -> None:
        if self._stop or self.step_number == self.total or self.step_number % self.options.save_every == 0:
            self._read_figures()  # nothing is saved before it is known to be sound
            self._save(self.run.path / "checkpoints" / f"step-{self.step_number:08d}")
            self._clock = time.perf_counter()
        if self._stop:
            self._stop_interrupted(self._stop)

    def _save(self, path: Path) -> None:
        wrote = self.run.sum_of("metrics.jsonl") if self.run.is_main else None  # whose position is written
        place = {"step": self.step_number, "count": self.count, "best": self._best, "metrics": wrote}
        position = place | self._identity
        save_checkpoint(path, self.accelerator, self.model, self.optimizer, position, self.also)
        if self.accelerator.is_main_process:
            old_best = [best for best in best_checkpoints(path.parent) if best != self._best_path()]
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

    def _stop_not_finite(self, what: str, value: float, step: int) -> NoReturn:
        saved = checkpoints(self.run.path / "checkpoints")
        kept = f"the last good checkpoint is {saved[-1]}" if saved else "no checkpoint was due yet"
        raise RunStopped(
            f"{what} became {value} at step {step} ({kept}); "
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
