"""Contrastive heads in the detector: both act before its features reach the proposals, and add a loss to its own."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from zsi_contrastive.greedy import GreedySizes, PatchModules
from zsi_contrastive.ssl.views import normalised

THUMBNAIL = 32  # the side of what the modules see
PATCH = 3  # places of the map, across and down
PATCH_WIDTH, TEMPERATURE = 64, 0.1
BACKGROUND = 8  # patches of each picture that lie on no thing


class GreedyInfoMaxHead(nn.Module):
    """Three gradient-isolated modules on the whole picture at 32 × 32, each with an InfoNCE loss of its own.

    What the last one sees is added to every level of the pyramid as one vector, through a layer that starts at zero:
    the detector can use it, but its losses do not reach the modules.
    """

    def __init__(self, channels: int, sizes: GreedySizes = GreedySizes()) -> None:  # noqa: B008
        """`channels` of the pyramid."""
        super().__init__()
        self.isolated = PatchModules(sizes)
        self.join = nn.Linear(self.isolated.width, channels)
        nn.init.zeros_(self.join.weight)
        nn.init.zeros_(self.join.bias)

    def forward(self, pictures: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum of the modules' losses, and what they see of each picture (n, width), without its graph."""
        losses, seen = self.isolated(thumbnails(pictures))
        return losses.sum(), seen

    def seen(self, pictures: Sequence[torch.Tensor]) -> torch.Tensor:
        """What the modules see of each picture (n, width)."""
        return self.isolated.features(thumbnails(pictures))

    def joined(self, levels: Mapping[str, torch.Tensor], seen: torch.Tensor) -> dict[str, torch.Tensor]:
        """The pyramid's levels (n, channels, h, w) with what the modules see of each picture."""
        added = self.join(seen)[:, :, None, None]
        return {name: level + added for name, level in levels.items()}


def thumbnails(pictures: Sequence[torch.Tensor]) -> torch.Tensor:
    """Pictures (3, height, width) of 0 to 1 at 32 × 32, as networks read them (n, 3, 32, 32)."""
    small = [
        F.interpolate(picture[None], (THUMBNAIL, THUMBNAIL), mode="bilinear", antialias=True) for picture in pictures
    ]
    return normalised(torch.cat(small))


class PatchInfoNCEHead(nn.Module):
    """Patches of one thing against those of other classes' things and of background.

    Two patches of a thing are related; patches of other things of its class are neither. Only annotated things count,
    so nothing is learnt about unseen classes.
    """

    def __init__(self, channels: int) -> None:
        """`channels` of the map."""
        super().__init__()
        self.embed = nn.Sequential(
            nn.Conv2d(channels, PATCH_WIDTH, 1), nn.ReLU(), nn.Conv2d(PATCH_WIDTH, PATCH_WIDTH, 1)
        )

    def forward(
        self, maps: torch.Tensor, targets: Sequence[Mapping[str, torch.Tensor]], height: int, width: int
    ) -> torch.Tensor:
        """InfoNCE of related patches; maps (pictures, channels, h, w) of a batch of `height` by `width` pixels.

        Targets have `labels` (n,) and `masks` (n, H, W), no larger than the batch.
        """
        embedded = self.embed(F.avg_pool2d(maps, PATCH, 1, PATCH // 2)).float()
        queries, keys, labels, others = [], [], [], []
        for picture, target in zip(embedded, targets, strict=True):
            masks = target["masks"].bool()
            for mask, label in zip(masks, target["labels"], strict=True):
                if (spots := _drawn_spots(mask, 2)) is not None:
                    one, other = _at(picture, spots, height, width)
                    queries.append(one)
                    keys.append(other)
                    labels.append(label)
            outside = ~masks.any(0) if len(masks) else torch.ones(1, 1, dtype=torch.bool, device=maps.device)
            if (spots := _drawn_spots(outside, BACKGROUND)) is not None:
                others.append(_at(picture, spots, height, width))
        if not queries:
            return embedded.sum() * 0
        return patch_info_nce(
            torch.stack(queries),
            torch.stack(keys),
            torch.stack(labels),
            torch.cat(others or [embedded.new_zeros(0, embedded.shape[1])]),
        )


def patch_info_nce(
    queries: torch.Tensor, keys: torch.Tensor, labels: torch.Tensor, others: torch.Tensor
) -> torch.Tensor:
    """InfoNCE of each query's key (n, d) among those of other `labels` (n,) and among `others` (m, d), by cosine."""
    columns = F.normalize(torch.cat([keys, others]), dim=1)
    logits = F.normalize(queries, dim=1) @ columns.T / TEMPERATURE
    same = (labels[:, None] == labels) & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    logits = logits.masked_fill(F.pad(same, (0, len(others))), -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(queries), device=logits.device))


def _drawn_spots(mask: torch.Tensor, count: int) -> torch.Tensor | None:
    """`count` different pixels (count, 2) of a mask, as row and column; None if it has fewer."""
    spots = mask.nonzero()
    if len(spots) < count:
        return None
    return spots[torch.randperm(len(spots), device=mask.device)[:count]]


def _at(picture: torch.Tensor, spots: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The vectors (count, d) of a map (d, h, w) at pixels of a batch of that size."""
    rows = spots[:, 0] * picture.shape[1] // height
    columns = spots[:, 1] * picture.shape[2] // width
    return picture[:, rows, columns].T
