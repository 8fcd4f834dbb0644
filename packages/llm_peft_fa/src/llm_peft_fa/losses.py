"""Cross-entropy on chosen positions in chunks: the logits of all positions never exist at once."""

import contextlib
from typing import Any

import torch

# Elements of one chunk's logits on a CPU: 16 MiB in float32, or 32 positions of Llama 3's vocabulary of 128,256.
CHUNK_LOGITS = 1 << 22
# On a GPU each chunk reads the whole head from memory, so a chunk is as large as is cheap: its logits in float32 are
# this share of the memory, and up to four times that exists at once (logarithms beside them, and both in 16 bits too).
CHUNK_SHARE = 1 / 64
# From here on a matrix product is bound by arithmetic; a larger chunk would gain nothing.
MOST_POSITIONS = 2048


def chunk_positions(vocabulary: int, memory: int | None) -> int:
    """Counts the positions whose logits exist at once on a GPU with `memory` bytes in all; None is a CPU.

    Total memory and not free one, so that the same machine always adds up the same sums.
    """
    if memory is None:
        return max(1, CHUNK_LOGITS // vocabulary)
    return min(MOST_POSITIONS, max(1, int(memory * CHUNK_SHARE) // (4 * vocabulary)))


def device_memory(device: torch.device) -> int | None:
    """Returns the bytes of a GPU's whole memory; None for a CPU."""
    return int(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else None


def chunked_cross_entropy(
    hidden: torch.Tensor,
    head: torch.nn.Linear,
    targets: torch.Tensor,
    softcap: float | None = None,
    chunk: int | None = None,
    scale: float = 1.0,
) -> torch.Tensor:
    """Sums -log softmax(cap(s (hidden @ W^T + b)))[target] over positions.

    Args:
        hidden: (positions, width), only the positions that predict a learnt token.
        head: the vocabulary projection, W (vocabulary, width).
        targets: (positions,) the learnt tokens.
        softcap: Gemma 2's final soft-cap c (arXiv 2408.00118, section 2): z becomes c tanh(z / c).
        chunk: positions whose logits exist at once; None takes what suits the device.
        scale: the factor s of the logits, see `model.logit_scale`.

    Returns:
        A float32 scalar. Gradients flow to `hidden`, and to the head where it trains; they are computed
        together with the loss, chunk by chunk, so memory holds the logits of one chunk.
    """
    with _gathered(head):
        rows = chunk or chunk_positions(head.weight.shape[0], device_memory(hidden.device))
        return _ChunkedCrossEntropy.apply(hidden, head.weight, head.bias, targets, softcap, scale, rows)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        softcap: float | None,
        scale: float,
        rows: int,
    ) -> torch.Tensor:
        if torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        weight_ = weight.to(hidden.dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight_) if ctx.needs_input_grad[1] else None
        d_bias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
        for start in range(0, len(hidden), rows):
            piece = slice(start, start + rows)
            z, y = hidden[piece] @ weight_.T, targets[piece, None]  # (rows, vocabulary), (rows, 1)
            z = (z if bias is None else z + bias).float()
            if scale != 1:
                z = z.mul_(scale)
            capped = None
            if softcap is not None:
                capped = z.div_(softcap).tanh_()
                z = capped * softcap
            log_p = torch.log_softmax(z, -1)
            del z  # a chunk of a GPU is a gigabyte
            total -= log_p.gather(1, y).sum()
            if d_hidden is None and d_weight is None and d_bias is None:
                continue
            d_z = log_p.exp_().scatter_add_(1, y, torch.full_like(y, -1, dtype=log_p.dtype))  # softmax - one-hot
            if capped is not None:
                d_z *= 1 - capped.square_()
            if scale != 1:
                d_z *= scale
            d_z = d_z.to(hidden.dtype)
            if d_hidden is not None:
                torch.mm(d_z, weight_, out=d_hidden[piece])
            if d_weight is not None:
                d_weight.addmm_(d_z.T, hidden[piece])
            if d_bias is not None:
                d_bias += d_z.sum(0)
            del d_z, log_p, capped
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return *(None if saved is None else saved * gradients[0] for saved in ctx.saved_tensors), None, None, None, None


def _gathered(head: torch.nn.Linear) -> contextlib.AbstractContextManager[Any]:
    """Makes the weight whole for a while where DeepSpeed ZeRO-3 has it in parts over the processes."""
    if hasattr(head.weight, "ds_status"):
        import deepspeed  # of an extra
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        if head.weight.ds_status != ZeroParamStatus.AVAILABLE:  # a small or tied one may be whole already
            return deepspeed.zero.GatheredParameters([head.weight])
    return contextlib.nullcontext()
