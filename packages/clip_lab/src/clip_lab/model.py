"""The models: two towers that meet (CLIP), with a decoder (CoCa), and one decoder that reads both (SimVLM)."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from clip_lab.config import MOST_SCALE, OWN, HeadOptions, ImageOptions, Objective, TextOptions
from clip_lab.image import ImageTower, make_image_tower
from clip_lab.text import PretrainedText, TextTower, last_of, pretrained_text
from clip_lab.tokens import Words
from clip_lab.transformer import AttentionalPool, Block, initialise


class Embedded(NamedTuple):
    """What training reads of a batch.

    Attributes:
        image: embeddings of its pictures (pictures, width), of length 1; likewise `text` (captions, width).
        scale: what cosines are multiplied by (scalar), with the `bias` that SigLIP adds.
        logits: the next word at each place (captions, length - 1, vocabulary), where the model writes.
    """

    image: torch.Tensor
    text: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None = None
    logits: torch.Tensor | None = None


class Scale(nn.Module):
    """The learnt factor of cosines, as its logarithm (Radford et al. 2021, section 2.5); SigLIP adds a bias."""

    def __init__(self, start: float, bias: float | None = None) -> None:
        super().__init__()
        # One value each, not none: DeepSpeed cannot send tensors without a dimension.
        self.logit_scale = nn.Parameter(torch.tensor([math.log(start)]))
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor([bias]))

    def forward(self) -> torch.Tensor:
        """The factor, never above 100; there its gradient goes on, so that it can come down again."""
        clipped = self.logit_scale.clamp(max=math.log(MOST_SCALE))
        return (self.logit_scale + (clipped - self.logit_scale).detach()).exp()[0]

    @property
    def bias(self) -> torch.Tensor | None:
        """What SigLIP adds to scaled cosines (scalar)."""
        return None if self.logit_bias is None else self.logit_bias[0]


class ClipModel(nn.Module):
    """Two towers and two projections without bias into one space (Radford et al. 2021, figure 3).

    Attributes:
        reads: what of the image tower's output the rest reads.
    """

    reads = "feature"

    def __init__(
        self, image: ImageTower, text: TextTower | PretrainedText, embedding: int, scale: float, bias: float | None
    ) -> None:
        super().__init__()
        self.image, self.text = image, text
        self.image_projection = nn.Linear(image.width, embedding, bias=False)
        self.text_projection = nn.Linear(text.width, embedding, bias=False)
        nn.init.normal_(self.image_projection.weight, std=image.width**-0.5)
        nn.init.normal_(self.text_projection.weight, std=text.width**-0.5)
        self.scale = Scale(scale, bias)

    def forward(self, pictures: torch.Tensor, words: torch.Tensor) -> Embedded:
        """Pictures (pictures, 3, size, size) or what the frozen tower made of them; captions (captions, length)."""
        return Embedded(self.embedded(rows_of(self, pictures)), self.embed_texts(words), self.scale(), self.scale.bias)

    def embedded(self, rows: torch.Tensor) -> torch.Tensor:
        """The tower's features (pictures, width) to embeddings of length 1."""
        return F.normalize(self.image_projection(rows), dim=1)

    def embed_texts(self, words: torch.Tensor) -> torch.Tensor:
        """Captions (captions, length), or the frozen tower's features, to embeddings of length 1."""
        feature = words if words.is_floating_point() else self.text(words).feature
        return F.normalize(self.text_projection(feature), dim=1)


