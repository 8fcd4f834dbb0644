"""The second stage: regions sampled, scored against class vectors, boxed and masked.

Sampling, matching, RoIAlign and the losses of boxes and masks are torchvision's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection.roi_heads import RoIHeads, project_masks_on_boxes
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops import boxes as box_ops

from zsi_contrastive.detector.heads import SemanticBoxHead, SemanticMaskHead, Target, mask_logits, transferred

# torchvision's, as in Faster R-CNN: shifts of boxes are scaled so that their deviations are about 1.
BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
OVERLAP = 0.5  # IoU from which a region is taken for an object's, in training
CANDIDATES = 2000  # the most boxes of a picture that go into non-maximum suppression
NARROW = 1e-2  # pixels: smaller boxes are dropped, as torchvision does


@dataclass(frozen=True)
class Query:
    """Classes to look for, which may be any that have vectors.

    Attributes:
        vectors: (classes, d).
        groups: (classes,), int64: of each group the best detections of a picture are kept.
        temperature: see `zsi_contrastive.detector.heads.transferred`.
        background: see there.
        masks: whether they are wanted.
    """

    vectors: torch.Tensor
    groups: torch.Tensor
    temperature: float = 1.0
    background: bool = True
    masks: bool = True


class Detections(NamedTuple):
    """The detections of a picture, best first within each group.

    Attributes:
        boxes: (found, 4), left, top, right and bottom.
        scores: (found,).
        classes: (found,), rows of `Query.vectors`.
        masks: probabilities (found, side, side) inside the boxes, or None.
    """

    boxes: torch.Tensor
    scores: torch.Tensor
    classes: torch.Tensor
    masks: torch.Tensor | None


@dataclass(frozen=True)
class Sampling:
    """The choice of a picture's regions for training. The defaults are those of Mask R-CNN with a pyramid."""

    per_picture: int = 512
    thing_share: float = 0.25


