"""What models that write make of captions: how probable they are with a picture."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from clip_lab.model import ClipModel, places_of_end
from clip_lab.objectives import PADDED, suffix_targets
from clip_lab.stored import Loaded
from labs_common.progress import tracked

AT_ONCE = 256


def writes(loaded: Loaded) -> bool:
    """Whether the model predicts words; CLIP and SigLIP do not."""
    return not isinstance(loaded.model, ClipModel)


@torch.no_grad()
def log_likelihoods(
    loaded: Loaded, rows: torch.Tensor, words: torch.Tensor, of_picture: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each caption with its picture, and how many words that is of, the end among them.

    Args:
        loaded: a model that writes.
        rows: of the image tower (pictures, width).
        words: captions as numbers (captions, length).
        of_picture: the row of each one's picture (captions,).

    Returns:
        Both (captions,).
    """
    model = loaded.model
    assert not isinstance(model, ClipModel)
    device = next(model.parameters()).device
    sums, counts = [], []
    for part, at in zip(words.split(AT_ONCE), of_picture.split(AT_ONCE), strict=True):
        part = part.to(device)
        logits = model.next_words(rows[at].to(device), part).float()
        start = torch.ones(len(part), dtype=torch.long, device=device)
        targets = suffix_targets(part, start, places_of_end(model, part))
        loss = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=PADDED, reduction="none")
        sums.append(-loss.sum(1).cpu())
        counts.append((targets != PADDED).sum(1).cpu())
    return torch.cat(sums), torch.cat(counts)


def perplexity(loaded: Loaded, rows: torch.Tensor, captions: Sequence[str], of_picture: Sequence[int]) -> float:
    """Exp of the mean loss over all words of the captions, with their pictures."""
    sums, counts = log_likelihoods(loaded, rows, loaded.words(captions), torch.as_tensor(of_picture))
    return float((-sums.sum() / counts.sum()).exp())


def likelihood_matrix(loaded: Loaded, rows: torch.Tensor, captions: Sequence[str]) -> torch.Tensor:
    """How much more probable each caption is with each picture than with any (captions, pictures).

    log p(caption | picture) less log of its mean over the pictures: else short and common captions would fit all.
    """
    pictures = torch.arange(len(rows))
    per = max(1, AT_ONCE // len(rows))
    starts = range(0, len(captions), per)
    scores = []
    for first in tracked(starts, "reading captions with every picture", len(starts)):
        words = loaded.words(captions[first : first + per])
        every = words.repeat_interleave(len(rows), 0)
        sums, _ = log_likelihoods(loaded, rows, every, pictures.repeat(len(words)))
        scores.append(sums.view(len(words), len(rows)))
    found = torch.cat(scores)
    return found - (found.logsumexp(1, keepdim=True) - torch.log(torch.tensor(float(len(rows)))))
