"""The captioner: an encoder and a decoder."""

from typing import Any

import torch
from torch import nn

from caption_lab.config import DecoderOptions, EncoderOptions, Model
from caption_lab.decoders import Output, ShowAttendTell, ShowTell
from caption_lab.encoder import Encoder, make_encoder
from caption_lab.transformer import TransformerCaptioner


class ImageCaptioningModel(nn.Module):
    """Looks with `encoder`, writes with `decoder`."""

    def __init__(self, encoder: Encoder, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, rows: torch.Tensor, of_rows: torch.Tensor, words: torch.Tensor) -> Output:
        """What follows each of the words (captions, length) that are about the pictures `of_rows` (captions,).

        `rows` (pictures, …) are of the encoder's front: what a picture's captions share is computed once.
        """
        return self.decoder(self.encoder.back(rows), words, of_rows)


def make_decoder(model: Model, options: DecoderOptions, vocabulary: int, length: int, encoder: Encoder) -> Any:
    """A decoder with fresh weights; `length` is the most positions of a caption. Take the seed first."""
    dropout = options.dropout or 0.0
    if model == "transformer":
        return TransformerCaptioner(vocabulary, encoder.width, encoder.places, options.width, options.layers,
                                    options.heads, dropout, length)  # fmt: skip
    kind = {"show_tell": ShowTell, "show_attend_tell": ShowAttendTell}[model]
    return kind(vocabulary, encoder.width, options.width, dropout)


def make_model(
    model: Model, encoder: EncoderOptions, decoder: DecoderOptions, vocabulary: int, length: int
) -> ImageCaptioningModel:
    """A captioner with a fresh decoder; take the seed first.

    Raises:
        LabError: the encoder cannot be had.
    """
    looking = make_encoder(encoder)
    return ImageCaptioningModel(looking, make_decoder(model, decoder, vocabulary, length, looking))
