"""InfoNCE, which both halves train with; the other losses are in `ssl/losses.py`."""

import torch
import torch.nn.functional as F

from labs_common.device import exact_float32
from labs_common.gathering import CHUNK, full_precision, gathered, in_chunks, several_processes


def info_nce_loss(
    queries: torch.Tensor, keys: torch.Tensor, temperature: float = 1.0, group: int = 0, chunk: int = CHUNK
) -> torch.Tensor:
    """Classifies which key belongs to each query: −log exp(q·k) / Σ exp(q·k') (van den Oord et al. 2018, CPC, eq. 4).

    Args:
        queries: (n, d), such as contexts after their W_k.
        keys: (n, d), row by row the one that belongs to each query.
        temperature: products are divided by it.
        group: compares each query only with the keys of its own group of `group` consecutive rows (a last incomplete
            group is left out); 0 compares all with all, over all processes.
        chunk: rows at once.
    """
    if group:
        count = max(1, len(queries) // group)
        size = min(group, len(queries))
        own, others = (full_precision(rows[: count * size]).view(count, size, -1) for rows in (queries, keys))
        with exact_float32(queries.device):
            products = (own @ others.transpose(1, 2) / temperature).flatten(0, 1)  # (count · size, size)
        return F.cross_entropy(products, torch.arange(size, device=queries.device).repeat(count))

    def part(query: torch.Tensor, place: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(query @ keys.T / temperature, place, reduction="sum")

    return in_chunks(part, (queries, own_places(queries)), (gathered(keys),), chunk) / len(queries)


def own_places(rows: torch.Tensor) -> torch.Tensor:
    """Returns the places (n,) of this process's rows among the gathered ones of all processes."""
    first = torch.distributed.get_rank() * len(rows) if several_processes() else 0
    return first + torch.arange(len(rows), device=rows.device)
