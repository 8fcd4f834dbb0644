"""The paper's network without weights, over eight processes that do not exist: what FSDP2 would gather at a time."""

import pytest
import torch
from labs_testing.sharded import assert_in_layers

from zsi_contrastive.detector.backbone import make_backbone
from zsi_contrastive.detector.model import Parts, Sampling, Sizes, ZeroShotMaskRCNN


@pytest.mark.alone
def test_a_unit_of_each_block() -> None:
    with torch.device("meta"):
        backbone = make_backbone("resnet101", False, None, 1, 256)
        vectors = torch.zeros(48, 300)
        model = ZeroShotMaskRCNN(backbone, vectors[0], vectors, Parts(), Sizes(), Sampling())
    assert_in_layers(model)
