"""The networks: encoders by name, and the heads that methods put on them."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import get_model, list_models

from labs_common.errors import LabError, reason_of
from labs_common.fitting import BATCH_NORM
from labs_common.saved import timm_arguments
from zsi_contrastive import TINY
from zsi_contrastive.networks import TINY_CHANNELS, TINY_SIZES, GreedySizes, PatchModules, TinyBody
from zsi_contrastive.ssl.config import RESNETS, EncoderOptions, PretrainConfig

NORMS = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm}


class Encoder(nn.Module):
    """A network without its classifier: pictures (n, 3, side, side) to features (n, width).

    Attributes:
        network: the network by itself, whose weights other labs and the detector can read.
    """

    def __init__(self, network: nn.Module, width: int) -> None:
        super().__init__()
        self.network, self.width = network, width

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """Computes features (n, width)."""
        out = self.network(pictures)
        # The tiny body gives its maps (n, channels, h, w), the coarsest last.
        return out[-1].mean((2, 3)) if isinstance(out, list) else out


def make_encoder(options: EncoderOptions) -> Encoder:
    """Makes the encoder with random weights.

    Raises:
        LabError: there is no such network, or it does not take pictures of that side.
    """
    name = options.backbone
    if name == TINY:
        return Encoder(TinyBody(), TINY_CHANNELS[-1])
    if name.startswith(RESNETS) and name in list_models():
        network: Any = get_model(name, weights=None)
        width = network.fc.in_features
        network.fc = nn.Identity()
        if options.stem == "small":
            network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
            network.maxpool = nn.Identity()
        return Encoder(network, width)
    arguments = timm_arguments(name, options.side, "--backbone")
    if options.drop_path:
        arguments["drop_path_rate"] = options.drop_path
    if "img_size" in arguments:
        arguments["dynamic_img_size"] = True  # local crops are smaller
    plain = name.removeprefix("timm/")
    try:
        try:
            network = timm.create_model(plain, num_classes=0, **arguments)
        except TypeError:  # a network of fixed side that is no ViT
            arguments.pop("dynamic_img_size")
            network = timm.create_model(plain, num_classes=0, **arguments)
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise LabError(f"--backbone {name}: cannot be made ({reason_of(error)})") from error
    return Encoder(network, network.num_features)


def make_head(
    widths: Sequence[int], norm: str, closed: bool = False, activation: type[nn.Module] = nn.ReLU
) -> nn.Sequential:
    """Makes linear layers between these widths, with a normalisation (`batch`, `layer`, `none`) and an activation each.

    The last has no activation, and a normalisation only if it is `closed`. Layers before one have no bias.
    """
    layers: list[nn.Module] = []
    for place, (before, after) in enumerate(pairwise(widths), 2):
        last = place == len(widths)
        normed = norm != "none" and (closed or not last)
        layers.append(nn.Linear(before, after, bias=not normed))
        if normed:
            layers.append(NORMS[norm](after))
        if not last:
            layers.append(activation())
    return nn.Sequential(*layers)


class DinoHead(nn.Module):
    """Layers, a bottleneck of length 1, and cosines with prototypes (Caron et al. 2021, appendix C).

    First weights are those of its authors' code.
    """

    def __init__(self, widths: Sequence[int], prototypes: int, norm: str) -> None:
        """`widths` are those of features, hidden layers and bottleneck."""
        super().__init__()
        self.layers = make_head(widths, norm, activation=nn.GELU)
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        self.prototypes = nn.Parameter(nn.Linear(widths[-1], prototypes, bias=False).weight.detach())

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Computes logits (n, prototypes)."""
        return F.linear(F.normalize(self.layers(features), dim=1), F.normalize(self.prototypes, dim=1))


