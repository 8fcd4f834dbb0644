"""The parameters that are unfrozen: these and nothing else."""

import pytest
import torch

from labs_common.errors import LabError
from vit_transfer.catalogue import FAMILIES, block_of, family
from vit_transfer.config import ModelOptions
from vit_transfer.model import Transfer, create, transfer, unfreeze

pytestmark = pytest.mark.quick

# Written down by hand, from timm's lists of modules: the last block of each network, then its head.
LAST = {
    "vgg11": ["features.16", "features.18", "head.fc"],
    "vgg13": ["features.20", "features.22", "head.fc"],
    "vgg16": ["features.24", "features.26", "features.28", "head.fc"],
    "vgg19": ["features.28", "features.30", "features.32", "features.34", "head.fc"],
    "resnet18": ["layer4.1", "fc"],
    "resnet34": ["layer4.2", "fc"],
    "resnet50": ["layer4.2", "fc"],
    "resnet101": ["layer4.2", "fc"],
    "resnet152": ["layer4.2", "fc"],
    "densenet121": ["features.denseblock4", "classifier"],
    "densenet161": ["features.denseblock4", "classifier"],
    "densenet169": ["features.denseblock4", "classifier"],
    "densenet201": ["features.denseblock4", "classifier"],
    "inception_v3": ["Mixed_7c", "fc"],
    "legacy_xception": ["conv3", "bn3", "conv4", "bn4", "fc"],
    "xception41": ["blocks.12", "head.fc"],
    "efficientnet_b0": ["blocks.6.0", "classifier"],
    "efficientnet_b1": ["blocks.6.1", "classifier"],
    "efficientnet_b2": ["blocks.6.1", "classifier"],
    "efficientnet_b3": ["blocks.6.1", "classifier"],
    "efficientnet_b4": ["blocks.6.1", "classifier"],
    "mobilenetv2_100": ["blocks.6.0", "classifier"],
    "mobilenetv3_small_100": ["blocks.4.2", "classifier"],
    "mobilenetv3_large_100": ["blocks.5.2", "classifier"],
    "vit_tiny_patch16_224": ["blocks.11", "head"],
    "vit_small_patch16_224": ["blocks.11", "head"],
    "vit_base_patch16_224": ["blocks.11", "head"],
    "vit_base_patch32_224": ["blocks.11", "head"],
    "vit_large_patch16_224": ["blocks.23", "head"],
    "deit_tiny_patch16_224": ["blocks.11", "head"],
    "deit_small_patch16_224": ["blocks.11", "head"],
    "deit_base_patch16_224": ["blocks.11", "head"],
    "deit_tiny_distilled_patch16_224": ["blocks.11", "head", "head_dist"],
    "deit_small_distilled_patch16_224": ["blocks.11", "head", "head_dist"],
    "deit_base_distilled_patch16_224": ["blocks.11", "head", "head_dist"],
    "swin_tiny_patch4_window7_224": ["layers.3.blocks.1", "head.fc"],
    "swin_small_patch4_window7_224": ["layers.3.blocks.1", "head.fc"],
    "swin_base_patch4_window7_224": ["layers.3.blocks.1", "head.fc"],
    "tiny-vit": ["blocks.3", "head"],
    "tiny-deit": ["blocks.3", "head", "head_dist"],
    "tiny-cnn": ["layer4.0", "fc"],
}


def test_the_table_is_the_catalogue() -> None:
    names = {name for members in FAMILIES.values() for name in members.networks}
    assert names == {name for name in LAST if not name.startswith("tiny-")}
    assert family("timm/resnet50.a1_in1k") == "ResNet"
    assert family("convnext_tiny") is None


@pytest.mark.parametrize("name", LAST)
def test_exactly_the_last_block_and_the_head_train(name: str) -> None:
    with torch.device("meta"):
        network = create(ModelOptions(model=name, pretrained=False), 10)
        model = Transfer(name, network, 64, unfreeze(network, "block", None), cut=None)
    trained = {key for key, parameter in network.named_parameters() if parameter.requires_grad}
    expected = {key for key, _ in network.named_parameters() if key.startswith(tuple(f"{p}." for p in LAST[name]))}
    assert trained == expected
    assert all(any(key.startswith(f"{prefix}.") for key in trained) for prefix in LAST[name])
    # In training only these are in training mode: no batch-norm statistic of the rest moves.
    model.train()
    moving = {key for key, layer in network.named_modules() if layer.training}
    assert moving == {
        key for key, _ in network.named_modules() if f"{key}.".startswith(tuple(f"{p}." for p in LAST[name]))
    }


def test_any_other_network_by_name() -> None:
    with torch.device("meta"):
        network = create(ModelOptions(model="convnext_tiny", pretrained=False), 10)
    with pytest.raises(LabError, match=r"name its last block with --block .*stages"):
        block_of(network, None)
    assert block_of(network, "stages.3.blocks.2") == ("stages.3.blocks.2",)
    assert block_of(network, "stages.3.blocks.1, stages.3.blocks.2") == ("stages.3.blocks.1", "stages.3.blocks.2")
    with pytest.raises(LabError, match="no such part"):
        block_of(network, "stages.9")
    with pytest.raises(LabError, match="no parameters"):
        block_of(network, "stages.3.blocks.2.mlp.act")


def test_frozen_statistics_stay_and_trained_ones_move() -> None:
    torch.manual_seed(0)
    network = create(ModelOptions(model="resnet18", pretrained=False), 10)
    model = transfer(network, ModelOptions(model="resnet18", image_size=32), cached=False)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    model.train()
    assert model.cut is not None
    rows = model.cut.front(torch.randn(4, 3, 32, 32))
    model(rows).sum().backward()
    moved = {key for key, value in network.state_dict().items() if not torch.equal(value, before[key])}
    assert moved
    assert all((key.startswith("layer4.1.bn") and "running" in key) or "num_batches" in key for key in moved)
    assert all(key.startswith("layer4.1.") for key in moved)
