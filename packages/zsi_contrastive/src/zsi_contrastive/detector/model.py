"""`ZeroShotMaskRCNN`: torchvision's Mask R-CNN with heads that know words (Zheng et al., CVPR 2021)."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.transforms.v2.functional import adjust_contrast, adjust_sharpness

from labs_common.device import constant
from zsi_contrastive import TINY
from zsi_contrastive.detector.backbone import make_backbone
from zsi_contrastive.detector.config import TrainConfig
from zsi_contrastive.detector.contrastive import CONTRASTIVE, THUMBNAIL, GreedyInfoMaxHead
from zsi_contrastive.detector.defaults import contrastive_of
from zsi_contrastive.detector.heads import (
    START,
    BackgroundAwareRPNHead,
    Samples,
    SemanticBoxHead,
    SemanticMaskHead,
    SynchronisedBackground,
    Target,
)
from zsi_contrastive.detector.proposals import BETA, Anchors, Proposals
from zsi_contrastive.detector.regions import Detections, Query, Sampling, ZeroShotRegions
from zsi_contrastive.detector.vectors import ClassVectors, read_vocabulary

RATIOS = (0.5, 1.0, 2.0)  # of anchors: height to width
MEAN, STD = list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD)  # the backbones were trained with them
RPN_FOREGROUND, RPN_BACKGROUND = 0.7, 0.3  # IoU from which an anchor is a thing, and below which it is background
RPN_THINGS = 0.5  # the largest share of things among an image's sampled anchors
RPN_NMS = 0.7  # IoU from which the weaker of two proposals is dropped; all four are Faster R-CNN's
TINY_CHANNELS, CHANNELS = 48, 256  # of the pyramid; 256 is that of Lin et al. 2017
TINY_ANCHORS = (16, 28, 48)  # drawn things are 15 to 46 pixels across


@dataclass(frozen=True)
class Parts:
    """The paper's parts that a detector has, and its contrastive heads (keys of `CONTRASTIVE`).

    `official` parts are computed as in the published code, but for what docs/zsi_contrastive.md lists; with `cosine`
    regions are compared with class vectors by their directions alone.
    """

    mask_head: bool = True
    box_decoder: bool = True
    mask_decoder: bool = True
    background_rpn: bool = True
    sync_background: bool = True
    contrastive: tuple[str, ...] = ()
    official: bool = False
    sync_masks: bool = False
    cosine: bool = False

    def plain(self) -> dict[str, bool]:
        """Returns a yes or no for each part and head: what is kept on disk."""
        plain: dict[str, bool] = {name: value for name, value in asdict(self).items() if name != "contrastive"}
        return plain | {name: name in self.contrastive for name in CONTRASTIVE}

    @classmethod
    def from_plain(cls, plain: dict[str, bool]) -> "Parts":
        """Makes them from what `plain` returned."""
        own = {name: value for name, value in plain.items() if name not in CONTRASTIVE}
        if "decoders" in own:  # as it was saved before
            own["box_decoder"] = own["mask_decoder"] = own.pop("decoders")
        return cls(**own, contrastive=tuple(name for name in CONTRASTIVE if plain.get(name)))


@dataclass(frozen=True)
class Sizes:
    """Widths and numbers. The defaults are the paper's, for photographs.

    Attributes:
        width: of the box head's layers.
        mask_width: of the mask head's convolutions, `mask_depth` of them.
        anchors: the anchors' sides in pixels, one for each level of the pyramid.
        min_side: pictures are scaled so that their shorter side is that long, and the longer at most `max_side`.
        rpn_samples: anchors of a picture that the proposals' loss looks at.
        proposals: before suppression in training and in use, and after it in training and in use.
        divisible: batches are padded to sides that this divides.
        sides: of what RoIAlign gives, for boxes and masks.
        points: samples across a cell of RoIAlign.
        tiny_modules: whether the modules of contrastive heads are small ones, or the paper's.
        thumbnail: side of what Greedy InfoMax sees, in pixels.
        contrast: of the pictures that are seen, and their `sharpness`; 1 leaves them as they are.
        strides: of the levels, for anchors as in the published code; without, they are torchvision's.
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
    strides: tuple[int, ...] = ()
    thumbnail: int = THUMBNAIL
    contrast: float = 1.0
    sharpness: float = 1.0


