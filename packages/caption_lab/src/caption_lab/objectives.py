"""What is learnt: the next word of a caption, or captions that score well."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from caption_lab.config import DecodingOptions
from caption_lab.decoders import Output
from caption_lab.decoding import log_probabilities, roll_out
from caption_lab.metrics import CiderD
from caption_lab.vocabulary import END, PAD, START, Vocabulary

GREEDY = DecodingOptions(beam=1)
SAMPLED = DecodingOptions(beam=1, top_p=1.0)


def next_word_loss(logits: torch.Tensor, targets: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """Mean cross-entropy over the words (captions, length) of the targets; padding does not count."""
    return F.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=PAD, label_smoothing=smoothing
    )  # fmt: skip


def attention_penalty(attention: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean over captions and places of (1 - sum_t alpha_ti)^2.

    That is Xu et al. 2015, eq. 14 over the number of places, so that its weight means the same for any picture size.
    `attention` is (captions, words, places); padding in `targets` (captions, words) does not look anywhere.
    """
    looked = (attention * (targets != PAD)[..., None]).sum(1)  # (captions, places)
    return ((1 - looked) ** 2).mean()


def masked(words: torch.Tensor, share: float, mask: int) -> torch.Tensor:
    """Input words of which about `share` are replaced by the number `mask`; `<start>` and padding never are."""
    hidden = (torch.rand(words.shape, device=words.device) < share) & (words != PAD) & (words != START)
    return torch.where(hidden, mask, words)


@torch.no_grad()
def with_own_guesses(words: torch.Tensor, output: Output, share: float) -> torch.Tensor:
    """Input words of which about `share` are replaced by what the model wrote there after the true words before.

    Scheduled sampling (Bengio et al. 2015), all positions at once (Duckworth et al. 2019, one pass).
    """
    logits = output.logits[:, :-1].float()
    logits[..., [PAD, START, END]] = -torch.inf  # a caption goes on where the true one does
    guesses = torch.distributions.Categorical(logits=logits).sample()
    true = words[:, 1:]
    replaced = (torch.rand(true.shape, device=words.device) < share) & (true != PAD)
    return torch.cat([words[:, :1], torch.where(replaced, guesses, true)], 1)


class SelfCritic:
    """Self-critical sequence training (Rennie et al. 2017, eq. 8): the reward of a drawn caption less the greedy one's.

    The reward is CIDEr-D against the picture's training captions.
    """

    def __init__(self, references: Sequence[Sequence[str]], vocabulary: Vocabulary) -> None:
        """`references` are the captions of each training picture."""
        self.vocabulary = vocabulary
        words = [[vocabulary.cleaning.words(caption) for caption in of_picture] for of_picture in references]
        self.cider = CiderD(words)

    def drawn(
        self, model: Any, rows: torch.Tensor, pictures: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Drawn captions (pictures, length) from `<start>` on, their advantages (pictures,), and their mean reward.

        `model` is a plain captioner; it writes without dropout and is in training mode again afterwards.
        """
        model.eval()
        with torch.no_grad():
            features = model.encoder.back(rows)
            length = self.vocabulary.length + 1
            greedy = roll_out(model.decoder, features, length, GREEDY).words
            drawn = roll_out(model.decoder, features, length, SAMPLED).words
        model.train()
        own, baseline = (
            self.cider.scores([self._words(c) for c in captions], pictures) for captions in (drawn, greedy)
        )
        longest = max(map(len, drawn))
        words = torch.tensor([[START, *caption] + [PAD] * (longest - len(caption)) for caption in drawn])
        advantages = torch.from_numpy(own - baseline).float()
        return words.to(rows.device), advantages.to(rows.device), float(own.mean())

    def _words(self, caption: Sequence[int]) -> list[str]:
        return self.vocabulary.decode(caption).split()


def policy_loss(logits: torch.Tensor, targets: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """Mean over captions of minus advantage times the mean log-probability of its words (Rennie et al. 2017, eq. 8).

    Log-probabilities are those that the words were drawn by: among the words that may be written.
    """
    there = targets != PAD
    logs = log_probabilities(logits).gather(2, targets[..., None])[..., 0]
    return -(advantages * torch.where(there, logs, 0.0).sum(1) / there.sum(1)).mean()
