"""The vectors that an image network of timm gives for the places of a picture, however it lays them out."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from labs_common.errors import LabError


@dataclass(frozen=True)
class Grid:
    """The layout of a network's last grid in the output of its `forward_features` for a square picture.

    Attributes:
        side: its rows, and its columns.
        width: of each place's vector.
        layout: "tokens" (batch, tokens, width), "channels last" (batch, rows, columns, width) as Swin's, or "channels
            first".
        skip: tokens before the first place's, such as the class token.
    """

    side: int
    width: int
    layout: Literal["tokens", "channels last", "channels first"]
    skip: int = 0

    def places(self, features: torch.Tensor) -> torch.Tensor:
        """Returns the vectors (batch, places, width), row by row."""
        if self.layout == "tokens":
            return features[:, self.skip :]
        return features.flatten(1, 2) if self.layout == "channels last" else features.flatten(2).transpose(1, 2)


def grid_of(network: Any, features: Any, said: str) -> Grid:
    """Finds the grid in the `features` that a network of timm gives for square pictures.

    Raises:
        LabError: there is none; `said` (option and name) begins the message.
    """
    if isinstance(features, torch.Tensor) and features.dim() == 3:
        count = features.shape[1]
        # Few networks do not say that they have a class token: without it the places fill a square.
        for skip in dict.fromkeys((int(getattr(network, "num_prefix_tokens", 0)), 1)):
            side = math.isqrt(max(0, count - skip))
            if side and side**2 == count - skip:
                return Grid(side, features.shape[2], "tokens", skip)
    elif isinstance(features, torch.Tensor) and features.dim() == 4:
        _, first, second, third = features.shape
        if second == third and (first != second or getattr(network, "output_fmt", "") != "NHWC"):
            return Grid(second, first, "channels first")
        if first == second:
            return Grid(first, third, "channels last")
    raise LabError(f"{said}: gives no grid of vectors; take another")


def drop_unused(network: nn.Module, features: torch.Tensor) -> None:
    """Takes out of the network what its `features` do not come from: layers after the grid that belong to a classifier.

    Processes that train together would wait for their gradients.
    """
    features.float().square().sum().backward()
    idle = {name for name, parameter in network.named_parameters() if parameter.grad is None}
    network.zero_grad()
    for name, part in list(network.named_modules()):
        own = {f"{name}.{inner}" for inner, _ in part.named_parameters()}
        if name and own and own <= idle:
            network.set_submodule(name, nn.Identity())
            idle -= own
