"""The encoder: any timm network without its classifier, giving one vector per place of its last grid."""

from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from torch import nn

from caption_lab.config import TINY, EncoderOptions
from caption_lab.tiny import RECIPE, tiny_arguments, tiny_weights
from labs_common.data.captions import Transform
from labs_common.errors import LabError, reason_of
from labs_common.frozen.cut import Cut
from labs_common.grid import grid_of
from labs_common.saved import load_exactly, read_weights, timm_arguments


class Encoder(nn.Module):
    """A timm network without its classifier: the vectors of its last grid, or their means over parts of the picture.

    It stays in evaluation mode, so that no batch-norm statistic moves, also in stages that train.

    Attributes:
        architecture: the name for `timm.create_model`, with `arguments`.
        pool: the means over so many parts across and down, side by side, are the one vector; 0 keeps the grid.
        transform: what makes a picture fit for it.
        grid: rows and columns of places.
        width: of each place's vector; of the one vector if it is pooled.
        stages: prefixes of the parameters that train.
    """

    def __init__(self, architecture: str, arguments: dict[str, Any], size: int, pool: int) -> None:
        """Makes the network with random weights for pictures of `size` pixels; 0 takes its own size.

        Raises:
            LabError: it takes no such pictures, or its output is no grid of vectors.
        """
        super().__init__()
        self.architecture, self.arguments, self.pool = architecture, arguments, pool
        network: Any = timm.create_model(architecture, num_classes=0, **arguments)
        self.network = network.eval()
        known = resolve_model_data_config(self.network)
        size = size or int(known["input_size"][-1])
        self.transform = Transform(size, tuple(known["mean"]), tuple(known["std"]), str(known["interpolation"]))
        self.stages: tuple[str, ...] = ()
        self.cuts: tuple[Cut, ...] = ()  # not a submodule: its modules are the network's
        with torch.no_grad():
            try:
                example = network.forward_features(self._example())
            except (AssertionError, RuntimeError) as error:
                said = f"--image-size {size}: {architecture} takes no such pictures ({reason_of(error)})"
                raise LabError(said) from error
        self._grid = grid_of(network, example, f"--encoder {architecture}")
        self.grid, self.width = (self._grid.side, self._grid.side), self._grid.width
        if pool > min(self.grid):
            raise LabError(f"--pool {pool}: the encoder's grid is {self.grid[0]} × {self.grid[1]} only")
        self.width *= pool**2 or 1

    @property
    def places(self) -> int:
        """The number of vectors that it gives."""
        return 1 if self.pool else self.grid[0] * self.grid[1]

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """Turns pictures (batch, 3, size, size) into (batch, places, width), or (batch, width) if it is pooled."""
        features = self._grid.places(self.network.forward_features(pictures))
        if not self.pool:
            return features
        grid = features.transpose(1, 2).unflatten(2, self.grid)  # (batch, width, rows, columns)
        return F.adaptive_avg_pool2d(grid, self.pool).flatten(1)

    def train_last(self, count: int, frozen_is_kept: bool) -> None:
        """Lets the last `count` stages train; cuts the network before them where their input is to be kept.

        Raises:
            LabError: it has fewer stages, or cannot be cut there.
        """
        self.cuts = ()
        self.stages = tuple(f"network.{name}" for name in last_stages(self.network, count))
        trained = tuple(f"{stage}." for stage in self.stages)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith(trained))
        if self.stages and frozen_is_kept:
            self.cuts = (Cut(self, self.stages, self._example()),)

    @property
    def row_width(self) -> int:
        """The number of values in a row of `front`."""
        return self.cuts[0].width if self.cuts else self.places * self.width

    @property
    def has_front(self) -> bool:
        """True if a part of it gives the same for a picture all the time."""
        return bool(self.cuts) or not self.stages

    def front(self, pictures: torch.Tensor) -> torch.Tensor:
        """Runs the part that does not train: pictures (batch, 3, size, size) to rows (batch, row_width)."""
        return self.cuts[0].front(pictures) if self.cuts else self(pictures).flatten(1)

    def back(self, rows: torch.Tensor) -> torch.Tensor:
        """Runs the part that trains: rows (pictures, where nothing is frozen) to features as `forward` gives them."""
        if not self.has_front:
            return self(rows)
        if self.cuts:
            return self.cuts[0].back(rows.float())
        return rows.float() if self.pool else rows.float().unflatten(1, (self.places, self.width))

    def train(self, mode: bool = True) -> "Encoder":
        """Changes nothing: no statistic of it moves, nothing of it is dropped."""
        return self

    def _example(self) -> torch.Tensor:
        """Two empty pictures (batch, 3, size, size); two, because a batch of one can hide an axis."""
        size = self.transform.size
        return torch.zeros(2, 3, size, size, device=next(self.network.parameters()).device)


def make_encoder(options: EncoderOptions) -> Encoder:
    """Makes the encoder with the weights that the options name; what trains is not decided yet.

    Raises:
        LabError: timm has no such network, its weights cannot be had, or the file is of another.
    """
    tiny = options.encoder in ("", TINY)
    architecture = RECIPE["architecture"] if tiny else options.encoder
    arguments = tiny_arguments() if tiny else timm_arguments(options.encoder, options.image_size, "--encoder")
    try:
        encoder = Encoder(architecture, arguments, options.image_size, options.pool)
    except (RuntimeError, ValueError, TypeError) as error:
        raise LabError(f"--encoder {options.encoder}: cannot be made ({reason_of(error)})") from error
    if options.weights is not None:
        load_exactly(encoder.network, read_weights(options.weights, "--weights"), f"--weights {options.weights}")
    elif options.pretrained and tiny:
        encoder.network.load_state_dict(tiny_weights())
    elif options.pretrained:
        try:
            weights = timm.create_model(architecture, pretrained=True, num_classes=0, **arguments).state_dict()
        except Exception as error:  # downloads fail in many ways; everything else about the name has been checked
            raise LabError(f"--encoder {options.encoder}: its weights cannot be had ({reason_of(error)}); check the "
                           "network, or give --weights FILE or --no-pretrained") from error  # fmt: skip
        encoder.network.load_state_dict(weights)
    return encoder


def last_stages(network: Any, count: int) -> list[str]:
    """Finds the prefixes of the parameters of the last `count` stages, and of all that comes after them.

    A stage ends where timm lists a feature map (`feature_info`): layer1 to layer4 of a ResNet, each block of a ViT.

    Raises:
        LabError: the network has fewer.
    """
    if not count:
        return []
    known = getattr(network, "feature_info", None)
    ends = [str(entry["module"]) for entry in (known if isinstance(known, list) else getattr(known, "info", []))]
    if count >= len(ends):
        raise LabError(
            f"--unfreeze {count}: {type(network).__name__} has {max(0, len(ends) - 1)} stages that can train"
        )
    before = ends[-count - 1]
    names = list(dict.fromkeys(_unit(name) for name, _ in network.named_parameters()))
    inside = [place for place, name in enumerate(names) if name == before or name.startswith(f"{before}.")]
    if not inside:
        raise LabError(f"--unfreeze: the stages of {type(network).__name__} are not known")
    return names[inside[-1] + 1 :]


def _unit(parameter: str) -> str:
    """Names the part of the network that a parameter belongs to: layer4 or blocks.6."""
    first, *rest = parameter.split(".")
    return f"{first}.{rest[0]}" if rest and rest[0].isdigit() and len(rest) > 1 else first
