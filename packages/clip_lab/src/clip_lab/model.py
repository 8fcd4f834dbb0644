"""The models: two towers that meet (CLIP, SigLIP), with a decoder (CoCa), and one decoder that reads both (SimVLM)."""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from clip_lab.config import MOST_SCALE, HeadOptions
from clip_lab.decoder import AttentionalPool, Block, go_on, initialise, nothing_read
from clip_lab.image import ImageTower
from clip_lab.text import PretrainedText, TextTower, last_of
from labs_common.decoding import NextWord, Tensors


class Embedded(NamedTuple):
    """A model's output for a batch.

    Attributes:
        image: embeddings of its pictures (pictures, width), of length 1; likewise `text` (captions, width).
        scale: the factor of the cosines (scalar), with the `bias` that SigLIP adds.
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
        """Returns the factor, never above 100 without a bias; there its gradient goes on, and it can come down again.

        With one it has no bound: SigLIP's own was learnt above 100.
        """
        if self.logit_bias is not None:
            return self.logit_scale.exp()[0]
        clipped = self.logit_scale.clamp(max=math.log(MOST_SCALE))
        return (self.logit_scale + (clipped - self.logit_scale).detach()).exp()[0]

    @property
    def bias(self) -> torch.Tensor | None:
        """SigLIP's addition to scaled cosines (scalar)."""
        return None if self.logit_bias is None else self.logit_bias[0]


