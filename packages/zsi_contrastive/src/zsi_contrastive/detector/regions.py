"""The second stage: regions sampled, scored against class vectors, boxed and masked.

How regions are matched, drawn, pooled and suppressed is in `proposals`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.models.detection.roi_heads import project_masks_on_boxes
from torchvision.ops import box_iou, clip_boxes_to_image

from zsi_contrastive.detector.heads import (
    Levels,
    SemanticBoxHead,
    SemanticMaskHead,
    Target,
    direct,
    known_columns,
    mask_logits,
    through_known,
    transferred,
)
from zsi_contrastive.detector.proposals import (
    BACKGROUND,
    BETA,
    counted,
    drawn,
    levels_of,
    matched,
    numbered,
    pooled,
    shift_loss,
    shifted,
    surviving,
)

# torchvision's, as in Faster R-CNN: shifts of boxes are scaled so that their deviations are about 1.
BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
OVERLAP = 0.5  # IoU from which a region is taken for an object's, in training
CANDIDATES = 2000  # boxes of a picture that go into non-maximum suppression at first: as a rule enough survive
WIDER = 4  # times as many go into it where too few did
NARROW = 1e-2  # pixels: smaller boxes are dropped, as torchvision does
SCALE, MOST_SCALE = 1 / 0.07, 100.0  # of cosines, at first and at most: CLIP's
IGNORED = -100  # the label of what the classes' loss leaves out


@dataclass(frozen=True)
class Query:
    """Classes to look for, which may be any that have vectors.

    Without groups it asks for the proposals themselves, best first: their scores and classes are 0.

    Attributes:
        vectors: (classes, d).
        groups: sizes of groups of consecutive classes: of each the best detections of a picture are kept.
        temperature: see `zsi_contrastive.detector.heads.transferred`.
        transfer: code, direct or things; see `zsi_contrastive.detector.options.DetectionOptions`.
        masks: whether they are wanted.
        rivals: for each group other classes (n, d) that take their share of what `direct` spreads over it.
        places: for each class its number among unseen ones, by which one without an own box takes a known class's;
            by default as they stand in their group.
    """

    vectors: torch.Tensor
    groups: tuple[int, ...]
    temperature: float = 1.0
    transfer: str = "code"
    masks: bool = True
    rivals: tuple[torch.Tensor, ...] = ()
    places: tuple[int, ...] = ()

    def to(self, device: torch.device) -> "Query":
        """Copies the vectors to a device."""
        return replace(self, vectors=self.vectors.to(device), rivals=tuple(one.to(device) for one in self.rivals))


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


class Regions(NamedTuple):
    """The regions that a batch's losses look at, (pictures, slots) of each; things stand first in their picture.

    Attributes:
        boxes: (pictures, slots, 4).
        labels: of the classes, from 1; 0 for background.
        owners: the object of its picture that a thing's region belongs to.
        wanted: that object's box (pictures, slots, 4).
        filled: the slots that count.
    """

    boxes: torch.Tensor
    labels: torch.Tensor
    owners: torch.Tensor
    wanted: torch.Tensor
    filled: torch.Tensor


class ZeroShotRegions(nn.Module):
    """The second stage of Mask R-CNN with heads that know words."""

    def __init__(
        self,
        levels: Sequence[str],
        box_head: SemanticBoxHead,
        mask_head: SemanticMaskHead | None,
        sampling: Sampling,
        sides: tuple[int, int],
        points: int,
        beta: float = BETA,
        cosine: bool = False,
    ) -> None:
        """Reads `levels` of the pyramid; RoIAlign gives `sides` for boxes and masks, of `points`² samples a cell."""
        super().__init__()
        # By its logarithm as in CLIP; of one value, because FSDP shards no scalar.
        self.logit_scale = nn.Parameter(torch.tensor([math.log(SCALE)])) if cosine else None
        self.beta = beta
        self.levels, self.sampling, self.sides, self.points = tuple(levels), sampling, sides, points
        self.box_head = box_head
        self.semantic_masks = mask_head
        self.keep(0.05, 0.5, 100)  # torchvision's

    def keep(self, score: float, overlap: float, most: int) -> None:
        """Drops detections that score less, overlap a better one of their class by more, or are not the best `most`."""
        self.score_thresh, self.nms_thresh, self.detections_per_img = score, overlap, most

    def losses(
        self,
        features: Levels,
        proposals: list[torch.Tensor],
        height: int,
        targets: list[Target],
        classes: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Returns losses by name.

        `classes` (1 + seen, d) begin with background, `targets` have labels from 1 on; `height` is the batch's.
        """
        regions = self._drawn(proposals, targets)
        filled, label = regions.filled.flatten(), regions.labels.flatten()  # (regions,) of all pictures
        boxes, things = regions.boxes.flatten(0, 1), filled & (label > 0)
        # Masks are of things alone, and they are few: the host reads once how many, with the numbers of each level.
        level_of = levels_of([features[name] for name in self.levels], boxes, height)
        thing_levels = counted(level_of.masked_fill(~things, -1), len(self.levels))
        numbers = counted(level_of, len(self.levels)), thing_levels, things.view_as(regions.filled).sum(1)
        of_levels, of_things, counts = (
            self._most(*regions.filled.shape)
            if isinstance(boxes, FakeTensor)
            else (part.tolist() for part in torch.cat(numbers).cpu().split([len(n) for n in numbers]))
        )
        vectors, shifts, seen = self.box_head(self._pooled(features, list(regions.boxes), height, 0, of_levels))
        logits = self.logits(vectors, classes)
        number = filled.sum().clamp(min=1)
        if self.box_head.boxes > 1:  # of its class
            shifts = shifts.gather(1, label[:, None, None].expand(-1, 1, 4))
        of_boxes = shift_loss(shifts[:, 0], boxes, regions.wanted.flatten(0, 1), things, BOX_WEIGHTS, self.beta)
        losses = {
            "classes": F.cross_entropy(logits, label.masked_fill(~filled, IGNORED), ignore_index=IGNORED),
            "box": of_boxes / number,  # torchvision's mean: over all regions, also those of background
        }
        if self.box_head.decoder is not None:
            error = self.box_head.reconstruction_loss(vectors, seen, reduction="none").mean(1)
            losses["box_reconstruction"] = torch.where(filled, error, 0).sum() / number
        if self.semantic_masks is None:
            return losses
        inside, owners, labels = (
            [part[:count] for part, count in zip(rows, counts, strict=True)]
            for rows in (regions.boxes, regions.owners, regions.labels)
        )
        pixels, mask_features = self.semantic_masks(self._pooled(features, inside, height, 1, of_things))
        of_masks = mask_logits(pixels, classes[torch.cat(labels)]).float()
        side = of_masks.shape[-1]
        masks = [
            project_masks_on_boxes(target["masks"], part, places, side)
            for target, part, places in zip(targets, inside, owners, strict=True)
        ]
        # Where no region is a thing the heads still take part, as every process has to.
        losses["mask"] = (
            F.binary_cross_entropy_with_logits(of_masks, torch.cat(masks)) if sum(counts) else of_masks.sum() * 0
        )
        if self.semantic_masks.decoder is not None:
            losses["mask_reconstruction"] = (
                self.semantic_masks.reconstruction_loss(pixels, mask_features)
                if sum(counts)
                else self.semantic_masks.decoder(pixels).sum() * 0
            )
        return losses

    def logits(self, vectors: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """Compares vectors (n, d) with classes (m, d), in 32 bits also under autocast: (n, m), see --similarity."""
        with torch.autocast(vectors.device.type, enabled=False):
            vectors, classes = vectors.float(), classes.float()
            if self.logit_scale is None:
                return vectors @ classes.T
            scale = self.logit_scale.exp().clamp(max=MOST_SCALE)
            return scale * F.normalize(vectors, dim=1) @ F.normalize(classes, dim=1).T

    def _most(self, pictures: int, slots: int) -> tuple[list[int], list[int], list[int]]:
        """Returns what `losses` reads where values are not known: all that may be things are, of the finest level."""
        things = min(int(self.sampling.per_picture * self.sampling.thing_share), slots)
        none = [0] * (len(self.levels) - 1)
        return [pictures * slots, *none], [pictures * things, *none], [things] * pictures

    @torch.no_grad()
    def _drawn(self, proposals: list[torch.Tensor], targets: list[Target]) -> Regions:
        """Draws the regions of a batch from its proposals and its objects' own boxes."""
        boxes = [torch.cat([part, target["boxes"]]) for part, target in zip(proposals, targets, strict=True)]
        owners, labels = [], []
        for part, target in zip(boxes, targets, strict=True):
            if len(target["boxes"]):
                owner = matched(box_iou(target["boxes"], part), OVERLAP, OVERLAP)
                labels.append(target["labels"][owner.clamp(min=0)].masked_fill(owner == BACKGROUND, 0))
                owners.append(owner.clamp(min=0))
            else:
                labels.append(torch.zeros(len(part), dtype=torch.int64, device=part.device))
                owners.append(labels[-1])
        # Pictures have different numbers of boxes and objects: the rest is filled up with what is never drawn, as the
        # proposals may be already.
        label = pad_sequence(labels, batch_first=True, padding_value=-1)  # (pictures, most boxes)
        owner, box = pad_sequence(owners, batch_first=True), pad_sequence(boxes, batch_first=True)
        own = pad_sequence([F.pad(target["boxes"], (0, 0, 0, 1)) for target in targets], batch_first=True)
        label = label.masked_fill(box[..., 2] <= box[..., 0], -1)
        places, filled = drawn(label, self.sampling.per_picture, self.sampling.thing_share)
        owner = owner.gather(1, places)
        return Regions(
            box.gather(1, places[..., None].expand(-1, -1, 4)),
            label.gather(1, places).clamp(min=0),
            owner,
            own.gather(1, owner[..., None].expand(-1, -1, 4)),
            filled,
        )

    def _pooled(
        self, features: Levels, boxes: Sequence[torch.Tensor], height: int, kind: int, counts: list[int] | None = None
    ) -> torch.Tensor:
        """Pools the boxes of each picture (n, 4), for the head of boxes (0) or of masks (1); see `pooled`."""
        levels = [features[name] for name in self.levels]
        return pooled(levels, numbered(boxes), height, self.sides[kind], self.points, counts)

    def detections(
        self,
        features: Levels,
        proposals: list[torch.Tensor],
        height: int,
        sizes: list[tuple[int, int]],
        known: torch.Tensor,
        word: torch.Tensor,
        queries: Sequence[Query],
    ) -> list[list[Detections]]:
        """Answers each query for every picture; `known` (1 + seen, d) are the classes trained on, after background.

        `word` (d,) is what stands for background where masks go through known classes.

        The proposals go through the box head once, whatever the number of queries. The host reads once how many
        detections score enough, and for each group twice: what suppression leaves of all pictures' and of each; and
        again where the best `CANDIDATES` leave too few.
        """
        vectors, shifts, _ = self.box_head(self._pooled(features, proposals, height, 0))
        counts = [len(part) for part in proposals]
        kinds = shifts.shape[1]  # boxes of a proposal: one for all classes, or one of each class
        decoded = shifted(torch.cat(proposals)[:, None], shifts.float(), BOX_WEIGHTS).split(counts)
        clipped = [clip_boxes_to_image(part, size) for part, size in zip(decoded, sizes, strict=True)]
        boxes = pad_sequence(clipped, batch_first=True)  # (pictures, proposals, kinds, 4); the filled in have no area
        big = (boxes[..., 2:] - boxes[..., :2] >= NARROW).all(3)
        logits = self.logits(vectors, known)
        candidates = []
        for query in queries:
            if not query.groups:
                continue
            with torch.autocast(logits.device.type, enabled=False):  # scores that differ little keep their order
                if query.transfer == "direct":
                    asked, *rivals = (self.logits(vectors, one) for one in (query.vectors, *query.rivals))
                    scores = direct(logits[:, :1], asked, query.groups, query.temperature, rivals)
                else:
                    scores = transferred(logits, known, query.vectors, query.temperature, query.transfer == "code")
            scores = pad_sequence(scores.split(counts), batch_first=True)
            first = 0
            for size in query.groups:
                # A known class has its own box; others have those of the known ones in turn, as unseen classes have in
                # the published code.
                own = None
                if kinds > 1:
                    column = known_columns(query.vectors[first : first + size], known)
                    turn = (column == 0).cumsum(0) - 1
                    if query.places:
                        turn = torch.tensor(query.places[first : first + size], device=column.device)
                    own = torch.where(column > 0, column, turn % (kinds - 1) + 1)
                large = big if own is None else big[..., own]
                part = scores[..., first : first + size].masked_fill(~large, -torch.inf)
                candidates.append((part, own, first))  # (pictures, proposals, classes)
                first += size
        enough = iter(torch.stack([(part > self.score_thresh).sum((1, 2)) for part, *_ in candidates]).tolist())
        of_groups = iter(candidates)
        answers = []
        for query in queries:
            if not query.groups:
                nothing = [torch.zeros(count, device=logits.device) for count in counts]
                pairs = zip(proposals, nothing, strict=True)
                answers.append([Detections(box.float(), zero, zero, None) for box, zero in pairs])
                continue
            groups = [self._kept(boxes, *next(of_groups), next(enough)) for _ in query.groups]
            found = []
            for of_picture in zip(*groups, strict=True):
                box, score, label = (torch.cat(columns) for columns in zip(*of_picture, strict=True))
                found.append(Detections(box, score, label, None))
            if query.masks and self.semantic_masks is not None:
                if query.transfer == "code":
                    asked = through_known(query.vectors, torch.cat([word[None], known[1:]]))
                    query = replace(query, vectors=asked)
                found = self._masked(features, height, found, query)
            answers.append(found)
        return answers

    def _kept(
        self,
        boxes: torch.Tensor,
        scores: torch.Tensor,
        own: torch.Tensor | None,
        first: int,
        counts: list[int],
        looked_at: int = CANDIDATES,
    ) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Keeps the best of a group in each picture, after non-maximum suppression within each class.

        Takes `boxes` (pictures, proposals, kinds, 4), `scores` (pictures, proposals, classes) of which `counts` are
        enough, each class's `own` kind of box, and the number of the `first` class. Suppression goes from the best
        score down, so that what it leaves of the best few are the best of what it would leave of all: more are looked
        at only where that is too few.
        """
        kinds, size = boxes.shape[2], scores.shape[2]
        best, place = scores.flatten(1).topk(min(looked_at, max(counts)))
        label = place % size
        row = place // size * kinds + (0 if own is None else own[label])
        box = boxes.flatten(1, 2).gather(1, row[..., None].expand(-1, -1, 4))
        box = box.masked_fill(~(best > self.score_thresh)[..., None], 0)
        kept = surviving(box, best, label, self.nms_thresh)
        order = kept.sort(dim=1, descending=True, stable=True).indices
        numbers = kept.sum(1).clamp(max=self.detections_per_img).tolist()
        found = [
            (box[picture, part[:number]], best[picture, part[:number]], first + label[picture, part[:number]])
            for picture, (part, number) in enumerate(zip(order, numbers, strict=True))
        ]
        for picture, (number, count) in enumerate(zip(numbers, counts, strict=True)):
            if number < self.detections_per_img and count > looked_at:
                one = slice(picture, picture + 1)
                found[picture : picture + 1] = self._kept(
                    boxes[one], scores[one], own, first, [count], WIDER * looked_at
                )
        return found

    def _masked(self, features: Levels, height: int, found: list[Detections], query: Query) -> list[Detections]:
        assert self.semantic_masks is not None
        pixels, _ = self.semantic_masks(self._pooled(features, [part.boxes for part in found], height, 1))
        wanted = query.vectors[torch.cat([part.classes for part in found])]
        masks = mask_logits(pixels, wanted).float().sigmoid().split([len(part.boxes) for part in found])
        return [part._replace(masks=mask) for part, mask in zip(found, masks, strict=True)]
