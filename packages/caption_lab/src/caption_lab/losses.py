"""The objectives: the next word of a caption, or captions that score well. `OBJECTIVES` is where one is registered."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import reduce

from caption_lab.config import TrainConfig
from caption_lab.data import Batch
from caption_lab.vocabulary import END, PAD, SPECIAL, START, TOKENS, Vocabulary, padded
from labs_common.caption_metrics import CiderD
from labs_common.decoding import GREEDY, Output, log_probabilities, sampled_places, write
from labs_common.options import DecodingOptions

# A part's shares of further means to log; on the device where they are computed there.
Metrics = dict[str, torch.Tensor | float]
SAMPLED = DecodingOptions(beam=1, top_p=1.0)


class SelfCritic:
    """Self-critical sequence training (Rennie et al. 2017, eq. 8): a sampled caption's reward less the greedy one's.

    The reward is CIDEr-D against the picture's training captions. `<end>` is a word on both sides, as in the code that
    is in use (ruotianluo/self-critical.pytorch): without it, a caption that stops in its middle is worth more.
    """

    def __init__(self, references: Sequence[Sequence[str]], vocabulary: Vocabulary) -> None:
        """`references` are the captions of each training picture."""
        self.vocabulary = vocabulary
        cleaned = vocabulary.cleaning.words
        self.cider = CiderD([[[*cleaned(caption), SPECIAL[END]] for caption in its] for its in references])

    def rewards(self, captions: Sequence[Sequence[int]], pictures: Sequence[int]) -> np.ndarray:
        """Scores the captions of pictures, as numbers; one that was cut off has no `<end>`."""
        ends = ([SPECIAL[END]] if END in caption else [] for caption in captions)
        said = [self.vocabulary.decode(caption).split() + end for caption, end in zip(captions, ends, strict=True)]
        return self.cider.scores(said, pictures)

    def sample(
        self, model: Any, rows: torch.Tensor, pictures: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Samples captions (pictures, length) from `<start>` on; returns their advantages (pictures,) and mean reward.

        `model` is a plain captioner; it writes without dropout and is in training mode again afterwards.
        """
        model.eval()
        with torch.no_grad():
            features = model.encoder.back(rows)
            length = self.vocabulary.length + 1
            greedy = write(model.decoder, features, TOKENS, length, GREEDY).words
            sampled = write(model.decoder, features, TOKENS, length, SAMPLED).words
        model.train()
        reward, baseline = (self.rewards(captions, pictures) for captions in (sampled, greedy))
        words, _ = padded([[START, *caption] for caption in sampled])
        advantages = torch.from_numpy(reward - baseline).float()
        return words.to(rows.device), advantages.to(rows.device), float(reward.mean())


@dataclass(frozen=True)
class Learner:
    """The captioner that trains, as an objective sees it.

    Attributes:
        model: the prepared captioner.
        plain: the same one as a plain module, for writing captions.
        critic: for the objectives that learn from written captions.
    """

    config: TrainConfig
    model: torch.nn.Module
    plain: Any
    vocabulary: Vocabulary
    critic: SelfCritic | None


def next_word(learner: Learner, batch: Batch, progress: float) -> tuple[torch.Tensor, Metrics]:
    """Computes this part's share of the step's loss: the next word, and that attention should go everywhere.

    `progress` is the share of the training that is over.
    """
    training, decoder = learner.config.training, learner.config.decoder
    inputs, targets = batch.words[:, :-1], batch.words[:, 1:]
    if decoder.mask_words:
        inputs = masked(inputs, decoder.mask_words, len(learner.vocabulary))
    if guessed := training.scheduled_sampling * progress:
        with torch.no_grad():
            first = learner.model(batch.rows, batch.of_rows, inputs)
        inputs = with_own_guesses(inputs, first, guessed)
    output = learner.model(batch.rows, batch.of_rows, inputs)
    loss = next_word_loss(output.logits, targets, training.label_smoothing) * batch.of_words
    if output.attention is None:
        return loss, {}
    penalty = attention_penalty(output.attention, targets) * batch.of_captions
    return loss + decoder.attention_penalty * penalty, {"word_loss": loss.detach(), "penalty": penalty.detach()}


