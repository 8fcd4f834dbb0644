"""Learns features from pictures without labels: `accelerate launch -m zsi_contrastive.pretrain --method byol …`."""

from zsi_contrastive import commands

if __name__ == "__main__":  # before the imports below: --help and a wrong option answer at once
    commands.pretrain()

import time
from typing import TYPE_CHECKING

from zsi_contrastive.ssl.config import PretrainConfig, complete

if TYPE_CHECKING:  # the real imports wait until the command line has been read: --help is fast
    import torch
    from accelerate import Accelerator

    from labs_common.data import LabelledPictures
    from labs_common.run import Run
    from zsi_contrastive.ssl.train import Fitted


def pretrain(config: PretrainConfig) -> None:
    """The road: pictures, network, training, what its features are worth, report."""
    from labs_common.data.splits import record_splits
    from labs_common.run import Run, check_run_options
    from labs_common.training import make_accelerator
    from zsi_contrastive.ssl.data import read_splits
    from zsi_contrastive.ssl.train import check_pictures, make
    from zsi_contrastive.ssl.report import finish_report

    clock = {"start": time.perf_counter()}
    config = complete(config)
    check_run_options(config.run)
    accelerator = make_accelerator(config.training)
    network = make(config, accelerator)
    with accelerator.main_process_first():
        splits = read_splits(config.data, config.run.seed, accelerator.is_main_process)
    check_pictures(config, splits)
    run = Run.start(config, config.run, f"{config.method}-{config.encoder.backbone}", accelerator)
    record_splits(run, splits)
    fitted = fit(config, network, run, accelerator, splits)
    clock |= fitted.clock
    if accelerator.is_main_process:
        finish_report(run, config, splits, fitted, clock)
    accelerator.wait_for_everyone()
    accelerator.end_training()


def fit(
    config: PretrainConfig,
    network: "torch.nn.Module",
    run: "Run",
    accelerator: "Accelerator",
    splits: "dict[str, LabelledPictures]",
) -> "Fitted":
    """Trains and writes the encoder to `model/` under the run.

    Raises:
        RunStopped: the loss is not a number, something fixed has moved, or the teacher was given a gradient.
        Interrupted: Ctrl-C; the run can be resumed.
    """
    from zsi_contrastive.ssl.train import finished, scores, set_up
    from zsi_contrastive.ssl.methods import LOSSES

    fitting = set_up(config, network, run, accelerator, splits)
    loop = fitting.loop
    if loop.step_number == 0:
        loop.evaluated(scores(fitting))  # before the first step: the random encoder
    for batch in loop.batches():
        loss = LOSSES[config.method](fitting.step_of(batch))
        fitting.set_decay()
        loop.step(loss, len(batch.pictures))
        fitting.follow()
        if loop.evaluation_due:
            loop.evaluated(scores(fitting), "validation/knn", higher_is_better=True)
    return finished(fitting)
