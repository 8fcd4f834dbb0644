"""Trains a model that describes pictures: `accelerate launch -m caption_lab.train --model transformer`."""

from caption_lab import commands

if __name__ == "__main__":  # before the imports below: --help and a wrong option answer at once
    commands.train()

import time
from typing import TYPE_CHECKING

from caption_lab.config import TrainConfig, complete

if TYPE_CHECKING:  # the real imports wait until the command line has been read: --help is fast
    import torch
    from accelerate import Accelerator

    from caption_lab.batches import Batch
    from caption_lab.fitting import Fitted, Fitting, Made
    from labs_common.data.described import Captions
    from labs_common.run import Run


def train(config: TrainConfig) -> None:
    """The road: pictures and captions, captioner, training, evaluation of what was written, report."""
    from caption_lab.data import read_data
    from caption_lab.evaluation import evaluated
    from caption_lab.export import load_captioner
    from caption_lab.fitting import make
    from caption_lab.results import finish_report
    from labs_common.data import record_splits
    from labs_common.run import Run, check_run_options
    from labs_common.training import make_accelerator

    clock = {"start": time.perf_counter()}
    config = complete(config)
    check_run_options(config.run)
    accelerator = make_accelerator(config.training)
    with accelerator.main_process_first():
        data = read_data(config.data, config.run.seed, accelerator.is_main_process)
    made = make(config, data, accelerator)
    run = Run.start(config, config.run, config.model.replace("_", "-"), accelerator)
    record_splits(run, data.splits)
    fitted = fit(made, run, accelerator, data)
    clock |= fitted.clock

    # The test is of what was written: the captioner is read back and sees the pictures themselves.
    captioner = load_captioner(run.path)
    found = evaluated(captioner, data.splits["test"], data.truth, config.decoding, accelerator)
    clock["tested"] = time.perf_counter()
    if accelerator.is_main_process:
        finish_report(run, made.config, data, captioner, fitted, found, clock)
    accelerator.end_training()


def fit(made: "Made", run: "Run", accelerator: "Accelerator", data: "Captions") -> "Fitted":
    """Trains the decoder, and what of the encoder is free, and writes the captioner to `model/` under the run.

    Raises:
        RunStopped: the loss is not a number, or something fixed has moved.
        Interrupted: Ctrl-C; the run can be resumed.
    """
    from caption_lab.fitting import finished, scores, set_up

    fitting = set_up(made, run, accelerator, data)
    loop, watch = fitting.loop, made.config.training.watch
    share_of_loss = {"cross-entropy": caption_loss, "scst": self_critical_loss}[made.config.objective]
    for batch in loop.batches():
        loss, metrics = share_of_loss(fitting, batch)
        loop.step(loss, len(batch.pictures) if batch.of_captions else 0, **metrics)
        if loop.evaluation_due:
            loop.evaluated(scores(fitting), f"validation/{watch}", higher_is_better=watch != "loss")
    return finished(fitting)


def caption_loss(fitting: "Fitting", batch: "Batch") -> "tuple[torch.Tensor, dict[str, float]]":
    """This part's share of the step's loss: the next word, and that attention should go everywhere."""
    import torch

    from caption_lab.objectives import attention_penalty, masked, next_word_loss, with_own_guesses

    options, loop, device = fitting.config.training, fitting.loop, fitting.accelerator.device
    rows, of_rows, words = (tensor.to(device) for tensor in (batch.rows, batch.of_rows, batch.words))
    inputs, targets = words[:, :-1], words[:, 1:]
    if hidden := fitting.config.decoder.mask_words:
        inputs = masked(inputs, hidden, len(fitting.vocabulary))
    if guessed := options.scheduled_sampling * loop.step_number / loop.total:
        with torch.no_grad():
            first = fitting.model(rows, of_rows, inputs)
        inputs = with_own_guesses(inputs, first, guessed)
    output = fitting.model(rows, of_rows, inputs)
    loss = next_word_loss(output.logits, targets, options.label_smoothing) * batch.of_words
    if output.attention is None:
        return loss, {}
    penalty = attention_penalty(output.attention, targets) * batch.of_captions
    share = fitting.config.decoder.attention_penalty
    return loss + share * penalty, {"word_loss": float(loss.detach()), "penalty": float(penalty.detach())}


def self_critical_loss(fitting: "Fitting", batch: "Batch") -> "tuple[torch.Tensor, dict[str, float]]":
    """This part's share of the step's loss: drawn captions that beat the greedy ones become more probable."""
    from caption_lab.objectives import policy_loss

    assert fitting.critic is not None
    device = fitting.accelerator.device
    rows, of_rows = batch.rows.to(device), batch.of_rows.to(device)
    words, advantages, reward = fitting.critic.drawn(fitting.plain, rows[of_rows], batch.pictures)
    logits = fitting.model(rows, of_rows, words[:, :-1]).logits
    loss = policy_loss(logits, words[:, 1:], advantages) * batch.of_captions
    return loss, {"reward": reward * batch.of_captions}
