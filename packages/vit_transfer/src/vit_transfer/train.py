"""Trains the last block of a pre-trained network: `accelerate launch -m vit_transfer.train --model resnet18`."""

from vit_transfer import commands

if __name__ == "__main__":  # before the imports below: --help and a wrong option answer at once
    commands.train()

import dataclasses
import time
from typing import TYPE_CHECKING

from vit_transfer.config import TrainConfig, complete

if TYPE_CHECKING:  # the real imports wait until the command line has been read: --help is fast
    from accelerate import Accelerator

    from labs_common.data import LabelledPictures
    from labs_common.run import Run
    from vit_transfer.fitting import Fitted


def train(config: TrainConfig) -> None:
    """The road: pictures, network, training, baselines, evaluation of what was written, report."""
    from labs_common.cache import path_name
    from labs_common.data import record_splits
    from labs_common.run import Run, check_run_options
    from labs_common.training import make_accelerator
    from vit_transfer.baselines import baseline_configs, trained_baselines
    from vit_transfer.data import Tensors, read_splits
    from vit_transfer.evaluate import predicted
    from vit_transfer.export import FOLDER, load_exported
    from vit_transfer.results import finish_report

    clock = {"start": time.perf_counter()}
    config = complete(config)
    check_run_options(config.run)
    accelerator = make_accelerator(config.training)
    with accelerator.main_process_first():
        splits = read_splits(config.data, config.run.seed, accelerator.is_main_process)
    check_network(config, splits)
    run = Run.start(config, config.run, f"{config.model.unfreeze}-{path_name(config.model.model)}", accelerator)
    record_splits(run, splits)
    fitted = fit(config, run, accelerator, splits)
    clock |= fitted.clock
    wanted = baseline_configs(config) if config.baselines == "yes" else {}
    others = trained_baselines(wanted, run, accelerator, splits)
    clock["baselines"] = time.perf_counter()

    # The test is of what was written: the exported network is read back and run whole.
    test = Tensors(splits["test"], fitted.transform)
    scored = {
        name: predicted(load_exported(folder / FOLDER), test, accelerator, f"testing, {name}")
        for name, folder in {"this run": run.path, **others}.items()
    }
    clock["tested"] = time.perf_counter()
    if accelerator.is_main_process:
        what = {"block": "The last block", "head": "The head", "all": "All"}[config.model.unfreeze]
        compared = "The same pictures for as many epochs: this run; the head alone; all weights from random."
        finish_report(run, config, splits, fitted, scored, clock, f"{what} of {config.model.model}", compared)
    accelerator.end_training()


def check_network(config: TrainConfig, splits: "dict[str, LabelledPictures]", by_head: bool = False) -> None:
    """Makes sure that there is such a network, that it can be cut and that --weights fit it, before a run begins.

    Raises:
        LabError: it is not so.
    """
    import torch

    from vit_transfer.model import create, input_size, transfer

    options = dataclasses.replace(config.model, pretrained=False)
    with torch.device("meta"):
        network = create(options, len(splits["train"].classes))
        transfer(network, options, input_size(network, options), config.cache.cache, by_head=by_head)


def fit(config: TrainConfig, run: "Run", accelerator: "Accelerator", splits: "dict[str, LabelledPictures]") -> "Fitted":
    """Trains what `config` leaves free and writes the whole network to `model/` under the run.

    Raises:
        RunStopped: the loss is not a number, or something fixed has moved.
        Interrupted: Ctrl-C; the run can be resumed.
    """
    import torch.nn.functional as F

    from vit_transfer.fitting import finished, scores, set_up

    fitting = set_up(config, run, accelerator, splits)
    loop, model, device = fitting.loop, fitting.model, accelerator.device
    for batch in loop.batches():
        logits = model(batch.inputs.to(device)).float()
        targets = batch.targets.to(device)
        loss = F.cross_entropy(logits, targets, label_smoothing=config.training.label_smoothing) * batch.share
        right = float((logits.argmax(1) == targets).float().mean()) * batch.share
        loop.step(loss, len(targets) if batch.share else 0, accuracy=right)
        if loop.evaluation_due:
            loop.evaluated(scores(fitting), watch="validation/loss")
    return finished(fitting, splits)
