"""The parameters that are unfrozen: these and nothing else."""

import pytest
import torch

from labs_common.errors import LabError
from vit_transfer.catalogue import FAMILIES, block_of, family
from vit_transfer.config import ModelOptions
from vit_transfer.model import Transfer, create, transfer, unfreeze
from vit_transfer.report import paper_table

pytestmark = pytest.mark.quick

# Written down by hand, from timm's lists of modules: the last block of each network, then its head.
LAST = {
    "vgg11": ["features.16", "features.18", "pre_logits", "head"],
    "vgg13": ["features.20", "features.22", "pre_logits", "head"],
    "vgg16": ["features.24", "features.26", "features.28", "pre_logits", "head"],
    "vgg19": ["features.28", "features.30", "features.32", "features.34", "head"],  # with the paper's head
    "resnet18": ["layer4.1", "fc"],
    "resnet34": ["layer4.2", "fc"],
    "resnet50": ["layer4.2", "fc"],
    "resnet101": ["layer4.2", "fc"],
    "resnet152": ["layer4.2", "fc"],
    "resnetv2_152": ["stages.3", "norm", "head"],
    "densenet121": ["features.denseblock4", "features.norm5", "classifier"],
    "densenet161": ["features.denseblock4", "features.norm5", "classifier"],
    "densenet169": ["features.denseblock4", "features.norm5", "classifier"],
    "densenet201": ["features.denseblock4", "features.norm5", "classifier"],
    "inception_v3": ["Mixed_7c", "fc"],
    "legacy_xception": ["conv3", "bn3", "conv4", "bn4", "fc"],
    "xception41": ["blocks.12", "head"],
    "efficientnet_b0": ["blocks.6.0", "conv_head", "bn2", "classifier"],
    "efficientnet_b1": ["blocks.6.1", "conv_head", "bn2", "classifier"],
    "efficientnet_b2": ["blocks.6.1", "conv_head", "bn2", "classifier"],
    "efficientnet_b3": ["blocks.6.1", "conv_head", "bn2", "classifier"],
    "efficientnet_b4": ["blocks.6.1", "conv_head", "bn2", "classifier"],
    "tf_efficientnetv2_l": ["blocks.6.6", "conv_head", "bn2", "classifier"],
    "mobilenetv2_100": ["blocks.6.0", "conv_head", "bn2", "classifier"],
    "mobilenetv3_small_100": ["blocks.4.2", "blocks.5", "conv_head", "classifier"],
    "mobilenetv3_large_100": ["blocks.5.2", "blocks.6", "conv_head", "classifier"],
    "dm_nfnet_f0": ["stages.3.2", "final_conv", "head"],
    "dm_nfnet_f6": ["stages.3.20", "final_conv", "head"],
    "vit_tiny_patch16_224": ["blocks.11", "norm", "head"],
    "vit_small_patch16_224": ["blocks.11", "norm", "head"],
    "vit_base_patch16_224": ["blocks.11", "norm", "head"],
    "vit_base_patch32_224": ["blocks.11", "norm", "head"],
    "vit_large_patch16_224": ["blocks.23", "norm", "head"],
    "vit_large_patch32_224": ["blocks.23", "norm", "head"],
    "coat_lite_tiny": ["serial_blocks4.1", "cpe4", "crpe4", "norm4", "head"],
    "coat_lite_small": ["serial_blocks4.2", "cpe4", "crpe4", "norm4", "head"],
    "cait_xxs24_224": ["blocks_token_only.1", "norm", "head"],
    "cait_s24_224": ["blocks_token_only.1", "norm", "head"],
    "deit_tiny_patch16_224": ["blocks.11", "norm", "head"],
    "deit_small_patch16_224": ["blocks.11", "norm", "head"],
    "deit_base_patch16_224": ["blocks.11", "norm", "head"],
    "deit_tiny_distilled_patch16_224": ["blocks.11", "norm", "head", "head_dist"],
    "deit_small_distilled_patch16_224": ["blocks.11", "norm", "head", "head_dist"],
    "deit_base_distilled_patch16_224": ["blocks.11", "norm", "head", "head_dist"],
    "swin_tiny_patch4_window7_224": ["layers.3.blocks.1", "norm", "head"],
    "swin_small_patch4_window7_224": ["layers.3.blocks.1", "norm", "head"],
    "swin_base_patch4_window7_224": ["layers.3.blocks.1", "norm", "head"],
    "tiny-vit": ["blocks.3", "norm", "head"],
    "tiny-deit": ["blocks.3", "norm", "head", "head_dist"],
    "tiny-cnn": ["layer4.0", "fc"],
}

# What the paper counts (arXiv 2110.05270, Table 1, its head included) and, where timm's network is another or the paper
# left the head out, what is added to it.
TABLE = {
    "resnetv2_152": (15_497_994, -4 * 2048),  # Keras: biases of three last convolutions and of the shortcut
    "tf_efficientnetv2_l": (7_020_960, 1280 * 256 + 256 + 256 * 10 + 10),  # printed without the head
    "vgg19": (9_573_130, 0),
    "dm_nfnet_f6": (12_012_043, 0),
    "densenet201": (6_982_400, 1920 * 256 + 256 + 256 * 10 + 10),  # printed without the head
    "vit_large_patch32_224": (12_863_242, 0),
    "swin_base_patch4_window7_224": (12_868_650, 0),
    "coat_lite_small": (3_308_298, 0),
    "cait_s24_224": (1_877_130, 0),
    "deit_base_distilled_patch16_224": (7_488_276, 0),
}


def test_the_papers_table_is_the_printed_one() -> None:
    rows = paper_table()
    assert {row.network: (row.trainable, row.more) for row in rows} == TABLE
    printed = (83.583, 90.130, 92.784, 94.350, 94.757, 95.467, 93.580, 94.100, 96.000, 96.450)
    assert tuple(row.accuracy for row in rows) == printed
    assert all(family(row.network) == row.family and bool(row.more) == bool(row.reason) for row in rows)


def test_the_table_is_the_catalogue() -> None:
    names = {name for members in FAMILIES.values() for name in members.networks}
    assert names == {name for name in LAST if not name.startswith("tiny-")}
    assert family("timm/resnet50.a1_in1k") == "ResNet"
    assert family("convnext_tiny") is None


@pytest.mark.parametrize("name", LAST)
def test_exactly_the_last_block_and_the_head_train(name: str) -> None:
    with torch.device("meta"):
        head = "paper" if name in TABLE else "linear"
        network = create(ModelOptions(model=name, pretrained=False, head=head, head_width=256), 10)
        model = Transfer(name, network, 64, unfreeze(network, "block", None), cut=None)
        if name in ("resnetv2_152", "vgg19"):  # whose heads are a convolution, and behind other layers
            assert network.eval()(torch.zeros(2, 3, 64, 64)).shape == (2, 10)
    trained = {key for key, parameter in network.named_parameters() if parameter.requires_grad}
    expected = {key for key, _ in network.named_parameters() if key.startswith(tuple(f"{p}." for p in LAST[name]))}
    assert trained == expected
    assert all(any(key.startswith(f"{prefix}.") for key in trained) for prefix in LAST[name])
    if name in TABLE:
        assert sum(own.numel() for own in network.parameters() if own.requires_grad) == sum(TABLE[name])
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
    assert block_of(network, "stages.3.blocks.2") == ("stages.3.blocks.2", "head")
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
