"""`ZeroShotMaskRCNN`: torchvision's Mask R-CNN with heads that know words (Zheng et al., CVPR 2021)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes

from zsi_contrastive.detector.contrastive import GreedyInfoMaxHead, PatchInfoNCEHead
from zsi_contrastive.detector.heads import (
    BackgroundAwareRPNHead,
    SemanticBoxHead,
    SemanticMaskHead,
    SynchronisedBackground,
)
from zsi_contrastive.detector.regions import Asked, Found, Sampling, Target, ZeroShotRegions
from zsi_contrastive.greedy import TINY_SIZES, GreedySizes

RATIOS = (0.5, 1.0, 2.0)
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
MASK_FROM = 0.5  # the probability from which a pixel belongs to a thing


@dataclass(frozen=True)
class Parts:
    """Which of the paper's parts there are, and which contrastive heads: ablations switch them on."""

    mask_head: bool = True
    decoders: bool = True
    background_rpn: bool = True
    sync_background: bool = True
    greedy_infomax: bool = False
    patch_infonce: bool = False


@dataclass(frozen=True)
class Sizes:
    """Widths and numbers. The defaults are the paper's, for photographs.

    Attributes:
        anchors: the anchors' sides in pixels, one for each level of the pyramid.
        proposals: before and after suppression, in training and in use.
        tiny_modules: whether the Greedy InfoMax head's are small ones, or the paper's.
    """

    width: int = 1024
    mask_width: int = 256
    mask_depth: int = 4
    anchors: tuple[int, ...] = (32, 64, 128, 256, 512)
    min_side: int = 800
    max_side: int = 1333
    rpn_samples: int = 256
    proposals: tuple[int, int, int, int] = (2000, 1000, 2000, 1000)
    divisible: int = 32
    sides: tuple[int, int] = (7, 14)
    points: int = 2
    tiny_modules: bool = False


class ZeroShotMaskRCNN(nn.Module):
    """Finds things of the classes that it was trained on and of any others that have vectors.

    How many classes there are is in no weight: the box head turns a region into a vector, and the classes are what
    that vector is compared with.
    """

    def __init__(
        self,
        backbone: nn.Module,
        background: torch.Tensor,
        seen: torch.Tensor,
        parts: Parts,
        sizes: Sizes,
        sampling: Sampling,
        words: torch.Tensor | None = None,
    ) -> None:
        """`background` (d,) and `seen` (seen, d) are vectors of words, `words` (n, d) a second vocabulary."""
        super().__init__()
        channels = int(backbone.out_channels)  # type: ignore[arg-type]
        self.parts = parts
        self.transform = GeneralizedRCNNTransform(sizes.min_side, sizes.max_side, MEAN, STD, sizes.divisible)
        self.backbone = backbone
        anchors = AnchorGenerator(tuple((side,) for side in sizes.anchors), (RATIOS,) * len(sizes.anchors))
        head = (
            BackgroundAwareRPNHead(channels, len(RATIOS), background)
            if parts.background_rpn
            else RPNHead(channels, len(RATIOS))
        )
        before_training, before, after_training, after = (sizes.proposals[place] for place in (0, 1, 2, 3))
        self.rpn = RegionProposalNetwork(
            anchors, head, 0.7, 0.3, sizes.rpn_samples, 0.5,
            {"training": before_training, "testing": before}, {"training": after_training, "testing": after}, 0.7,
        )  # fmt: skip
        self.background = SynchronisedBackground(background)
        self.register_buffer("seen", seen.float().clone())
        box_head = SemanticBoxHead(channels * sizes.sides[0] ** 2, sizes.width, len(background), parts.decoders, words)
        mask_head = None
        if parts.mask_head:
            mask_head = SemanticMaskHead(channels, sizes.mask_width, sizes.mask_depth, len(background), parts.decoders)
        levels = [str(place) for place in range(min(4, len(sizes.anchors)))]
        self.regions = ZeroShotRegions(levels, box_head, mask_head, sampling, sizes.sides, sizes.points)
        modules = TINY_SIZES if sizes.tiny_modules else GreedySizes()
        self.greedy = GreedyInfoMaxHead(channels, modules) if parts.greedy_infomax else None
        self.patch = PatchInfoNCEHead(channels) if parts.patch_infonce else None

    def classes(self) -> torch.Tensor:
        """The vectors that training compares with (1 + seen, d): background's first, as it is now."""
        head = self.rpn.head
        learnt = None
        if self.parts.sync_background and isinstance(head, BackgroundAwareRPNHead):
            learnt = head.background_vector()
        assert isinstance(self.seen, torch.Tensor)
        return self.background(self.seen, learnt)

    def forward(self, pictures: list[torch.Tensor], targets: list[Target]) -> dict[str, torch.Tensor]:
        """The losses by name.

        Pictures are (3, height, width) of 0 to 1; a target has `boxes` (n, 4), `labels` (n,) from 1 in the order of
        the seen classes, and `masks` (n, height, width) of 0 and 1.
        """
        batch, scaled = self.transform(pictures, targets)
        features = self.backbone(batch.tensors)
        contrast = {}
        if self.greedy is not None:
            contrast["greedy_infomax"], seen = self.greedy(pictures)
            features = self.greedy.joined(features, seen)
        if self.patch is not None:
            finest = next(iter(features.values()))
            contrast["patch_infonce"] = self.patch(finest, scaled, *batch.tensors.shape[-2:])
        proposals, losses = self.rpn(batch, features, scaled)
        found = self.regions.losses(features, proposals, batch.image_sizes, scaled, self.classes())
        return {
            "objectness": losses["loss_objectness"],
            "proposal_box": losses["loss_rpn_box_reg"],
            **found,
            **contrast,
        }

    @torch.no_grad()
    def detect(self, pictures: list[torch.Tensor], lists: Sequence[Asked]) -> list[list[Found]]:
        """For each of `lists` what is in every picture (3, height, width), boxes in the picture's own pixels.

        Masks stay as small as the head gives them; see `pasted`.
        """
        batch, _ = self.transform(pictures)
        features = self.backbone(batch.tensors)
        if self.greedy is not None:
            features = self.greedy.joined(features, self.greedy.seen(pictures))
        proposals, _ = self.rpn(batch, features)
        found = self.regions.detections(features, proposals, batch.image_sizes, self.classes(), lists)
        originals = [tuple(picture.shape[-2:]) for picture in pictures]
        return [
            [
                part._replace(boxes=resize_boxes(part.boxes, size, original))
                for part, size, original in zip(of_list, batch.image_sizes, originals, strict=True)
            ]
            for of_list in found
        ]


def pasted(found: Found, height: int, width: int) -> torch.Tensor:
    """The masks in a picture of that size (found, height, width), bool."""
    assert found.masks is not None
    if len(found.masks) == 0:
        return torch.zeros(0, height, width, dtype=torch.bool)
    return paste_masks_in_image(found.masks[:, None], found.boxes, (height, width))[:, 0] >= MASK_FROM
