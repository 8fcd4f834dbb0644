"""Backbones by name, each under a feature pyramid: a tiny one, torchvision's ResNets, timm's networks."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import freeze_batch_norm_2d
from torch import nn
from torchvision.models import get_model_weights, list_models
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from labs_common.errors import LabError, reason_of
from labs_common.saved import load_exactly, read_weights, timm_arguments
from zsi_contrastive import TINY
from zsi_contrastive.networks import TINY_CHANNELS, TinyBody

STAGES = 4  # of a ResNet, after its stem


class Pyramid(nn.Module):
    """A network that gives a list of feature maps, and torchvision's feature pyramid on them."""

    def __init__(self, body: nn.Module, channels: list[int], out_channels: int, pooled: bool) -> None:
        """Takes the `channels` of the body's maps; `pooled` adds a coarser level."""
        super().__init__()
        self.body = body
        self.fpn = FeaturePyramidNetwork(channels, out_channels, LastLevelMaxPool() if pooled else None)
        self.out_channels = out_channels

    def train(self, mode: bool = True) -> "Pyramid":
        """Switches to training mode, but for stages that are frozen: no statistic of theirs moves."""
        super().train(mode)
        for stage in self.body.children():
            if not any(parameter.requires_grad for parameter in stage.parameters()):
                stage.eval()
        return self

    def forward(self, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns the levels by name, finest first."""
        maps = OrderedDict((str(place), found) for place, found in enumerate(self.body(pictures)))
        return self.fpn(maps)


def make_backbone(
    name: str, pretrained: bool | str, weights: Path | None, frozen_stages: int, channels: int
) -> nn.Module:
    """Puts a backbone under a pyramid of `channels`; its stem and its first `frozen_stages` stages (of 4) do not train.

    Where nothing that trains comes before a layer, autograd keeps none of its activations. `weights` are of the plain
    network, without the pyramid; they win over `pretrained`, which may name one of torchvision's sets. Networks of
    torchvision and timm have their batch norms fixed, because a detector's batches are too small for statistics.

    Raises:
        LabError: there is no such network, it cannot be had, or the weights do not fit.
    """
    if name == TINY:
        tiny = Pyramid(TinyBody(), list(TINY_CHANNELS[1:]), channels, pooled=False)
        _load(tiny.body, weights)
        for stage in list(tiny.body.children())[: 0 if frozen_stages == 0 else frozen_stages + 1]:
            stage.requires_grad_(False)
        return tiny
    try:
        if name.startswith(("resnet", "resnext", "wide_resnet")) and name in list_models():
            chosen = None
            if pretrained and weights is None:
                chosen = get_model_weights(name)[pretrained if isinstance(pretrained, str) else "DEFAULT"]
            # torchvision counts from the other end, and its fifth trainable layer is the stem.
            backbone = resnet_fpn_backbone(
                backbone_name=name, weights=chosen, trainable_layers=STAGES + (frozen_stages == 0) - frozen_stages
            )
            given = _load(backbone.body, weights)
            # A converted detector has its pyramid too.
            pyramid = {name.removeprefix("fpn."): given[name] for name in given if name.startswith("fpn.")}
            if pyramid:
                load_exactly(backbone.fpn, pyramid, f"--backbone-weights {weights}")
            return backbone
        return _of_timm(name, bool(pretrained), weights, frozen_stages, channels)
    except LabError:
        raise
    except Exception as error:  # no network, no such weights; a file that was cut off can fail anywhere
        raise LabError(
            f"--backbone {name}: cannot be had ({reason_of(error)}); give --backbone-weights, or "
            "--no-backbone-pretrained"
        ) from error


def _of_timm(name: str, pretrained: bool, weights: Path | None, frozen_stages: int, channels: int) -> nn.Module:
    arguments = timm_arguments(name, 0, "--backbone")
    plain = name.removeprefix("timm/")
    known: Any = timm.create_model(plain, features_only=True, **arguments).feature_info
    levels = [place for place, reduction in enumerate(known.reduction()) if reduction in (4, 8, 16, 32)]
    if len(levels) != STAGES:
        raise LabError(f"--backbone {name}: has feature maps at strides {known.reduction()}, not at 4, 8, 16 and 32")
    body = timm.create_model(
        plain, features_only=True, out_indices=levels, pretrained=pretrained and weights is None, **arguments
    )
    _load(body, weights)
    body = freeze_batch_norm_2d(body)
    if frozen_stages:
        last = body.feature_info.module_name()[frozen_stages - 1].replace(".", "_")
        if last not in dict(body.named_children()):
            raise LabError(f"--frozen-stages: the stages of {name} have no order; take 0")
        for child_name, child in body.named_children():
            child.requires_grad_(False)
            if child_name == last:
                break
    return Pyramid(body, body.feature_info.channels(), channels, pooled=True)


def _load(body: nn.Module, weights: Path | None) -> dict[str, torch.Tensor]:
    if weights is None:
        return {}
    state = read_weights(weights, "--backbone-weights")
    for child, _ in body.named_children():  # a feature network of timm calls stages_0 what is stages.0 in the plain one
        whole = child.replace("_", ".") + "."
        renamed = {name: name.replace(whole, f"{child}.", 1) if name.startswith(whole) else name for name in state}
        state = {renamed[name]: tensor for name, tensor in state.items()}
    load_exactly(body, state, f"--backbone-weights {weights}")
    return state
