"""Trains the last block of a pre-trained network: `accelerate launch -m vit_transfer.train --model resnet18`."""

import dataclasses
import time
from typing import TYPE_CHECKING

from labs_common.cli import run_command
from vit_transfer.config import TrainConfig, complete

if TYPE_CHECKING:  # the real imports wait until the command line has been read: --help is fast
    from accelerate import Accelerator

    from labs_common.data import LabelledPictures
    from labs_common.run import Run
    from vit_transfer.results import Fitted


def main() -> None:
    """The command."""
    run_command(train, TrainConfig, "python -m vit_transfer.train")


def train(config: TrainConfig) -> None:
    """The road: pictures, network, training, baselines, evaluation of what was written, report."""
    from labs_common.cache import path_name
    from labs_common.run import Run, check_run_options
    from labs_common.training import make_accelerator
    from vit_transfer.baselines import trained_baselines
    from vit_transfer.data import Tensors, read_splits, record_splits
    from vit_transfer.evaluate import predicted
    from vit_transfer.export import FOLDER, load_exported
    from vit_transfer.results import finish_report, print_left_out

    clock = {"start": time.perf_counter()}
    config = complete(config)
    check_run_options(config.run)
    accelerator = make_accelerator(config.training)
    with accelerator.main_process_first():
        splits = read_splits(config.data, config.run.seed, accelerator.is_main_process)
    if accelerator.is_main_process:
        print_left_out(splits)
    check_network(config, splits)
    run = Run.start(config, config.run, f"{config.model.unfreeze}-{path_name(config.model.model)}", accelerator)
    record_splits(run, splits)
    fitted = fit(config, run, accelerator, splits)
    clock |= fitted.clock
    others = trained_baselines(config, run, accelerator, splits) if config.baselines == "yes" else {}
    clock["baselines"] = time.perf_counter()

    # The test is of what was written: the exported network is read back and run whole.
    test = Tensors(splits["test"], fitted.transform)
    scored = {
        name: predicted(load_exported(folder / FOLDER), test, accelerator, f"testing, {name}")
        for name, folder in {"this run": run.path, **others}.items()
    }
    clock["tested"] = time.perf_counter()
    if accelerator.is_main_process:
        finish_report(run, config, splits, fitted, scored, clock)
    accelerator.end_training()


def check_network(config: TrainConfig, splits: "dict[str, LabelledPictures]") -> None:
    """Makes sure that there is such a network and that it can be cut, before a run begins; without its weights.

    Raises:
        LabError: it is not so.
    """
    import torch

    from vit_transfer.model import create, input_size, transfer

    options = dataclasses.replace(config.model, pretrained=False, weights=None)
    with torch.device("meta"):
        network = create(options, len(splits["train"].classes))
        transfer(network, options, input_size(network, options), config.cache.cache)


def fit(config: TrainConfig, run: "Run", accelerator: "Accelerator", splits: "dict[str, LabelledPictures]") -> "Fitted":
    """Trains what `config` leaves free and writes the whole network to `model/` under the run.

    Raises:
        RunStopped: the loss is not a number, or something fixed has moved.
        Interrupted: Ctrl-C; the run can be resumed.
    """
    import torch
    import torch.nn.functional as F
    from accelerate.utils import set_seed

    from labs_common.checkpoint import SHARDED
    from labs_common.freezing import FrozenAudit
    from labs_common.training import Loop, state_bytes
    from vit_transfer.architecture import structure_of
    from vit_transfer.batches import PictureSteps, disk_bytes, rows_of
    from vit_transfer.data import Tensors, transform_of
    from vit_transfer.evaluate import mean_scores, training_scores
    from vit_transfer.export import FOLDER, save_model
    from vit_transfer.model import create, input_size, transfer
    from vit_transfer.results import Fitted

    options, shown = config.training, accelerator.is_main_process
    with accelerator.main_process_first():  # a tiny model is made, others are downloaded on their first use
        set_seed(config.run.seed)
        network = create(config.model, len(splits["train"].classes)).to(accelerator.device)
    size = input_size(network, config.model)
    sharded = accelerator.distributed_type in SHARDED
    model = transfer(network, config.model, size, config.cache.cache, sharded)
    structure = structure_of(network)
    transform = transform_of(network, size, config.data, config.run.seed)
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
    for batch in loop.batches():
        logits = prepared(batch.inputs.to(accelerator.device)).float()
        targets = batch.targets.to(accelerator.device)
        loss = F.cross_entropy(logits, targets, label_smoothing=options.label_smoothing) * batch.share
        right = float((logits.argmax(1) == targets).float().mean()) * batch.share
        loop.step(loss, len(targets) if batch.share else 0, accuracy=right)
        if loop.evaluation_due:
            held_out = mean_scores(prepared, rows["validation"], options.batch_size, accelerator)
            scores = training_scores(run) | {f"validation/{name}": value for name, value in held_out.items()}
            loop.evaluated(scores, watch="validation/loss")
            prepared.train()
    audit.check()
    save_model(accelerator, prepared, config.model, transform, splits["train"].classes, run.path / FOLDER)
    clock = {"prepared": prepared_at, "trained": time.perf_counter()}
    kept = disk_bytes(list(rows.values())) if shown else 0
    state = state_bytes(optimizer)
    accelerator.free_memory()
    return Fitted(structure, audit, transform, state, kept, clock)


if __name__ == "__main__":
    main()
