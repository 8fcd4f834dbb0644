"""The offline base models: a small CNN and a small vision transformer of timm, pre-trained here on first use.

They learn which shape the largest thing of a drawn scene has. The transformer, which knows nothing of neighbourhood,
also learns what shape each of its patches shows (token labelling, Jiang et al. 2021, eq. 4), without which it would
need far more pictures. About a minute each on two cores; then kept in the user's cache.
"""

from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed

from labs_common.cache import cached_directory
from labs_common.progress import tracked
from labs_common.scenes.files import TASKS
from labs_common.scenes.world import SHAPES, Scene, picture, scene_generator
from labs_common.tiny import reproducible, train_tiny
from vit_transfer.catalogue import CNN, TRANSFORMER, classifiers

SIDE, PATCH = 48, 8
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
TOKEN_WEIGHT = 3.0  # of the patches' loss beside that of the whole picture
RECIPES: dict[str, dict[str, Any]] = {
    "tiny-vit": {
        "kind": TRANSFORMER,
        "architecture": "vit_tiny_patch16_224",
        "arguments": {"img_size": SIDE, "patch_size": PATCH, "embed_dim": 96, "depth": 4, "num_heads": 3},
        "pictures": 8000, "steps": 650, "batch": 64, "learning_rate": 2e-3,
    },
    # Strides only down to 8: to count things a network has to see where they are.
    "tiny-cnn": {
        "kind": CNN,
        "architecture": "resnet10t", "arguments": {"channels": (24, 48, 64, 96), "output_stride": 8},
        "pictures": 8000, "steps": 450, "batch": 64, "learning_rate": 4e-3,
    },
    # tiny-vit with a distillation token, which begins as a copy of the class token.
    "tiny-deit": {
        "kind": TRANSFORMER,
        "architecture": "deit_tiny_distilled_patch16_224",
        "arguments": {"img_size": SIDE, "patch_size": PATCH, "embed_dim": 96, "depth": 4, "num_heads": 3},
        "base": "tiny-vit",
    },
}  # fmt: skip


def tiny_model(name: str, classes: int, pretrained: bool, size: int = 0) -> Any:
    """Makes a tiny model with a fresh head, pre-trained on shapes (now, if never before) or random."""
    model = _created(RECIPES[name], classes, size)
    if pretrained:
        base = RECIPES[name].get("base", name)
        state = load_file(_pretrained_folder(base) / "model.safetensors")
        if base != name:
            positions = state["pos_embed"]  # (1, tokens, width), the class token's first
            state |= {"dist_token": state["cls_token"], "pos_embed": torch.cat([positions[:, :1], positions], 1)}
        if size not in (0, SIDE) and "pos_embed" in state:
            state["pos_embed"] = resample_abs_pos_embed(
                state["pos_embed"], model.patch_embed.grid_size, num_prefix_tokens=model.num_prefix_tokens
            )
        heads = tuple(f"{head}." for head in classifiers(model))
        model.load_state_dict({key: value for key, value in state.items() if not key.startswith(heads)}, strict=False)
    return model


def _created(recipe: dict[str, Any], classes: int, size: int = 0) -> Any:
    arguments = dict(recipe["arguments"])
    if size and "img_size" in arguments:
        arguments["img_size"] = size
    shown = {"mean": MEAN, "std": STD, "input_size": (3, SIDE, SIDE), "crop_pct": 1.0, "pool_size": None}
    return timm.create_model(recipe["architecture"], num_classes=classes, pretrained_cfg_overlay=shown, **arguments)


def _pretrained_folder(name: str) -> Path:
    """Returns the directory of a tiny model's weights, which are trained if they never were."""
    recipe = {key: value for key, value in RECIPES[name].items() if key != "kind"}  # does not change the weights

    def make(folder: Path) -> None:
        with reproducible():
            save_file(_pretrained(recipe).state_dict(), folder / "model.safetensors")

    return cached_directory(name, recipe | {"format": 1}, make)


def _pretrained(recipe: dict[str, Any]) -> torch.nn.Module:
    """Trains a tiny model on the shape task."""
    name = recipe["architecture"]
    images, labels, tokens = _shapes(recipe["pictures"], f"drawing shapes for the tiny {name}")
    model = _created(recipe, len(SHAPES)).train()
    by_patch = torch.nn.Linear(model.num_features, len(SHAPES) + 1) if hasattr(model, "patch_embed") else None

    def loss_of(places: torch.Tensor) -> torch.Tensor:
        features = model.forward_features((images[places].float() / 255 - MEAN[0]) / STD[0])
        loss = F.cross_entropy(model.forward_head(features), labels[places])
        if by_patch is not None:
            said = by_patch(features[:, model.num_prefix_tokens :])  # (batch, patches, shapes + 1)
            loss = loss + TOKEN_WEIGHT * F.cross_entropy(said.flatten(0, 1), tokens[places].flatten())
        return loss

    parameters = [*model.parameters(), *(by_patch.parameters() if by_patch is not None else ())]
    task = f"pre-training the tiny {name} on shapes"
    train_tiny(parameters, loss_of, len(images), recipe["steps"], recipe["batch"], recipe["learning_rate"], task)
    return model.eval()


def _shapes(count: int, task: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draws pictures (count, 3, side, side), the largest thing's shape (count,), and that at each patch's centre."""
    images, labels, tokens = [], [], []
    for number in tracked(range(count), task, count):
        scene, label = TASKS["shape"].sample(scene_generator(1, number))
        images.append(np.asarray(picture(scene, SIDE)))
        labels.append(label)
        tokens.append(_shape_by_patch(scene))
    return (
        torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(),
        torch.tensor(labels),
        torch.from_numpy(np.stack(tokens)).long(),
    )


def _shape_by_patch(scene: Scene) -> np.ndarray:
    """Numbers the shape at the centre of each patch, from 1, row by row; 0 is background."""
    canvas = Image.new("L", (SIDE, SIDE))
    for thing in scene.things:
        ImageDraw.Draw(canvas).polygon(thing.outline(SIDE).ravel().tolist(), fill=1 + list(SHAPES).index(thing.shape))
    return np.asarray(canvas)[PATCH // 2 :: PATCH, PATCH // 2 :: PATCH].ravel()
