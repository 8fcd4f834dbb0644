"""Attention over rows of packed conversations, each of which sees only itself.

A packed row holds conversations one after another. Their tokens are gathered into small padded blocks of
conversations of like length, causal attention runs on each block, and the results go back to their places.
No mask over the whole row is ever made, nothing crosses a conversation whatever the cache or mask settings,
and the work grows with the squares of the conversations' lengths, not of the row's.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

NAME = "labs_packed"  # for `attn_implementation`
# Conversations are grouped by length, rounded up to a power of two, so that less than half of a block is padding. All
# up to this length share a block: more blocks are more calls of the kernel.
SMALLEST_BLOCK = 32
# Scores of blocks this long are made again in the backward pass: they are as large as the length squared.
RECOMPUTED_FROM = 256

Blocks = tuple[list[torch.Tensor], torch.Tensor]
Prefix = list[tuple[torch.Tensor, torch.Tensor]]  # keys and values by layer, (1, key heads, virtual tokens, head width)


def blocks_of(lengths: list[int]) -> Blocks:
    """Plans how a packed row of conversations of these lengths is gathered into blocks, and back.

    Returns:
        gather: per block, (conversations, longest) positions in the row. Padding repeats position 0; it
            stands to the right, where no real token looks.
        back: (row length,) the place of each position of the row in the flattened, concatenated blocks.
    """
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    groups: dict[int, list[int]] = {}
    for number, length in enumerate(lengths):
        groups.setdefault(max(SMALLEST_BLOCK, 1 << (length - 1).bit_length()), []).append(number)
    gather, back, offset = [], torch.empty(starts[-1], dtype=torch.long), 0
    for members in groups.values():
        longest = max(lengths[number] for number in members)
        block = torch.zeros(len(members), longest, dtype=torch.long)
        for place, number in enumerate(members):
            length, start = lengths[number], starts[number]
            block[place, :length] = torch.arange(start, start + length)
            first = offset + place * longest
            back[start : start + length] = torch.arange(first, first + length)
        offset += block.numel()
        gather.append(block)
    return gather, back


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    blocks: Blocks | None = None,
    prefix: Prefix | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Computes attention as transformers calls it; `blocks` of `blocks_of` make it packed.

    `query` is (1, heads, row, head width); key and value have a divisor of its heads. `softcap` is Gemma 2's
    attention soft-cap. With `sliding_window` w a position sees itself and the w - 1 before it. `prefix` stands before
    each conversation (prefix tuning) and counts as positions. Returns (1, row, heads, head width) and no weights.

    Without `blocks` (generation) it is the ordinary masked attention of transformers.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if blocks is None:
        return _attend(query, key, value, attention_mask, scale, softcap, dropout).transpose(1, 2).contiguous(), None
    gather, back = blocks
    parts = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]  # (row, heads, head width)
    results = []
    for block in gather:
        q, k, v = (
            part.index_select(0, block.flatten()).view(*block.shape, *part.shape[1:]).transpose(1, 2) for part in parts
        )  # (conversations, heads, longest, head width)
        if prefix is not None:
            before = [part.expand(len(block), -1, -1, -1).to(k.dtype) for part in prefix[cast(int, module.layer_idx)]]
            k, v = torch.cat([before[0], k], 2), torch.cat([before[1], v], 2)
        out = _causal(q, k, v, scale, softcap, sliding_window, dropout)
        results.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(results).index_select(0, back)[None], None


def _causal(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    scale: float, softcap: float | None, window: int | None, dropout: float,
) -> torch.Tensor:  # fmt: skip
    length, seen = q.shape[2], k.shape[2]  # seen: a prefix and the conversation
    if window is not None and seen <= window:
        window = None
    if softcap is None and window is None and seen == length:
        return _attend(q, k, v, None, scale, None, dropout)
    distance = torch.arange(seen - length, seen, device=q.device)[:, None] - torch.arange(seen, device=q.device)
    hidden = (distance < 0) if window is None else (distance < 0) | (distance >= window)
    mask = torch.zeros(length, seen, dtype=q.dtype, device=q.device).masked_fill_(hidden, float("-inf"))
    if length < RECOMPUTED_FROM or not torch.is_grad_enabled():
        return _attend(q, k, v, mask, scale, softcap, dropout)
    return checkpoint(_attend, q, k, v, mask, scale, softcap, dropout, use_reentrant=False)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None,
    scale: float, softcap: float | None, dropout: float,
) -> torch.Tensor:  # fmt: skip
    """Computes attention under an additive mask, or causal without one; (batch, heads, length, head width)."""
    if softcap is None:
        causal = mask is None and q.shape[2] > 1
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, mask, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=grouped
        )
    repeats = q.shape[1] // k.shape[1]
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    # (batch, heads, length, seen); arXiv 2408.00118, section 2
    scores = (q @ k.transpose(2, 3) * (scale / softcap)).tanh() * softcap
    if mask is not None:
        scores = scores + mask
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(v.dtype)
    return F.dropout(weights, dropout) @ v


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, eager_mask)
