"""The two LSTM captioners, and what every decoder has: `forward` for training, `begin` and `step` for writing.

While writing, words are (pictures, beams): all beams of all pictures take a step at once. What a decoder knows lies in
two dicts of tensors: `fixed` (pictures, …) never changes, `moving` (pictures, beams, …) does, and goes where its beam
    goes.
"""

from typing import NamedTuple

import torch
from torch import nn

from caption_lab.vocabulary import PAD

Tensors = dict[str, torch.Tensor]


class Output(NamedTuple):
    """What a decoder says about captions that it was shown.

    Attributes:
        logits: (captions, words, vocabulary).
        attention: share of each place for each word (captions, words, places), where the decoder has it in training.
    """

    logits: torch.Tensor
    attention: torch.Tensor | None


class Step(NamedTuple):
    """What a decoder says after one more word of each beam.

    Attributes:
        logits: (pictures, beams, vocabulary).
        moving: what it knows now.
        attention: share of each place (pictures, beams, places), if it attends.
    """

    logits: torch.Tensor
    moving: Tensors
    attention: torch.Tensor | None


def of_captions(known: tuple[Tensors, Tensors], of_features: torch.Tensor | None) -> tuple[Tensors, Tensors]:
    """What `begin` knows of pictures, for each of their captions."""
    if of_features is None:
        return known
    fixed, moving = ({name: tensor[of_features] for name, tensor in part.items()} for part in known)
    return fixed, moving


def first_state(features: int, width: int) -> nn.Module:
    """An MLP from what was seen to the LSTM's first state or cell."""
    return nn.Sequential(nn.Linear(features, width), nn.Tanh(), nn.Linear(width, width))


def remember(bias: torch.Tensor) -> None:
    """Lets an LSTM begin by keeping what it knows: forget gates open (Jozefowicz et al. 2015)."""
    with torch.no_grad():
        bias.view(4, -1)[1] = 1.0  # input, forget, cell, output


