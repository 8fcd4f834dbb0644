"""Trains a zero-shot detector: `accelerate launch -m zsi_contrastive.train --data coco --split 48_17 …`."""

import time
from typing import TYPE_CHECKING

from zsi_contrastive.detector.config import TrainConfig, complete

if TYPE_CHECKING:  # the real imports wait until the command line has been read: --help is fast
    from accelerate import Accelerator

    from labs_common.run import Run
    from zsi_contrastive.detector.data import ZeroShotData
    from zsi_contrastive.detector.fitting import Fitted
    from zsi_contrastive.detector.model import ZeroShotMaskRCNN


def train(config: TrainConfig) -> None:
    """The road: pictures, words, model, training, evaluation of what was written, report."""
    from labs_common.data.splits import record_splits
    from labs_common.run import Run, check_run_options
    from labs_common.training import make_accelerator
    from zsi_contrastive.detector.data import read_data
    from zsi_contrastive.detector.evaluation import evaluated
    from zsi_contrastive.detector.fitting import make
    from zsi_contrastive.detector.results import finish_report
    from zsi_contrastive.detector.stored import load_model

    clock = {"start": time.perf_counter()}
    config = complete(config)
    check_run_options(config.run)
    accelerator = make_accelerator(config.training)
    with accelerator.main_process_first():
        data = read_data(config.data, config.words, config.run.seed, accelerator.is_main_process)
    model = make(config, data, accelerator)
    run = Run.start(config, config.run, f"zsi-{data.split.name}", accelerator)
    record_splits(run, data.pictures)
    fitted = fit(config, model, run, accelerator, data)
    clock |= fitted.clock

    # The test is of what was written: the model is read back and sees the pictures themselves.
    loaded = load_model(run.path)
    found = evaluated(loaded.model, data.split, data.vectors, data.pictures, config.detection, accelerator,
                      config.run.seed)  # fmt: skip
    clock["tested"] = time.perf_counter()
    if accelerator.is_main_process:
        finish_report(run, config, data, loaded, fitted, found, clock)
    accelerator.wait_for_everyone()
    accelerator.end_training()


def fit(
    config: TrainConfig, model: "ZeroShotMaskRCNN", run: "Run", accelerator: "Accelerator", data: "ZeroShotData"
) -> "Fitted":
    """Trains what is not frozen and writes the model to `model/` under the run.

    Raises:
        RunStopped: the loss is not a number, or something fixed has moved.
        Interrupted: Ctrl-C; the run can be resumed.
    """
    from zsi_contrastive.detector.fitting import finished, scores, set_up

    fitting = set_up(config, model, run, accelerator, data)
    loop, options = fitting.loop, config.training
    weights = {"box_reconstruction": options.reconstruction, "mask_reconstruction": options.reconstruction,
               "greedy_infomax": options.greedy_share, "patch_infonce": options.patch_share}  # fmt: skip
    for batch in loop.batches():
        pictures, targets, share = batch.to(accelerator.device)
        losses = fitting.model(pictures, targets)
        loss = sum(weights.get(name, 1.0) * value for name, value in losses.items()) * share
        parts = {f"{name}_loss": float(value.detach()) * share for name, value in losses.items()}
        loop.step(loss, len(pictures) if share else 0, **parts)
        if loop.evaluation_due and len(data.pictures["validation"]):
            loop.evaluated(scores(fitting), "validation/harmonic_mean", higher_is_better=True)
    return finished(fitting)
