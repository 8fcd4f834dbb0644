"""The families that are compared, and for each the last block: what is unfrozen besides the head."""

from collections.abc import Callable
from typing import Any

import torch
from timm.models.densenet import DenseNet
from timm.models.efficientnet import EfficientNet
from timm.models.inception_v3 import InceptionV3
from timm.models.mobilenetv3 import MobileNetV3
from timm.models.resnet import ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.vgg import VGG
from timm.models.vision_transformer import VisionTransformer
from timm.models.xception import Xception
from timm.models.xception_aligned import XceptionAligned

from labs_common.errors import LabError

# The models of arXiv 2110.05270 by family, under timm's names, with the closest weights where timm has several.
CATALOGUE: dict[str, tuple[str, ...]] = {
    "VGG": ("vgg11", "vgg13", "vgg16", "vgg19"),
    "ResNet": ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    "DenseNet": ("densenet121", "densenet161", "densenet169", "densenet201"),
    "Inception": ("inception_v3",),
    "Xception": ("legacy_xception", "xception41"),
    "EfficientNet": ("efficientnet_b0", "efficientnet_b1", "efficientnet_b2", "efficientnet_b3", "efficientnet_b4"),
    "MobileNet": ("mobilenetv2_100", "mobilenetv3_small_100", "mobilenetv3_large_100"),
    "ViT": ("vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224", "vit_base_patch32_224",
            "vit_large_patch16_224"),
    "DeiT": ("deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224",
             "deit_tiny_distilled_patch16_224", "deit_small_distilled_patch16_224",
             "deit_base_distilled_patch16_224"),
    "Swin": ("swin_tiny_patch4_window7_224", "swin_small_patch4_window7_224", "swin_base_patch4_window7_224"),
}  # fmt: skip
TRANSFORMERS = frozenset({"ViT", "DeiT", "Swin"})


def family(model_name: str) -> str | None:
    """The family that a timm name (with or without a tag) belongs to, if it is in the catalogue."""
    plain = model_name.removeprefix("timm/").split(".")[0]
    return next((name for name, members in CATALOGUE.items() if plain in members), None)


def last_block(model: torch.nn.Module) -> tuple[str, ...]:
    """The prefixes of the parameters of the last block, of any model of a class that the catalogue has.

    - transformers: the last encoder block (`blocks.11`; Swin: `layers.3.blocks.1`);
    - ResNet: the last residual block (`layer4.2`), EfficientNet and MobileNet: the last inverted residual;
    - VGG: the last group of convolutions, between its last two poolings;
    - DenseNet: the last dense block, Inception: the last mixed block, Xception: the exit flow's last convolutions.

    Raises:
        LabError: the model is of another class; its children are listed.
    """
    for kind, rule in RULES.items():
        if isinstance(model, kind):
            return rule(model)
    parts = ", ".join(name for name, _ in model.named_children())
    raise LabError(f"--model: a {type(model).__name__} is not in the catalogue: name its last block with --block "
                   f"(it has {parts})")  # fmt: skip


def block_of(model: torch.nn.Module, block: str | None) -> tuple[str, ...]:
    """`--block`, one prefix or several after commas, or the model's own last block.

    Raises:
        LabError: no module has such a name.
    """
    if block is None:
        return last_block(model)
    prefixes = tuple(part.strip() for part in block.split(",") if part.strip())
    modules = dict(model.named_modules())
    for prefix in prefixes:
        if not prefix or prefix not in modules:
            known = [name for name in modules if name.count(".") <= 1 and name][-8:]
            raise LabError(f"--block {prefix}: the model has no such part; among its last are {', '.join(known)}")
    if not any(True for prefix in prefixes for _ in modules[prefix].parameters()):
        raise LabError(f"--block {block}: has no parameters")
    return prefixes


def classifiers(model: Any) -> tuple[str, ...]:
    """The names of the model's heads (two for a distilled DeiT)."""
    names = model.pretrained_cfg["classifier"]
    return (names,) if isinstance(names, str) else tuple(names)


def _in_order(*path: str) -> Callable[[torch.nn.Module], tuple[str, ...]]:
    """The last child of the last child … below `path`."""

    def rule(model: torch.nn.Module) -> tuple[str, ...]:
        prefix = path[0]
        for _ in path[1:]:
            prefix += f".{list(model.get_submodule(prefix)._modules)[-1]}"
        return (prefix,)

    return rule


def _swin(model: Any) -> tuple[str, ...]:
    stage = f"layers.{len(model.get_submodule('layers')) - 1}.blocks"
    return (f"{stage}.{len(model.get_submodule(stage)) - 1}",)


def _vgg(model: torch.nn.Module) -> tuple[str, ...]:
    layers = list(model.get_submodule("features").named_children())
    pools = [place for place, (_, layer) in enumerate(layers) if isinstance(layer, torch.nn.MaxPool2d)]
    group = layers[pools[-2] + 1 : pools[-1]]
    return tuple(f"features.{name}" for name, layer in group if any(True for _ in layer.parameters()))


def _inverted_residual(model: torch.nn.Module) -> tuple[str, ...]:
    names = [name for name, layer in model.named_modules() if type(layer).__name__ in INVERTED]
    return (names[-1],)


INVERTED = ("InvertedResidual", "DepthwiseSeparableConv", "EdgeResidual", "UniversalInvertedResidual")
RULES: dict[type, Callable[[torch.nn.Module], tuple[str, ...]]] = {
    VisionTransformer: _in_order("blocks", "last"),
    SwinTransformer: _swin,
    ResNet: _in_order("layer4", "last"),
    VGG: _vgg,
    DenseNet: lambda model: ("features.denseblock4",),
    InceptionV3: lambda model: ("Mixed_7c",),
    Xception: lambda model: ("conv3", "bn3", "conv4", "bn4"),
    XceptionAligned: _in_order("blocks", "last"),
    EfficientNet: _inverted_residual,
    MobileNetV3: _inverted_residual,
}
