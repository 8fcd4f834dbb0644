"""The families of networks that the lab compares, and of each the last block: from it on to the end everything trains.

A family is one entry of `FAMILIES`; the list on the screen, the comparison and `--unfreeze block` all read it there.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.cait import Cait
from timm.models.coat import CoaT
from timm.models.densenet import DenseNet
from timm.models.efficientnet import EfficientNet
from timm.models.inception_v3 import InceptionV3
from timm.models.mobilenetv3 import MobileNetV3
from timm.models.nfnet import NormFreeNet
from timm.models.resnet import ResNet
from timm.models.resnetv2 import ResNetV2
from timm.models.swin_transformer import SwinTransformer
from timm.models.vgg import VGG
from timm.models.vision_transformer import VisionTransformer
from timm.models.xception import Xception
from timm.models.xception_aligned import XceptionAligned

from labs_common.errors import LabError

# Finds the name of the module with which the last block begins.
Rule = Callable[[torch.nn.Module], str]
CNN, TRANSFORMER = "CNN", "transformer"


@dataclass(frozen=True)
class Family:
    """Networks of one architecture.

    Attributes:
        kind: CNN or transformer.
        networks: timm's names of those that are compared.
        last_block: by timm's class, also for networks of that class that are not listed.
    """

    kind: str
    networks: tuple[str, ...]
    last_block: Mapping[type, Rule]


def at(path: str) -> Rule:
    """Returns the rule that names the module at this path, where -1 stands for the last child: blocks.-1."""

    def resolved(model: torch.nn.Module) -> str:
        found: list[str] = []
        for part in path.split("."):
            children = model.get_submodule(".".join(found)).named_children()
            found.append([name for name, _ in children][-1] if part == "-1" else part)
        return ".".join(found)

    return resolved


def last_group(model: torch.nn.Module) -> str:
    """Names the first convolution of a VGG after its last pooling but one."""
    layers = list(model.get_submodule("features").named_children())
    pools = [place for place, (_, layer) in enumerate(layers) if isinstance(layer, torch.nn.MaxPool2d)]
    return f"features.{layers[pools[-2] + 1][0]}"


def last_inverted_residual(model: torch.nn.Module) -> str:
    """Names the last inverted residual block; a 1 x 1 convolution with its norm may follow."""
    kinds = ("InvertedResidual", "DepthwiseSeparableConv", "EdgeResidual", "UniversalInvertedResidual")
    return [name for name, layer in model.named_modules() if type(layer).__name__ in kinds][-1]


# The ten networks of arXiv 2110.05270, Table 1 (`paper_table.csv`), under timm's names, and their relatives.
FAMILIES: dict[str, Family] = {
    "VGG": Family(CNN, ("vgg11", "vgg13", "vgg16", "vgg19"), {VGG: last_group}),
    "ResNet": Family(
        CNN,
        ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnetv2_152"),
        {ResNet: at("layer4.-1"), ResNetV2: at("stages.-1")},  # of version 2 the paper trains the whole last stage
    ),
    "DenseNet": Family(
        CNN, ("densenet121", "densenet161", "densenet169", "densenet201"), {DenseNet: at("features.denseblock4")}
    ),
    "Inception": Family(CNN, ("inception_v3",), {InceptionV3: at("Mixed_7c")}),
    "Xception": Family(
        CNN,
        ("legacy_xception", "xception41"),
        # The exit flow's last two separable convolutions with their norms.
        {Xception: at("conv3"), XceptionAligned: at("blocks.-1")},
    ),
    "EfficientNet": Family(
        CNN,
        ("efficientnet_b0", "efficientnet_b1", "efficientnet_b2", "efficientnet_b3", "efficientnet_b4",
         "tf_efficientnetv2_l"),
        {EfficientNet: last_inverted_residual},
    ),
    "MobileNet": Family(
        CNN,
        ("mobilenetv2_100", "mobilenetv3_small_100", "mobilenetv3_large_100"),
        {MobileNetV3: last_inverted_residual},  # timm builds version 2 as an EfficientNet
    ),
    "NFNet": Family(CNN, ("dm_nfnet_f0", "dm_nfnet_f6"), {NormFreeNet: at("stages.-1.-1")}),
    "ViT": Family(
        TRANSFORMER,
        ("vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224", "vit_base_patch32_224",
         "vit_large_patch16_224", "vit_large_patch32_224"),
        {VisionTransformer: at("blocks.-1")},
    ),
    "DeiT": Family(
        TRANSFORMER,
        ("deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224", "deit_tiny_distilled_patch16_224",
         "deit_small_distilled_patch16_224", "deit_base_distilled_patch16_224"),
        {VisionTransformer: at("blocks.-1")},
    ),
    "Swin": Family(
        TRANSFORMER,
        ("swin_tiny_patch4_window7_224", "swin_small_patch4_window7_224", "swin_base_patch4_window7_224"),
        {SwinTransformer: at("layers.-1.blocks.-1")},
    ),
    # A block of CoaT has its position encodings in common with the other blocks of its stage: they train with it.
    "CoaT": Family(TRANSFORMER, ("coat_lite_tiny", "coat_lite_small"), {CoaT: at("serial_blocks4.-1")}),
    "CaiT": Family(TRANSFORMER, ("cait_xxs24_224", "cait_s24_224"), {Cait: at("blocks_token_only.-1")}),
}  # fmt: skip


def family(model_name: str) -> str | None:
    """Returns the family that lists a timm name (with or without a tag), None if none does."""
    plain = model_name.removeprefix("timm/").split(".")[0]
    return next((name for name, members in FAMILIES.items() if plain in members.networks), None)


def block_of(model: torch.nn.Module, block: str | None) -> tuple[str, ...]:
    """Finds the prefixes of what `--unfreeze block` trains: from a block to the end, nothing behind it is fixed.

    That is the last block of the model's family, or the one that `--block` names. Several, with commas between, train
    by themselves.

    Raises:
        LabError: no module has such a name, or the model is of a class that no family has; its parts are listed.
    """
    if block is None:
        for kind, rule in ((kind, rule) for members in FAMILIES.values() for kind, rule in members.last_block.items()):
            if isinstance(model, kind):
                return to_the_end(model, rule(model))
        parts = ", ".join(name for name, _ in model.named_children())
        raise LabError(
            f"--model: a {type(model).__name__} is not in the catalogue: name its last block with --block "
            f"(it has {parts})"
        )
    prefixes = tuple(part.strip() for part in block.split(",") if part.strip())
    modules = dict(model.named_modules())
    for prefix in prefixes:
        if prefix not in modules:
            known = [name for name in modules if name.count(".") <= 1 and name][-8:]
            raise LabError(f"--block {prefix}: the model has no such part; among its last are {', '.join(known)}")
    if not any(True for prefix in prefixes for _ in modules[prefix].parameters()):
        raise LabError(f"--block {block}: has no parameters")
    return prefixes if len(prefixes) > 1 else to_the_end(model, prefixes[0])


def to_the_end(model: torch.nn.Module, first: str) -> tuple[str, ...]:
    """Names the module `first` and all with parameters that timm registers after it, which is the order of forward."""
    found, inner = [first], first
    while inner:
        above, _, own = inner.rpartition(".")
        children = list(model.get_submodule(above).named_children())
        later = children[[name for name, _ in children].index(own) + 1 :]
        found += [f"{above}.{name}".lstrip(".") for name, child in later if any(True for _ in child.parameters())]
        inner = above
    return tuple(found)


def classifiers(model: Any) -> tuple[str, ...]:
    """Returns the names of a timm model's heads: one, or two for a distilled DeiT."""
    names = model.pretrained_cfg["classifier"]
    return (names,) if isinstance(names, str) else tuple(names)
