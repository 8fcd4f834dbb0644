"""The last block of a vision transformer for the few tokens that the head reads: same output, a fraction of the work.

A head that reads the class token needs the last block's output for that token alone: keys and values of all tokens,
everything else for one. And as the block's input x is a constant (the front is frozen), not even keys and values have
to be computed. With y_j = g * n_j + c the layer norm's output for token j (n_j without its affine part, a constant
too), the score of head h is

    q . (W_k y_j + b_k) = (g * (W_k^T q)) . n_j + q . (W_k c + b_k)

where the last term is the same for all j and cancels in the softmax, and the attended value is

    sum_j a_j (W_v y_j + b_v) = W_v (g * sum_j a_j n_j + c) + b_v      since sum_j a_j = 1.

So the cost falls from tokens * width^2 to heads * tokens * width, with gradients for all of the block's parameters.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm
from timm.models.vision_transformer import Attention, Block, VisionTransformer


class FirstTokens(torch.nn.Module):
    """Block `block` for the first `count` tokens; its children are the block's own, under their own names."""

    def __init__(self, block: Block, count: int) -> None:
        super().__init__()
        self.count = count
        for name, child in block.named_children():
            self.add_module(name, child)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Turns (batch, tokens, width) into (batch, count, width)."""
        own: Any = self
        first = x[:, : self.count]
        first = first + own.drop_path1(own.ls1(self._attended(x)))
        return first + own.drop_path2(own.ls2(own.mlp(own.norm2(first))))

    def _attended(self, x: torch.Tensor) -> torch.Tensor:
        norm: Any = self.norm1
        attention: Any = self.attn
        heads, size = attention.num_heads, attention.head_dim
        n = F.layer_norm(x, norm.normalized_shape, eps=norm.eps)  # (batch, tokens, width)
        first = n[:, : self.count] * norm.weight + norm.bias
        w_q, w_k, w_v = attention.qkv.weight.unflatten(0, (3, heads, size))  # (heads, size, width) each
        bias = attention.qkv.bias
        q = F.linear(first, w_q.flatten(0, 1), None if bias is None else bias[: heads * size])
        q = q.unflatten(2, (heads, size)) * attention.scale  # (batch, count, heads, size)
        reading = torch.einsum("bchs,hsd->bchd", q, w_k) * norm.weight
        scores = reading.flatten(1, 2) @ n.mT  # (batch, count * heads, tokens)
        read = (scores.softmax(2).to(n.dtype) @ n).unflatten(1, (self.count, heads))
        read = read * norm.weight + norm.bias  # (batch, count, heads, width)
        value = torch.einsum("bchd,hsd->bchs", read, w_v).flatten(2)
        if bias is not None:
            value = value + bias[2 * heads * size :]
        return attention.proj_drop(attention.proj(value))


def read_tokens(model: torch.nn.Module) -> int:
    """Counts the first tokens that the head of a timm model reads; 0 if it reads others too, or that is not known."""
    if not isinstance(model, VisionTransformer) or model.attn_pool is not None or model.global_pool != "token":
        return 0
    return model.num_prefix_tokens if type(model).__name__ == "VisionTransformerDistilled" else 1


def can_be_shortened(block: torch.nn.Module) -> bool:
    """Tells whether `FirstTokens` computes what the block does: plain attention after a layer norm, no dropout."""
    if type(block) is not Block or type(block.attn) is not Attention:
        return False
    attention, norm = block.attn, block.norm1
    plain = (attention.q_norm, attention.k_norm, attention.norm)
    return (
        all(isinstance(layer, torch.nn.Identity) for layer in plain)
        and attention.gate is None
        and attention.attn_drop.p == 0
        and type(norm) in (torch.nn.LayerNorm, LayerNorm)
        and norm.weight is not None
        and norm.bias is not None
    )