class Transform(GeneralizedRCNNTransform):
    """torchvision's scaling and padding, without its six small copies to the device for each picture."""

    def normalize(self, image: torch.Tensor) -> torch.Tensor:
        """Takes the mean from a picture (3, height, width) and divides by the standard deviation."""
        mean, std = (constant(tuple(values), image.device) for values in (self.image_mean, self.image_std))
        return (image - mean[:, None, None]) / std[:, None, None]

    def resize(self, image: torch.Tensor, target: Target | None = None) -> tuple[torch.Tensor, Target | None]:
        """Scales a picture, and the boxes and masks of its objects with it."""
        before = tuple(image.shape[-2:])
        scale = min(self.min_size[-1] / min(before), self.max_size / max(before))
        if min(before) * scale < 1:  # of a strip torchvision would leave no pixel
            height, width = (max(1, int(side * scale)) for side in before)
            image = F.interpolate(image[None], (height, width), mode="bilinear", align_corners=False)[0]
        else:
            image, _ = super().resize(image)
        if target is None:
            return image, None
        size = tuple(image.shape[-2:])
        masks = F.interpolate(target["masks"][:, None], size)[:, 0] if size != before else target["masks"]
        return image, {**target, "boxes": scaled(target["boxes"], before, size), "masks": masks}


def scaled(boxes: torch.Tensor, before: Sequence[int], after: Sequence[int]) -> torch.Tensor:
    """Moves boxes (n, 4) from a picture of height and width `before` to one of `after`: as torchvision, to the bit."""
    down, across = (float(np.float32(new) / np.float32(old)) for new, old in zip(after, before, strict=True))
    left, top, right, bottom = boxes.unbind(1)
    return torch.stack([left * across, top * down, right * across, bottom * down], 1)


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
        """Takes vectors of `background` (d,) and of `seen` classes (seen, d), and perhaps a vocabulary (n, d)."""
        super().__init__()
        channels = int(backbone.out_channels)  # type: ignore[arg-type]
        self.parts, self.sizes = parts, sizes
        self.transform = Transform(sizes.min_side, sizes.max_side, MEAN, STD, sizes.divisible)
        self.backbone = backbone
        anchors = Anchors(tuple((side,) for side in sizes.anchors), (RATIOS,) * len(sizes.anchors), sizes.strides)
        head = (
            BackgroundAwareRPNHead(channels, len(RATIOS), background, 1.0 if parts.official else START)
            if parts.background_rpn
            else RPNHead(channels, len(RATIOS))
        )
        before_training, before, after_training, after = sizes.proposals
        self.rpn = Proposals(
            anchors,
            head,
            RPN_FOREGROUND,
            RPN_BACKGROUND,
            sizes.rpn_samples,
            RPN_THINGS,
            {"training": before_training, "testing": before},
            {"training": after_training, "testing": after},
            RPN_NMS,
        )
        self.background = SynchronisedBackground(background)
        self.register_buffer("seen", seen.float().clone())
        inputs, length, official = channels * sizes.sides[0] ** 2, len(background), parts.official
        box_head = SemanticBoxHead(
            inputs, sizes.width, length, parts.box_decoder, words, official=1 + len(seen) if official else 0
        )
        mask_head = None
        if parts.mask_head:
            # In the published code each convolution reads the same input, and only the last one's output is used.
            depth = 1 if official else sizes.mask_depth
            mask_head = SemanticMaskHead(channels, sizes.mask_width, depth, length, parts.mask_decoder, official)
        # torchvision pools from four levels: the fifth, coarsest one is for proposals alone.
        levels = [str(place) for place in range(min(4, len(sizes.anchors)))]
        beta = 1.0 if official else BETA
        self.regions = ZeroShotRegions(
            levels, box_head, mask_head, sampling, sizes.sides, sizes.points, beta, parts.cosine
        )
        for name in parts.contrastive:
            contrastive = CONTRASTIVE[name].make(channels, sizes.tiny_modules)
            if isinstance(contrastive, GreedyInfoMaxHead):
                contrastive.thumbnail = sizes.thumbnail
            self.add_module(CONTRASTIVE[name].module, contrastive)

    def contrastive(self) -> dict[str, nn.Module]:
        """Returns the contrastive heads that there are, by their names in `CONTRASTIVE`."""
        return {name: self.get_submodule(CONTRASTIVE[name].module) for name in self.parts.contrastive}

    def classes(self) -> torch.Tensor:
        """Returns the vectors that training compares with (1 + seen, d): background's first, as it is now."""
        head = self.rpn.head
        learnt = None
        if self.parts.sync_background and isinstance(head, BackgroundAwareRPNHead):
            learnt = head.background_vector()
            if self.parts.official:
                learnt = learnt.detach()  # only the proposals' loss moves it
        assert isinstance(self.seen, torch.Tensor)
        return self.background(self.seen, learnt)

    def forward(
        self, samples: Samples, queries: Sequence[Query] = ()
    ) -> dict[str, torch.Tensor] | list[list[Detections]]:
        """Returns the losses by name in training; in evaluation each query's answers for every picture.

        Targets have `boxes` (n, 4), `labels` (n,) from 1 in the order of the seen classes, and `masks` (n, height,
        width) of 0 and 1. Both ways lead through here, because weights that are sharded are whole in a forward pass
        alone.
        """
        return self.losses(samples) if self.training else self.detect(samples.pictures, queries)

    def losses(self, samples: Samples) -> dict[str, torch.Tensor]:
        """Returns the losses by name; see `forward`."""
        pictures = self.enhanced(samples.pictures)
        batch, targets = self.transform(pictures, samples.targets)
        size = tuple(batch.tensors.shape[-2:])
        features = self.backbone(batch.tensors)
        contrast = {}
        for name, head in self.contrastive().items():
            contrast[name], features = head(pictures, features, targets, size)
        proposals, losses = self.rpn(batch, features, targets)
        found = self.regions.losses(features, proposals, size[0], targets, self.classes())
        return {**losses, **found, **contrast}

    def enhanced(self, pictures: list[torch.Tensor]) -> list[torch.Tensor]:
        """Changes contrast and sharpness of pictures (3, height, width) as the sizes say, in training and in use."""
        contrast, sharpness = self.sizes.contrast, self.sizes.sharpness
        if contrast != 1:
            pictures = [adjust_contrast(picture, contrast) for picture in pictures]
        return pictures if sharpness == 1 else [adjust_sharpness(picture, sharpness) for picture in pictures]

    @torch.no_grad()
    def detect(self, pictures: list[torch.Tensor], queries: Sequence[Query]) -> list[list[Detections]]:
        """Answers each query for every picture (3, height, width), with boxes in the picture's own pixels.

        Masks stay as small as the head gives them; see `zsi_contrastive.detector.pictures.run_lengths`.
        """
        pictures = self.enhanced(pictures)
        batch, _ = self.transform(pictures)
        features = self.backbone(batch.tensors)
        for head in self.contrastive().values():
            features = head.joined(pictures, features)  # type: ignore[operator]
        proposals, _ = self.rpn(batch, features)
        height = batch.tensors.shape[-2]
        known = self.classes()
        assert isinstance(self.background.word, torch.Tensor)
        word = known[0] if self.parts.sync_masks else self.background.word
        found = self.regions.detections(features, proposals, height, batch.image_sizes, known, word, queries)
        originals = [tuple(picture.shape[-2:]) for picture in pictures]
        return [
            [
                part._replace(boxes=scaled(part.boxes, size, original))
                for part, size, original in zip(of_query, batch.image_sizes, originals, strict=True)
            ]
            for of_query in found
        ]


