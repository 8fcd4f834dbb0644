"""Greedy InfoMax: modules learn alone, and what that saves."""

import pytest
import torch
from benchmarks.memory import held_bytes

from zsi_contrastive.networks import GRID, TINY_SIZES, GreedySizes, PatchModules, PixelContext, patches_of


def modules(seed: int = 0, **more: bool) -> tuple[PatchModules, torch.Tensor]:
    torch.manual_seed(seed)
    network = PatchModules(TINY_SIZES, **more)
    for block in network.modules():  # blocks start as their shortcuts; here all of them count
        if isinstance(block, torch.nn.Conv2d):
            torch.nn.init.normal_(block.weight, std=0.05)
    return network, torch.randn(4, 3, 32, 32)


def losses_of(network: PatchModules, pictures: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(7)  # which negatives are drawn
    return network(pictures)[0]


def owner(name: str) -> int:
    return int(name.split(".")[1])


def test_patches_overlap_by_half() -> None:
    pictures = torch.arange(64.0).view(1, 1, 1, 64).expand(1, 3, 64, 64)
    found = patches_of(pictures).view(GRID, GRID, 3, 16, 16)
    assert found[3, 0, 0, 0].tolist() == list(map(float, range(16)))
    assert found[0, 2, 1, 5].tolist() == list(map(float, range(16, 32)))
    torch.testing.assert_close(found[:, :, :, 4, :8], found[:, :, :, 9, :8])


@pytest.mark.parametrize("early", [True, False])
def test_each_modules_loss_trains_only_that_module(early: bool) -> None:
    network, pictures = modules(early=early)
    for module in range(3):
        network.zero_grad()
        losses_of(network, pictures)[module].backward()
        reached = {
            owner(name) for name, p in network.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0
        }
        assert reached == {module}


def test_end_to_end_gradients_do_cross() -> None:
    """The counter-example: with one loss at the top, and nothing between modules, all of them learn by it."""
    network, pictures = modules(isolated=False)
    losses_of(network, pictures).sum().backward()
    reached = {
        owner(name) for name, p in network.named_parameters() if name.startswith("parts") and p.grad.abs().sum() > 0
    }
    assert reached == {0, 1, 2}


def test_gradients_taken_early_are_the_same() -> None:
    found = []
    for early in (True, False):
        network, pictures = modules(early=early)
        loss = losses_of(network, pictures)
        loss.sum().backward()
        found.append((loss.detach(), [p.grad for p in network.parameters()]))
    torch.testing.assert_close(found[0], found[1])


def test_module_by_module_training_frees_activations() -> None:
    greedy, pictures = modules()
    whole, _ = modules(early=False)
    held, of_all = (held_bytes(lambda it=it: losses_of(it, pictures).sum()) for it in (greedy, whole))
    assert held < 0.75 * of_all


def test_context_sees_rows_above_only() -> None:
    torch.manual_seed(0)
    context = PixelContext(5)
    maps = torch.randn(1, 5, 7, 7, requires_grad=True)
    context(maps)[0, :, 3].sum().backward()
    seen = maps.grad[0].abs().sum((0, 2))
    assert (seen[:4] > 0).all()
    assert (seen[4:] == 0).all()


@pytest.mark.alone
def test_paper_sizes() -> None:
    network = PatchModules(GreedySizes())
    assert network.width == 1024
    assert [len(part) for part in network.parts] == [4, 4, 6]  # the first has the stem
    losses, seen = network(torch.randn(2, 3, 64, 64))
    assert losses.shape == (3,)
    assert seen.shape == (2, 1024)
    assert network.ahead == 5
