"""Encoders by name, and the heads that methods put on them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import get_model, list_models

from labs_common.errors import LabError
from labs_common.networks import timm_arguments
from zsi_contrastive.detector.backbone import TINY_CHANNELS, TinyBody
from zsi_contrastive.detector.config import TINY
from zsi_contrastive.greedy import TINY_SIZES, GreedySizes, PatchModules
from zsi_contrastive.ssl.config import GREEDY, EncoderOptions, PretrainConfig


class Encoder(nn.Module):
    """A network without its classifier: pictures (n, 3, side, side) to features (n, width).

    Attributes:
        network: the network by itself, whose weights other labs and the detector can read.
    """

    def __init__(self, network: nn.Module, width: int) -> None:
        super().__init__()
        self.network, self.width = network, width

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """Features (n, width)."""
        found = self.network(pictures)
        if isinstance(found, list):  # the tiny body's maps, the coarsest last
            found = found[-1].mean((2, 3))
        return found


def make_encoder(options: EncoderOptions) -> Encoder:
    """The encoder with random weights.

    Raises:
        LabError: there is no such network, or it does not take pictures of that side.
    """
    name = options.backbone
    if name == TINY:
        return Encoder(TinyBody(), TINY_CHANNELS[-1])
    if name.startswith(("resnet", "resnext", "wide_resnet")) and name in list_models():
        network: Any = get_model(name, weights=None)
        width = network.fc.in_features
        network.fc = nn.Identity()
        if options.stem == "small":
            network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
            network.maxpool = nn.Identity()
        return Encoder(network, width)
    import timm

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
        raise LabError(f"--backbone {name}: cannot be made ({str(error).splitlines()[0]})") from error
    return Encoder(network, network.num_features)


def make_head(inputs: int, hidden: int, outputs: int, norm: str) -> nn.Sequential:
    """Two layers with a normalisation (`batch`, `layer` or none, "") and a ReLU between."""
    norms = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm, "": nn.Identity}
    return nn.Sequential(
        nn.Linear(inputs, hidden, bias=not norm), norms[norm](hidden), nn.ReLU(), nn.Linear(hidden, outputs)
    )


class DinoHead(nn.Module):
    """Three layers, a bottleneck of length 1, and cosines with prototypes (Caron et al. 2021, appendix C)."""

    def __init__(self, inputs: int, hidden: int, bottleneck: int, prototypes: int, norm: str) -> None:
        super().__init__()
        norms = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm}
        self.layers = nn.Sequential(
            nn.Linear(inputs, hidden), norms[norm](hidden), nn.GELU(),
            nn.Linear(hidden, hidden), norms[norm](hidden), nn.GELU(), nn.Linear(hidden, bottleneck),
        )  # fmt: skip
        self.prototypes = nn.Parameter(torch.randn(prototypes, bottleneck) * 0.02)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Logits (n, prototypes)."""
        return F.linear(F.normalize(self.layers(features), dim=1), F.normalize(self.prototypes, dim=1))


class Learner(nn.Module):
    """An encoder with its projection, and a prediction on that where the method has one.

    A teacher is a copy of it without the prediction.
    """

    def __init__(self, encoder: Encoder, projection: nn.Module, prediction: nn.Module | None = None) -> None:
        super().__init__()
        self.encoder, self.projection, self.prediction = encoder, projection, prediction

    def forward(self, views: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """What comes out for each view (n, outputs), and the features of those of the first size (n, width).

        Views of one size go through together, so they share the statistics of batch norms.
        """
        found: list[torch.Tensor] = []
        features: list[torch.Tensor] = []  # of the first size
        while len(found) < len(views):
            first = len(found)
            alike = [view for view in views[first:] if view.shape == views[first].shape]
            seen = self.encoder(torch.cat(alike))
            features = features or list(seen.chunk(len(alike)))
            out = self.projection(seen)
            out = out if self.prediction is None else self.prediction(out)
            found += out.chunk(len(alike))
        return found, features


def make_learner(config: PretrainConfig) -> nn.Module:
    """The untrained network of a completed config: a `Learner`, or `PatchModules` for gim and cpc.

    Raises:
        LabError: the encoder cannot be had.
    """
    own, method = config.own, config.method
    if method in GREEDY:
        sizes = TINY_SIZES if config.encoder.backbone == TINY else GreedySizes()
        return PatchModules(sizes, method == "gim", own.ahead, own.negatives)
    encoder = make_encoder(config.encoder)
    if method == "dino":
        bottleneck = min(256, own.hidden)
        return Learner(encoder, DinoHead(encoder.width, own.hidden, bottleneck, own.outputs, own.head_norm))
    projection = make_head(encoder.width, own.hidden, own.outputs, "" if method == "moco" else own.head_norm)
    prediction = None
    if method == "byol":
        prediction = make_head(own.outputs, own.hidden, own.outputs, own.head_norm)
    return Learner(encoder, projection, prediction)


def has_batch_norm(network: nn.Module) -> bool:
    """Whether its outputs depend on the rest of the batch."""
    return any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in network.modules())


def encoder_of(network: nn.Module) -> nn.Module:
    """What gives the features of pictures: `Learner.encoder`, or `PatchModules` as they are."""
    return network.encoder if isinstance(network, Learner) else network


def features_of(encoder: nn.Module, pictures: torch.Tensor) -> torch.Tensor:
    """Features (n, width) of pictures as networks read them."""
    found: torch.Tensor = encoder.features(pictures) if isinstance(encoder, PatchModules) else encoder(pictures)
    return found
