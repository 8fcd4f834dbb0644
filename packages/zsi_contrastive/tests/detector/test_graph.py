"""Message passing: what the order of neighbours changes, and what it does not."""

import pytest
import torch

from zsi_contrastive.detector.graph import AGGREGATES, aggregated, neighbour_graph, refined

pytestmark = pytest.mark.quick

torch.manual_seed(0)
STATES, OWN, OTHERS = torch.randn(7, 4), torch.randn(4, 3), torch.randn(4, 3)
GRAPH = (torch.rand(7, 7) < 0.4).float().fill_diagonal_(0)
ORDER = torch.randperm(7)


def propagated(
    graph: torch.Tensor, states: torch.Tensor, own: torch.Tensor, of_neighbours: torch.Tensor, how: str
) -> torch.Tensor:
    """A layer H' = tanh(H W + agg(A, H) W') (n, e) on a square graph (n, n), states (n, d), weights (d, e)."""
    return torch.tanh(states @ own + aggregated(graph, states, how) @ of_neighbours)


@pytest.mark.parametrize("how", AGGREGATES)
def test_layers_are_equivariant(how: str) -> None:
    p = torch.eye(7)[ORDER]
    found = propagated(p @ GRAPH @ p.T, p @ STATES, OWN, OTHERS, how)
    torch.testing.assert_close(found, p @ propagated(GRAPH, STATES, OWN, OTHERS, how))


@pytest.mark.parametrize("how", AGGREGATES)
def test_aggregates_do_not_depend_on_the_order_of_neighbours(how: str) -> None:
    torch.testing.assert_close(aggregated(GRAPH[:, ORDER], STATES[ORDER], how), aggregated(GRAPH, STATES, how))
    for node in range(7):
        members = STATES[GRAPH[node] > 0]
        expected = {"sum": members.sum(0), "mean": members.mean(0), "max": members.amax(0) if len(members) else None}
        if len(members):
            torch.testing.assert_close(aggregated(GRAPH, STATES, how)[node], expected[how])


def test_a_weight_for_each_neighbours_place_breaks_it() -> None:
    """The counter-example: a node that weighs its first neighbour otherwise than its second."""
    weights = torch.arange(1.0, 8.0)

    def by_place(graph: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        return torch.tanh(states @ OWN + (graph * weights) @ states @ OTHERS)

    p = torch.eye(7)[ORDER]
    found = by_place(p @ GRAPH @ p.T, p @ STATES)
    assert not torch.allclose(found, p @ by_place(GRAPH, STATES), atol=1e-2)


def test_refined_vectors() -> None:
    seen, unseen = torch.randn(9, 5), torch.randn(4, 5)
    graph = neighbour_graph(unseen, torch.cat([seen, unseen]), 3)
    assert graph.sum(1).tolist() == [3.0] * 4
    assert graph[:, 9:].diagonal().sum() == 0, "nobody is its own neighbour"
    for how in AGGREGATES:
        torch.testing.assert_close(refined(unseen, seen, how, 3, 0.0), unseen)
        found = refined(unseen, seen, how, 3, 0.4)
        torch.testing.assert_close(found.norm(dim=1), unseen.norm(dim=1))
        order = torch.randperm(4)
        torch.testing.assert_close(refined(unseen[order], seen, how, 3, 0.4), found[order])
        torch.testing.assert_close(refined(unseen, seen[torch.randperm(9)], how, 3, 0.4), found)
    one = refined(unseen, seen, "mean", 2, 0.5)[0]
    everything = torch.cat([seen, unseen])
    cosines = torch.cosine_similarity(unseen[:1], everything)
    cosines[9] = -2
    mixed = 0.5 * unseen[0] + 0.5 * everything[cosines.topk(2).indices].mean(0)
    torch.testing.assert_close(one, mixed / mixed.norm() * unseen[0].norm())
