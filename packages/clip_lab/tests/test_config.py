"""Options: what contradicts itself is refused."""

import dataclasses

import pytest

from clip_lab.config import HeadOptions, ImageOptions, TextOptions, TrainConfig
from clip_lab.defaults import complete
from clip_lab.losses import check_objective
from labs_common.errors import LabError


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
