"""Everything that a training sets up around its loop and finishes after it; the loop itself stays in the lab.

```
accelerator = begin(config.run, config.training)
...  # data, model, run, optimizer, source: the lab's
fitting = Fitting.start(run, accelerator, model, optimizer, source, config.training, config.run.seed, "pictures")
for batch in fitting.loop.batches():
    loss = fitting.model(batch.pictures) ...
    fitting.loop.step(loss, len(batch.pictures))
fitted = fitting.finish(save)
```
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from labs_common.checkpoint import SHARDED, Stateful, check_resumed
from labs_common.cli import to_plain
from labs_common.device import mixed_precision, state_bytes
from labs_common.errors import LabError, reason_of
from labs_common.frozen.audit import FrozenAudit
from labs_common.frozen.cache import Rows, disk_bytes
from labs_common.launch import check_launch
from labs_common.lock import lock
from labs_common.options import RunOptions, TrainingOptions
from labs_common.progress import console
from labs_common.report.page import Section, making_report, write_report
from labs_common.run import Run, check_run_options, cost_of, machine_of
from labs_common.sharding import kept_weights, partition, prepare_sharded, spreads_weights, whole_state
from labs_common.steps import Source
from labs_common.training import Loop, identity, make_accelerator

BATCH_NORM = torch.nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True)
class Fitted:
    """The facts that a training leaves behind besides the saved model.

    Attributes:
        audit: passed.
        trained: parameters that trained.
        parameters: all parameters.
        optimizer_bytes: of its state, in a process.
        cache_bytes: of the cached rows on disk.
        clock: moments at which its parts ended, in order.
    """

    audit: FrozenAudit
    trained: int
    parameters: int
    optimizer_bytes: int
    cache_bytes: int
    clock: dict[str, float]


@dataclass(frozen=True)
class Fitting:
    """A training that is ready to begin, or to go on.

    Attributes:
        model: as `accelerator.prepare` returned it, in training mode.
        plain: the module in it. Where weights are sharded (FSDP, ZeRO-3) it cannot be called or saved by itself.
        prepared_at: the moment at which all this was there.
    """

    run: Run
    accelerator: Accelerator
    model: torch.nn.Module
    plain: torch.nn.Module
    optimizer: torch.optim.Optimizer
    loop: Loop
    audit: FrozenAudit
    prepared_at: float

    @classmethod
    def start(
        cls,
        run: Run,
        accelerator: Accelerator,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        source: Source,
        options: TrainingOptions,
        seed: int,
        unit: str = "samples",
        also: Stateful | None = None,
    ) -> "Fitting":
        """Prepares model and optimizer for the launch's processes, hashes what is frozen, and makes the loop.

        The optimizer holds the parameters that train; what does not has `requires_grad=False`. For `unit` and `also`
        see `Loop`.

        Raises:
            RunStopped: the run is being resumed, and something frozen is not what it was.
            LabError: the run is being resumed, and its checkpoint is damaged, or the run would go on otherwise.
        """
        if run.resumed:
            check_resumed(run.path / "checkpoints", accelerator, identity(run, options, source))
        if options.compile:
            model.compile()  # in its place: names and weights stay those of the plain module, which is what is saved
        if accelerator.distributed_type == DistributedType.FSDP:
            prepared, optimizer = prepare_sharded(accelerator, model, optimizer)
        else:
            with kept_weights(model, accelerator):
                if spreads_weights(accelerator):
                    partition(accelerator, model, optimizer)
                prepared, optimizer = accelerator.prepare(model, optimizer)
        audit = FrozenAudit.start(run, accelerator, prepared)
        loop = Loop(run, accelerator, prepared, optimizer, source, options, seed, unit, also)
        prepared.train()
        plain = accelerator.unwrap_model(prepared)
        return cls(run, accelerator, prepared, plain, optimizer, loop, audit, time.perf_counter())

    def finish(
        self, save: Callable[[dict[str, torch.Tensor]], None] | None = None, rows: Iterable[Rows | None] = ()
    ) -> Fitted:
        """Audits what was frozen, hands the whole weights to `save` in the main process, and frees the memory.

        `save` gets them by name, gathered where they are sharded; other processes wait until it is done. `rows` are
        those whose cache is counted.

        Raises:
            RunStopped: something frozen has moved.
        """
        self.audit.check()
        trained, parameters = count_parameters(self.plain)
        if save is not None:
            # Called by all processes together.
            if self.accelerator.distributed_type == DistributedType.FSDP:
                state = whole_state(self.plain, self.accelerator.is_main_process)
            else:
                state = self.accelerator.get_state_dict(self.model)
            if self.accelerator.is_main_process:
                save(state)
        clock = {"prepared": self.prepared_at, "trained": time.perf_counter()}
        fitted = Fitted(self.audit, trained, parameters, state_bytes(self.optimizer), disk_bytes(rows), clock)
        self.accelerator.wait_for_everyone()
        self.accelerator.free_memory()
        return fitted


def begin(run: RunOptions, training: TrainingOptions) -> Accelerator:
    """Checks what can be checked of a run's options before any work, and finds its processes, device and precision.

    Raises:
        LabError: the output directory exists already or cannot be made, another process works on the run to resume, or
            the machine lacks the precision, or has fewer GPUs than processes.
    """
    check_run_options(run)
    try:
        check_launch(mixed_precision(training.precision))
        accelerator = make_accelerator(training)
    except (ValueError, RuntimeError) as error:  # WORLD_SIZE without a launcher, a port that is taken
        raise LabError(f"the processes cannot be set up ({reason_of(error)}); start with accelerate launch or "
                       "torchrun, or unset WORLD_SIZE, RANK and LOCAL_RANK") from error  # fmt: skip
    if run.resume is not None:
        lock(run.resume, accelerator.is_main_process)
    return accelerator


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """Counts the parameters that train, and all; whole ones also where ZeRO-3 leaves a part in each process."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)


