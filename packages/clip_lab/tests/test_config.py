"""Options: what contradicts itself is refused."""

import dataclasses
from pathlib import Path

import pytest

from clip_lab.config import HeadOptions, ImageOptions, StartOptions, TextOptions, TrainConfig
from clip_lab.defaults import complete
from clip_lab.losses import check_objective
from labs_common.errors import LabError
from labs_common.options import CaptionDataOptions
from labs_common.scenes.files import write_flickr8k


def test_options_that_contradict_each_other_are_refused() -> None:
    base = TrainConfig()
    wrong = {
        "--freeze-image": dataclasses.replace(base, image=ImageOptions(freeze_image=True)),
        "--freeze-text": dataclasses.replace(base, text=TextOptions(freeze_text=True)),
        "--views": dataclasses.replace(base, image=ImageOptions(views=2)),
        "--tokenizer": dataclasses.replace(base, text=TextOptions(text="bert", tokenizer="clip")),
        "causal": dataclasses.replace(base, objective="coca", text=TextOptions(text="bert")),
        "--caption-weight": dataclasses.replace(base, head=HeadOptions(caption_weight=1.0)),
    }
    for said, config in wrong.items():
        with pytest.raises(LabError, match=said):
            check_objective(complete(config))


PHOTOGRAPHS = TrainConfig(data=CaptionDataOptions(data="flickr8k"))


@pytest.mark.parametrize(
    ("config", "towers", "rates"),
    [
        (TrainConfig(), ("tiny-cnn", False, "own"), (4e-3, None, None)),
        (dataclasses.replace(PHOTOGRAPHS, data=CaptionDataOptions(data="written")), ("tiny-cnn", False, "own"),
         (4e-3, None, None)),
        (PHOTOGRAPHS, ("resnet50", True, "distilbert-base-uncased"), (1e-3, 1e-4, 1e-5)),
        (dataclasses.replace(PHOTOGRAPHS, objective="coca"), ("resnet50", True, "own"), (5e-4, 5e-5, None)),
        (dataclasses.replace(PHOTOGRAPHS, text=TextOptions(tokenizer="clip")), ("resnet50", True, "own"), (5e-4, 5e-5, None)),
        (dataclasses.replace(PHOTOGRAPHS, image=ImageOptions("vit_tiny_patch16_224", False)),
         ("vit_tiny_patch16_224", False, "distilbert-base-uncased"), (1e-3, None, 1e-5)),
        (dataclasses.replace(PHOTOGRAPHS, image=ImageOptions("tiny-cnn")), ("tiny-cnn", False, "own"), (4e-3, None, None)),
        (dataclasses.replace(PHOTOGRAPHS, start=StartOptions("a CLIP")), ("", True, ""), (1e-4, 1e-5, None)),
    ],
)  # fmt: skip
def test_photographs_get_pretrained_towers(
    config: TrainConfig,
    towers: tuple[str, bool, str],
    rates: tuple[float | None, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rates of what starts from random weights, and of the image and text tower that do not; None is not used.

    Drawn scenes are no photographs, whoever wrote them.
    """
    write_flickr8k(tmp_path / "written", range(1), side=16)
    monkeypatch.chdir(tmp_path)
    found = complete(config)
    assert (found.image.image, found.image.image_pretrained, found.text.text) == towers
    training = found.training
    every = (training.learning_rate, training.tower_learning_rate, training.text_learning_rate)
    for rate, expected in zip(every, rates, strict=True):
        assert expected is None or rate == pytest.approx(expected)
    assert complete(found) == found, "a resumed run reads what was written"
