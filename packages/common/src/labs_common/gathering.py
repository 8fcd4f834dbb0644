"""Losses over all pairs of rows: gathered from all processes and taken in chunks, with their gradients."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from labs_common.device import exact_float32

CHUNK = 4096  # rows: their matrix with as many columns takes 64 MiB in 32 bits


def several_processes() -> bool:
    """Says whether a process group is there."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def gathered(own: torch.Tensor) -> torch.Tensor:
    """Returns the rows of all processes, one after the other; gradients flow back to the process that a row is of.

    Every process must bring the same number of rows. A loss over a process's own rows whose mean over processes is the
    whole loss has the gradient of that after DistributedDataParallel has averaged.
    """
    if not several_processes():
        return own
    return _Gathered.apply(own) if own.is_floating_point() else _all_rows(own)


def mean_over_processes(own: torch.Tensor) -> torch.Tensor:
    """Returns the mean of what each process has, in float32 or more; without a gradient."""
    if not several_processes():
        return own
    total = full_precision(own.detach()).clone()
    torch.distributed.all_reduce(total)
    return total / torch.distributed.get_world_size()


def full_precision(tensor: torch.Tensor) -> torch.Tensor:
    """Returns what autocast left in 16 bits in 32, and all else as it is; gradients flow."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _all_rows(own: torch.Tensor) -> torch.Tensor:
    parts = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, own.contiguous())
    return torch.cat(parts)


class _Gathered(torch.autograd.Function):
    """Gives each process the sum of the gradients that all have of its rows."""

    @staticmethod
    def forward(ctx: Any, own: torch.Tensor) -> torch.Tensor:
        ctx.count = len(own)
        return _all_rows(own)

    @staticmethod
    def backward(ctx: Any, *gradient: torch.Tensor) -> Any:
        whole = gradient[0].clone()
        torch.distributed.all_reduce(whole)
        first = torch.distributed.get_rank() * ctx.count
        return whole[first : first + ctx.count]


def in_chunks(
    part: Callable[..., torch.Tensor], rows: Sequence[torch.Tensor], shared: Sequence[torch.Tensor], chunk: int = CHUNK
) -> torch.Tensor:
    """Sums `part(*rows, *shared)` over chunks of `rows`; a chunk's matrix is forgotten before the next is made.

    All of `rows` are as long as the first; what is floating gets a gradient. It is computed in float32, also under
    autocast: a sum over thousands of pairs, of logits that cosines times up to 100 make, needs more than 8 or 11 bits.
    """
    with exact_float32(rows[0].device):
        total: torch.Tensor = _InChunks.apply(part, chunk, len(rows), *map(full_precision, (*rows, *shared)))
    return total


class _InChunks(torch.autograd.Function):
    """Takes a chunk's gradients as soon as its loss is known, so that its matrix can be forgotten."""

    @staticmethod
    def forward(ctx: Any, part: Callable[..., torch.Tensor], chunk: int, count: int, *all_: torch.Tensor) -> Any:
        wanted = [place for place in range(len(all_)) if ctx.needs_input_grad[place + 3]]  # after part, chunk and count
        kept = {place: torch.zeros_like(all_[place]) for place in wanted}
        length = len(all_[0])
        shared = [tensor.detach().requires_grad_(place in kept) for place, tensor in enumerate(all_) if place >= count]
        total = all_[0].new_zeros(())
        for first in range(0, length, chunk):
            here = slice(first, first + chunk)
            own = [tensor[here].detach().requires_grad_(place in kept) for place, tensor in enumerate(all_[:count])]
            with torch.set_grad_enabled(bool(wanted)):
                loss = part(*own, *shared)
            total += loss.detach()
            if wanted:
                inputs = [*own, *shared]
                gradients = torch.autograd.grad(loss, [inputs[place] for place in wanted])
                for place, gradient in zip(wanted, gradients, strict=True):
                    if place < count:
                        kept[place][here] = gradient
                    else:
                        kept[place] += gradient
        ctx.wanted, ctx.count = wanted, len(all_)
        ctx.save_for_backward(*kept.values())
        return total

    @staticmethod
    def backward(ctx: Any, *gradient: torch.Tensor) -> Any:
        found: list[torch.Tensor | None] = [None] * ctx.count
        for place, kept in zip(ctx.wanted, ctx.saved_tensors, strict=True):
            found[place] = gradient[0] * kept
        return None, None, None, *found
