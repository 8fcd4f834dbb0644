"""Where a network looked: attention roll-out for vision transformers, Grad-CAM for everything else."""

import contextlib
from collections.abc import Iterator
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.models.vision_transformer import Attention, VisionTransformer


def heat_maps(model: Any, images: torch.Tensor, classes: torch.Tensor) -> tuple[str, torch.Tensor]:
    """The method's name and a map (batch, height, width) from 0 to 1 of what spoke for `classes` (batch,).

    Roll-out does not depend on the class.
    """
    if isinstance(model, VisionTransformer) and all(type(block.attn) is Attention for block in model.blocks):
        return "attention roll-out", _spread(attention_rollout(model, images), images)
    return "Grad-CAM", _spread(grad_cam(model, images, classes), images)


@torch.no_grad()
def attention_rollout(model: VisionTransformer, images: torch.Tensor) -> torch.Tensor:
    """How much of each patch reaches what the head reads (batch, rows, columns).

    Abnar & Zuidema 2020, eq. 1: the mean over heads, half of it replaced by the identity for the residual path,
    multiplied from the first block to the last.
    """
    with _recorded_attention(model) as attentions:
        model(images)
    rollout = torch.eye(attentions[0].shape[-1], device=images.device)
    for attention in attentions:
        rollout = (attention.mean(1) + torch.eye(attention.shape[-1], device=images.device)) / 2 @ rollout
    first = model.num_prefix_tokens
    read = slice(0, first) if model.global_pool == "token" and first else slice(first, None)
    grid = model.patch_embed.grid_size
    return rollout[:, read, first:].mean(1).unflatten(1, grid)


@torch.enable_grad()
def grad_cam(model: Any, images: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Grad-CAM (Selvaraju et al. 2017, eq. 1 and 2) at the output of the last convolution or stage.

    Returns (batch, rows, columns).
    """
    with torch.no_grad():
        features = model.forward_features(images)
    features = features.detach().requires_grad_()
    scores = model.forward_head(features).gather(1, classes[:, None]).sum()
    (gradient,) = torch.autograd.grad(scores, features)
    if features.dim() == 3:  # tokens
        grid = model.patch_embed.grid_size
        features, gradient = (t[:, -grid[0] * grid[1] :].unflatten(1, grid) for t in (features, gradient))
    channels = 3 if features.dim() == 4 and features.shape[-1] == model.num_features != features.shape[1] else 1
    space = (1, 2) if channels == 3 else (2, 3)
    return F.relu((gradient.mean(space, keepdim=True) * features).sum(channels)).detach()


def overlaid(image: Image.Image, heat: torch.Tensor, side: int = 160) -> Image.Image:
    """The picture beside itself under its map, both `side` pixels high."""
    shown = image.resize((side, side), Image.Resampling.BILINEAR)
    levels = mpl.colormaps["inferno"](np.asarray(heat.cpu()))[..., :3]
    colours = Image.fromarray((255 * levels).astype(np.uint8)).resize((side, side), Image.Resampling.BILINEAR)
    both = Image.new("RGB", (2 * side + 4, side), "white")
    both.paste(shown, (0, 0))
    both.paste(Image.blend(shown, colours, 0.6), (side + 4, 0))
    return both


@contextlib.contextmanager
def _recorded_attention(model: VisionTransformer) -> Iterator[list[torch.Tensor]]:
    """The attention (batch, heads, tokens, tokens) of every block of the next pass, which then is not a fused one."""
    found: list[torch.Tensor] = []
    layers: list[Any] = [block.attn for block in model.blocks]
    before = [layer.fused_attn for layer in layers]
    hooks = [layer.attn_drop.register_forward_hook(lambda _m, _i, out: found.append(out.detach())) for layer in layers]
    for layer in layers:
        layer.fused_attn = False
    try:
        yield found
    finally:
        for layer, fused, hook in zip(layers, before, hooks, strict=True):
            layer.fused_attn = fused
            hook.remove()


def _spread(maps: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Each map from 0 to 1, at the size of the pictures."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    scaled = (maps - low) / (high - low).clamp(min=1e-12)
    grown = F.interpolate(scaled[:, None], size=images.shape[-2:], mode="bilinear", align_corners=False)
    return grown[:, 0]
