"""The offline base models."""

from pathlib import Path

import pytest
import torch

from vit_transfer import tiny
from vit_transfer.config import ModelOptions
from vit_transfer.model import create


def test_the_tiny_one_starts_from_the_tiny_transformer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    random = create(ModelOptions(model="tiny-vit", pretrained=False), 8)
    monkeypatch.setattr(tiny, "_pretrained", lambda recipe: random)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = create(ModelOptions(model="tiny-deit"), 5)
    assert torch.equal(made.dist_token, random.cls_token)
    assert torch.equal(made.pos_embed[:, 2:], random.pos_embed[:, 1:])
    assert torch.equal(made.blocks[2].attn.qkv.weight, random.blocks[2].attn.qkv.weight)
    assert made.head.out_features == made.head_dist.out_features == 5
    larger = create(ModelOptions(model="tiny-deit", image_size=64), 5)
    assert larger(torch.zeros(1, 3, 64, 64)).shape == (1, 5)
