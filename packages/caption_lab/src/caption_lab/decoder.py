"""The decoders, one class each, and `CAPTIONERS`, the table in which a further one is registered.

A decoder has `forward` for training, which reads whole captions, and `begin` and `step` for writing, which go on word
by word with all beams of all pictures at once, as `labs_common.decoding` says.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from caption_lab.clipcap import ClipCap
from caption_lab.config import DecoderOptions
from caption_lab.vocabulary import PAD, in_groups, longest_first
from labs_common.decoding import NextWord, Output, Tensors

Begun = tuple[Tensors, Tensors]  # `fixed` and `moving` before the first word


class Sizes(NamedTuple):
    """Numbers that a decoder's shapes depend on besides its options.

    Attributes:
        vocabulary: number of words, special tokens included.
        features: width of each vector that the encoder gives.
        places: how many vectors it gives.
        length: most positions of a caption, `<start>` included.
    """

    vocabulary: int
    features: int
    places: int
    length: int


class LSTMDecoder(nn.Module):
    """The base of both LSTM captioners: an embedding, normalised features, and MLPs for the first state."""

    def __init__(self, sizes: Sizes, options: DecoderOptions) -> None:
        super().__init__()
        features, width = sizes.features, options.width
        self.embedding = nn.Embedding(sizes.vocabulary, width, padding_idx=PAD)
        self.scaled = nn.LayerNorm(features)  # so that one learning rate fits encoders of any scale
        self.first_hidden, self.first_cell = (
            nn.Sequential(nn.Linear(features, width), nn.Tanh(), nn.Linear(width, width)) for _ in range(2)
        )

    def first_state(self, vector: torch.Tensor) -> Tensors:
        """Turns a vector of each picture (pictures, width of features) into the state of its one first beam."""
        return {"hidden": self.first_hidden(vector)[:, None], "cell": self.first_cell(vector)[:, None]}


class ShowTell(LSTMDecoder):
    """An LSTM whose first state is the picture (Vinyals et al. 2015, who feed it as a word before the first one)."""

    def __init__(self, sizes: Sizes, options: DecoderOptions) -> None:
        super().__init__(sizes, options)
        self.lstm = nn.LSTM(options.width, options.width, batch_first=True)
        open_forget_gates(self.lstm.get_parameter("bias_ih_l0"))
        self.dropout = nn.Dropout(options.dropout or 0.0)
        self.to_words = nn.Linear(options.width, sizes.vocabulary)

    def forward(self, features: torch.Tensor, words: torch.Tensor, of_features: torch.Tensor | None = None) -> Output:
        """Reads features (pictures, width of features) and words (captions, length); predicts what follows each word.

        `of_features` (captions,) says whose captions they are; without it there is one of each picture.
        """
        return in_groups(self, partial(self._read, self.begin(features)), words, of_features)

    def _read(self, begun: Begun, words: torch.Tensor, of_features: torch.Tensor | None) -> torch.Tensor:
        _, first = by_caption(begun, of_features)
        hidden, cell = first["hidden"][:, 0], first["cell"][:, 0]  # (captions, width)
        states, _ = exactly(self.lstm, self.dropout(self.embedding(words)), (hidden[None], cell[None]))
        return self.to_words(self.dropout(states))

    def begin(self, features: torch.Tensor) -> Begun:
        """Returns `fixed` and `moving` before the first word, with one beam."""
        return {}, self.first_state(self.scaled(features))

    def step(self, words: torch.Tensor, fixed: Tensors, moving: Tensors) -> NextWord:
        """Reads one more word of each beam (pictures, beams)."""
        pictures, beams = words.shape
        state = (moving["hidden"].flatten(0, 1)[None], moving["cell"].flatten(0, 1)[None])
        out, (hidden, cell) = exactly(self.lstm, self.embedding(words).flatten(0, 1)[:, None], state)
        moved = {"hidden": hidden[0].unflatten(0, (pictures, beams)), "cell": cell[0].unflatten(0, (pictures, beams))}
        return NextWord(self.to_words(out[:, 0]).unflatten(0, (pictures, beams)), moved, None)


class ShowAttendTell(LSTMDecoder):
    """An LSTM that looks at a part of the picture for each word (Xu et al. 2015, soft attention, section 4.2).

    e_i = f_att(a_i, h), alpha = softmax(e), z = sigmoid(f_beta(h)) * sum_i alpha_i a_i; the LSTM reads the last word
    and z; the first state comes from the mean of the a_i by two MLPs; words come out by eq. 7.

    With --plain, alpha = softmax(W h + b) with a row of W for each place, whatever is there, and z = sum_i alpha_i a_i.
    """

    def __init__(self, sizes: Sizes, options: DecoderOptions) -> None:
        super().__init__(sizes, options)
        features, width = sizes.features, options.width
        self.plain = options.plain
        if self.plain:
            self.of_state = nn.Linear(width, sizes.places)
        else:
            self.of_place, self.of_state = nn.Linear(features, width), nn.Linear(width, width, bias=False)
            self.energy = nn.Linear(width, 1, bias=False)
            self.gate = nn.Linear(width, 1)
        self.cell = nn.LSTMCell(width + features, width)
        open_forget_gates(self.cell.bias_ih)
        self.from_state, self.from_context = nn.Linear(width, width), nn.Linear(features, width)
        self.dropout = nn.Dropout(options.dropout or 0.0)
        self.to_words = nn.Linear(width, sizes.vocabulary)

    def forward(self, features: torch.Tensor, words: torch.Tensor, of_features: torch.Tensor | None = None) -> Output:
        """Reads features (pictures, places, width of features) and words (captions, length) as `ShowTell` does."""
        order, counts = longest_first(words)
        embedded = self.dropout(self.embedding(words))[order]
        fixed, moving = by_caption(self.begin(features), order if of_features is None else of_features[order])
        read, states, contexts, attentions = [], [], [], []
        for word, count in zip(embedded.unbind(1), counts, strict=True):
            if count < len(moving["hidden"]):  # captions that are over leave
                fixed, moving = ({name: tensor[:count] for name, tensor in part.items()} for part in (fixed, moving))
            read.append(word[:count, None])
            attention, context, moving = self._attend(read[-1], fixed, moving)
            states.append(moving["hidden"])
            contexts.append(context)
            attentions.append(attention)
        logits = self._logits(torch.cat(read), torch.cat(states), torch.cat(contexts))  # (words, 1, vocabulary)
        return Output(*(unpack(packed.squeeze(1), order, counts) for packed in (logits, torch.cat(attentions))))

    def begin(self, features: torch.Tensor) -> Begun:
        """Returns `fixed` and `moving` before the first word, with one beam."""
        features = self.scaled(features)
        moving = self.first_state(features.mean(1))
        if self.plain:
            return {"features": features}, moving
        # The places' half of the attention's sum is the same for every word: it is computed once.
        return {"features": features, "keys": self.of_place(features)}, moving

    def step(self, words: torch.Tensor, fixed: Tensors, moving: Tensors) -> NextWord:
        """Reads one more word of each beam (pictures, beams)."""
        embedded = self.embedding(words)
        attention, context, moving = self._attend(embedded, fixed, moving)
        return NextWord(self._logits(embedded, moving["hidden"], context), moving, attention)

    def _attend(
        self, embedded: torch.Tensor, fixed: Tensors, moving: Tensors
    ) -> tuple[torch.Tensor, torch.Tensor, Tensors]:
        """Returns attention (pictures, beams, places), context (pictures, beams, width of features), the next state."""
        hidden = moving["hidden"]
        beams = hidden.shape[:2]
        energies = self.of_state(hidden)
        if not self.plain:
            # (pictures, beams, places, width)
            energies = self.energy(torch.tanh(fixed["keys"][:, None] + energies[:, :, None])).squeeze(-1)
        attention = energies.softmax(-1)
        context = attention @ fixed["features"]
        if not self.plain:
            context = torch.sigmoid(self.gate(hidden)) * context
        seen = torch.cat([embedded, context], -1).flatten(0, 1)
        hidden, cell = exactly(self.cell, seen, (hidden.flatten(0, 1), moving["cell"].flatten(0, 1)))
        return attention, context, {"hidden": hidden.unflatten(0, beams), "cell": cell.unflatten(0, beams)}

    def _logits(self, embedded: torch.Tensor, state: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Predicts the next word from the last word, the state and the context (eq. 7)."""
        return self.to_words(self.dropout(embedded + self.from_state(self.dropout(state)) + self.from_context(context)))


