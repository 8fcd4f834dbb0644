"""Attention over rows of packed conversations, each of which sees only itself.

A packed row holds conversations one after another. `KERNELS` are the ways to attend within them. The first needs
nothing: tokens are gathered into small padded blocks of conversations of like length, causal attention runs on each
block, and the results go back to their places. No mask over the whole row is ever made, nothing crosses a conversation
whatever the cache or mask settings, and the work grows with the squares of the conversations' lengths, not of the
row's. The others are kernels for GPUs that know where conversations begin, or which positions see each other.
"""

import importlib.util
import os
import sys
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from labs_common.errors import LabError, reason_of
from labs_common.progress import console

NAME = "labs_packed"  # for `attn_implementation`
# Conversations are grouped by length, rounded up to a power of two, so that less than half of a block is padding. All
# up to this length share a block: more blocks are more calls of the kernel.
SMALLEST_BLOCK = 32
# Scores of blocks this long are made again in the backward pass: they are as large as the length squared.
RECOMPUTED_FROM = 256
# What decoders hand down to attention that changes nothing in it.
PASSED_ON = {"position_ids", "cache_position", "use_cache", "return_dict", "output_attentions", "output_hidden_states",
             "output_router_logits"}  # fmt: skip
FLEX_BLOCK = 128  # positions to a side of the blocks in which FlexAttention skips what is hidden: its own size

Prefix = list[tuple[torch.Tensor, torch.Tensor]]  # keys and values by layer, (1, key heads, virtual tokens, head width)


class Blocks(NamedTuple):
    """Tells attention where the conversations of a packed row are.

    Attributes:
        gather: per block, (conversations, longest) positions in the row. Padding repeats position 0; it stands to the
            right, where no real token looks.
        back: (row length,) the place of each position of the row in the flattened, concatenated blocks.
        starts: (conversations + 1,) int32, where each begins, and the row's length.
        conversation: (row length,) the number of the conversation to which a position belongs.
        longest: tokens of the longest.
        masks: FlexAttention's masks of the row by sliding window, made once for all layers.
    """

    gather: list[torch.Tensor]
    back: torch.Tensor
    starts: torch.Tensor
    conversation: torch.Tensor
    longest: int
    masks: dict[int | None, BlockMask]


def blocks_of(lengths: list[int]) -> Blocks:
    """Plans how attention finds the conversations of these lengths in their packed row."""
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
    ends = torch.tensor(starts, dtype=torch.int32)
    conversation = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(torch.tensor(lengths))
    return Blocks(gather, back, ends, conversation, max(lengths), {})


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    blocks: Blocks | None = None,
    kernel: str = "auto",
    prefix: Prefix | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Computes attention as transformers calls it; `blocks` of `blocks_of` make it packed.

    `query` is (1, heads, row, head width); key and value have a divisor of its heads. `softcap` is Gemma 2's
    attention soft-cap. With `sliding_window` w a position sees itself and the w - 1 before it. `prefix` stands before
    each conversation (prefix tuning) and counts as positions. Returns (1, row, heads, head width) and no weights.

    Without `blocks` (generation) it is the ordinary masked attention of transformers.

    Raises:
        LabError: the model asks for more than this, such as sinks or a bias of positions.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    unknown = sorted(name for name, value in others.items() if value is not None and name not in PASSED_ON)
    if is_causal is False:
        unknown.append("is_causal")
    if blocks is None and unknown:
        own = sys.modules[type(module).__module__].eager_attention_forward
        return own(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, softcap=softcap,
            sliding_window=sliding_window, **others,
        )  # fmt: skip
    if unknown:
        raise LabError(f"{type(module).__name__} takes {', '.join(unknown)}, which packed attention does not have")
    if blocks is None:
        return _attend(query, key, value, attention_mask, scale, softcap, dropout).transpose(1, 2).contiguous(), None
    if prefix is not None or dropout:  # which only the blocks have
        before = None if prefix is None else prefix[cast(int, module.layer_idx)]
        return _in_blocks(query, key, value, blocks, scale, softcap, sliding_window, dropout, before), None
    if query.device.type != "cpu":
        # Kernels do not cast by themselves, as matrix products do: rotary positions may have made float32 of a query.
        kind = query.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if kernel == "auto":
        kernel = fastest(query, key.shape[1], scale, softcap, sliding_window)
    return KERNELS[kernel](query, key, value, blocks, scale, softcap, sliding_window), None


