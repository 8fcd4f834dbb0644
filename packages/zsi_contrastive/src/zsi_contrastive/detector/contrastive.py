"""Contrastive heads: they act before the features reach the proposals, and add a loss to the detector's own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn
from torchvision.transforms.v2.functional import normalize

from labs_common.saved import load_exactly, read_weights
from zsi_contrastive.detector.config import ModelOptions
from zsi_contrastive.detector.heads import Levels, Target
from zsi_contrastive.networks import TINY_SIZES, GreedySizes, PatchModules

THUMBNAIL = 32  # pixels: the side of what Greedy InfoMax's modules see
PATCH_WIDTH, TEMPERATURE = 64, 0.1  # of patch InfoNCE; SimCLR's best temperature (Chen et al. 2020, table 5)
MARGIN = 1.0  # of Hadsell's loss, between vectors of length 1


class GreedyInfoMaxHead(nn.Module):
    """Three gradient-isolated modules on the whole picture as a thumbnail, each with an InfoNCE loss of its own.

    What the last one sees is added to every level of the pyramid as one vector, through a layer that starts at zero:
    the detector can use it, but its losses do not reach the modules.
    """

    def __init__(self, channels: int, sizes: GreedySizes = GreedySizes()) -> None:  # noqa: B008
        """Makes modules of these sizes, for a pyramid of `channels`."""
        super().__init__()
        self.thumbnail = THUMBNAIL
        self.isolated = PatchModules(sizes)
        self.join = nn.Linear(self.isolated.width, channels)
        nn.init.zeros_(self.join.weight)
        nn.init.zeros_(self.join.bias)

    def forward(
        self, pictures: Sequence[torch.Tensor], levels: Levels, targets: Sequence[Target], size: tuple[int, int]
    ) -> tuple[torch.Tensor, Levels]:
        """Returns the sum of the modules' losses, and the levels with what the modules see; see `Contrastive`."""
        losses, seen = self.isolated(thumbnails(pictures, self.thumbnail))
        return losses.sum(), self._added(levels, seen)

    def joined(self, pictures: Sequence[torch.Tensor], levels: Levels) -> Levels:
        """Adds what the modules see of each picture to the pyramid's levels (n, channels, h, w)."""
        return self._added(levels, self.isolated.features(thumbnails(pictures, self.thumbnail)))

    def _added(self, levels: Levels, seen: torch.Tensor) -> Levels:
        added = self.join(seen)[:, :, None, None]  # (n, channels, 1, 1)
        return {name: level + added for name, level in levels.items()}


