"""A real network without weights, over eight processes that do not exist: what FSDP2 would gather at a time."""

import pytest
import torch
from labs_testing.sharded import assert_in_layers

from caption_lab.config import DecoderOptions
from caption_lab.decoder import CAPTIONERS, Sizes
from caption_lab.encoder import Encoder
from caption_lab.model import ImageCaptioningModel


@pytest.mark.alone
def test_a_unit_of_each_block() -> None:
    """The encoder of Show, Attend and Tell with its usual vocabulary; all of it trains."""
    with torch.device("meta"):
        encoder = Encoder("resnet101", {}, 224, 0)
        sizes = Sizes(10_000, encoder.width, encoder.places, 30)
        decoder = CAPTIONERS["show_attend_tell"].decoder(sizes, DecoderOptions(width=512, dropout=0.1))
    assert_in_layers(ImageCaptioningModel(encoder, decoder))
