"""Greedy InfoMax: modules learn alone, and what that saves."""

import math

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


def test_gradients_do_not_vanish_in_fp16() -> None:
    """Tiny ones, which a scaler makes large for the backward pass, are those without autocast."""
    found = []
    for scale, low in ((1.0, False), (2.0**16, True)):
        network, pictures = modules()
        for parameter in network.predictions.parameters():
            parameter.data *= 1e-4
        with torch.autocast("cpu", torch.float16, enabled=low):
            loss = losses_of(network, pictures).sum()
        (loss * scale).backward()
        found.append(torch.cat([p.grad.flatten() / scale for p in network.parts[0].parameters()]))
    exact, rounded = found
    assert (rounded - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize(("skip", "least", "most"), [(1, math.log(17) - 0.05, math.log(17) + 0.15), (0, 0.0, 1.0)])
def test_nothing_can_be_copied_from_the_half_that_patches_share(skip: int, least: float, most: float) -> None:
    """Random blocks of half a patch: a patch says nothing of those below but of the half that it shares with one."""
    torch.manual_seed(0)
    network = PatchModules(TINY_SIZES, ahead=1, skip=skip)
    layer = torch.nn.Linear(12, 12, bias=False)
    optimizer = torch.optim.Adam(layer.parameters(), 0.03)
    losses = []
    for _ in range(150):
        pictures = torch.randn(16, 3, 8, 8).repeat_interleave(4, 2).repeat_interleave(4, 3)
        blocks = patches_of(pictures)[:, :, ::4, ::4]  # the colours of a patch's four (n · 49, 3, 2, 2)
        loss = network._loss(blocks.reshape(16, GRID, GRID, 12), torch.nn.ModuleList([layer]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert least < sum(losses[-30:]) / 30 < most


def test_info_nce_is_exact_under_autocast() -> None:
    network, _ = modules()
    seen, layers = 3 * torch.randn(8, GRID, GRID, network.width), network.predictions[-1]
    found = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(network._loss(seen, layers))
    torch.testing.assert_close(*found, rtol=1e-6, atol=0)


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
