from dataclasses import replace
from pathlib import Path

import pytest
import timm

from caption_lab.config import DecoderOptions, EncoderOptions, TrainConfig
from caption_lab.model import complete
from labs_common.errors import LabError
from labs_common.options import CaptionDataOptions

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("model", "encoder", "pool", "width", "dropout", "rate"),
    [
        ("show_tell", "tiny-cnn", 3, 256, 0.0, 3e-3),
        ("show_tell", "resnet50", 1, 512, 0.3, 4e-4),
        ("show_attend_tell", "tiny-cnn", 0, 256, 0.0, 3e-3),
        ("show_attend_tell", "resnet50", 0, 512, 0.3, 4e-4),
        ("transformer", "tiny-cnn", 0, 128, 0.0, 2e-3),
        ("transformer", "resnet50", 0, 512, 0.1, 3e-4),
    ],
)
def test_defaults_are_those_that_help_names(
    model: str, encoder: str, pool: int, width: int, dropout: float, rate: float
) -> None:
    config = TrainConfig(model=model, encoder=EncoderOptions(encoder=encoder))
    found = complete(config)
    assert (found.encoder.pool, found.decoder.width, found.decoder.dropout) == (pool, width, dropout)
    assert (found.training.learning_rate, found.training.epochs, found.vocabulary.min_count) == (rate, 3, 1)
    photographs = complete(replace(config, data=CaptionDataOptions(data="flickr8k")))
    assert (photographs.training.epochs, photographs.vocabulary.min_count) == (20, 3)
    assert complete(replace(config, decoder=DecoderOptions(width=64, dropout=0.5))).decoder == DecoderOptions(
        width=64, dropout=0.5
    )


def test_photographs_are_seen_by_a_real_encoder_and_drawn_scenes_by_the_tiny_one(scenes: Path) -> None:
    every = [complete(TrainConfig(data=CaptionDataOptions(data=data))) for data in (None, str(scenes), "flickr8k")]
    assert [(one.training.epochs, one.vocabulary.min_count) for one in every] == [(3, 1), (3, 1), (20, 3)]
    found = [one.encoder.encoder for one in every]
    assert found == ["tiny-cnn", "tiny-cnn", "vit_base_patch32_clip_quickgelu_224.openai"]
    assert timm.get_pretrained_cfg(found[2]).has_weights


def test_a_width_that_heads_cannot_share_is_named() -> None:
    config = TrainConfig(decoder=DecoderOptions(heads=7))
    with pytest.raises(LabError, match="--width 128: must be a multiple of --heads 7"):
        complete(config)
    complete(replace(config, model="show_tell"))  # an LSTM has no heads
