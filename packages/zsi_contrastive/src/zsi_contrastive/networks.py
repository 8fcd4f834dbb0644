"""The networks that both halves use: a tiny body for drawn things, and Greedy InfoMax on patches.

Greedy InfoMax's modules each learn by a loss of their own, with no gradient between them: Löwe et al., "Putting An End
to End-to-End: Gradient-Isolated Learning of Representations", NeurIPS 2019, section 4.1. CPC (van den Oord et al.
2018, section 3.3) is the same in one module under a context.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import BasicBlock
from torchvision.ops import Conv2dNormActivation

from labs_common.device import exact_float32
from zsi_contrastive.losses import info_nce_loss

TINY_CHANNELS = (24, 48, 64, 96)  # of the tiny body, at strides 2, 4, 8 and 16
GRID = 7  # patches across and down: half of each overlaps the next, as in the paper
CUT = 4  # a patch's side is a quarter of the picture's: 16 of 64 pixels in the paper


class TinyBody(nn.Sequential):
    """Three feature maps at strides 4, 8 and 16: small enough to learn drawn things on a CPU in minutes."""

    def __init__(self) -> None:
        stages: list[nn.Module] = []
        before = 3
        for channels in TINY_CHANNELS:
            halved = Conv2dNormActivation(before, channels, 3, 2)
            stages.append(nn.Sequential(halved, BasicBlock(channels, channels)) if stages else halved)
            before = channels
        super().__init__(*stages)

    def forward(self, pictures: torch.Tensor) -> list[torch.Tensor]:
        """Returns maps (batch, channels, height / stride, width / stride), without the first stage's."""
        maps = []
        for stage in self:
            pictures = stage(pictures)
            maps.append(pictures)
        return maps[1:]


@dataclass(frozen=True)
class GreedySizes:
    """Blocks and channels of each module; with `expansion` above 1 blocks are bottlenecks. The first has a stem.

    The defaults are the paper's: the first three stages of a ResNet-50-v2.
    """

    blocks: tuple[int, ...] = (3, 4, 6)
    channels: tuple[int, ...] = (64, 128, 256)
    expansion: int = 4
    stem_stride: int = 1


TINY_SIZES = GreedySizes((1, 1, 1), (32, 64, 96), 1, 2)