def fastest(query: torch.Tensor, key_heads: int, scale: float, softcap: float | None, window: int | None) -> str:
    """Chooses the kernel for queries (1, heads, row, head width): the first of a GPU's that does what blocks do.

    The kernels want a GPU from 2020 on (compute capability 8) and 16-bit numbers; else blocks are taken. `flash` is of
    the package flash_attn, where it is installed; `varlen` is PyTorch's own and knows no soft-cap; `flex` is compiled.
    """
    device, dtype = query.device, query.dtype
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return "blocks"
    if torch.cuda.get_device_capability(device)[0] < 8:
        return "blocks"
    names: list[str] = ["flash"] if importlib.util.find_spec("flash_attn") else []
    names.append("varlen" if softcap is None else "flex")
    for name in names:
        if agrees(name, device, dtype, query.shape[1], key_heads, query.shape[3], scale, softcap, window):
            return name
    return "blocks"


@cache
def agrees(
    name: str, device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, width: int,
    scale: float, softcap: float | None, window: int | None,
) -> bool:  # fmt: skip
    """Tells whether a kernel runs here and agrees with blocks, in values and gradients, on two small conversations.

    Kernels that are missing for a GPU, or need more shared memory than it has, say so in many ways, at their first use.
    """
    blocks = blocks_of([70, 130])
    blocks = blocks._replace(
        gather=[part.to(device) for part in blocks.gather], back=blocks.back.to(device),
        starts=blocks.starts.to(device), conversation=blocks.conversation.to(device),
    )  # fmt: skip
    window = None if window is None else min(window, 50)  # one that hides something of so short a conversation
    draw = torch.Generator().manual_seed(0)
    shapes = [(1, count, 200, width) for count in (heads, key_heads, key_heads)]
    values = [torch.randn(shape, generator=draw).to(device, dtype) for shape in shapes]
    found = []
    # Checkpointing around the caller must not see what is recorded here: its own recording would not have it.
    with torch.enable_grad(), torch.autocast(device.type, enabled=False), saved_tensors_hooks(_same, _same):
        try:
            for kernel in (name, "blocks"):
                q, k, v = (value.clone().requires_grad_() for value in values)
                out = KERNELS[kernel](q, k, v, blocks, scale, softcap, window)
                found.append((out.detach(), *torch.autograd.grad(out.float().square().sum(), (q, k, v))))
        except Exception as error:  # each missing kernel raises something else
            return _answer(name, f"no: {reason_of(error)}")
    # Two 16-bit computations of the same differ by some parts in a hundred of the largest value, another mask by more.
    pairs = zip(*found, strict=True)
    alike = all(bool((one - other).abs().max() <= 0.05 * other.abs().max()) for one, other in pairs)
    return _answer(name, "yes" if alike else "no: its values are not those of blocks")


def _answer(kernel: str, said: str) -> bool:
    """Says once whether the kernel is taken: without one, long rows are slow and need more memory than planned."""
    if os.environ.get("RANK", "0") == "0":
        console.print(f"attention by {kernel} on this GPU: {said}")
    return said == "yes"


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _in_blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, blocks: Blocks, scale: float,
    softcap: float | None, window: int | None, dropout: float = 0.0,
    prefix: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:  # fmt: skip
    parts = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]  # (row, heads, head width)
    results = []
    for block in blocks.gather:
        q, k, v = (
            part.index_select(0, block.flatten()).view(*block.shape, *part.shape[1:]).transpose(1, 2) for part in parts
        )  # (conversations, heads, longest, head width)
        if prefix is not None:
            before = [part.expand(len(block), -1, -1, -1).to(k.dtype) for part in prefix]
            k, v = torch.cat([before[0], k], 2), torch.cat([before[1], v], 2)
        out = _causal(q, k, v, scale, softcap, window, dropout)
        results.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(results).index_select(0, blocks.back)[None]


def _flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, blocks: Blocks, scale: float,
    softcap: float | None, window: int | None,
) -> torch.Tensor:  # fmt: skip
    """Runs FlashAttention-2 (Dao 2023) of the package flash_attn."""
    from flash_attn import flash_attn_varlen_func  # not a dependency: it is built on the machine

    out: torch.Tensor = flash_attn_varlen_func(
        *(part[0].transpose(0, 1) for part in (query, key, value)),  # (row, heads, head width)
        blocks.starts, blocks.starts, blocks.longest, blocks.longest, softmax_scale=scale, causal=True,
        window_size=_before(window), softcap=softcap or 0.0,
    )  # fmt: skip
    return out[None]


