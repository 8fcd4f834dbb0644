"""Losses, accuracies and predictions of a split, and heat-maps of the pictures' parts that a prediction comes from."""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from timm.models.cait import Cait
from timm.models.coat import CoaT
from timm.models.vision_transformer import Attention, VisionTransformer

from labs_common.data.classes import LabelledPictures
from labs_common.device import each_tensor, to_device, widest_float
from labs_common.progress import tracked
from labs_common.report.classes import Predictions
from labs_common.report.figures import under_map
from labs_common.sharding import place
from vit_transfer.data import PictureRows, Tensors, saved_transform

TEST_BATCH = 64  # pictures at once: fills a GPU, and needs no memory for gradients


@torch.no_grad()
def scores(model: torch.nn.Module, data: PictureRows, batch_size: int, accelerator: Accelerator) -> dict[str, float]:
    """Computes mean cross-entropy and accuracy on validation pictures; every process takes its share of them.

    The model is in training mode afterwards.
    """
    model.eval()
    device = accelerator.device
    sums = torch.zeros(2, dtype=widest_float(device), device=device)  # on it: no batch is waited for
    mine = range(accelerator.process_index, len(data.labels), accelerator.num_processes)
    longest = -(-len(data.labels) // accelerator.num_processes)
    for first in range(0, longest, batch_size):
        places = list(mine[first : first + batch_size])
        # Sharded weights are gathered by all processes together: one without pictures left repeats one.
        batch = each_tensor(to_device, data.batch(0, places or [0]), device)
        logits = model(batch.inputs).float()
        if places:
            losses = F.cross_entropy(logits, batch.targets, reduction="sum")
            right = (logits.argmax(1) == batch.targets).sum()
            sums += torch.stack([losses, right])
    everyone = accelerator.reduce(sums.float()) if accelerator.num_processes > 1 else sums
    model.train()
    loss, right = (everyone.cpu().double() / len(data.labels)).tolist()
    return {"validation/loss": loss, "validation/accuracy": right}


@torch.no_grad()
def predictions_of(
    model: torch.nn.Module, pictures: LabelledPictures, accelerator: Accelerator, task: str
) -> Predictions:
    """Runs a saved network, whole and in float32, on the pictures of a split; the processes share them."""
    tensors = Tensors(pictures, saved_transform(model))
    sharded = place(model.eval(), accelerator)
    mine = range(accelerator.process_index, len(tensors), accelerator.num_processes)
    found: list[tuple[int, list[float]]] = []
    # Where it is sharded all processes compute together: one without pictures left repeats one.
    longest = -(-len(tensors) // accelerator.num_processes) if sharded else len(mine)
    starts = range(0, longest, TEST_BATCH)
    for first in tracked(starts, task, len(starts), accelerator.is_main_process):
        places = list(mine[first : first + TEST_BATCH])
        logits = model(tensors.batch(0, places or [0]).to(accelerator.device)).float()
        found += zip(places, logits[: len(places)].softmax(1).tolist(), strict=True)
    everyone = gather_object(found) if accelerator.num_processes > 1 else found
    rows = [row for _, row in sorted(everyone)]
    return Predictions(np.array(rows), pictures.labels)


def heat_maps(model: Any, images: torch.Tensor, classes: torch.Tensor) -> tuple[str, torch.Tensor]:
    """Returns a method's name and its maps (batch, height, width) from 0 to 1 of what spoke for `classes` (batch,).

    The method is attention roll-out for plain vision transformers, which does not depend on the class, the gradient of
    the picture for CaiT and CoaT, whose heads read a class token and no place, and Grad-CAM for everything else.
    """
    if isinstance(model, VisionTransformer) and all(type(block.attn) is Attention for block in model.blocks):
        name, maps = "attention roll-out", attention_rollout(model, images)
    elif isinstance(model, (Cait, CoaT)):
        name, maps = "gradient of the picture", input_gradient(model, images, classes)
    else:
        name, maps = "Grad-CAM", grad_cam(model, images, classes)
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    scaled = (maps - low) / (high - low).clamp(min=1e-12)
    grown = F.interpolate(scaled[:, None], size=images.shape[-2:], mode="bilinear", align_corners=False)
    return name, grown[:, 0]


@torch.no_grad()
def attention_rollout(model: VisionTransformer, images: torch.Tensor) -> torch.Tensor:
    """Computes how much of each patch reaches what the head reads (batch, rows, columns).

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
    return rollout[:, read, first:].mean(1).unflatten(1, grid)  # (batch, patches) to (batch, rows, columns)


@torch.enable_grad()
def grad_cam(model: Any, images: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Computes Grad-CAM (Selvaraju et al. 2017, eq. 1 and 2) at the output of the last convolution or stage.

    Returns (batch, rows, columns).
    """
    with torch.no_grad():
        features = model.forward_features(images)
    features = features.detach().requires_grad_()
    said = model.forward_head(features).gather(1, classes[:, None]).sum()
    (gradient,) = torch.autograd.grad(said, features)
    if features.dim() == 3:  # tokens (batch, tokens, width) to (batch, rows, columns, width)
        grid = model.patch_embed.grid_size
        features, gradient = (t[:, -grid[0] * grid[1] :].unflatten(1, grid) for t in (features, gradient))
    # Swin's stages and tokens have their channels last, CNNs' theirs first.
    channels = 3 if features.dim() == 4 and features.shape[-1] == model.num_features != features.shape[1] else 1
    space = (1, 2) if channels == 3 else (2, 3)
    return F.relu((gradient.mean(space, keepdim=True) * features).sum(channels)).detach()


@torch.enable_grad()
def input_gradient(model: Any, images: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Computes the largest slope over the channels (batch, height, width) of each class's logit by each pixel.

    Simonyan et al. 2014, section 3.
    """
    images = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(images).gather(1, classes[:, None]).sum(), images)
    return gradient.abs().amax(1)


def overlaid(image: Image.Image, heat: torch.Tensor, side: int = 160) -> Image.Image:
    """Puts the picture beside itself under its map, both `side` pixels high."""
    both = Image.new("RGB", (2 * side + 4, side), "white")
    both.paste(image.resize((side, side), Image.Resampling.BILINEAR), (0, 0))
    both.paste(under_map(image, heat.cpu().numpy(), side), (side + 4, 0))
    return both


@contextlib.contextmanager
def _recorded_attention(model: VisionTransformer) -> Iterator[list[torch.Tensor]]:
    """Records the attention (batch, heads, tokens, tokens) of every block; fused attention, which hides it, is off."""
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