class PreActivationBlock(nn.Module):
    """A residual block whose convolutions follow their activations (He et al. 2016), without batch norms.

    Batch norms would tell a patch about the others. Each block starts as its shortcut alone.
    """

    def __init__(self, before: int, channels: int, expansion: int, stride: int) -> None:
        super().__init__()
        after = channels * expansion
        if expansion > 1:
            plan = [(before, channels, 1, 1), (channels, channels, 3, stride), (channels, after, 1, 1)]
        else:
            plan = [(before, channels, 3, stride), (channels, channels, 3, 1)]
        self.convs = nn.ModuleList(nn.Conv2d(i, o, size, step, size // 2) for i, o, size, step in plan)
        for conv in self.convs:
            assert isinstance(conv, nn.Conv2d)
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        assert isinstance(conv, nn.Conv2d)
        nn.init.zeros_(conv.weight)  # of the last one
        self.shortcut = nn.Conv2d(before, after, 1, stride) if stride > 1 or before != after else nn.Identity()

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """Turns maps (n, before, h, w) into (n, channels · expansion, h / stride, w / stride)."""
        found = maps
        for conv in self.convs:
            found = conv(F.relu(found))
        return self.shortcut(maps) + found


class PixelContext(nn.Module):
    """Gathers what the rows of patches so far say: PixelCNN's masked convolutions (van den Oord et al. 2016)."""

    def __init__(self, width: int, layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(width, width, (2, 3)) for _ in range(layers))

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """Turns maps (n, width, rows, columns) into contexts of that shape: each sees its own row and those above."""
        for layer in self.layers:
            maps = maps + layer(F.relu(F.pad(maps, [1, 1, 1, 0])))  # nothing below: the kernel has two rows
        return maps


class PatchModules(nn.Module):
    """Modules on the patches of a picture, each with a loss; `features` are the last one's output.

    Attributes:
        width: channels of the last module.
    """

    def __init__(
        self,
        sizes: GreedySizes = GreedySizes(),
        isolated: bool = True,
        ahead: int = 5,
        negatives: int = 16,
        early: bool = True,
        skip: int = 1,
    ) -> None:
        """Modules are `isolated` (Greedy InfoMax), or all learn by the last one's loss, through a context (CPC).

        Each predicts `ahead` rows below, the first `skip` left out, and tells the right patch from `negatives`. A row
        is skipped as in the authors' code: half of the next one's pixels are a patch's own and could be copied. With
        `early`, an isolated module's gradients are taken as soon as it has its loss, so that its activations are
        forgotten before the next begins; in fp16 they wait for the backward pass, for which the loss is scaled.
        """
        super().__init__()
        self.isolated, self.ahead, self.negatives = isolated, min(ahead, GRID - 1 - skip), negatives
        self.early, self.skip = early, skip
        self.parts = nn.ModuleList()
        before = 3
        for place, (blocks, channels) in enumerate(zip(sizes.blocks, sizes.channels, strict=True)):
            layers: list[nn.Module] = [] if place else [nn.Conv2d(3, channels, 5, sizes.stem_stride, 2)]
            before = before if place else channels
            for block in range(blocks):
                layers.append(PreActivationBlock(before, channels, sizes.expansion, 2 if place and not block else 1))
                before = channels * sizes.expansion
            self.parts.append(nn.Sequential(*layers))
        widths = [channels * sizes.expansion for channels in sizes.channels]
        self.width = widths[-1]
        self.context = None if isolated else PixelContext(self.width)
        self.predictions = nn.ModuleList(
            nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(self.ahead))
            for width in (widths if isolated else widths[-1:])
        )

    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the loss of each module (modules,), or of all (1,), and the features (n, width) without their graph.

        Pictures are (n, 3, side, side), normalised.
        """
        losses = []
        maps = patches_of(pictures)
        for place, part in enumerate(self.parts):
            maps = part(maps)
            last = place == len(self.parts) - 1
            if self.isolated or last:
                loss = self._loss(_by_patch(maps), self.predictions[place if self.isolated else 0])
                if self.isolated:
                    own = [*part.parameters(), *self.predictions[place].parameters()]
                    early = self.early and torch.is_grad_enabled() and not _in_fp16(loss.device)
                    losses.append(_early(loss, own) if early else loss)
                else:
                    losses.append(loss)
            maps = maps.detach() if self.isolated else maps
        return torch.stack(losses), _by_patch(maps.detach()).mean((1, 2))

    def features(self, pictures: torch.Tensor) -> torch.Tensor:
        """Averages what the last module sees over all patches (n, width)."""
        maps = patches_of(pictures)
        for part in self.parts:
            maps = part(maps)
        return _by_patch(maps).mean((1, 2))

    def _loss(self, seen: torch.Tensor, predictions: nn.Module) -> torch.Tensor:
        """Averages InfoNCE of `ahead` rows below, from row 1 + `skip`, over these; `seen` (n, rows, columns, width)."""
        contexts = seen
        if self.context is not None:
            contexts = self.context(seen.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # channels first, and last again
        seen, contexts = seen.float(), contexts.float()
        losses = []
        assert isinstance(predictions, nn.ModuleList)
        for rows, layer in enumerate(predictions, 1 + self.skip):
            with exact_float32(seen.device):
                asked = layer(contexts[:, :-rows]).flatten(0, 2)  # (n · rows · columns, width)
            right = seen[:, rows:].flatten(0, 2)  # of the patches that lie so many rows below
            # In random groups every patch is told from `negatives` others of the batch: one small matrix product.
            order = torch.randperm(len(right), device=right.device)
            losses.append(info_nce_loss(asked[order], right[order], group=1 + self.negatives))
        return torch.stack(losses).mean()


def patches_of(pictures: torch.Tensor) -> torch.Tensor:
    """Cuts pictures (n, 3, side, side) into patches (n · 49, 3, p, p): p is a quarter of the side, halves overlap."""
    size = pictures.shape[-1] // CUT
    cut = pictures.unfold(2, size, size // 2).unfold(3, size, size // 2)  # (n, 3, rows, columns, p, p)
    patches = cut.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, size, size)
    return patches.contiguous(memory_format=torch.channels_last)  # convolutions are faster so


def _by_patch(maps: torch.Tensor) -> torch.Tensor:
    """Averages maps (n · 49, width, h, w) over each patch (n, 7, 7, width)."""
    return maps.mean((2, 3)).view(-1, GRID, GRID, maps.shape[1])


def _in_fp16(device: torch.device) -> bool:
    """Says whether autocast computes in fp16, whose gradients vanish unless the loss is scaled."""
    kind = device.type
    return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16


def _early(loss: torch.Tensor, parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """Takes a loss's gradients by `parameters` at once, so that what they are made from need not be kept."""
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    if not wanted or any(hasattr(parameter, "ds_id") or hasattr(parameter, "to_local") for parameter in wanted):
        return loss  # ZeRO-3 and FSDP have the weights together only where their own backward pass wants them
    gradients = torch.autograd.grad(loss, wanted)
    # The result's value is the loss, and its gradient by each parameter is the one taken above.
    replayed = torch.stack([(p * g).sum() for p, g in zip(wanted, gradients, strict=True)]).sum()
    return loss.detach() + (replayed - replayed.detach())