def channels_last(module: torch.nn.Module, accelerator: Accelerator) -> None:
    """Puts convolutions' weights into their fastest memory format: small CNNs are about 1.5 times as fast.

    They are left alone where DeepSpeed or FSDP shard weights: both want contiguous ones.
    """
    if accelerator.distributed_type not in SHARDED:
        module.to(memory_format=torch.channels_last)


def share_batch_norms(module: torch.nn.Module, accelerator: Accelerator) -> torch.nn.Module:
    """Lets batch norms of a `module` that trains take statistics over all GPUs' samples: the result is that of one GPU.

    On CPUs torch cannot: then a line says that the result depends on the number of processes.
    """
    if accelerator.num_processes == 1 or not any(isinstance(part, BATCH_NORM) for part in module.modules()):
        return module
    if accelerator.device.type == "cuda":
        return torch.nn.SyncBatchNorm.convert_sync_batchnorm(module)
    if accelerator.is_main_process:
        console.print("batch normalisation takes the statistics of each process's own pictures here: torch shares them "
                      "between GPUs only, so the result depends on the number of processes")  # fmt: skip
    return module


def results_of(
    run: Run,
    config: Any,
    fitted: Fitted,
    unit: str,
    preparation_seconds: float,
    packages: Sequence[str] = ("torch", "timm", "accelerate"),
) -> dict[str, Any]:
    """Gathers what a comparison needs of any run: its config, costs, machine and versions; labs add their scores.

    `unit` is what the loop counts.
    """
    # `packages` are only names to look up: timm is among them because four of the five labs take their networks from
    # it. The core does not depend on timm, and where it is not installed its version is recorded as null.
    return {
        "config": to_plain(config),
        "cost": {
            **cost_of(run, unit),
            "preparation seconds": preparation_seconds,
            "trainable": fitted.trained,
            "parameters": fitted.parameters,
            "optimizer bytes": fitted.optimizer_bytes,
            "cache bytes": fitted.cache_bytes,
        },
        "environment": machine_of(run, packages),
    }


def write_results(
    run: Run, results: Mapping[str, Any], report: bool, title: str, page: Callable[[], tuple[str, list[Section]]]
) -> None:
    """Writes results.json and, if `report` is asked for, the report of the summary and sections that `page` makes.

    Raises:
        RunStopped: the report cannot be made; everything else is there.
    """
    run.save_json("results.json", results)
    if report:
        with making_report():
            summary, sections = page()
            print(f"report: {write_report(run, title, summary, sections)}")