class CocaModel(nn.Module):
    """CoCa (Yu et al. 2022, figure 2): contrast by one attentional pool, captions from another through a decoder.

    The text tower is the unimodal half; its causal states feed the multimodal half. The end token has seen the whole
    caption, so it takes the part of the paper's appended [CLS].
    """

    reads = "places"

    def __init__(self, image: ImageTower, text: TextTower, options: HeadOptions) -> None:
        super().__init__()
        self.image, self.text = image, text
        width = text.width
        self.places = nn.Linear(image.width, width, bias=False)
        self.contrastive = AttentionalPool(1, width, text.heads)
        self.generative = AttentionalPool(options.queries, width, text.heads)
        self.decoder = nn.ModuleList(Block(width, text.heads, cross=True) for _ in range(options.decoder_layers))
        self.norm = nn.LayerNorm(width)
        self.vocabulary = nn.Linear(width, text.vocabulary, bias=False)
        self.image_projection = nn.Linear(width, options.embedding, bias=False)
        self.text_projection = nn.Linear(width, options.embedding, bias=False)
        for layer in (self.image_projection, self.text_projection, self.vocabulary):
            nn.init.normal_(layer.weight, std=width**-0.5)
        for part in (self.contrastive, self.generative, self.decoder):
            initialise(part, width, options.decoder_layers)
        self.scale = Scale(options.scale)

    def forward(self, pictures: torch.Tensor, words: torch.Tensor, of_picture: torch.Tensor | None = None) -> Embedded:
        """Pictures (pictures, 3, size, size) or the frozen tower's places, flat; captions (captions, length).

        `of_picture` is each caption's picture (captions,); by default every picture has the same number of them.
        """
        rows = rows_of(self, pictures)
        read = self.text(words)
        text = F.normalize(self.text_projection(read.feature), dim=1)
        logits = self._next(_each(rows, words, of_picture), read.states[:, :-1])
        return Embedded(self.embedded(rows), text, self.scale(), None, logits)

    def embedded(self, rows: torch.Tensor) -> torch.Tensor:
        """The tower's places, flat (pictures, places × width), to embeddings of length 1."""
        return F.normalize(self.image_projection(self.pooled(rows)), dim=1)

    def pooled(self, rows: torch.Tensor) -> torch.Tensor:
        """The same to what the projection reads (pictures, width)."""
        return self.contrastive(self._places(rows))[:, 0]

    def embed_texts(self, words: torch.Tensor) -> torch.Tensor:
        """Captions (captions, length) to embeddings of length 1."""
        return F.normalize(self.text_projection(self.text(words).feature), dim=1)

    def next_words(self, rows: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """Logits of the next word (captions, length - 1, vocabulary); a row of places for each caption."""
        return self._next(rows, self.text(words).states[:, :-1])

    def _next(self, rows: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        queries = self.generative(self._places(rows))
        for block in self.decoder:
            states = block(states, queries, causal=True)
        return self.vocabulary(self.norm(states))

    def _places(self, rows: torch.Tensor) -> torch.Tensor:
        return self.places(rows.unflatten(1, (self.image.count, self.image.width)))


class SimVlmModel(nn.Module):
    """SimVLM (Wang et al. 2022): places of the picture and the caption's prefix see each other, the rest is written.

    One transformer reads both; the paper's encoder and decoder are its prefix and its causal part.
    """

    reads = "places"

    def __init__(self, image: ImageTower, text: TextTower, options: HeadOptions) -> None:
        super().__init__()
        self.image = image
        width, self.end, self.length = text.width, text.end, text.length
        self.places = nn.Linear(image.width, width)
        self.where = nn.Parameter(torch.randn(image.count, width) * 0.01)
        self.words, self.when = text.words, text.places
        self.blocks = nn.ModuleList(Block(width, text.heads) for _ in range(options.decoder_layers))
        self.norm = nn.LayerNorm(width)
        self.vocabulary = nn.Linear(width, text.vocabulary, bias=False)
        nn.init.normal_(self.vocabulary.weight, std=width**-0.5)
        initialise(self.blocks, width, options.decoder_layers)

    def forward(
        self,
        pictures: torch.Tensor,
        words: torch.Tensor,
        prefix: torch.Tensor,
        of_picture: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits (captions, length - 1, vocabulary) after the prefixes (captions,), which count the start token.

        Pictures and `of_picture` as CoCa has them.
        """
        return self.next_words(_each(rows_of(self, pictures), words, of_picture), words, prefix)

    def next_words(self, rows: torch.Tensor, words: torch.Tensor, prefix: torch.Tensor | None = None) -> torch.Tensor:
        """The same with a row of places for each caption; without `prefix`, every word is to be predicted."""
        places = self.places(rows.unflatten(1, (self.image.count, self.image.width))) + self.where
        written = self.words(words[:, :-1]) + self.when[: words.shape[1] - 1]
        states = torch.cat([places, written], 1)
        known = places.shape[1] + (1 if prefix is None else prefix[:, None, None])
        at = torch.arange(states.shape[1], device=states.device)
        mask = (at < known) | (at <= at[:, None])  # (captions, 1 or length, length): the prefix is seen from everywhere
        mask = mask.expand(len(states), -1, -1)[:, None]
        for block in self.blocks:
            states = block(states, mask=mask)
        return self.vocabulary(self.norm(states[:, places.shape[1] :]))


Model = ClipModel | CocaModel | SimVlmModel


def _each(rows: torch.Tensor, words: torch.Tensor, of_picture: torch.Tensor | None) -> torch.Tensor:
    """The row of each caption's picture (captions, width)."""
    return rows.repeat_interleave(len(words) // len(rows), 0) if of_picture is None else rows[of_picture]


def rows_of(model: Model, pictures: torch.Tensor) -> torch.Tensor:
    """What of the image tower's output the rest reads, a row per picture; rows of a frozen tower are given back."""
    if pictures.dim() == 2:
        return pictures
    seen = model.image(pictures)
    return seen.feature if model.reads == "feature" else seen.places.flatten(1)


def make_model(objective: Objective, image: ImageOptions, text: TextOptions, head: HeadOptions, words: Words) -> Model:
    """The model for an objective, with the weights that the towers' options name.

    Raises:
        LabError: a tower cannot be had.
    """
    tower = make_image_tower(image)
    reader: TextTower | PretrainedText
    if text.text == OWN:
        reader = TextTower(len(words), text.text_width, text.text_layers, text.text_heads, words.length, words.end)
    else:
        reader = pretrained_text(text.text, text.text_pretrained, words.length, words.end)
    model = built(objective, tower, reader, head)
    for part, frozen in ((model.image, image.freeze_image), (getattr(model, "text", None), text.freeze_text)):
        if part is not None and frozen:
            part.requires_grad_(False)
    return model


def built(objective: Objective, image: ImageTower, text: TextTower | PretrainedText, head: HeadOptions) -> Model:
    """The model for an objective on these towers."""
    if objective in ("clip", "siglip"):
        # SigLIP's own starts (Zhai et al. 2023, section 3.2).
        siglip = objective == "siglip"
        start = 10.0 if siglip and head.scale == HeadOptions().scale else head.scale
        return ClipModel(image, text, head.embedding, start, -10.0 if siglip else None)
    assert isinstance(text, TextTower)
    return CocaModel(image, text, head) if objective == "coca" else SimVlmModel(image, text, head)


def places_of_end(model: Model, words: torch.Tensor) -> torch.Tensor:
    """The place of each caption's end token (captions,)."""
    return last_of(words, model.end if isinstance(model, SimVlmModel) else model.text.end)
