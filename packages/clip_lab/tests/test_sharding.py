"""A real network without weights, over eight processes that do not exist: what FSDP2 would gather at a time."""

import pytest
import torch
from labs_testing.sharded import assert_in_layers

from clip_lab.config import HeadOptions
from clip_lab.image import ImageTower
from clip_lab.model import ClipModel
from clip_lab.text import TextTower


@pytest.mark.alone
def test_a_unit_of_each_block_of_both_towers() -> None:
    """CLIP's own ViT-B/16 and text tower (Radford et al. 2021, table 19)."""
    with torch.device("meta"):
        text = TextTower(49408, 512, 12, 8, 77, 49407)
        model = ClipModel(ImageTower("vit_base_patch16_224", {}, 224), text, HeadOptions(embedding=512))
    assert_in_layers(model)
