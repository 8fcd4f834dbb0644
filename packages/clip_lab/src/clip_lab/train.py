"""Trains CLIP, SigLIP, CoCa or SimVLM: `accelerate launch -m clip_lab.train --objective clip --data flickr8k`."""

from clip_lab import commands

if __name__ == "__main__":  # before the imports below: --help and a wrong option answer at once
    commands.train()

import time
from typing import TYPE_CHECKING

from clip_lab.config import TrainConfig, complete

if TYPE_CHECKING:  # the real imports wait until the command line has been read: --help is fast
    import torch
    from accelerate import Accelerator

    from clip_lab.batches import Step
    from clip_lab.fitting import Fitted, Fitting
    from clip_lab.model import Model
    from clip_lab.tokens import Words
    from labs_common.data.described import Captions
    from labs_common.run import Run


def train(config: TrainConfig) -> None:
    """The road: pictures and captions, model, training, evaluation of what was written, report."""
    from clip_lab.data import read_data
    from clip_lab.evaluation import evaluated
    from clip_lab.fitting import make
    from clip_lab.results import finish_report
    from clip_lab.stored import load_model
    from labs_common.data import record_splits
    from labs_common.run import Run, check_run_options
    from labs_common.training import make_accelerator

    clock = {"start": time.perf_counter()}
    config = complete(config)
    check_run_options(config.run)
    accelerator = make_accelerator(config.training)
    with accelerator.main_process_first():
        data = read_data(config.data, config.run.seed, accelerator.is_main_process)
    model, words = make(config, data, accelerator)
    run = Run.start(config, config.run, config.objective, accelerator)
    record_splits(run, data.splits)
    fitted = fit(config, model, words, run, accelerator, data)
    clock |= fitted.clock

    # The test is of what was written: the model is read back and sees the pictures themselves.
    if accelerator.is_main_process:
        loaded = load_model(run.path)
        found = evaluated(loaded, data.splits["test"], data.truth, accelerator.device)
        clock["tested"] = time.perf_counter()
        finish_report(run, config, data, loaded, fitted, found, clock)
    accelerator.wait_for_everyone()
    accelerator.end_training()


def fit(
    config: TrainConfig, model: "Model", words: "Words", run: "Run", accelerator: "Accelerator", data: "Captions"
) -> "Fitted":
    """Trains what is not frozen and writes the model to `model/` under the run.

    Raises:
        RunStopped: the loss is not a number, or something fixed has moved.
        Interrupted: Ctrl-C; the run can be resumed.
    """
    from clip_lab.fitting import finished, set_up
    from clip_lab.scoring import scores

    fitting = set_up(config, model, words, run, accelerator, data)
    loop, watch = fitting.loop, config.training.watch
    share_of_loss = {"clip": contrastive, "siglip": contrastive, "coca": coca, "simvlm": simvlm}[config.objective]
    for step, number in loop.batches():
        loss, metrics = share_of_loss(fitting, step, number)
        loop.step(loss, len(step.parts[number].ids), **metrics)
        if loop.evaluation_due:
            loop.evaluated(scores(fitting), f"validation/{watch}", higher_is_better=watch == "recall")
    return finished(fitting)


def contrastive(fitting: "Fitting", step: "Step", number: int) -> "tuple[torch.Tensor, dict[str, float]]":
    """A part's share of the step's loss: each caption finds its picture among all, each picture its captions."""
    from clip_lab.contrast import contrast_share

    loss, found = contrast_share(fitting, step, number)
    return loss, {"logit_scale": float(found.scale.detach()) / len(step.parts)}


def coca(fitting: "Fitting", step: "Step", number: int) -> "tuple[torch.Tensor, dict[str, float]]":
    """The same, and every caption is written word by word (Yu et al. 2022, eq. 4)."""
    from clip_lab.contrast import caption_share, contrast_share

    head = fitting.config.head
    contrast, found = contrast_share(fitting, step, number)
    assert found.logits is not None
    captions = caption_share(fitting, step.parts[number], found.logits)
    metrics = {
        "logit_scale": float(found.scale.detach()) / len(step.parts),
        "contrastive_loss": float(contrast.detach()),
        "caption_loss": float(captions.detach()),
    }
    return head.contrastive_weight * contrast + head.caption_weight * captions, metrics


def simvlm(fitting: "Fitting", step: "Step", number: int) -> "tuple[torch.Tensor, dict[str, float]]":
    """A part's share of the step's loss: each caption goes on from its beginning (Wang et al. 2022, eq. 3)."""
    from clip_lab.contrast import suffix_share

    return suffix_share(fitting, step.parts[number]), {}
