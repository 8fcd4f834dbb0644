"""Sets up a training before its loop and finishes it after it; train and distill share that."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from labs_common.checkpoint import SHARDED
from labs_common.data import LabelledPictures
from labs_common.freezing import FrozenAudit
from labs_common.progress import console
from labs_common.report.structure import Structure, structure_of
from labs_common.run import Run
from labs_common.training import Loop, state_bytes, training_means
from vit_transfer.config import TrainConfig
from vit_transfer.data import PictureRows, PictureSteps, Tensors, Transform, disk_bytes, rows_of, transform_of
from vit_transfer.evaluate import mean_scores
from vit_transfer.model import create, transfer
from vit_transfer.saved import FOLDER, save_model


@dataclass(frozen=True)
class Fitting:
    """A training that is ready to begin, or to go on.

    Attributes:
        model: a prepared `Transfer`.
        rows: what its trained part reads, by split.
        prepared_at: the moment at which all this was there.
    """

    config: TrainConfig
    run: Run
    accelerator: Accelerator
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    loop: Loop
    rows: dict[str, PictureRows]
    audit: FrozenAudit
    structure: Structure
    transform: Transform
    prepared_at: float


@dataclass(frozen=True)
class Fitted:
    """What a training leaves behind besides the exported network.

    Attributes:
        optimizer_bytes: of its state, in a process.
        cache_bytes: of the frozen features on disk.
        clock: moments at which its parts ended, in order.
    """

    structure: Structure
    audit: FrozenAudit
    transform: Transform
    optimizer_bytes: int
    cache_bytes: int
    clock: dict[str, float]


def set_up(
    config: TrainConfig,
    run: Run,
    accelerator: Accelerator,
    splits: Mapping[str, LabelledPictures],
    by_head: bool = False,
) -> Fitting:
    """Makes the network, freezes and cuts it, computes its front's output and prepares the loop.

    `by_head` lets a network with a distillation token give the logits of both heads in training.

    Raises:
        LabError: the network cannot be had, or not be cut.
        RunStopped: the run is being resumed, and something fixed is another.
    """
    options, shown = config.training, accelerator.is_main_process
    with accelerator.main_process_first():  # a tiny model is made, others are downloaded on their first use
        set_seed(config.run.seed)
        network = create(config.model, len(splits["train"].classes)).to(accelerator.device)
    several = accelerator.num_processes > 1
    sync = several and accelerator.device.type == "cuda"
    sharded = accelerator.distributed_type in SHARDED
    model = transfer(network, config.model, config.cache.cache, sharded, by_head, sync)
    if several and not sync and shown and model.has_batch_norm:
        console.print("batch normalisation takes the statistics of each process's own pictures here: torch shares them "
                      "between GPUs only, so the result depends on the number of processes")  # fmt: skip
    structure = structure_of(network)
    transform = transform_of(network, model.size, config.data.augment, config.run.seed)
    views = {"train": config.data.views, "validation": 1}
    rows = {
        name: rows_of(name, Tensors(splits[name], transform), model, config.cache, count, accelerator)
        for name, count in views.items()
    }
    prepared_at = time.perf_counter()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=options.learning_rate, weight_decay=options.weight_decay)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    audit = FrozenAudit(accelerator.unwrap_model(prepared))
    if run.resumed and (before := run.load_json("frozen.json")):
        audit.check(before)
    elif shown:
        run.save_json("frozen.json", audit.before)
    source = PictureSteps(rows["train"], options.batch_size, config.data.views, config.run.seed,
                          accelerator.process_index, accelerator.num_processes)  # fmt: skip
    loop = Loop(run, accelerator, prepared, optimizer, source, options, config.run.seed, unit="pictures")
    prepared.train()
    return Fitting(
        config, run, accelerator, prepared, optimizer, loop, rows, audit, structure, transform, prepared_at
    )  # fmt: skip


def scores(fitting: Fitting) -> dict[str, float]:
    """Loss and accuracy in training since the last evaluation, and on the validation pictures; in training mode."""
    held_out = mean_scores(
        fitting.model, fitting.rows["validation"], fitting.config.training.batch_size, fitting.accelerator
    )
    fitting.model.train()
    before = training_means(fitting.run, "pictures", ("loss", "accuracy"))
    return before | {f"validation/{name}": value for name, value in held_out.items()}


def finished(fitting: Fitting, splits: Mapping[str, LabelledPictures]) -> Fitted:
    """Audits what was frozen and writes the whole network to `model/` under the run.

    Raises:
        RunStopped: something fixed has moved.
    """
    fitting.audit.check()
    accelerator, folder = fitting.accelerator, fitting.run.path / FOLDER
    save_model(
        accelerator, fitting.model, fitting.config.model, fitting.transform, splits["train"].classes, folder
    )  # fmt: skip
    clock = {"prepared": fitting.prepared_at, "trained": time.perf_counter()}
    kept = disk_bytes(list(fitting.rows.values())) if accelerator.is_main_process else 0
    state = state_bytes(fitting.optimizer)
    accelerator.free_memory()
    return Fitted(fitting.structure, fitting.audit, fitting.transform, state, kept, clock)
