"""The heads of the network that know words.

Proposals, boxes and masks are scored against class vectors as in Zheng et al., "Zero-Shot Instance Segmentation", CVPR
2021, section 3. Shapes: d is the length of a word vector, and class vectors are rows, with the background's first.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads

DECONV = 2  # the mask head doubles the side of what RoIAlign gives
START = 0.01  # standard deviation of new weights of the proposals, as in Faster R-CNN (Ren et al. 2015, section 3.1.3)
Levels = dict[str, torch.Tensor]
Target = dict[str, torch.Tensor]  # of a picture: `boxes` (n, 4), `labels` (n,) from 1, `masks` (n, height, width)


@dataclass(frozen=True)
class Samples:
    """The pictures of a batch, and in training what is in them.

    Not a tuple or a list: FSDP would turn those tensors, and with them the boxes, into bfloat16.

    Attributes:
        pictures: each (3, height, width) of 0 to 1.
        targets: of each.
    """

    pictures: list[torch.Tensor]
    targets: list[Target] | None = None


class BackgroundAwareRPNHead(nn.Module):
    """Proposals that learn what background is as a word vector (section 3.3).

    Each place becomes a vector in the space of words; an anchor's score is its product with a learnt row for things
    minus that with a learnt row for background, which starts as background's word vector. In place of
    torchvision's `RPNHead`.
    """

    def __init__(self, channels: int, anchors: int, background: torch.Tensor, start: float = START) -> None:
        """Makes the layers for `anchors` per place; `background` (d,) is copied, rows for things deviate by `start`."""
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.semantic = nn.Conv2d(channels, len(background), 1)
        self.box = nn.Conv2d(channels, anchors * 4, 1)
        for layer in (self.conv, self.semantic, self.box):
            nn.init.normal_(layer.weight, std=START)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
        self.background = nn.Parameter(background.float().repeat(anchors, 1))  # (anchors, d)
        self.thing = nn.Parameter(torch.randn(anchors, len(background)) * start)

    def forward(self, features: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Scores and shifts the anchors of every level (pictures, channels, h, w).

        Returns scores (pictures, anchors, h, w) and boxes (pictures, anchors · 4, h, w). A score is the logit of being
        a thing: the softmax over both rows is its sigmoid.
        """
        rows = self.thing - self.background  # (anchors, d)
        # The vectors and their product with the rows are one linear map: a place's d values are never held.
        weight = (rows @ self.semantic.weight.flatten(1))[..., None, None]  # (anchors, channels, 1, 1)
        bias = rows @ self.semantic.bias if self.semantic.bias is not None else None
        scores, boxes = [], []
        for feature in features:
            seen = F.relu(self.conv(feature))
            scores.append(F.conv2d(seen, weight.to(seen.dtype), None if bias is None else bias.to(seen.dtype)))
            boxes.append(self.box(seen))
        return scores, boxes

    def background_vector(self) -> torch.Tensor:
        """Returns what stands for background now (d,): the mean of the anchors' rows."""
        return self.background.mean(0)


class SynchronisedBackground(nn.Module):
    """Class vectors whose first row is background: its word vector, or what the proposals have learnt (section 3.5)."""

    def __init__(self, background: torch.Tensor) -> None:
        """Keeps `background` (d,), its word vector."""
        super().__init__()
        self.register_buffer("word", background.float().clone())

    def forward(self, seen: torch.Tensor, learnt: torch.Tensor | None = None) -> torch.Tensor:
        """Returns (1 + seen, d); the gradient flows back into `learnt` (d,) where that takes the word's place."""
        assert isinstance(self.word, torch.Tensor)
        return torch.cat([(self.word if learnt is None else learnt)[None], seen])


