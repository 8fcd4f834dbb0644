"""Message passing over a graph of similar classes, which refines the vectors of unseen ones.

With weights that all neighbours share, sums, means and maxima do not depend on the neighbours' order, and a layer
H' = σ(H W + A H W') is equivariant: P H' = σ((P H) W + (P A Pᵀ)(P H) W') for any permutation P of the classes
(Zaheer et al., "Deep Sets", NeurIPS 2017; Xu et al., ICLR 2019). With a weight for each neighbour's place it is not.
"""

import torch

AGGREGATES = ("sum", "mean", "max")  # of `aggregated`, and of --refine


def neighbour_graph(vectors: torch.Tensor, among: torch.Tensor, count: int) -> torch.Tensor:
    """Finds the `count` rows of `among` (n, d) that are nearest by cosine to each row of `vectors` (m, d).

    Returns a graph (m, n) of 0 and 1. A row that is equal to one of `among` is not its own neighbour.
    """
    one, other = (rows / rows.norm(dim=1, keepdim=True) for rows in (vectors, among))
    cosines = one @ other.T
    same = (vectors[:, None] == among[None]).all(-1)
    cosines = cosines.masked_fill(same, -2)  # less than any cosine
    places = cosines.topk(min(count, len(among)), dim=1).indices
    return torch.zeros_like(cosines).scatter_(1, places, 1.0)


def aggregated(graph: torch.Tensor, states: torch.Tensor, how: str) -> torch.Tensor:
    """Takes the sum, mean or largest values over each node's neighbours (m, d); zeros where it has none.

    `graph` is (m, n) of 0 and 1, `states` are (n, d).
    """
    if how == "max":
        reached = torch.where(graph[..., None] > 0, states[None], -torch.inf).amax(1)  # (m, n, d) to (m, d)
        return torch.where(reached.isinf(), torch.zeros_like(reached), reached)
    found = graph @ states
    return found / graph.sum(1, keepdim=True).clamp(min=1) if how == "mean" else found


def refined(unseen: torch.Tensor, seen: torch.Tensor, how: str, neighbours: int, share: float) -> torch.Tensor:
    """Mixes each unseen vector (unseen, d) with those of its nearest classes: a step without weights to learn.

    It takes (1 - share) of the own vector and `share` of the aggregate over the `neighbours` nearest among seen
    (seen, d) and unseen classes, and brings the mixture back to the own vector's length.
    """
    everything = torch.cat([seen, unseen])
    found = aggregated(neighbour_graph(unseen, everything, neighbours), everything, how)
    mixed = (1 - share) * unseen + share * found
    return mixed / mixed.norm(dim=1, keepdim=True).clamp(min=1e-12) * unseen.norm(dim=1, keepdim=True)
