"""A cut network computes what the whole one does, gradients included."""

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from labs_common.errors import LabError
from labs_common.frozen.cut import Cut

pytestmark = pytest.mark.quick


class Residual(nn.Module):
    """What is added to the last layer's output crosses beside its input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return (self.last(y.relu()) + y).mean((2, 3))


class Plain(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 5))


class Mixing(nn.Linear):
    """Attention without heads: every token reads all others."""

    def __init__(self) -> None:
        super().__init__(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(super().forward(x), x, x)


class Blocks(nn.Module):
    """A transformer's way: patches, a token that is a parameter, blocks in a list, a mask with a default."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.token = nn.Conv2d(3, 8, 4, 4), nn.Parameter(torch.randn(1, 1, 8))
        self.blocks = nn.ModuleList([nn.Sequential(nn.LayerNorm(8), Mixing(), nn.GELU()) for _ in range(3)])
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(x.shape[0], -1, -1), tokens], 1)
        for block in self.blocks:
            tokens = block(tokens if mask is None else tokens * mask)
        return self.head(tokens[:, 0])


@pytest.mark.parametrize(
    ("network", "trained", "crossing"),
    [
        (Residual(), ("last",), 2),
        (Plain(), ("4",), 1),
        (Plain(), ("0", "4"), 1),
        (Blocks(), ("head",), 1),
        (Blocks(), ("blocks.2", "head"), 1),
        (Blocks(), ("blocks.0", "head"), 1),
    ],
)
def test_front_and_back_are_the_whole_with_gradients(network: nn.Module, trained: Sequence[str], crossing: int) -> None:
    torch.manual_seed(0)
    network.eval()
    images = torch.randn(3, 3, 8, 8)
    cut = Cut(network, trained, images[:2])
    assert len(cut.shapes) == crossing
    rows = cut.front(images).detach()
    assert rows.shape == (3, cut.width)
    torch.testing.assert_close(cut.back(rows), network(images))
    parameters = [p for name, p in network.named_parameters() if name.startswith(tuple(f"{t}." for t in trained))]
    plain = torch.autograd.grad(network(images).square().sum(), parameters)
    through = torch.autograd.grad(cut.back(rows).square().sum(), parameters)
    for one, other in zip(plain, through, strict=True):
        torch.testing.assert_close(one, other)


def test_the_back_may_call_another_module() -> None:
    network, images = Plain().eval(), torch.randn(2, 3, 8, 8)
    cut = Cut(network, ("4",), images)
    assert cut.calls("4")
    assert not cut.calls("0")
    cut.replace("4", nn.Identity())
    assert cut.back(cut.front(images)).shape == (2, 144)


def test_what_cannot_be_cut_says_so() -> None:
    class Mean(Residual):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + x.mean()

    with pytest.raises(LabError, match="not a tensor with a row per picture"):
        Cut(Mean(), ("last",), torch.randn(2, 3, 8, 8))

    class Deciding(Residual):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) if x.sum() > 0 else x

    with pytest.raises(LabError, match="--no-cache"):
        Cut(Deciding(), ("last",), torch.randn(2, 3, 8, 8))