class ZeroShotRegions(RoIHeads):
    """torchvision's second stage with heads that know words."""

    def __init__(
        self,
        levels: Sequence[str],
        box_head: SemanticBoxHead,
        mask_head: SemanticMaskHead | None,
        sampling: Sampling,
        sides: tuple[int, int],
        points: int,
    ) -> None:
        """Reads `levels` of the pyramid; RoIAlign gives `sides` for boxes and masks, of `points`² samples a cell."""
        super().__init__(
            MultiScaleRoIAlign(list(levels), sides[0], points),
            box_head,
            nn.Identity(),  # torchvision's box predictor: here the head does it all
            OVERLAP,
            OVERLAP,
            sampling.per_picture,
            sampling.thing_share,
            BOX_WEIGHTS,
            score_thresh=0.05,  # these three until `keep` is called
            nms_thresh=0.5,
            detections_per_img=100,
        )
        self.semantic_masks = mask_head
        self.mask_pool = MultiScaleRoIAlign(list(levels), sides[1], points) if mask_head else None

    def keep(self, score: float, overlap: float, most: int) -> None:
        """Drops detections that score less, overlap a better one of their class by more, or are not the best `most`."""
        self.score_thresh, self.nms_thresh, self.detections_per_img = score, overlap, most

    def losses(
        self,
        features: dict[str, torch.Tensor],
        proposals: list[torch.Tensor],
        sizes: list[tuple[int, int]],
        targets: list[Target],
        classes: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Returns losses by name. `classes` (1 + seen, d) begin with background, `targets` have labels from 1 on."""
        regions, matched, labels, shifts = self.select_training_samples(list(proposals), targets)
        vectors, boxes, seen = self.box_head(self.box_roi_pool(features, regions, sizes))
        label = torch.cat(labels)  # (regions,) of all pictures
        things = torch.where(label > 0)[0]
        wanted = torch.cat(list(shifts))[things]
        losses = {
            "classes": F.cross_entropy(vectors @ classes.T, label),
            # torchvision's: beta 1/9, and the mean over all regions, also those of background.
            "box": F.smooth_l1_loss(boxes[things], wanted, beta=1 / 9, reduction="sum") / max(1, len(label)),
        }
        if self.box_head.decoder is not None:
            losses["box_reconstruction"] = self.box_head.reconstruction_loss(vectors, seen)
        if self.semantic_masks is None or self.mask_pool is None:
            return losses
        kept = [torch.where(of_picture > 0)[0] for of_picture in labels]
        inside = [part[places] for part, places in zip(regions, kept, strict=True)]
        of_thing = [part[places] for part, places in zip(matched, kept, strict=True)]
        pixels, mask_features = self.semantic_masks(self.mask_pool(features, inside, sizes))
        logits = mask_logits(pixels, classes[label[things]])
        side = logits.shape[-1]
        masks = [
            project_masks_on_boxes(target["masks"], part, places, side)
            for target, part, places in zip(targets, inside, of_thing, strict=True)
        ]
        # Where no region is a thing the heads still take part, as every process has to.
        losses["mask"] = (
            F.binary_cross_entropy_with_logits(logits, torch.cat(masks)) if len(things) else logits.sum() * 0
        )
        if self.semantic_masks.decoder is not None:
            losses["mask_reconstruction"] = (
                self.semantic_masks.reconstruction_loss(pixels, mask_features)
                if len(things)
                else self.semantic_masks.decoder(pixels).sum() * 0
            )
        return losses

    def detections(
        self,
        features: dict[str, torch.Tensor],
        proposals: list[torch.Tensor],
        sizes: list[tuple[int, int]],
        known: torch.Tensor,
        queries: Sequence[Query],
    ) -> list[list[Detections]]:
        """Answers each query for every picture; `known` (1 + seen, d) are the classes trained on.

        The proposals go through the box head once, whatever the number of queries.
        """
        vectors, shifts, _ = self.box_head(self.box_roi_pool(features, proposals, sizes))
        counts = [len(part) for part in proposals]
        boxes = self.box_coder.decode(shifts.float(), proposals).reshape(-1, 4).split(counts)
        with torch.autocast(vectors.device.type, enabled=False):  # scores that differ little keep their order
            logits = vectors.float() @ known.float().T
            scores = [
                transferred(logits, known, query.vectors, query.temperature, query.background).split(counts)
                for query in queries
            ]
        answers = []
        for query, of_query in zip(queries, scores, strict=True):
            found = [
                self._kept(box_ops.clip_boxes_to_image(part, size), score, query.groups)
                for part, score, size in zip(boxes, of_query, sizes, strict=True)
            ]
            if query.masks and self.semantic_masks is not None:
                found = self._masked(features, sizes, found, query)
            answers.append(found)
        return answers

    def _kept(self, boxes: torch.Tensor, scores: torch.Tensor, groups: torch.Tensor) -> Detections:
        """Keeps the best of each group, after non-maximum suppression within each class."""
        parts = []
        big = ((boxes[:, 2:] - boxes[:, :2]) >= NARROW).all(1)
        for group in groups.unique():
            members = torch.where(groups == group)[0]
            candidates = torch.where(big[:, None], scores[:, members], -torch.inf).flatten()  # (boxes · members,)
            best, place = candidates.topk(min(CANDIDATES, len(candidates)))
            place = place[best > self.score_thresh]
            best = best[best > self.score_thresh]
            box, label = boxes[place // len(members)], members[place % len(members)]
            keep = box_ops.batched_nms(box, best, label, self.nms_thresh)[: self.detections_per_img]
            parts.append((box[keep], best[keep], label[keep]))
        found, score, label = (torch.cat(columns) for columns in zip(*parts, strict=True))
        return Detections(found, score, label, None)

    def _masked(
        self, features: dict[str, torch.Tensor], sizes: list[tuple[int, int]], found: list[Detections], query: Query
    ) -> list[Detections]:
        assert self.semantic_masks is not None
        assert self.mask_pool is not None
        pixels, _ = self.semantic_masks(self.mask_pool(features, [part.boxes for part in found], sizes))
        wanted = query.vectors[torch.cat([part.classes for part in found])]
        masks = mask_logits(pixels, wanted).float().sigmoid().split([len(part.boxes) for part in found])
        return [part._replace(masks=mask) for part, mask in zip(found, masks, strict=True)]
