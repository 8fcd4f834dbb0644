"""Trains the last block of a pre-trained network: `accelerate launch -m vit_transfer.train --model resnet18`."""

from vit_transfer import commands

if __name__ == "__main__":  # before the imports below: --help and a wrong option answer at once
    commands.train()

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.utils import ModelEmaV3

from labs_common.cache import path_name
from labs_common.checkpoint import SHARDED
from labs_common.data.classes import read_pictures
from labs_common.data.images import record_splits
from labs_common.device import each_tensor, expect_fixed_shapes, to_device
from labs_common.errors import Interrupted, LabError
from labs_common.fitting import Fitted, Fitting, begin, channels_last
from labs_common.frozen.cache import DTYPES
from labs_common.launch import main_process_first
from labs_common.plan import print_plan
from labs_common.progress import console
from labs_common.run import Run, training_means
from labs_common.steps import ShuffledSteps
from vit_transfer.config import AttackConfig, DistillConfig, ModelOptions, TrainConfig, complete
from vit_transfer.data import (
    Batch,
    Splits,
    Tensors,
    boundary_rows,
    drawn_scenes,
    read_splits,
    training_batches,
    transform_of,
)
from vit_transfer.evaluate import predictions_of, scores
from vit_transfer.model import create, transfer
from vit_transfer.report import finish_report
from vit_transfer.saved import FOLDER, load_model, save_model

# Gives the mean loss over a batch and further means to log, of a prepared `Transfer` in training mode.
Loss = Callable[[torch.nn.Module, Batch], tuple[torch.Tensor, dict[str, torch.Tensor]]]


def train(config: TrainConfig) -> None:
    """Walks the road: pictures, network, training, baselines, evaluation of what was written, report."""
    clock = {"start": time.perf_counter()}
    config = complete(config)
    if config.plan.plan:
        print_needs(config, lambda _: label_loss(config.training.label_smoothing))
        return
    accelerator = begin(config.run, config.training)
    with main_process_first(accelerator):
        splits = read_splits(config.data, config.run.seed, accelerator.is_main_process)
    check_network(config.model, len(splits["train"].classes), config.cache.cache)
    run = Run.start(config, config.run, f"{config.model.unfreeze}-{path_name(config.model.model)}", accelerator)
    record_splits(run, splits)
    fitted = fit(config, run, accelerator, splits)
    clock |= fitted.clock
    folders = {"this run": run.path / FOLDER}
    if config.baselines == "yes":
        folders |= fit_beside(baselines(config), run, accelerator, splits)
    clock["baselines"] = time.perf_counter()

    # The test is of what was written: the saved network is read back and run whole.
    scored = {
        name: predictions_of(load_model(folder), splits["test"], accelerator, f"testing, {name}")
        for name, folder in folders.items()
    }
    clock["tested"] = time.perf_counter()
    if accelerator.is_main_process:
        what = {"block": "The last block", "head": "The head", "all": "All"}[config.model.unfreeze]
        compared = "The same pictures for as many epochs: this run; the head alone; all weights from random."
        finish_report(run, config, splits, fitted, scored, clock, f"{what} of {config.model.model}", compared)
    accelerator.end_training()


def check_network(options: ModelOptions, classes: int, cached: bool, by_head: bool = False) -> None:
    """Makes sure that there is such a network, that it can be cut and that --weights fit it, before a run begins.

    Raises:
        LabError: it is not so.
    """
    with torch.device("meta"):  # shapes without weights
        network = create(dataclasses.replace(options, pretrained=False), classes)
        transfer(network, options, cached, by_head=by_head)


def print_needs(config: TrainConfig, loss_for: Callable[[int], Loss], by_head: bool = False) -> None:
    """Prints the memory that the training needs; of the data it reads how many pictures and classes there are.

    `loss_for` gives the loss for so many classes.

    Raises:
        LabError: there is no such data or network.
    """
    found = read_pictures(config.data.data or str(drawn_scenes()))
    classes, pictures = len(found.train.classes), math.ceil(len(found.train) * config.data.label_fraction)
    validation = (
        round(pictures * config.data.validation_fraction) if found.validation is None else len(found.validation)
    )
    with torch.device("meta"):
        network = create(dataclasses.replace(config.model, pretrained=False, weights=None), classes)
        model = transfer(network, config.model, config.cache.cache, by_head=by_head).train()
    cut, loss_of, dtype = model.cut, loss_for(classes), DTYPES[config.cache.boundary_precision][0]
    # The back holds some parameters by itself.
    whole = model if cut is None else torch.nn.ModuleList([model, cut.back])

    def loss(count: int) -> torch.Tensor:
        side = model.size
        inputs = torch.empty(count, 3, side, side) if cut is None else torch.empty(count, cut.width, dtype=dtype)
        return loss_of(model, Batch(inputs, torch.zeros(count, dtype=torch.long), 0, range(count), 1.0))[0]

    limit, rows = config.data.limit or pictures, []
    if cut is not None and config.cache.cache:
        kept = (min(pictures, limit) * config.data.views, min(validation, limit))
        rows = [size * cut.width * dtype.itemsize for size in kept]
    print_plan(f"{config.model.model}, {config.model.unfreeze}", "pictures", config, whole, loss, rows)