class ShowTell(nn.Module):
    """An LSTM whose first state is the picture (Vinyals et al. 2015, there fed as a word before the first one)."""

    def __init__(self, vocabulary: int, features: int, width: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=PAD)
        self.scaled = nn.LayerNorm(features)
        self.first_hidden, self.first_cell = first_state(features, width), first_state(features, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        remember(self.lstm.get_parameter("bias_ih_l0"))
        self.dropout = nn.Dropout(dropout)
        self.to_words = nn.Linear(width, vocabulary)

    def forward(self, features: torch.Tensor, words: torch.Tensor, of_features: torch.Tensor | None = None) -> Output:
        """Features (pictures, width of features) and words (captions, length) to what follows each word.

        `of_features` (captions,) says whose captions they are; without it, one of each picture.
        """
        _, first = of_captions(self.begin(features), of_features)
        hidden, cell = first["hidden"][:, 0], first["cell"][:, 0]
        states, _ = self.lstm(self.dropout(self.embedding(words)), (hidden[None], cell[None]))
        return Output(self.to_words(self.dropout(states)), None)

    def begin(self, features: torch.Tensor) -> tuple[Tensors, Tensors]:
        """Fixed and moving before the first word, with one beam."""
        features = self.scaled(features)
        hidden, cell = self.first_hidden(features), self.first_cell(features)
        return {}, {"hidden": hidden[:, None], "cell": cell[:, None]}

    def step(self, words: torch.Tensor, fixed: Tensors, moving: Tensors) -> Step:
        """One more word (pictures, beams)."""
        pictures, beams = words.shape
        state = (moving["hidden"].flatten(0, 1)[None], moving["cell"].flatten(0, 1)[None])
        out, (hidden, cell) = self.lstm(self.embedding(words).flatten(0, 1)[:, None], state)
        moved = {"hidden": hidden[0].unflatten(0, (pictures, beams)), "cell": cell[0].unflatten(0, (pictures, beams))}
        return Step(self.to_words(out[:, 0]).unflatten(0, (pictures, beams)), moved, None)


class ShowAttendTell(nn.Module):
    """An LSTM that looks at a part of the picture for each word (Xu et al. 2015, soft attention, section 4.2).

    e_i = f_att(a_i, h), alpha = softmax(e), z = sigmoid(f_beta(h)) * sum_i alpha_i a_i; the LSTM reads the last word
    and z; the first state comes from the mean of the a_i by two MLPs; words come out by eq. 7. The
    a_i are layer-normalised first, so that one learning rate fits encoders of any scale.
    """

    def __init__(self, vocabulary: int, features: int, width: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=PAD)
        self.scaled = nn.LayerNorm(features)
        self.first_hidden, self.first_cell = first_state(features, width), first_state(features, width)
        self.of_place, self.of_state = nn.Linear(features, width), nn.Linear(width, width, bias=False)
        self.energy = nn.Linear(width, 1, bias=False)
        self.gate = nn.Linear(width, 1)
        self.cell = nn.LSTMCell(width + features, width)
        remember(self.cell.bias_ih)
        self.from_state, self.from_context = nn.Linear(width, width), nn.Linear(features, width)
        self.dropout = nn.Dropout(dropout)
        self.to_words = nn.Linear(width, vocabulary)

    def forward(self, features: torch.Tensor, words: torch.Tensor, of_features: torch.Tensor | None = None) -> Output:
        """Features (pictures, places, width of features) and words (captions, length) to what follows each word.

        `of_features` (captions,) says whose captions they are; without it, one of each picture.
        """
        embedded = self.dropout(self.embedding(words))
        fixed, moving = of_captions(self.begin(features), of_features)
        states, contexts, attentions = [], [], []
        for word in embedded.unbind(1):
            attention, context, moving = self._looked(word[:, None], fixed, moving)
            states.append(moving["hidden"])
            contexts.append(context)
            attentions.append(attention)
        state, context = torch.cat(states, 1), torch.cat(contexts, 1)  # (captions, length, …)
        return Output(self._said(embedded, state, context), torch.cat(attentions, 1))

    def begin(self, features: torch.Tensor) -> tuple[Tensors, Tensors]:
        """Fixed and moving before the first word, with one beam."""
        features = self.scaled(features)
        mean = features.mean(1)
        moving = {"hidden": self.first_hidden(mean)[:, None], "cell": self.first_cell(mean)[:, None]}
        return {"features": features, "keys": self.of_place(features)}, moving

    def step(self, words: torch.Tensor, fixed: Tensors, moving: Tensors) -> Step:
        """One more word (pictures, beams)."""
        embedded = self.embedding(words)
        attention, context, moving = self._looked(embedded, fixed, moving)
        return Step(self._said(embedded, moving["hidden"], context), moving, attention)

    def _looked(
        self, embedded: torch.Tensor, fixed: Tensors, moving: Tensors
    ) -> tuple[torch.Tensor, torch.Tensor, Tensors]:
        """Attention (pictures, beams, places), context (pictures, beams, width of features) and the next state."""
        hidden = moving["hidden"]
        pictures, beams, _ = hidden.shape
        mixed = torch.tanh(
            fixed["keys"][:, None] + self.of_state(hidden)[:, :, None]
        )  # (pictures, beams, places, width)
        attention = self.energy(mixed).squeeze(-1).softmax(-1)
        context = torch.sigmoid(self.gate(hidden)) * (attention @ fixed["features"])
        seen = torch.cat([embedded, context], -1).flatten(0, 1)
        state = self.cell(seen, (hidden.flatten(0, 1), moving["cell"].flatten(0, 1)))
        names = ("hidden", "cell")
        return (
            attention,
            context,
            {name: part.unflatten(0, (pictures, beams)) for name, part in zip(names, state, strict=True)},
        )

    def _said(self, embedded: torch.Tensor, state: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Eq. 7: what follows, from the last word, the state and what was looked at."""
        return self.to_words(self.dropout(embedded + self.from_state(self.dropout(state)) + self.from_context(context)))
