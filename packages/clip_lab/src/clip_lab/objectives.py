"""The objectives, one function each. None of them keeps a matrix of all pictures by all captions in memory.

Pictures and captions carry the number of their picture, and what has the same number belongs together: the captions
of one picture are not negatives of each other. In several processes, `gathered` brings what the others have.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

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
    by_picture = in_chunks(_cross_entropy, chunk, image, columns.text, scale, image_ids, columns.text_ids)
    by_caption = in_chunks(_cross_entropy, chunk, text, columns.image, scale, text_ids, columns.image_ids)
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

    def pairs(rows: torch.Tensor, others: torch.Tensor, scale: torch.Tensor, ids: torch.Tensor, of: torch.Tensor,
              bias: torch.Tensor) -> torch.Tensor:  # fmt: skip
        sign = (ids[:, None] == of).to(rows.dtype) * 2 - 1
        return -F.logsigmoid(sign * (scale * rows @ others.T + bias)).sum()

    return in_chunks(pairs, chunk, image, columns.text, scale, image_ids, columns.text_ids, bias) / len(image)


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
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return Columns(image, text, image_ids, text_ids)
    ids = []
    for own in (image_ids, text_ids):
        parts = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, own)
        ids.append(torch.cat(parts))
    return Columns(_Gathered.apply(image), _Gathered.apply(text), *ids)


class _Gathered(torch.autograd.Function):
    """The rows of all processes, one after the other; each gets back the sum of what all made of its rows."""

    @staticmethod
    def forward(ctx: Any, own: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, own.contiguous())
        ctx.count = len(own)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradient: torch.Tensor) -> Any:
        whole = gradient[0].clone()
        torch.distributed.all_reduce(whole)
        first = torch.distributed.get_rank() * ctx.count
        return whole[first : first + ctx.count]


def _cross_entropy(
    rows: torch.Tensor, others: torch.Tensor, scale: torch.Tensor, ids: torch.Tensor, of: torch.Tensor
) -> torch.Tensor:
    """Sum over rows of the cross-entropy with a target that is even over the columns of the row's id."""
    logits = scale * rows @ others.T
    together = ids[:, None] == of
    wanted = (logits * together).sum(1) / together.sum(1)
    return (logits.logsumexp(1) - wanted).sum()


def in_chunks(
    part: Callable[..., torch.Tensor],
    chunk: int,
    rows: torch.Tensor,
    others: torch.Tensor,
    scale: torch.Tensor,
    ids: torch.Tensor,
    of: torch.Tensor,
    *more: torch.Tensor,
) -> torch.Tensor:
    """Sum of `part(rows, others, scale, ids, of, *more)` over chunks of rows; nothing of a chunk is kept."""
    total: torch.Tensor = _InChunks.apply(part, chunk, ids, of, rows, others, scale, *more)
    return total


class _InChunks(torch.autograd.Function):
    """A chunk's gradients are taken as soon as its loss is known, so that its matrix can be forgotten."""

    @staticmethod
    def forward(
        ctx: Any, part: Callable[..., torch.Tensor], chunk: int, ids: torch.Tensor, of: torch.Tensor,
        rows: torch.Tensor, *shared: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        needed = any(ctx.needs_input_grad)
        others, scale, *more = (tensor.detach().requires_grad_(needed) for tensor in shared)
        total = rows.new_zeros(())
        of_rows = torch.zeros_like(rows)
        of_shared = [torch.zeros_like(tensor) for tensor in shared]
        for first in range(0, len(rows), chunk):
            own = rows[first : first + chunk].detach().requires_grad_(needed)
            with torch.set_grad_enabled(needed):
                loss = part(own, others, scale, ids[first : first + chunk], of, *more)
            total += loss.detach()
            if needed:
                gradients = torch.autograd.grad(loss, (own, others, scale, *more))
                of_rows[first : first + chunk] = gradients[0]
                for kept, new in zip(of_shared, gradients[1:], strict=True):
                    kept += new
        ctx.save_for_backward(of_rows, *of_shared)
        return total

    @staticmethod
    def backward(ctx: Any, *gradient: torch.Tensor) -> Any:
        return None, None, None, None, *(gradient[0] * kept for kept in ctx.saved_tensors)
