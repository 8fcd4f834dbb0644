"""The first stage, and what both stages share: matching, a draw of fixed size, and RoIAlign.

torchvision's own code asks the device about ten times a picture how many boxes are left, and computes boxes in the
precision of the features: in bfloat16 a coordinate of 800 pixels is off by up to 2. Here shapes are known beforehand,
boxes are 32 bits, and on a GPU the host waits twice in a step: in non-maximum suppression, which is one call for all
pictures (of at most 65,536 boxes), and for the numbers of regions by level and of things.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor
from torchvision.models.detection._utils import BoxCoder, encode_boxes
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, concat_box_prediction_layers
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image, nms, roi_align
from torchvision.ops.poolers import LevelMapper

from labs_common.device import constant
from zsi_contrastive.detector.heads import Levels, Target

BACKGROUND, NEITHER = -1, -2  # what a box is that is no object's
# Boxes in one call of suppression on a GPU: memory and work grow with the square (a bit for each pair: 0.5 GB).
TOGETHER = 65_536
BETA = 1 / 9  # of the smooth L1 loss of shifts: torchvision's, in both stages; the published code's second has 1
LARGEST_GROWTH = BoxCoder((1.0, 1.0, 1.0, 1.0)).bbox_xform_clip  # of a side, as a logarithm

Weights = tuple[float, float, float, float]  # shifts are multiplied by them, so that their deviations are about 1


def matched(overlaps: torch.Tensor, low: float, high: float, forced: bool = False) -> torch.Tensor:
    """Says whose each box is (boxes,): a row of `overlaps` (objects, boxes) in IoU, `BACKGROUND` or `NEITHER`.

    A box is the object's that it overlaps most, from `high` on; below `low` it is background. With `forced` an
    object also gets the boxes that overlap it most of all. The same as torchvision's `Matcher`.
    """
    most, owner = overlaps.max(0)
    found = owner.masked_fill(most < high, NEITHER).masked_fill(most < low, BACKGROUND)
    if forced:
        best = (overlaps == overlaps.max(1, keepdim=True).values).any(0)
        found = torch.where(best, owner, found)
    return found


def drawn(labels: torch.Tensor, count: int, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws `count` boxes of each picture by chance: things, of which `share` is the most, then background.

    Takes `labels` (pictures, boxes): above 0 a thing, 0 background, below 0 none of both. Returns their places
    (pictures, slots), things first, and which of the slots are filled: a picture may have too few boxes.
    """
    # The boxes with the largest of random keys, as many as there are: no count has to be known by the host.
    keys = torch.rand(labels.shape, device=labels.device)
    of_thing, things = keys.masked_fill(labels < 1, -1).topk(min(int(count * share), labels.shape[1]))
    of_other, others = keys.masked_fill(labels != 0, -1).topk(min(count, labels.shape[1]))
    is_thing = of_thing >= 0
    room = count - is_thing.sum(1, keepdim=True)
    is_other = (of_other >= 0) & (torch.arange(others.shape[1], device=labels.device) < room)
    filled, order = torch.cat([is_thing, is_other], 1).sort(dim=1, descending=True, stable=True)
    slots = min(count, order.shape[1])
    return torch.cat([things, others], 1).gather(1, order[:, :slots]), filled[:, :slots]


def shifted(boxes: torch.Tensor, shifts: torch.Tensor, weights: Weights) -> torch.Tensor:
    """Moves boxes (…, 4) by shifts (…, 4): torchvision's `BoxCoder.decode`, which copies numbers to the device."""
    sides = boxes[..., 2:] - boxes[..., :2]
    moves, growth = (shifts / constant(weights, shifts.device)).split(2, -1)
    centres = moves * sides + (boxes[..., :2] + 0.5 * sides)
    half = 0.5 * (growth.clamp(max=LARGEST_GROWTH).exp() * sides)
    return torch.cat([centres - half, centres + half], -1)