def fit(
    config: TrainConfig,
    run: Run,
    accelerator: Accelerator,
    splits: Splits,
    loss_of: Loss | None = None,
    by_head: bool = False,
) -> Fitted:
    """Trains what `config` leaves free and writes the whole network to `model/` under the run.

    `loss_of` is by default the cross-entropy with the labels. `by_head` lets a network with a distillation token give
    the logits of both heads in training.

    Raises:
        RunStopped: the loss is NaN, or something frozen has changed.
        Interrupted: Ctrl-C; the run can be resumed.
    """
    options, data = config.training, config.data
    with main_process_first(accelerator):  # a tiny model is made, others are downloaded on their first use
        set_seed(config.run.seed)
        network = create(config.model, len(splits["train"].classes)).to(accelerator.device)
    if accelerator.device.type == "cuda":  # on a CPU only small networks are faster so
        channels_last(network, accelerator)
    expect_fixed_shapes(accelerator.device)
    model = transfer(network, config.model, config.cache.cache, accelerator, by_head)
    transform = transform_of(network, model.size, data.augment, config.run.seed, data.interpolation)
    training, validation = (
        boundary_rows(name, Tensors(splits[name], transform), model, config.cache, views, accelerator)
        for name, views in (("train", data.views), ("validation", 1))
    )
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=options.learning_rate, weight_decay=options.weight_decay, fused=True)
    batch_of = training_batches(training, data.views, accelerator)
    source = ShuffledSteps(len(training.labels), options.batch_size, config.run.seed, batch_of)
    if options.ema and accelerator.distributed_type in SHARDED:
        raise LabError("--ema: cannot follow weights that are sharded; drop it, or launch without FSDP or ZeRO")
    average = ModelEmaV3(model, options.ema) if options.ema else None
    fitting = Fitting.start(run, accelerator, model, optimizer, source, options, config.run.seed, "pictures", average)
    loop, loss_of = fitting.loop, loss_of or label_loss(options.label_smoothing)
    for batch in loop.batches():
        loss, means = loss_of(fitting.model, each_tensor(to_device, batch, accelerator.device))
        shares = {name: value * batch.share for name, value in means.items()}
        loop.step(loss * batch.share, len(batch.targets) if batch.share else 0, **shares)
        if average is not None:
            average.update(fitting.plain)
        if loop.evaluation_due:
            found = training_means(run, "pictures", ("loss", "accuracy"))  # since the last evaluation
            used = fitting.model if average is None else average.module
            found |= scores(used, validation, options.batch_size, accelerator)
            by_accuracy = options.schedule == "plateau"  # as arXiv 2110.05270 has it
            loop.evaluated(found, "validation/accuracy" if by_accuracy else "validation/loss", by_accuracy)
    save = partial(save_model, model, config.model, transform, splits["train"].classes, run.path)
    if average is not None:
        return fitting.finish(lambda _: save(average.module.state_dict()), [training.rows, validation.rows])
    return fitting.finish(save, [training.rows, validation.rows])


def label_loss(smoothing: float) -> Loss:
    """Returns the cross-entropy with the labels, of whose weight a share is spread over all classes."""

    def loss_of(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        logits = model(batch.inputs).float()
        loss = F.cross_entropy(logits, batch.targets, label_smoothing=smoothing)
        return loss, {"accuracy": (logits.argmax(1) == batch.targets).float().mean()}

    return loss_of


def baselines(config: TrainConfig) -> dict[str, TrainConfig]:
    """Returns by name what a run is compared with: the learning rate that is usual for it, all else as in `config`."""
    training = dataclasses.replace(config.training, learning_rate=0.0)

    def other(**change: Any) -> TrainConfig:
        model = dataclasses.replace(config.model, block=None, **change)
        return complete(dataclasses.replace(config, model=model, training=training, baselines="no"))

    return {
        "head only": other(unfreeze="head"),
        "from scratch": other(unfreeze="all", pretrained=False, weights=None),
    }


def named_config(name: str, config: DistillConfig | AttackConfig) -> TrainConfig:
    """Returns the training of a network that is only named: its last block, plain pictures, the same budget."""
    data = dataclasses.replace(config.data, views=1, augment="flip")
    training = dataclasses.replace(config.training, learning_rate=0.0, ema=0.0)
    return complete(TrainConfig(ModelOptions(name), data, config.cache, training, config.run, baselines="no"))


def fit_beside(
    configs: Mapping[str, TrainConfig], run: Run, accelerator: Accelerator, splits: Splits
) -> dict[str, Path]:
    """Trains what is not there yet under the run; returns the directory of each one's saved network.

    Raises:
        Interrupted: Ctrl-C; what was done is saved, and resuming the run goes on from there.
    """
    folders = {}
    for name, wanted in configs.items():
        path = run.path / "baselines" / path_name(name).replace(" ", "-")
        folders[name] = path / FOLDER
        if folders[name].is_dir():
            continue
        if accelerator.is_main_process:
            console.print(f"training {name}")
            path.mkdir(parents=True, exist_ok=True)
        accelerator.wait_for_everyone()
        try:
            fit(wanted, Run(path, run.is_main, resumed=True), accelerator, splits)
        except Interrupted as error:
            reason = str(error).split(";")[0]
            raise Interrupted(f"{reason}; everything is saved: go on with --resume {run.path}") from None
    return folders
