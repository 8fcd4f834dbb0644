"""The objectives, one function each. None of them keeps a matrix of all pictures by all captions in memory.

Pictures and captions carry the number of their picture, and what has the same number belongs together: the captions
of one picture are not negatives of each other. In several processes, `gathered` brings what the others have.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from labs_common.gathering import gathered as all_processes
from labs_common.gathering import in_chunks

PADDED = -100


class Columns(NamedTuple):
    """What a process compares its own pictures and captions with: those of all processes.

    Attributes:
        image: embeddings of pictures (pictures, width), of length 1, with `image_ids` (pictures,).
        text: those of captions (captions, width), with `text_ids` (captions,).
    """

    image: torch.Tensor
    text: torch.Tensor
    image_ids: torch.Tensor
    text_ids: torch.Tensor


def clip_loss(
    image: torch.Tensor,
    text: torch.Tensor,
    scale: torch.Tensor,
    image_ids: torch.Tensor,
    text_ids: torch.Tensor,
    columns: Columns | None = None,
    chunk: int = 4096,
) -> torch.Tensor:
    """CLIP's symmetric cross-entropy (Radford et al. 2021, figure 3), with several positives where ids are equal.

    The target of a row is spread evenly over what has its id (Yang et al. 2022, UniCL, eq. 3): with one caption per
    picture this is CLIP's own loss.

    Args:
        image: (pictures, width), of length 1.
        text: (captions, width), of length 1.
        scale: what cosines are multiplied by, 1 / temperature (scalar).
        image_ids: the number of each picture (pictures,).
        text_ids: the number of each caption's picture (captions,).
        columns: what rows are compared with; by default each other.
        chunk: rows at once; memory grows with it times the columns.
    """
    columns = columns or Columns(image, text, image_ids, text_ids)
    by_picture = in_chunks(_cross_entropy, (image, image_ids), (columns.text, columns.text_ids, scale), chunk)
    by_caption = in_chunks(_cross_entropy, (text, text_ids), (columns.image, columns.image_ids, scale), chunk)
    return (by_picture / len(image) + by_caption / len(text)) / 2


def siglip_loss(
    image: torch.Tensor,
    text: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    image_ids: torch.Tensor,
    text_ids: torch.Tensor,
    columns: Columns | None = None,
    chunk: int = 4096,
) -> torch.Tensor:
    """The sigmoid loss of every pair (Zhai et al. 2023, eq. 1): do the two belong together?

    Shapes are those of `clip_loss`; `bias` is added to the scaled cosines (scalar).
    """
    columns = columns or Columns(image, text, image_ids, text_ids)

    def pairs(rows: torch.Tensor, ids: torch.Tensor, others: torch.Tensor, of: torch.Tensor, scale: torch.Tensor,
              bias: torch.Tensor) -> torch.Tensor:  # fmt: skip
        sign = (ids[:, None] == of).to(rows.dtype) * 2 - 1
        return -F.logsigmoid(sign * (scale * rows @ others.T + bias)).sum()

    return in_chunks(pairs, (image, image_ids), (columns.text, columns.text_ids, scale, bias), chunk) / len(image)


def caption_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next word over all words to be predicted (Yu et al. 2022, eq. 3).

    Args:
        logits: (captions, length, vocabulary).
        targets: (captions, length); `PADDED` where nothing is to be predicted.
    """
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=PADDED)


def suffix_targets(words: torch.Tensor, prefix: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """What PrefixLM predicts (Wang et al. 2022, SimVLM, eq. 3): the words after each caption's prefix.

    Args:
        words: (captions, length).
        prefix: how many words each caption's prefix has (captions,), the start token among them.
        last: the place of each one's end token (captions,).

    Returns:
        (captions, length - 1): the next word at each place, `PADDED` within the prefix and after the end.
    """
    place = torch.arange(1, words.shape[1], device=words.device)
    wanted = (place >= prefix[:, None]) & (place <= last[:, None])
    return words[:, 1:].masked_fill(~wanted, PADDED)


def gathered(image: torch.Tensor, text: torch.Tensor, image_ids: torch.Tensor, text_ids: torch.Tensor) -> Columns:
    """What all processes have, one after the other; gradients flow back to the process that an embedding is of.

    Every process must bring the same number of pictures, and of captions.
    """
    return Columns(*(all_processes(own) for own in (image, text, image_ids, text_ids)))


def _cross_entropy(
    rows: torch.Tensor, ids: torch.Tensor, others: torch.Tensor, of: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """Sum over rows of the cross-entropy with a target that is even over the columns of the row's id."""
    logits = scale * rows @ others.T
    together = ids[:, None] == of
    wanted = (logits * together).sum(1) / together.sum(1)
    return (logits.logsumexp(1) - wanted).sum()
