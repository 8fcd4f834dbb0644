"""Image towers: any timm network without its classifier, and the tiny one for CPUs."""

from typing import Any, NamedTuple

import timm
import torch
from timm.data import resolve_model_data_config
from torch import nn

from clip_lab.config import TINY, ImageOptions
from labs_common.errors import LabError, reason_of
from labs_common.grid import drop_unused, grid_of
from labs_common.saved import load_exactly, read_weights, timm_arguments

# Small enough for a CPU: a training of seven thousand pictures takes two minutes. A stride of 8 instead of timm's 32
# leaves a grid of 4 × 4 places of 32 pixels: enough to tell left from right.
TINY_TOWER: dict[str, Any] = {
    "architecture": "resnet10t",
    "arguments": {"channels": (32, 64, 96, 128), "output_stride": 8},
}
TINY_SIDE, TINY_MEAN, TINY_STD = 32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


class Seen(NamedTuple):
    """An image tower's output: a feature per picture (pictures, width), one per place (pictures, places, width)."""

    feature: torch.Tensor
    places: torch.Tensor


class ImageTower(nn.Module):
    """A timm network; its feature is what its own classifier would read, its places those of its last grid.

    Where a classifier has more layers than one, as VGG's and MobileNetV3's, the feature is the mean of the grid.

    Attributes:
        architecture: what `timm.create_model` is given, with `arguments`.
        stages: 0, or how many of a CNN's stages there are; the last of them then gives the places, and their mean is
            the feature.
        size: side of its pictures in pixels.
        mean: of its pictures' channels, with `std`.
        width: of the feature and of each place.
        count: how many places there are.
    """

    def __init__(self, architecture: str, arguments: dict[str, Any], size: int, stages: int = 0) -> None:
        """Builds the network with random weights.

        Raises:
            LabError: its output is no grid of vectors, or it takes no pictures of this size.
        """
        super().__init__()
        self.architecture, self.arguments, self.stages = architecture, arguments, stages
        self.network: Any = timm.create_model(architecture, num_classes=0, **arguments)
        known = resolve_model_data_config(self.network)
        self.size = size or int(known["input_size"][-1])
        self.mean, self.std = tuple(known["mean"]), tuple(known["std"])
        self.interpolation = str(known["interpolation"])
        if stages:
            self._keep_stages()
        # A picture goes through once: only so is it known for every network of timm what comes out.
        before = self.network.training
        self.network.eval()
        pictures = torch.zeros(2, 3, self.size, self.size, device=next(self.parameters()).device)
        try:
            with torch.no_grad():
                grid = self._grid_of(pictures)
                self.grid = grid_of(self.network, grid, f"--image {architecture}")
                self._mean = bool(stages) or not self._has_own_feature(grid)
            if self._mean and not stages:
                with torch.enable_grad():
                    drop_unused(self.network, self._grid_of(pictures))
        except (AssertionError, RuntimeError) as error:
            said = f"{architecture} takes no such pictures ({reason_of(error)})"
            raise LabError(f"--image-size {self.size}: {said}") from error
        self.network.train(before)
        self.count, self.width = self.grid.side**2, self.grid.width

    def forward(self, pictures: torch.Tensor) -> Seen:
        """Maps pictures (batch, 3, size, size) to their features."""
        grid = self._grid_of(pictures)
        places = self.grid.places(grid)
        return Seen(places.mean(1) if self._mean else self.network.forward_head(grid, pre_logits=True), places)

    def _grid_of(self, pictures: torch.Tensor) -> torch.Tensor:
        if not self.stages:
            return self.network.forward_features(pictures)
        return self.network.forward_intermediates(
            pictures, indices=[self.stages], intermediates_only=True, stop_early=True, output_fmt="NCHW"
        )[0]

    def _has_own_feature(self, grid: torch.Tensor) -> bool:
        """Says whether what the network's classifier would read is as wide as its grid."""
        try:
            return self.network.forward_head(grid, pre_logits=True).shape[1:] == (self.grid.width,)
        except (TypeError, AttributeError):  # a few take no such argument
            return False

    def _keep_stages(self) -> None:
        try:
            self.network.prune_intermediate_layers([self.stages], prune_norm=True, prune_head=True)
        except (AttributeError, AssertionError, IndexError, TypeError) as error:
            raise LabError(f"--image-stages {self.stages}: {self.architecture} has no such stage") from error


def make_image_tower(options: ImageOptions) -> ImageTower:
    """Builds the tower with the weights that the options name.

    Raises:
        LabError: timm has no such network, its weights cannot be had, or the file is of another.
    """
    tiny = options.image in ("", TINY)
    architecture = TINY_TOWER["architecture"] if tiny else options.image
    arguments = (
        tiny_arguments(options.image_size) if tiny else timm_arguments(options.image, options.image_size, "--image")
    )
    try:
        tower = ImageTower(architecture, arguments, options.image_size, options.image_stages)
    except (RuntimeError, ValueError, TypeError) as error:
        raise LabError(f"--image {options.image}: cannot be made ({reason_of(error)})") from error
    if options.image_weights is not None:
        own = read_weights(options.image_weights, "--image-weights")
        load_exactly(tower.network, own, f"--image-weights {options.image_weights}")
    elif options.image_pretrained and not tiny:
        try:
            weights = timm.create_model(architecture, pretrained=True, num_classes=0, **arguments).state_dict()
        except Exception as error:  # downloads fail in many ways; everything else about the name has been checked
            said = f"its weights cannot be had ({reason_of(error)}); check the network, or give --image-weights FILE"
            raise LabError(f"--image {options.image}: {said}") from error
        load_exactly(tower.network, weights, f"--image {options.image}")
    return tower


def tiny_arguments(size: int = 0) -> dict[str, Any]:
    """Returns what timm's `create_model` needs besides the name to build the tiny network."""
    side = size or TINY_SIDE
    shown = {"mean": TINY_MEAN, "std": TINY_STD, "input_size": (3, side, side), "crop_pct": 1.0}
    return dict(TINY_TOWER["arguments"]) | {"pretrained_cfg_overlay": shown}