class SemanticBoxHead(nn.Module):
    """Turns a region into a vector in the space of words, and the shift of its box, which is the same for every class.

    With a decoder the features are reconstructed from the vector (section 3.2); with a vocabulary the vector
    passes through its products with many words first. As in the published code, with `official` classes, each
    class has a shift of its own, and the decoder goes back through the vocabulary.
    """

    words: torch.Tensor | None

    def __init__(
        self,
        inputs: int,
        width: int,
        length: int,
        decoder: bool,
        words: torch.Tensor | None = None,
        official: int = 0,
    ) -> None:
        """Makes layers for `inputs` values of a region, `width` and `length` d; `words` (n, d) are a vocabulary."""
        super().__init__()
        self.boxes = official or 1
        self.first = nn.Linear(inputs, width)
        self.second = nn.Linear(width, width)
        self.semantic = nn.Linear(width, length)
        self.box = nn.Linear(width, 4 * self.boxes)
        self.decoder = nn.Linear(length, width) if decoder else None
        self.register_buffer("words", words)
        self.from_words: nn.Linear | None = None
        self.to_words: nn.Linear | None = None
        if words is not None:
            self.from_words = nn.Linear(len(words), length, bias=bool(official))
            if official and decoder:
                self.to_words = nn.Linear(length, len(words))
            if not official:
                # It starts as the detour that changes nothing: words @ pinv(words) is one where there are more than d.
                self.from_words.weight = nn.Parameter(torch.linalg.pinv(words.T).T.contiguous())
        if official:
            for name, value in self.named_parameters():
                if name.partition(".")[0] not in ("decoder", "to_words"):
                    if value.ndim == 1:
                        nn.init.zeros_(value)
                    elif name.startswith(("first", "second")):
                        nn.init.xavier_uniform_(value)
                    else:
                        nn.init.normal_(value, std=START / 10)

    def forward(self, regions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Turns regions (n, channels, s, s) into vectors (n, d), shifts (n, boxes, 4) and features (n, width)."""
        features = F.relu(self.second(F.relu(self.first(regions.flatten(1)))))
        vectors = self.semantic(features)
        if self.from_words is not None:
            assert isinstance(self.words, torch.Tensor)
            vectors = self.from_words(vectors @ self.words.T)
        return vectors, self.box(features).view(len(features), self.boxes, 4), features

    def reconstruction_loss(
        self, vectors: torch.Tensor, features: torch.Tensor, reduction: str = "mean"
    ) -> torch.Tensor:
        """Returns the decoder's mean squared error; vectors and the features that they come from both learn by it."""
        assert self.decoder is not None
        if self.to_words is not None:
            assert isinstance(self.words, torch.Tensor)
            vectors = self.to_words(vectors) @ self.words
        return F.mse_loss(self.decoder(vectors), features, reduction=reduction)


class SemanticMaskHead(nn.Module):
    """Turns a region's pixels into vectors in the space of words: a class's mask is their product with its vector.

    That product is the paper's fixed 1 × 1 convolution, done for the wanted class alone (section 3.4).
    """

    def __init__(
        self, channels: int, width: int, depth: int, length: int, decoder: bool, official: bool = False
    ) -> None:
        """Makes `depth` convolutions of `width` channels, before the side is doubled.

        The `official` decoder has its ReLU last: what it reconstructs comes out of one.
        """
        super().__init__()
        self.convs = MaskRCNNHeads(channels, [width] * depth, 1)
        self.deconv = nn.ConvTranspose2d(width, width, 2, DECONV)
        self.encoder = nn.Sequential(
            nn.Conv2d(width, length, 3, padding=1), nn.ReLU(), nn.Conv2d(length, length, 3, padding=1)
        )
        self.decoder: nn.Sequential | None = None
        if decoder:
            between, last = (nn.Identity(), nn.ReLU()) if official else (nn.ReLU(), nn.Identity())
            self.decoder = nn.Sequential(
                nn.Conv2d(length, length, 3, padding=1), between, nn.Conv2d(length, width, 3, padding=1), last
            )
        nn.init.kaiming_normal_(self.deconv.weight, mode="fan_out", nonlinearity="relu")
        if official:
            for name, value in self.named_parameters():
                if name.startswith(("deconv", "encoder", "decoder.2")):
                    if value.ndim == 1:
                        nn.init.zeros_(value)
                    else:
                        nn.init.kaiming_normal_(value, mode="fan_out", nonlinearity="relu")

    def forward(self, regions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Turns regions (n, channels, s, s) into vectors (n, d, 2s, 2s) and features (n, width, 2s, 2s)."""
        features = F.relu(self.deconv(self.convs(regions)))
        return self.encoder(features), features

    def reconstruction_loss(self, vectors: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Returns the decoder's mean squared error over all pixels."""
        assert self.decoder is not None
        return F.mse_loss(self.decoder(vectors), features)


def mask_logits(vectors: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Computes logits (n, h, w) of each region's mask: its vectors (n, d, h, w) times its class's vector (n, d)."""
    return torch.einsum("ndhw,nd->nhw", vectors, classes.to(vectors.dtype))


def transferred(
    logits: torch.Tensor,
    known: torch.Tensor,
    asked: torch.Tensor,
    temperature: float = 1.0,
    background: bool = True,
) -> torch.Tensor:
    """Scores any classes (n, asked) by the logits of known ones: softmax(logits) · V · V_askedᵀ (section 3.2).

    `logits` (n, 1 + seen), `known` V (1 + seen, d) with background first, `asked` (asked, d). A region that looks
    half like one class and half like another has that mixture as its vector. That is the paper's rule. A higher
    `temperature` divides the logits, so that more than the likeliest class counts; without `background` only things
    are mixed, and background takes its probability away from the scores instead.
    """
    logits, known, asked = logits.float(), known.float(), asked.float()
    if background:
        return (logits / temperature).softmax(-1) @ known @ asked.T
    thing = 1 - logits.softmax(-1)[:, :1]
    return thing * ((logits[:, 1:] / temperature).softmax(-1) @ known[1:] @ asked.T)


def direct(
    background: torch.Tensor,
    asked: torch.Tensor,
    groups: Sequence[int],
    temperature: float = 1.0,
    rivals: Sequence[torch.Tensor] = (),
) -> torch.Tensor:
    """Scores classes by their own logits (n, asked): the softmax over background's (n, 1), a group's and its rivals'.

    So the paper's text has it (section 3.2: the seen classes' vectors are replaced); its code has `transferred`.
    """
    parts = [
        torch.cat([background, part, *rivals[place : place + 1]], 1) / temperature
        for place, part in enumerate(asked.split(list(groups), 1))
    ]
    return torch.cat([part.softmax(-1)[:, 1 : 1 + size] for part, size in zip(parts, groups, strict=True)], 1)


def through_known(asked: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """Returns vectors (asked, d) whose masks are those of the published code: (x V) Vᵀ U, for x a pixel's vector.

    Classes of `known` V (1 + seen, d), background first, keep their own.
    """
    is_known = (known_columns(asked, known) > 0)[:, None]
    return torch.where(is_known, asked, asked @ known.T @ known)


def known_columns(asked: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """Says which row of `known` (1 + seen, d) each asked vector (asked, d) is: (asked,), 0 if none; 0 is background."""
    same = (asked[:, None] == known[1:]).all(2)
    return torch.where(same.any(1), same.int().argmax(1) + 1, 0)
