"""The networks: encoders by name, and the heads that methods put on them."""

from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import get_model, list_models

from labs_common.errors import LabError, reason_of
from labs_common.saved import timm_arguments
from zsi_contrastive import TINY
from zsi_contrastive.networks import TINY_CHANNELS, TINY_SIZES, GreedySizes, PatchModules, TinyBody
from zsi_contrastive.ssl.config import RESNETS, EncoderOptions, PretrainConfig

NORMS = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm, "": nn.Identity}


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


def make_head(inputs: int, hidden: int, outputs: int, norm: str) -> nn.Sequential:
    """Makes two layers with a normalisation (`batch`, `layer` or none, "") and a ReLU between."""
    return nn.Sequential(
        nn.Linear(inputs, hidden, bias=not norm), NORMS[norm](hidden), nn.ReLU(), nn.Linear(hidden, outputs)
    )


class DinoHead(nn.Module):
    """Three layers, a bottleneck of length 1, and cosines with prototypes (Caron et al. 2021, appendix C)."""

    def __init__(self, inputs: int, hidden: int, bottleneck: int, prototypes: int, norm: str) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(inputs, hidden), NORMS[norm](hidden), nn.GELU(),
            nn.Linear(hidden, hidden), NORMS[norm](hidden), nn.GELU(), nn.Linear(hidden, bottleneck),
        )  # fmt: skip
        self.prototypes = nn.Parameter(torch.randn(prototypes, bottleneck) * 0.02)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Computes logits (n, prototypes)."""
        return F.linear(F.normalize(self.layers(features), dim=1), F.normalize(self.prototypes, dim=1))


class Learner(nn.Module):
    """An encoder with its projection, and a prediction on that where the method has one.

    A teacher is a copy of it without the prediction.
    """

    def __init__(self, encoder: Encoder, projection: nn.Module, prediction: nn.Module | None = None) -> None:
        super().__init__()
        self.encoder, self.projection, self.prediction = encoder, projection, prediction

    def forward(self, views: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Computes the output for each view (n, outputs), and the features of those of the first size (n, width).

        Views of one size go through together, so they share the statistics of batch norms.
        """
        outputs: list[torch.Tensor] = []
        features: list[torch.Tensor] = []  # of the first size
        while len(outputs) < len(views):
            first = len(outputs)
            alike = [view for view in views[first:] if view.shape == views[first].shape]
            seen = self.encoder(torch.cat(alike))  # (alike · n, width)
            features = features or list(seen.chunk(len(alike)))
            out = self.projection(seen)
            out = out if self.prediction is None else self.prediction(out)
            outputs += out.chunk(len(alike))
        return outputs, features


def with_projection(config: PretrainConfig, norm: bool = True, prediction: bool = False) -> Learner:
    """Makes the learner of SimCLR, MoCo (no norm in its projection) and BYOL (with a prediction)."""
    encoder, own = make_encoder(config.encoder), config.own
    projection = make_head(encoder.width, own.hidden, own.outputs, own.head_norm if norm else "")
    return Learner(
        encoder, projection, make_head(own.outputs, own.hidden, own.outputs, own.head_norm) if prediction else None
    )


def with_prototypes(config: PretrainConfig) -> Learner:
    """Makes the learner of DINO."""
    encoder, own = make_encoder(config.encoder), config.own
    bottleneck = min(256, own.hidden)  # 256 in the paper, with 2,048 hidden
    return Learner(encoder, DinoHead(encoder.width, own.hidden, bottleneck, own.outputs, own.head_norm))


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