class ClipModel(nn.Module):
    """Two towers and two projections without bias into one space (Radford et al. 2021, figure 3).

    Attributes:
        made_of: in a comparison's words.
        reads: the part of the image tower's output that the rest reads: its `feature`, or its `places`.
        embeds: whether it has embeddings, so that pictures can be searched by one matrix product.
        writes: whether it predicts words, for which it needs a causal text tower.
        continues: whether it goes on from a caption's beginning, which is drawn anew in every step.
    """

    made_of, reads, embeds, writes, continues = "two towers", "feature", True, False, False

    def __init__(self, image: ImageTower, text: TextTower | PretrainedText, options: HeadOptions) -> None:
        super().__init__()
        self.image, self.text = image, text
        self.image_projection = nn.Linear(image.width, options.embedding, bias=False)
        self.text_projection = nn.Linear(text.width, options.embedding, bias=False)
        nn.init.normal_(self.image_projection.weight, std=image.width**-0.5)
        nn.init.normal_(self.text_projection.weight, std=text.width**-0.5)
        self.scale = Scale(options.scale)

    def forward(self, pictures: torch.Tensor, words: torch.Tensor) -> Embedded:
        """Embeds pictures (pictures, 3, size, size), or a frozen tower's rows, and captions (captions, length)."""
        return Embedded(
            self.embedded(tower_rows(self, pictures)), self.embed_texts(words), self.scale(), self.scale.bias
        )

    def embedded(self, rows: torch.Tensor) -> torch.Tensor:
        """Projects the tower's features (pictures, width) to embeddings of length 1."""
        return F.normalize(self.image_projection(self.pooled(rows)), dim=1)

    def pooled(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns the input of the projection (pictures, width): the tower's features themselves."""
        return rows

    def embed_texts(self, words: torch.Tensor) -> torch.Tensor:
        """Embeds captions (captions, length), or the frozen tower's features of them, with length 1."""
        feature = words if words.is_floating_point() else self.text(words).feature
        return F.normalize(self.text_projection(feature), dim=1)


class SiglipModel(ClipModel):
    """The same with a bias, and SigLIP's own starts of both (Zhai et al. 2023, section 3.2)."""

    def __init__(self, image: ImageTower, text: TextTower | PretrainedText, options: HeadOptions) -> None:
        super().__init__(image, text, options)
        start = 10.0 if options.scale == HeadOptions().scale else options.scale
        self.scale = Scale(start, bias=-10.0)  # at first nearly all pairs are negatives, and are taken for such


class CocaModel(nn.Module):
    """CoCa (Yu et al. 2022, figure 2): contrast by one attentional pool, captions from another through a decoder.

    The text tower is the unimodal half; its causal states feed the multimodal half. The end token has seen the whole
    caption, so it takes the part of the paper's appended [CLS]. Attributes are those of `ClipModel`.
    """

    made_of, reads, embeds, writes, continues = "two towers and a decoder on both", "places", True, True, False

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
        """Embeds pictures (pictures, 3, size, size), or a frozen tower's rows, and captions (captions, length).

        `of_picture` is each caption's picture (captions,); by default every picture has the same number of them.
        """
        rows = tower_rows(self, pictures)
        read = self.text(words)
        text = F.normalize(self.text_projection(read.feature), dim=1)
        logits = self._next(_each(rows, words, of_picture), read.states[:, :-1])
        return Embedded(self.embedded(rows), text, self.scale(), None, logits)

    def embedded(self, rows: torch.Tensor) -> torch.Tensor:
        """Turns the tower's places, flat (pictures, places × width), into embeddings of length 1."""
        return F.normalize(self.image_projection(self.pooled(rows)), dim=1)

    def pooled(self, rows: torch.Tensor) -> torch.Tensor:
        """Turns the same into the input of the projection (pictures, width)."""
        return self.contrastive(self._places(rows))[:, 0]

    def embed_texts(self, words: torch.Tensor) -> torch.Tensor:
        """Embeds captions (captions, length), with length 1."""
        return F.normalize(self.text_projection(self.text(words).feature), dim=1)

    def next_words(self, rows: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """Returns logits of the next word (captions, length - 1, vocabulary), given a row of places per caption."""
        return self._next(rows, self.text(words).states[:, :-1])

    def begin(self, rows: torch.Tensor) -> tuple[Tensors, Tensors]:
        """Returns `fixed` and `moving` of `labs_common.decoding` before the first word, given rows of places."""
        queries, decoder = self.generative(self._places(rows)), list[Any](self.decoder)
        fixed = {str(n): block.cross.read(queries) for n, block in enumerate(decoder, len(self.text.blocks))}
        return fixed, nothing_read([*self.text.blocks, *decoder], queries)

    def step(self, words: torch.Tensor, fixed: Tensors, moving: Tensors) -> NextWord:
        """Reads one more word of each beam (pictures, beams)."""
        states = self.text.words(words) + self.text.places[moving["0"].shape[-2]]
        states, read = go_on(list(self.text.blocks), states, fixed, moving)
        states, more = go_on(list(self.decoder), self.text.norm(states), fixed, moving, len(read))
        return NextWord(self.vocabulary(self.norm(states)), read | more, None)

    def _next(self, rows: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        queries = self.generative(self._places(rows))
        for block in self.decoder:
            states = block(states, queries, causal=True)
        return self.vocabulary(self.norm(states))

    def _places(self, rows: torch.Tensor) -> torch.Tensor:
        return self.places(rows.unflatten(1, (self.image.count, self.image.width)))  # (pictures, places, width)


class SimVlmModel(nn.Module):
    """SimVLM (Wang et al. 2022): places of the picture and the caption's prefix see each other, the rest is written.

    One transformer reads both; the paper's encoder and decoder are its prefix and its causal part. With
    `encoder_layers` there is an encoder of picture and prefix, to which the layers that write attend, as in the paper.
    Attributes are those of `ClipModel`.
    """

    made_of, reads, embeds, writes, continues = "a transformer on places and words", "places", False, True, True

    def __init__(self, image: ImageTower, text: TextTower, options: HeadOptions) -> None:
        super().__init__()
        self.image = image
        width, self.end, self.length = text.width, text.end, text.length
        self.places = nn.Linear(image.width, width)
        self.where = nn.Parameter(torch.randn(image.count, width) * 0.01)
        self.words, self.when = text.words, text.places
        layers, apart = options.decoder_layers, options.encoder_layers
        self.blocks = nn.ModuleList(Block(width, text.heads, cross=bool(apart)) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.vocabulary = nn.Linear(width, text.vocabulary, bias=False)
        nn.init.normal_(self.vocabulary.weight, std=width**-0.5)
        initialise(self.blocks, width, layers)
        self.encoder = nn.ModuleList(Block(width, text.heads) for _ in range(apart))
        self.encoded = nn.LayerNorm(width) if apart else None
        initialise(self.encoder, width, apart)

    def forward(
        self,
        pictures: torch.Tensor,
        words: torch.Tensor,
        prefix: torch.Tensor,
        of_picture: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns logits (captions, length - 1, vocabulary) after prefixes (captions,) that count the start token.

        Pictures and `of_picture` are those of `CocaModel`.
        """
        return self.next_words(_each(tower_rows(self, pictures), words, of_picture), words, prefix)

    def next_words(self, rows: torch.Tensor, words: torch.Tensor, prefix: torch.Tensor | None = None) -> torch.Tensor:
        """Does the same given a row of places for each caption; without `prefix`, every word is to be predicted."""
        places = self._places(rows)
        written = self.words(words[:, :-1]) + self.when[: words.shape[1] - 1]
        states = torch.cat([places, written], 1)  # (captions, places + length - 1, width)
        known = places.shape[1] + (1 if prefix is None else prefix[:, None, None])
        at = torch.arange(states.shape[1], device=states.device)
        if self.encoded is not None:
            mask = (at < known).expand(len(states), 1, -1)[:, None]  # picture and prefix are seen from everywhere
            for block in self.encoder:
                states = block(states, mask=mask)
            context = self.encoded(states)
            for block in self.blocks:
                written = block(written, context, causal=True, of_context=mask)
            return self.vocabulary(self.norm(written))
        mask = (at < known) | (at <= at[:, None])  # (captions, 1 or length, length): the prefix is seen from everywhere
        mask = mask.expand(len(states), -1, -1)[:, None]
        for block in self.blocks:
            states = block(states, mask=mask)
        return self.vocabulary(self.norm(states[:, places.shape[1] :]))

    def pooled(self, rows: torch.Tensor) -> torch.Tensor:
        """Averages the transformer's states of the picture alone (pictures, width): what the paper probes."""
        states, norm = self._places(rows), self.norm if self.encoded is None else self.encoded
        for block in self.blocks if self.encoded is None else self.encoder:
            states = block(states)
        return norm(states).mean(1)

    def begin(self, rows: torch.Tensor, start: int) -> tuple[Tensors, Tensors]:
        """Returns `fixed` and `moving` of `labs_common.decoding` before the first word, given rows of places.

        Places see the token `start` too, which is always in the prefix.
        """
        places, fixed = self._places(rows), {}
        first = (self.words.weight[start] + self.when[0]).expand(len(places), 1, -1)
        states = torch.cat([places, first], 1)
        if self.encoded is not None:
            for block in self.encoder:
                states = block(states)
            context = self.encoded(states)
            fixed = {str(place): block.cross.read(context) for place, block in enumerate(list[Any](self.blocks))}
        else:
            for place, block in enumerate(list[Any](self.blocks)):
                fixed[str(place)] = block.attention.read(block.norm1(states[:, :-1]))  # the start comes as a word
                states = block(states)
        return fixed, nothing_read(list(self.blocks), places)

    def step(self, words: torch.Tensor, fixed: Tensors, moving: Tensors) -> NextWord:
        """Reads one more word of each beam (pictures, beams)."""
        states = self.words(words) + self.when[moving["0"].shape[-2]]
        states, read = go_on(list(self.blocks), states, fixed, moving)
        return NextWord(self.vocabulary(self.norm(states)), read, None)

    def _places(self, rows: torch.Tensor) -> torch.Tensor:
        return self.places(rows.unflatten(1, (self.image.count, self.image.width))) + self.where


Model = ClipModel | CocaModel | SimVlmModel


def _each(rows: torch.Tensor, words: torch.Tensor, of_picture: torch.Tensor | None) -> torch.Tensor:
    """Returns the row of each caption's picture (captions, width)."""
    return rows.repeat_interleave(len(words) // len(rows), 0) if of_picture is None else rows[of_picture]


def tower_rows(model: Any, pictures: torch.Tensor) -> torch.Tensor:
    """Returns the part of the image tower's output that the rest reads, a row per picture.

    Rows of a frozen tower, which have been computed before, are given back as they are.
    """
    if pictures.dim() == 2:
        return pictures
    seen = model.image(pictures)
    return seen.feature if model.reads == "feature" else seen.places.flatten(1)


def places_of_end(model: nn.Module, words: torch.Tensor) -> torch.Tensor:
    """Returns the place of each caption's end token (captions,)."""
    reader: Any = getattr(model, "text", model)  # SimVLM is its own
    return last_of(words, reader.end)


def training_mode(prepared: nn.Module, plain: nn.Module) -> None:
    """Sets training mode, but for towers that are frozen: no statistic of theirs moves."""
    prepared.train()
    for tower in (getattr(plain, "image", None), getattr(plain, "text", None)):
        if tower is not None and not any(parameter.requires_grad for parameter in tower.parameters()):
            tower.eval()
