"""Transformer blocks: causal for the text tower, with cross-attention for CoCa, with a free mask for SimVLM.

For writing they go on word by word, with all beams of all pictures at once, as `labs_common.decoding` says: what was
read is kept as keys and values, those of the picture once for all of its beams.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from labs_common.decoding import NextWord, Tensors


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

    def read(self, states: torch.Tensor) -> torch.Tensor:
        """Returns keys and values of states (…, length, width): (…, 2, heads, length, width of a head)."""
        parts = [layer(states).unflatten(-1, (self.heads, -1)).transpose(-2, -3) for layer in (self.k, self.v)]
        return torch.stack(parts, -4)

    def ask(self, states: torch.Tensor, *known: torch.Tensor) -> torch.Tensor:
        """Attends from a state of each beam (pictures, beams, width) to all that `read` gave.

        It is the picture's, the same for its beams (pictures, 2, …), or each beam's own (pictures, beams, 2, …).
        """
        q = self.q(states).unflatten(-1, (self.heads, -1))  # (pictures, beams, heads, width of a head)
        forms = ["phkw" if one.dim() == 5 else "pbhkw" for one in known]
        keys, values = zip(*(one.unbind(-4) for one in known), strict=True)
        scores = [torch.einsum(f"pbhw,{form}->pbhk", q, key) for form, key in zip(forms, keys, strict=True)]
        shares = (torch.cat(scores, -1) * q.shape[-1] ** -0.5).softmax(-1).split([key.shape[-2] for key in keys], -1)
        seen = [torch.einsum(f"pbhk,{form}->pbhw", *pair) for form, *pair in zip(forms, shares, values, strict=True)]
        return self.out(torch.stack(seen).sum(0).flatten(2))


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
        of_context: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Maps states (batch, length, width) to new ones of the same shape; arguments as in `Attention`.

        `of_context` is the mask of the context.
        """
        states = states + self.attention(self.norm1(states), mask=mask, causal=causal)
        if self.cross is not None and self.norm2 is not None:
            states = states + self.cross(self.norm2(states), context, of_context)
        return states + self.narrow(F.gelu(self.wide(self.norm3(states))))

    def step(
        self, states: torch.Tensor, before: torch.Tensor, picture: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Goes on by one state of each beam (pictures, beams, width); returns the new ones, and `before` with theirs.

        `before` was read of each beam's earlier states, `picture` of its picture: for the second attention where there
        is one, else for the first, which then sees both.
        """
        normed = self.norm1(states)
        before = torch.cat([before, self.attention.read(normed[:, :, None])], -2)
        own = [part for part in (None if self.cross is not None else picture, before) if part is not None]
        states = states + self.attention.ask(normed, *own)
        if self.cross is not None and self.norm2 is not None and picture is not None:
            states = states + self.cross.ask(self.norm2(states), picture)
        return states + self.narrow(F.gelu(self.wide(self.norm3(states)))), before


def nothing_read(blocks: Sequence[Any], rows: torch.Tensor) -> Tensors:
    """Returns what blocks have read of the one beam of each picture before its first word: by their place."""
    sizes = [(part.heads, part.q.out_features // part.heads) for part in (block.attention for block in blocks)]
    return {str(place): rows.new_zeros(len(rows), 1, 2, heads, 0, width) for place, (heads, width) in enumerate(sizes)}


def go_on(
    blocks: Sequence[Any], states: torch.Tensor, fixed: Tensors, moving: Tensors, first: int = 0
) -> tuple[torch.Tensor, Tensors]:
    """Takes a state of each beam through blocks, of which the first has the place `first`: states, what was read."""
    moved = {}
    for place, block in enumerate(blocks, first):
        states, moved[str(place)] = block.step(states, moving[str(place)], fixed.get(str(place)))
    return states, moved


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


class CocaWriter:
    """open_clip's CoCa as `labs_common.decoding` reads it: the library's own code, from the first word every time."""

    def __init__(self, network: Any) -> None:
        self.network = network

    def begin(self, pictures: torch.Tensor) -> tuple[Tensors, Tensors]:
        """Returns `fixed` and `moving` before the first word, given pictures (pictures, 3, size, size)."""
        seen = self.network(pictures)
        words = torch.empty(len(pictures), 1, 0, dtype=torch.long, device=pictures.device)
        return {"feature": seen["image_features"], "places": seen["image_embs"]}, {"words": words}

    def step(self, words: torch.Tensor, fixed: Tensors, moving: Tensors) -> NextWord:
        """Reads one more word of each beam (pictures, beams)."""
        read = torch.cat([moving["words"], words[..., None]], 2)
        feature, places = (fixed[name].repeat_interleave(words.shape[1], 0) for name in ("feature", "places"))
        found = self.network(None, read.flatten(0, 1), feature, places, output_labels=False)["logits"][:, -1]
        return NextWord(found.unflatten(0, words.shape), {"words": read}, None)