def thumbnails(pictures: Sequence[torch.Tensor], side: int = THUMBNAIL) -> torch.Tensor:
    """Shrinks pictures (3, height, width) of 0 to 1, and normalises them (n, 3, side, side)."""
    small = [F.interpolate(picture[None], (side, side), mode="bilinear", antialias=True) for picture in pictures]
    return normalize(torch.cat(small), IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


class PatchInfoNCEHead(nn.Module):
    """Tells related patches from unrelated ones.

    By label, two patches of a thing are related, which its annotated mask says, and those of other classes' things and
    of background are not; patches of other things of its class are neither. So nothing is learnt about unseen classes.
    By place, a patch's neighbour in any direction is related and all others of the batch are not: without labels.
    """

    def __init__(self, channels: int, options: ModelOptions | None = None) -> None:
        """Makes the embedding for maps of `channels`; `options` say how patches are drawn and compared."""
        super().__init__()
        self.options = options or ModelOptions()
        self.embed = nn.Sequential(
            nn.Conv2d(channels, PATCH_WIDTH, 1), nn.ReLU(), nn.Conv2d(PATCH_WIDTH, PATCH_WIDTH, 1)
        )

    def forward(
        self, pictures: Sequence[torch.Tensor], levels: Levels, targets: Sequence[Target], size: tuple[int, int]
    ) -> tuple[torch.Tensor, Levels]:
        """Returns the loss of patches of the finest level, and the levels as they are; see `Contrastive`."""
        return self.loss(next(iter(levels.values())), targets, size), levels

    def loss(self, maps: torch.Tensor, targets: Sequence[Target], size: tuple[int, int]) -> torch.Tensor:
        """Computes the loss on maps (pictures, channels, h, w) of a batch of `size` pixels; 0 without any thing."""
        side, drawn = self.options.patch_size, self.options.patches
        embedded = self.embed(F.avg_pool2d(maps, side, 1, side // 2)).float()
        labels: list[torch.Tensor] = []
        queries, keys, others = [], [], []
        for picture, target in zip(embedded, targets, strict=True):
            masks = target["masks"].bool()
            if self.options.patches_by == "place":
                one, other = _neighbours(masks.shape[1:], drawn, side * size[0] // picture.shape[1], masks.device)
                labels += list(torch.arange(drawn, device=masks.device) + len(labels))  # each is a class of its own
                queries += list(_at(picture, one, size))
                keys += list(_at(picture, other, size))
                continue
            for mask, label in zip(masks, target["labels"], strict=True):
                if (spots := _drawn_spots(mask, 2)) is not None:
                    one, other = _at(picture, spots, size)
                    queries.append(one)
                    keys.append(other)
                    labels.append(label)
            outside = ~masks.any(0) if len(masks) else torch.ones(1, 1, dtype=torch.bool, device=maps.device)
            if (spots := _drawn_spots(outside, drawn)) is not None:
                others.append(_at(picture, spots, size))
        if not queries:
            return embedded.sum() * 0  # every process's weights take part in every step
        background = torch.cat(others or [embedded.new_zeros(0, embedded.shape[1])])
        rows = torch.stack(queries), torch.stack(keys), torch.stack(labels), background
        if self.options.patch_loss == "hadsell":
            return patch_hadsell(*rows)
        return patch_info_nce(*rows, self.options.patch_temperature)

    def joined(self, pictures: Sequence[torch.Tensor], levels: Levels) -> Levels:
        """Returns the levels as they are: the head teaches the backbone, and does nothing in use."""
        return levels


def patch_info_nce(
    queries: torch.Tensor,
    keys: torch.Tensor,
    labels: torch.Tensor,
    others: torch.Tensor,
    temperature: float = TEMPERATURE,
) -> torch.Tensor:
    """Computes InfoNCE of queries and their keys (n, d) against those of other `labels` (n,) and `others` (m, d)."""
    cosines, neither = _compared(queries, keys, labels, others)
    logits = (cosines / temperature).masked_fill(neither, -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(queries), device=logits.device))


def patch_hadsell(
    queries: torch.Tensor, keys: torch.Tensor, labels: torch.Tensor, others: torch.Tensor
) -> torch.Tensor:
    """Averages Hadsell's loss over pairs: squared distances to keys, max(0, 1 − distance)² to the unrelated.

    Takes what `patch_info_nce` does; vectors have length 1 here too (Hadsell et al. 2006, eq. 4).
    """
    cosines, neither = _compared(queries, keys, labels, others)
    squared = (2 - 2 * cosines).clamp(min=1e-12)  # the square root's gradient at 0 is infinite
    related = torch.eye(*cosines.shape, dtype=torch.bool, device=cosines.device)
    loss = torch.where(related, squared, (MARGIN - squared.sqrt()).clamp(min=0).square())
    return loss.masked_fill(neither, 0).sum() / (~neither).sum()


def _compared(
    queries: torch.Tensor, keys: torch.Tensor, labels: torch.Tensor, others: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns cosines (n, n + m) of queries with keys and others, and which pairs are neither related nor unrelated."""
    columns = F.normalize(torch.cat([keys, others]), dim=1)
    same = (labels[:, None] == labels) & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    return F.normalize(queries, dim=1) @ columns.T, F.pad(same, (0, len(others)))


def _drawn_spots(mask: torch.Tensor, count: int) -> torch.Tensor | None:
    """Draws `count` different pixels (count, 2) of a mask, as row and column; None if it has fewer."""
    spots = mask.nonzero()
    if len(spots) < count:
        return None
    return spots[torch.randperm(len(spots), device=mask.device)[:count]]


def _neighbours(area: Sequence[int], count: int, away: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws `count` pixels (count, 2) of an area, and one `away` from each of them, straight or diagonally."""
    most = torch.tensor(area, device=device) - 1
    spots = (torch.rand(count, 2, device=device) * (most + 1)).long()
    turns = torch.tensor([(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if y or x], device=device) * away
    moved = turns[torch.randint(len(turns), (count,), device=device)]
    # Back from an edge; in an area that is too narrow for that, along it.
    moved = torch.where((spots + moved < 0) | (spots + moved > most), -moved, moved)
    return spots, torch.minimum((spots + moved).clamp(min=0), most)


def _at(picture: torch.Tensor, spots: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Takes the vectors (count, d) of a map (d, h, w) at pixels of a batch of `size`."""
    rows = spots[:, 0] * picture.shape[1] // size[0]
    columns = spots[:, 1] * picture.shape[2] // size[1]
    return picture[:, rows, columns].T


@dataclass(frozen=True)
class Contrastive:
    """A contrastive head that a detector may have.

    The module is called with the pictures (3, height, width) of 0 to 1, the pyramid's levels (n, channels, h, w), the
    targets in the batch's pixels, and the batch's height and width; it returns its loss and the levels that the
    detector goes on with. In use, its `joined` gets pictures and levels and returns the levels.

    Attributes:
        make: returns the module for a pyramid of so many channels; small ones for tiny.
        module: the detector's attribute, which names its weights on disk.
        said: what a report calls it.
        share: what its loss is multiplied by, unless an option says otherwise.
        start: gives a new module what the model options say of it, such as weights.
        options: the model options that `start` reads; ablate leaves them out where the head is not.
    """

    make: Callable[[int, bool], nn.Module]
    module: str
    said: str
    share: float = 0.1
    start: Callable[[nn.Module, ModelOptions], None] | None = None
    options: tuple[str, ...] = ()


def _start_greedy(head: nn.Module, options: ModelOptions) -> None:
    assert isinstance(head, GreedyInfoMaxHead)
    if options.greedy_weights is not None:
        state = read_weights(options.greedy_weights, "--greedy-weights")
        load_exactly(head.isolated, state, f"--greedy-weights {options.greedy_weights}")


def _start_patch(head: nn.Module, options: ModelOptions) -> None:
    assert isinstance(head, PatchInfoNCEHead)
    head.options = options


# By the choice of --contrastive, which also names their losses and, with hyphens, their rows in ablate.
CONTRASTIVE: dict[str, Contrastive] = {
    "greedy_infomax": Contrastive(
        lambda channels, tiny: GreedyInfoMaxHead(channels, TINY_SIZES if tiny else GreedySizes()),
        module="greedy",
        said="Greedy InfoMax",
        start=_start_greedy,
        options=("greedy_weights", "thumbnail"),
    ),
    "patch_infonce": Contrastive(
        lambda channels, tiny: PatchInfoNCEHead(channels),
        module="patch",
        said="patch InfoNCE",
        start=_start_patch,
        options=("patches_by", "patch_loss", "patch_size", "patches", "patch_temperature"),
    ),
}