def self_critical(learner: Learner, batch: Batch, progress: float) -> tuple[torch.Tensor, Metrics]:
    """Computes this part's share of the step's loss: sampled captions that beat the greedy ones get more probable."""
    assert learner.critic is not None
    words, advantages, reward = learner.critic.sample(learner.plain, batch.rows[batch.of_rows], batch.pictures)
    logits = learner.model(batch.rows, batch.of_rows, words[:, :-1]).logits
    # How many words the step has is known now: captions of all processes together, but for one that repeats a sample.
    counted = (words[:, 1:] != PAD).sum().float() * bool(batch.of_captions)
    loss = policy_loss(logits, words[:, 1:], advantages) * (counted / reduce(counted))
    return loss, {"reward": reward * batch.of_captions}


@dataclass(frozen=True)
class Objective:
    """An objective as the table has it.

    Attributes:
        loss: a process's share of a step's loss with further metrics, from the learner, its part and the progress.
        description: one line for the report.
        writes: it learns from captions that the captioner writes: it goes on from --start, takes each picture once in
            an epoch, and cannot have sharded weights.
    """

    loss: Callable[[Learner, Batch, float], tuple[torch.Tensor, Metrics]]
    description: str
    writes: bool = False


OBJECTIVES: dict[str, Objective] = {
    "cross-entropy": Objective(next_word, "predict the next word of the training captions"),
    "scst": Objective(self_critical, "get more CIDEr-D for the captions that the model itself writes", writes=True),
}


def next_word_loss(logits: torch.Tensor, targets: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """Returns the mean cross-entropy over the words (captions, length) of the targets; padding does not count."""
    # (captions * length, vocabulary)
    flat = logits.flatten(0, 1).float()
    return F.cross_entropy(flat, targets.flatten(), ignore_index=PAD, label_smoothing=smoothing)


def attention_penalty(attention: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Returns the mean over captions and places of (1 - sum_t alpha_ti)^2.

    That is Xu et al. 2015, eq. 14 over the number of places, so that its weight means the same for any picture size.
    `attention` is (captions, words, places); padding in `targets` (captions, words) does not look anywhere.
    """
    looked = (attention * (targets != PAD)[..., None]).sum(1)  # (captions, places)
    return ((1 - looked) ** 2).mean()


def masked(words: torch.Tensor, share: float, mask: int) -> torch.Tensor:
    """Replaces about `share` of the input words by the number `mask`; `<start>` and padding stay."""
    hidden = (torch.rand(words.shape, device=words.device) < share) & (words != PAD) & (words != START)
    return torch.where(hidden, mask, words)


@torch.no_grad()
def with_own_guesses(words: torch.Tensor, output: Output, share: float) -> torch.Tensor:
    """Replaces about `share` of the input words by what the model wrote there after the true words before.

    Scheduled sampling (Bengio et al. 2015), all positions at once (Duckworth et al. 2019, one pass).
    """
    logits = output.logits[:, :-1].float()
    logits[..., [PAD, START, END]] = -torch.inf  # a caption goes on where the true one does
    guesses = sampled_places(logits.softmax(-1))
    true = words[:, 1:]
    replaced = (torch.rand(true.shape, device=words.device) < share) & (true != PAD)
    return torch.cat([words[:, :1], torch.where(replaced, guesses, true)], 1)


def policy_loss(logits: torch.Tensor, targets: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """Returns the mean over words of minus their caption's advantage times their log-probability.

    That is Rennie et al. 2017, eq. 8, over the number of words. Log-probabilities are those that the words were
    sampled by: among the words that may be written.
    """
    there = targets != PAD
    logs = log_probabilities(logits, TOKENS.never).gather(2, targets[..., None])[..., 0]
    return -(advantages * torch.where(there, logs, 0.0).sum(1)).sum() / there.sum()
