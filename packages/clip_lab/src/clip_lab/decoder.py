"""Transformer blocks: causal for the text tower, with cross-attention for CoCa, with a free mask for SimVLM."""

import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    """Multi-head attention of `states` to themselves, or to a `context` of the same width."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(
        self,
        states: torch.Tensor,
        context: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        causal: bool = False,
    ) -> torch.Tensor:
        """Attends from states (batch, length, width) to a context (batch, places, width), by default themselves.

        `mask` (broadcast to batch, heads, length, places) is true where a state may look; with `causal`, only back.
        """
        context = states if context is None else context
        q, k, v = (
            layer(of).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (batch, heads, length, width / heads)
            for layer, of in ((self.q, states), (self.k, context), (self.v, context))
        )
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.out(seen.transpose(1, 2).flatten(2))  # (batch, length, width)


class Block(nn.Module):
    """Pre-norm transformer block; with `cross`, a second attention to a context lies between its halves."""

    def __init__(self, width: int, heads: int, cross: bool = False) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width) if cross else None
        self.cross = Attention(width, heads) if cross else None
        self.norm3 = nn.LayerNorm(width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(
        self,
        states: torch.Tensor,
        context: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        causal: bool = False,
    ) -> torch.Tensor:
        """Maps states (batch, length, width) to new ones of the same shape; arguments as in `Attention`."""
        states = states + self.attention(self.norm1(states), mask=mask, causal=causal)
        if self.cross is not None and self.norm2 is not None:
            states = states + self.cross(self.norm2(states), context)
        return states + self.narrow(F.gelu(self.wide(self.norm3(states))))


class AttentionalPool(nn.Module):
    """Learnt queries that attend to places (Yu et al. 2022, section 3.2; Lee et al. 2019)."""

    def __init__(self, queries: int, width: int, heads: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(queries, width) * width**-0.5)
        self.norm, self.attention, self.after = nn.LayerNorm(width), Attention(width, heads), nn.LayerNorm(width)

    def forward(self, places: torch.Tensor) -> torch.Tensor:
        """Pools places (batch, places, width) to (batch, queries, width)."""
        queries = self.queries.expand(len(places), -1, -1)  # the same for every picture
        return self.after(self.attention(queries, self.norm(places)))


def initialise(module: nn.Module, width: int, layers: int) -> None:
    """Draws the weights of all blocks in `module` as CLIP's text tower does (Radford et al. 2021, released code).

    What writes into the residual stream starts smaller the more layers there are, so that its variance stays the same.
    """
    for part in module.modules():
        if isinstance(part, Attention):
            for layer in (part.q, part.k, part.v):
                nn.init.normal_(layer.weight, std=width**-0.5)
            nn.init.normal_(part.out.weight, std=width**-0.5 * (2 * layers) ** -0.5)
            for layer in (part.q, part.k, part.v, part.out):
                nn.init.zeros_(layer.bias)
        elif isinstance(part, Block):
            nn.init.normal_(part.wide.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(part.narrow.weight, std=width**-0.5 * (2 * layers) ** -0.5)
            nn.init.zeros_(part.wide.bias)
            nn.init.zeros_(part.narrow.bias)
