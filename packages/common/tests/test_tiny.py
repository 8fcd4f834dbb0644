"""The short training of the networks that labs start from offline."""

import pytest
import torch

from labs_common.tiny import reproducible, train_tiny


def trained(threads: int, seed: int = 0) -> torch.Tensor:
    torch.set_num_threads(threads)
    features = torch.randn(200, 300, generator=torch.Generator().manual_seed(1))
    labels = features[:, 0] > 0
    with reproducible(seed):
        network = torch.nn.Linear(300, 2)
        train_tiny(
            network.parameters(),
            lambda places: torch.nn.functional.cross_entropy(network(features[places]), labels[places].long()),
            samples=200, steps=100, batch=32, learning_rate=1e-2, task="training",
        )  # fmt: skip
    assert float((network(features).argmax(1) == labels).double().mean()) > 0.9
    return network.weight.detach()


@pytest.mark.long
def test_it_is_the_same_with_any_threads_and_whatever_was_drawn_before() -> None:
    threads = torch.get_num_threads()
    try:
        torch.manual_seed(5)
        state = torch.get_rng_state()
        first = trained(1)
        assert torch.equal(torch.get_rng_state(), state), "outside, nothing was drawn"
        assert torch.get_num_threads() == 1
        torch.manual_seed(6)
        assert torch.equal(trained(4), first)
        assert not torch.equal(trained(1, seed=1), first)
    finally:
        torch.set_num_threads(threads)