def encoded(encoder: Encoder, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Computes the features of each part by itself; running statistics of batch norms move once, to the parts' mean.

    As lightly's `SplitBatchNorm`: of K steps, the k-th has momentum m / (K - (K - k) m), so that all weigh m / K.
    """
    modules = encoder.modules() if len(parts) > 1 else ()
    norms = [(module, module.momentum) for module in modules if isinstance(module, BATCH_NORM) and module.momentum]
    features = []
    for later, part in zip(reversed(range(len(parts))), parts, strict=True):
        for norm, momentum in norms:
            norm.momentum = momentum / (len(parts) - later * momentum)
        features.append(encoder(part))
    for norm, momentum in norms:
        norm.momentum = momentum
    return features


class Learner(nn.Module):
    """An encoder with its projection, and a prediction on that where the method has one.

    A teacher is a copy of it without the prediction.
    """

    def __init__(
        self, encoder: Encoder, projection: nn.Module, prediction: nn.Module | None = None, splits: int = 0
    ) -> None:
        """`splits` are the parts of each view that go through apart; 0 takes views together."""
        super().__init__()
        self.encoder, self.projection, self.prediction, self.splits = encoder, projection, prediction, splits

    def forward(self, views: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Computes the output for each view (n, outputs), and the features of those of the first size (n, width).

        Views of one size go through together, so they share the statistics of batch norms, unless there are `splits`:
        then each view has its own in the heads, and each part of it in the encoder.
        """
        outputs: list[torch.Tensor] = []
        features: list[torch.Tensor] = []  # of the first size
        while len(outputs) < len(views):
            first = len(outputs)
            alike = [view for view in views[first:] if view.shape == views[first].shape]
            if self.splits:
                alike = alike[:1]
            parts = torch.cat(alike).chunk(self.splits or 1)
            seen = torch.cat(encoded(self.encoder, parts))  # (alike · n, width)
            if views[first].shape == views[0].shape:
                features += seen.chunk(len(alike))
            out = self.projection(seen)
            out = out if self.prediction is None else self.prediction(out)
            outputs += out.chunk(len(alike))
        return outputs, features


def with_projection(
    config: PretrainConfig, norm: bool = True, closed: bool = False, prediction: bool = False
) -> Learner:
    """Makes the learner of SimCLR (`closed` by a norm), MoCo (without any) and BYOL (with a prediction)."""
    encoder, own = make_encoder(config.encoder), config.own
    inside = [own.hidden] * (own.head_layers - 1)
    projection = make_head([encoder.width, *inside, own.outputs], own.head_norm if norm else "none", closed)
    predicted = None
    if prediction and own.predictor == "mlp":
        predicted = make_head([own.outputs, own.hidden, own.outputs], own.head_norm)
    return Learner(encoder, projection, predicted, own.norm_splits)


def with_prototypes(config: PretrainConfig) -> Learner:
    """Makes the learner of DINO."""
    encoder, own = make_encoder(config.encoder), config.own
    bottleneck = min(256, own.hidden)  # 256 in the paper, with 2,048 hidden
    widths = [encoder.width, *[own.hidden] * (own.head_layers - 1), bottleneck]
    return Learner(encoder, DinoHead(widths, own.outputs, own.head_norm), splits=own.norm_splits)


def on_patches(config: PretrainConfig, isolated: bool) -> PatchModules:
    """Makes the modules of Greedy InfoMax, which are isolated, or of CPC."""
    sizes = TINY_SIZES if config.encoder.backbone == TINY else GreedySizes()
    return PatchModules(sizes, isolated, config.own.ahead, config.own.negatives)


def encoder_of(network: nn.Module) -> nn.Module:
    """Returns the part that gives the features of pictures: `Learner.encoder`, or `PatchModules` as they are."""
    return network.encoder if isinstance(network, Learner) else network


def features_of(encoder: nn.Module, pictures: torch.Tensor) -> torch.Tensor:
    """Computes features (n, width) of normalised pictures."""
    return encoder.features(pictures) if isinstance(encoder, PatchModules) else encoder(pictures)