class TransformerCaptioner(nn.Module):
    """Words attend to the words before them and to the places of the picture (Vaswani et al. 2017, pre-norm).

    Places are projected to the decoder's width and get a learnt position, as words do. Training runs torch's decoder;
    writing uses the same weights, and keeps the keys and values of the words before.
    """

    def __init__(self, sizes: Sizes, options: DecoderOptions) -> None:
        super().__init__()
        width, heads, dropout = options.width, options.heads, options.dropout or 0.0
        self.heads = heads
        # One number more than there are words stands for a word that is hidden in training; it is never written.
        self.embedding = nn.Embedding(sizes.vocabulary + 1, width, padding_idx=PAD)
        self.positions = nn.Parameter(torch.randn(sizes.length, width))
        self.from_places = nn.Sequential(nn.Linear(sizes.features, width), nn.LayerNorm(width))
        self.place_positions = nn.Parameter(torch.randn(sizes.places, width))
        layer = nn.TransformerDecoderLayer(
            width, heads, 4 * width, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerDecoder(layer, options.layers, nn.LayerNorm(width))
        self.dropout = nn.Dropout(dropout)
        self.to_words = nn.Linear(width, sizes.vocabulary)
        with torch.no_grad():  # scaled by sqrt(width) when read, they begin as large as the positions
            self.embedding.weight.normal_(std=width**-0.5)[PAD] = 0
        for parameter in self.layers.parameters():  # torch clones one layer: all would begin the same
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, features: torch.Tensor, words: torch.Tensor, of_features: torch.Tensor | None = None) -> Output:
        """Reads features (pictures, places, width of features) and words (captions, length) as `ShowTell` does."""
        memory = self.from_places(features) + self.place_positions
        return in_groups(self, partial(self._read, memory), words, of_features)

    def _read(self, memory: torch.Tensor, words: torch.Tensor, of_memory: torch.Tensor | None) -> torch.Tensor:
        length = words.shape[1]
        memory = memory if of_memory is None else memory[of_memory]
        causal = torch.ones(length, length, dtype=torch.bool, device=words.device).triu(1)  # true: may not be looked at
        x = self.dropout(self._embedded(words) + self.positions[:length])
        x = self.layers(x, memory, tgt_mask=causal, tgt_key_padding_mask=words == PAD, tgt_is_causal=True)
        return self.to_words(x)

    def begin(self, features: torch.Tensor) -> Begun:
        """Returns `fixed` and `moving` before the first word, with one beam: keys and values of places and of words."""
        memory = self.from_places(features) + self.place_positions
        fixed, moving = {}, {}
        pictures, _, width = memory.shape
        empty = memory.new_zeros(pictures, 1, self.heads, 0, width // self.heads)
        for number, layer in enumerate(self.layers.layers):
            attend = layer.multihead_attn
            weight, bias = attend.in_proj_weight[width:], attend.in_proj_bias[width:]
            keys, values = F.linear(memory, weight, bias).chunk(2, -1)
            fixed[f"keys {number}"], fixed[f"values {number}"] = self._by_head(keys), self._by_head(values)
            moving[f"keys {number}"], moving[f"values {number}"] = empty, empty
        return fixed, moving

    def step(self, words: torch.Tensor, fixed: Tensors, moving: Tensors) -> NextWord:
        """Reads one more word of each beam (pictures, beams); only that word's own query is computed."""
        position = moving["keys 0"].shape[3]
        x = self._embedded(words) + self.positions[position]  # (pictures, beams, width)
        moved: Tensors = {}
        attention = x
        for number, layer in enumerate(self.layers.layers):
            own = layer.self_attn
            query, key, value = F.linear(layer.norm1(x), own.in_proj_weight, own.in_proj_bias).chunk(3, -1)
            query, key, value = (t.unflatten(-1, (self.heads, -1))[:, :, :, None] for t in (query, key, value))
            keys = torch.cat([moving[f"keys {number}"], key], 3)  # (pictures, beams, heads, words, width of a head)
            values = torch.cat([moving[f"values {number}"], value], 3)
            moved[f"keys {number}"], moved[f"values {number}"] = keys, values
            x = x + own.out_proj(F.scaled_dot_product_attention(query, keys, values).flatten(2))
            cross = layer.multihead_attn
            width = x.shape[-1]
            query = F.linear(layer.norm2(x), cross.in_proj_weight[:width], cross.in_proj_bias[:width])
            # All beams of a picture ask the same keys: (pictures, heads, beams, places)
            scores = self._by_head(query) @ fixed[f"keys {number}"].transpose(-1, -2) * (width // self.heads) ** -0.5
            attention = scores.softmax(-1)
            x = x + cross.out_proj((attention @ fixed[f"values {number}"]).transpose(1, 2).flatten(2))
            x = x + layer.linear2(layer.activation(layer.linear1(layer.norm3(x))))
        assert self.layers.norm is not None
        return NextWord(self.to_words(self.layers.norm(x)), moved, attention.mean(1))

    def _embedded(self, words: torch.Tensor) -> torch.Tensor:
        return self.embedding(words) * self.embedding.embedding_dim**0.5

    def _by_head(self, x: torch.Tensor) -> torch.Tensor:
        """Reshapes (pictures, places, width) to (pictures, heads, places, width of a head)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def by_caption(known: Begun, of_features: torch.Tensor | None) -> Begun:
    """Repeats what `begin` says of pictures for each of their captions, so that it is computed once a picture."""
    if of_features is None:
        return known
    fixed, moving = ({name: tensor[of_features] for name, tensor in part.items()} for part in known)
    return fixed, moving


def unpack(packed: torch.Tensor, order: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Takes (words, …), position by position, to (captions, length, …), with 0 where nothing was read."""
    captions, length = len(order), len(counts)
    if len(packed) == captions * length:
        return packed.unflatten(0, (length, captions)).transpose(0, 1)
    places = torch.cat([order[:count] * length + position for position, count in enumerate(counts)])
    padded = packed.new_zeros(captions * length, *packed.shape[1:]).index_copy(0, places, packed)
    return padded.unflatten(0, (captions, length))


def exactly(lstm: nn.Module, inputs: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor]) -> Any:
    """Runs an LSTM or a cell of one in the precision of its weights, whatever autocast says.

    Its state is a sum over all words so far: in 16 bits it would be rounded with each. CUDA's LSTM even takes fp16
    under autocast to bf16, where large values overflow.
    """
    dtype = next(lstm.parameters()).dtype
    with torch.autocast(inputs.device.type, enabled=False):
        return lstm(inputs.to(dtype), (state[0].to(dtype), state[1].to(dtype)))


def open_forget_gates(bias: torch.Tensor) -> None:
    """Lets an LSTM begin by keeping what it knows (Jozefowicz et al. 2015)."""
    with torch.no_grad():
        bias.view(4, -1)[1] = 1.0  # input, forget, cell, output


@dataclass(frozen=True)
class Kind:
    """A captioner as the table has it.

    Attributes:
        decoder: its class, made of `Sizes` and `DecoderOptions`.
        description: one line for the report.
        one_vector: it sees the picture as one vector; else as the places of the encoder's grid.
        words_at_once: it reads all words at once, through --layers with --heads, and so can be trained with
            --mask-words.
        language: it writes the tokens of --language-model, and has --prefix and --lora.
        width: --width with the tiny encoder, if none is given.
        dropout: --dropout with a real encoder, if none is given; the tiny one's scenes are many: none is needed.
        rates: --learning-rate with the tiny encoder and with a real one, if none is given.
    """

    decoder: type[nn.Module]
    description: str
    one_vector: bool = False
    words_at_once: bool = False
    language: bool = False
    width: int = 256
    dropout: float = 0.3
    rates: tuple[float, float] = (3e-3, 4e-4)


CAPTIONERS: dict[str, Kind] = {
    "show_tell": Kind(ShowTell, "an LSTM that saw the picture once", one_vector=True),
    "show_attend_tell": Kind(ShowAttendTell, "an LSTM that looks at a part of the picture for each word"),
    "transformer": Kind(
        TransformerCaptioner, "a transformer that attends to the words before and to the places of the picture",
        words_at_once=True, width=128, dropout=0.1, rates=(2e-3, 3e-4),
    ),
    # The paper's rate is 2e-5 for ten epochs of COCO, which has twenty times the captions of Flickr8k.
    "clipcap": Kind(
        ClipCap, "a language model that goes on from a picture", one_vector=True, language=True, dropout=0.1,
        rates=(2e-3, 1e-4),
    ),
}  # fmt: skip