def _varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, blocks: Blocks, scale: float,
    softcap: float | None, window: int | None,
) -> torch.Tensor:  # fmt: skip
    """Runs PyTorch's attention over conversations of many lengths."""
    assert softcap is None, "varlen_attn has no soft-cap"
    q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))  # (row, heads, head width)
    out = varlen_attn(
        q, k, v, blocks.starts, blocks.starts, blocks.longest, blocks.longest, scale=scale,
        window_size=_before(window), enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    return cast(torch.Tensor, out)[None]


def _in_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, blocks: Blocks, scale: float,
    softcap: float | None, window: int | None,
) -> torch.Tensor:  # fmt: skip
    """Stands for a GPU's kernel where only shapes matter: conversations of one length, no soft-cap and no window."""
    count = len(blocks.starts) - 1
    # (conversations, heads, length, head width), without a copy
    q, k, v = (part[0].unflatten(1, (count, -1)).transpose(0, 1) for part in (query, key, value))
    out = _attend(q, k, v, None, scale, None, 0.0)
    return out.transpose(1, 2).flatten(0, 1)[None]


def _before(window: int | None) -> tuple[int, int]:
    """Says in these kernels' way how many positions before and after itself one sees; -1 is all."""
    return (-1 if window is None else window - 1, 0)


def _flex(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, blocks: Blocks, scale: float,
    softcap: float | None, window: int | None,
) -> torch.Tensor:  # fmt: skip
    """Runs FlexAttention (Dong et al. 2024), compiled on a GPU: no scores of a row in memory, soft-cap or not."""
    if window not in blocks.masks:
        blocks.masks[window] = block_mask(blocks.conversation, window)
    run = _compiled_flex() if query.device.type == "cuda" else cast(Callable[..., torch.Tensor], flex_attention)
    out = run(
        query, key, value, score_mod=_capped(softcap), block_mask=blocks.masks[window], scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return out.transpose(1, 2)


@cache
def _compiled_flex() -> Callable[..., torch.Tensor]:
    return cast(Callable[..., torch.Tensor], torch.compile(flex_attention, dynamic=True))  # rows have many lengths


def block_mask(conversation: torch.Tensor, window: int | None) -> BlockMask:
    """Makes FlexAttention's mask of a row from the numbers of its positions' conversations (row,), which rise.

    torch's own way would hold a yes or no for every pair of positions; here only pairs of blocks are looked at.
    """
    row = len(conversation)
    first = conversation[::FLEX_BLOCK]  # (blocks,), the conversation of each block's first position
    last = torch.cat([conversation[FLEX_BLOCK - 1 :: FLEX_BLOCK], conversation[-1:]])[: len(first)]
    place = torch.arange(len(first), device=conversation.device)
    apart = (place[:, None] - place) * FLEX_BLOCK  # of a block of queries from one of keys
    reach = row if window is None else window
    some = (first[:, None] == last) & (apart > 0) & (apart - FLEX_BLOCK + 1 < reach) | (apart == 0)
    every = (last[:, None] == first) & (apart > 0) & (apart + FLEX_BLOCK - 1 < reach)
    every &= ((place + 1) * FLEX_BLOCK <= row)[:, None]  # the last block of queries may not be whole
    found = []
    for chosen in (some & ~every, every):
        order = chosen.int().sort(dim=1, descending=True, stable=True).indices
        found.append((chosen.sum(1, dtype=torch.int32)[None, None], order.int()[None, None]))
    (partly, whole), sees = found, _sees(conversation, window)
    return BlockMask.from_kv_blocks(*partly, *whole, BLOCK_SIZE=FLEX_BLOCK, mask_mod=sees, seq_lengths=(row, row))


def _sees(conversation: torch.Tensor, window: int | None) -> Callable[..., torch.Tensor]:
    """Makes FlexAttention's mask: whether the query at `i` sees the key at `j`."""

    def sees(batch: torch.Tensor, head: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        seen = (conversation[i] == conversation[j]) & (i >= j)
        return seen if window is None else seen & (i - j < window)

    return sees


@cache  # another function would be compiled again
def _capped(softcap: float | None) -> Callable[..., torch.Tensor] | None:
    """Makes FlexAttention's change of scores: Gemma 2's soft-cap (arXiv 2408.00118, section 2)."""
    if softcap is None:
        return None

    def capped(score: torch.Tensor, batch: Any, head: Any, i: Any, j: Any) -> torch.Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


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


KERNELS: dict[str, Callable[..., torch.Tensor]] = {
    "blocks": _in_blocks,
    "flash": _flash,
    "varlen": _varlen,
    "flex": _flex,
    "shapes": _in_one,
}

AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, eager_mask)