def surviving(boxes: torch.Tensor, scores: torch.Tensor, groups: torch.Tensor, overlap: float) -> torch.Tensor:
    """Says which boxes (pictures, n, 4) non-maximum suppression leaves, within groups of a picture.

    Takes `scores`, `groups` and returns as (pictures, n). Boxes without area are fillers: they neither suppress nor
    survive.
    """
    real = boxes[..., 2] > boxes[..., 0]
    pictures, number = real.shape
    if not number or isinstance(boxes, FakeTensor):  # --plan measures shapes: which they are does not matter
        return real
    if boxes.is_cuda:
        if pictures > (most := max(1, TOGETHER // number)):
            parts_of = zip(boxes.split(most), scores.split(most), groups.split(most), strict=True)
            return torch.cat([surviving(box, score, group, overlap) for box, score, group in parts_of])
        # One call for all, as the host waits in each. What must not meet is moved apart, in 64 bits, which leave every
        # box as exact as it was. 32 round what stands thousands of pixels away: of 60,000 random boxes five were kept
        # otherwise, of pairs at the threshold half.
        own = groups + (groups.amax() + 1) * torch.arange(pictures, device=boxes.device)[:, None]
        apart = boxes.double() + (own * (boxes.amax().double() + 1))[..., None]
        keep = nms(apart.flatten(0, 1), scores.double().flatten(), overlap)
    else:  # work grows with the square of the number: picture by picture, as torchvision does
        parts = []
        for place in range(pictures):
            mine = real[place].nonzero()[:, 0]
            kept = batched_nms(boxes[place, mine], scores[place, mine], groups[place, mine], overlap)
            parts.append(mine[kept] + place * number)
        keep = torch.cat(parts)
    return real & torch.zeros_like(real).flatten().index_fill_(0, keep, True).view_as(real)


def shift_loss(
    shifts: torch.Tensor,
    boxes: torch.Tensor,
    wanted: torch.Tensor,
    things: torch.Tensor,
    weights: Weights,
    beta: float = BETA,
) -> torch.Tensor:
    """Sums the smooth L1 loss of shifts (…, 4) that should turn `boxes` into `wanted` ones, where `things` (…) says."""
    right = encode_boxes(wanted.reshape(-1, 4), boxes.reshape(-1, 4), weights).view_as(boxes)
    # What is no thing has no shift: it may be infinite there, and infinity times zero is no number.
    off = torch.where(things[..., None], shifts.float() - right, 0)
    return F.smooth_l1_loss(off, torch.zeros_like(off), beta=beta, reduction="sum")


def levels_of(levels: Sequence[torch.Tensor], boxes: torch.Tensor, height: int) -> torch.Tensor:
    """Says from which of the levels each of the boxes (n, 4) is pooled (n,); see `pooled`."""
    finest, coarsest = (round(math.log2(height / level.shape[-2])) for level in (levels[0], levels[-1]))
    return LevelMapper(finest, coarsest)([boxes])


def counted(level_of: torch.Tensor, levels: int) -> torch.Tensor:
    """Counts boxes by their level: (n,) to (levels,); a level below 0 is none."""
    return (level_of[:, None] == torch.arange(levels, device=level_of.device)).sum(0)


def pooled(
    levels: Sequence[torch.Tensor], regions: torch.Tensor, height: int, side: int, points: int,
    counts: list[int] | None = None,
) -> torch.Tensor:  # fmt: skip
    """Pools regions (n, 5), each a picture's number and a box, from the levels that fit: (n, channels, side, side).

    `height` is that of the batch in pixels. The same as torchvision's `MultiScaleRoIAlign`, which reads every level's
    number of regions on its own; who knows the `counts` gives them.
    """
    scales = [level.shape[-2] / height for level in levels]  # 1/4, 1/8, …: the batch is padded so that they are exact
    level_of, order = levels_of(levels, regions[:, 1:], height).sort(stable=True)
    parts = [
        roi_align(level, part, side, scale, points)
        for level, part, scale in zip(
            levels, regions[order].split(counts or counted(level_of, len(levels)).tolist()), scales, strict=True
        )
    ]
    everything = torch.cat([part.to(levels[0].dtype) for part in parts])
    return torch.zeros_like(everything).index_copy(0, order, everything)


def numbered(boxes: Sequence[torch.Tensor]) -> torch.Tensor:
    """Puts each picture's number before its boxes (n, 4): (all, 5)."""
    return torch.cat([F.pad(part, (1, 0), value=number) for number, part in enumerate(boxes)])


class Anchors(AnchorGenerator):
    """torchvision's anchors, in 32 bits whatever the features are in.

    With `strides`, one of each level, they lie around the middle of their place as in the published code, half a stride
    further right and down; and a level whose side was rounded up keeps its stride (torchvision: 61 pixels, not 64, of
    a side of 800).
    """

    def __init__(
        self,
        sides: tuple[tuple[int, ...], ...],
        ratios: tuple[tuple[float, ...], ...],
        strides: Sequence[int] = (),
    ) -> None:
        """Makes anchors of each level's sides in pixels and ratios, height to width."""
        super().__init__(sides, ratios)
        self.strides = strides
        if strides:
            cells: list[torch.Tensor] = self.cell_anchors  # type: ignore[has-type]
            self.cell_anchors = [cell + side / 2 for cell, side in zip(cells, strides, strict=True)]

    def set_cell_anchors(self, dtype: torch.dtype, device: torch.device) -> None:
        """Moves the anchors of a cell to the device."""
        super().set_cell_anchors(torch.float32, device)

    def grid_anchors(self, grid_sizes: list[list[int]], strides: list[list[torch.Tensor]]) -> list[torch.Tensor]:
        """Places the anchors of each level (h · w · anchors, 4) by the exact strides, where there are any."""
        exact: list[list[Any]] = [[side, side] for side in self.strides]
        return super().grid_anchors(grid_sizes, exact or strides)


class Proposals(RegionProposalNetwork):
    """torchvision's first stage with boxes in 32 bits, and without its host reads."""

    def forward(
        self, batch: ImageList, features: Levels, targets: list[Target] | None = None
    ) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        """Returns each picture's proposals (n, 4), best first, and in training the losses by name.

        In a training on a GPU they are filled up with boxes without area, so that nobody has to wait for their number.
        """
        levels = list(features.values())
        scores, shifts = self.head(levels)
        counts = [level[0].numel() for level in scores]  # anchors of each level
        anchors = self.anchor_generator(batch, levels)[0]  # (anchors, 4): the same for every picture
        pictures = len(batch.image_sizes)
        flat, shifts = concat_box_prediction_layers(scores, shifts)
        objectness, shifts = flat.float().view(pictures, -1), shifts.float().view(pictures, -1, 4)
        with torch.no_grad():
            boxes = shifted(anchors, shifts.detach(), self.box_coder.weights)
            proposals = self._best(boxes, objectness.detach(), batch.image_sizes, counts)
        if targets is None:
            return proposals, {}
        return proposals, self._losses(objectness, shifts, anchors, targets)

    def _best(
        self, boxes: torch.Tensor, objectness: torch.Tensor, sizes: list[tuple[int, int]], counts: list[int]
    ) -> list[torch.Tensor]:
        """Takes the best of each level, after non-maximum suppression within it."""
        top = self._get_top_n_idx(objectness, counts)  # (pictures, kept)
        probability = objectness.gather(1, top).sigmoid()
        level = torch.cat([torch.full((n,), place, device=top.device) for place, n in enumerate(counts)])[top]
        boxes = boxes.gather(1, top[..., None].expand(-1, -1, 4))
        boxes = torch.stack([clip_boxes_to_image(part, size) for part, size in zip(boxes, sizes, strict=True)])
        big = (boxes[..., 2:] - boxes[..., :2] >= self.min_size).all(2)
        boxes = torch.where(big[..., None], boxes, 0)
        kept = surviving(boxes, probability, level, self.nms_thresh)
        best, order = probability.masked_fill(~kept, -1).sort(dim=1, descending=True, stable=True)
        best, order = best[:, : self.post_nms_top_n()], order[:, : self.post_nms_top_n()]
        boxes = boxes.gather(1, order[..., None].expand(-1, -1, 4)).masked_fill(best[..., None] < 0, 0)
        if self.training and (boxes.is_cuda or isinstance(boxes, FakeTensor)):
            return list(boxes)
        return [part[:count] for part, count in zip(boxes, (best >= 0).sum(1).tolist(), strict=True)]

    def _losses(
        self, objectness: torch.Tensor, shifts: torch.Tensor, anchors: torch.Tensor, targets: list[Target]
    ) -> dict[str, torch.Tensor]:
        labels, wanted = [], []
        for target in targets:
            boxes = target["boxes"]
            if len(boxes):
                matcher = self.proposal_matcher
                owner = matched(box_iou(boxes, anchors), matcher.low_threshold, matcher.high_threshold, forced=True)
                labels.append(torch.where(owner >= 0, 1, owner - BACKGROUND))  # 1, 0 for background, −1 for neither
                wanted.append(boxes[owner.clamp(min=0)])
            else:
                labels.append(torch.zeros(len(anchors), dtype=torch.int64, device=anchors.device))
                wanted.append(anchors)
        label = torch.stack(labels)
        sampler = self.fg_bg_sampler
        places, filled = drawn(label, sampler.batch_size_per_image, sampler.positive_fraction)
        label = label.gather(1, places)
        number = filled.sum().clamp(min=1)
        four = places[..., None].expand(-1, -1, 4)
        loss = F.binary_cross_entropy_with_logits(objectness.gather(1, places), label.float(), reduction="none")
        box_loss = shift_loss(
            shifts.gather(1, four), anchors[places], torch.stack(wanted).gather(1, four), filled & (label > 0),
            self.box_coder.weights,
        )  # fmt: skip
        return {"objectness": torch.where(filled, loss, 0).sum() / number, "proposal_box": box_loss / number}
