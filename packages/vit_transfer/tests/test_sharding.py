"""Real networks without weights, over eight processes that do not exist: what FSDP2 would gather at a time."""

import pytest
import torch
from labs_testing.sharded import assert_in_layers

from vit_transfer.config import ModelOptions
from vit_transfer.model import create, transfer


@pytest.mark.alone
@pytest.mark.parametrize(("name", "part"), [("vit_base_patch16_224", "block"), ("resnet50", "all")])
def test_a_unit_of_each_block(name: str, part: str) -> None:
    options = ModelOptions(name, pretrained=False, unfreeze=part)  # type: ignore[arg-type]
    with torch.device("meta"):
        assert_in_layers(transfer(create(options, 10), options, cached=False))