def make_model(config: TrainConfig, vectors: ClassVectors) -> ZeroShotMaskRCNN:
    """Makes the untrained detector that a completed config describes.

    Raises:
        LabError: the backbone or the vocabulary cannot be had, or weights do not fit.
    """
    options, words = config.model, None
    if config.words.vocabulary is not None:
        words = read_vocabulary(config.words.vocabulary, vectors.seen.shape[1])
    channels = channels_of(options.backbone)
    official = options.form == "official"
    pretrained = options.backbone_pretrained and ("IMAGENET1K_V1" if official else True)
    backbone = make_backbone(options.backbone, pretrained, options.backbone_weights, options.frozen_stages, channels)
    parts = Parts(
        options.mask_head,
        options.decoders and options.box_decoder,
        options.decoders and options.mask_decoder,
        options.background_rpn,
        options.sync_background,
        contrastive_of(options),
        official,
        options.sync_masks,
        options.similarity == "cosine",
    )
    model = ZeroShotMaskRCNN(backbone, vectors.background, vectors.seen, parts, *sizes_of(config), words)
    for name, head in model.contrastive().items():
        if (start := CONTRASTIVE[name].start) is not None:
            start(head, options)
    return model


def sizes_of(config: TrainConfig) -> tuple[Sizes, Sampling]:
    """Returns widths and numbers for a completed config's backbone; tiny's fit drawn scenes of 96 pixels."""
    options = config.model
    shared: dict[str, Any] = {
        name: getattr(options, name) for name in ("min_side", "max_side", "thumbnail", "contrast", "sharpness")
    }
    # Level by level from 4 on, also over the tiny body.
    strides = (4, 8, 16, 32, 64) if options.form == "official" else ()
    if options.backbone != TINY:
        return Sizes(strides=strides, **shared), Sampling()
    sizes = Sizes(
        width=256,
        mask_width=48,
        mask_depth=2,
        anchors=TINY_ANCHORS,
        rpn_samples=64,
        proposals=(100, 200, 50, 100),
        divisible=16,
        sides=(5, 7),
        points=1,
        tiny_modules=True,
        strides=strides[: len(TINY_ANCHORS)],
        **shared,
    )
    return sizes, Sampling(per_picture=24)


def channels_of(backbone: str) -> int:
    """Returns the channels of the pyramid over a backbone."""
    return TINY_CHANNELS if backbone == TINY else CHANNELS
