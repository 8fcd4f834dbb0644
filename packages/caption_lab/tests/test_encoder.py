from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from caption_lab.config import EncoderOptions
from caption_lab.encoder import Encoder, last_stages, make_encoder
from labs_common.errors import LabError

BLOCK = {"embed_dim": 16, "depth": 1, "num_heads": 2, "img_size": 32}
STAGES = {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "img_size": 64, "window_size": 8}
SMALL = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}
VGG = {"mlp_ratio": 0.001}  # its classifier has 100 million parameters
# A network of each family, how it is made small, its pictures' side and its grid's, and whether its feature for its
# classifier is the plain mean.
FAMILIES: dict[str, tuple[dict[str, object], int, int, bool]] = {
    "test_resnet": ({}, 128, 4, True),
    "test_efficientnet": ({}, 128, 4, True),
    "test_convnext": ({}, 128, 4, False),
    "regnetx_002": ({}, 128, 4, True),
    "densenet121": ({"block_config": (1, 1), "growth_rate": 8}, 128, 16, True),
    "mobilenetv3_small_050": ({}, 128, 4, False),
    "ghostnet_050": ({}, 128, 4, False),
    "vgg11": (VGG, 128, 4, False),
    "mambaout_femto": (SMALL, 128, 4, False),  # channels last
    "pvt_v2_b0": ({}, 128, 4, True),
    "swin_tiny_patch4_window7_224": (STAGES, 64, 8, True),  # channels last
    "vit_tiny_patch16_224": (BLOCK, 32, 2, False),
    "vit_base_patch32_clip_224": (BLOCK | {"img_size": 128}, 128, 4, False),
    "vit_small_patch14_reg4_dinov2": (BLOCK | {"img_size": 28}, 28, 2, False),  # a class token and four registers
    "deit_tiny_distilled_patch16_224": (BLOCK, 32, 2, False),  # two tokens before the places
    "beit_base_patch16_224": (BLOCK, 32, 2, False),
    "cait_xxs24_224": (BLOCK | {"depth_token_only": 1}, 32, 2, False),
    "xcit_nano_12_p16_224": (BLOCK, 32, 2, False),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_vector_for_each_place_of_any_network(name: str) -> None:
    arguments, size, side, plain = FAMILIES[name]
    torch.manual_seed(0)
    encoder = Encoder(name, arguments, size, 0)
    assert (encoder.grid, encoder.places) == ((side, side), side**2)
    usual, part = torch.randn(1, 3, size, size), size // side
    with torch.no_grad():
        features = encoder(usual)
        assert features.shape == (1, side**2, encoder.width)
        corners, changes = ((0, side - 1), (side - 1, 0)), []
        for row, column in corners:  # only this place is another
            lit = usual.clone()
            lit[:, :, row * part :, column * part :][:, :, :part, :part] = 2 * torch.randn(3, part, part)
            changes.append((encoder(lit) - features).norm(dim=2)[0])
        first, second = (row * side + column for row, column in corners)  # row by row
        assert changes[0][first] > 1.1 * changes[1][first]
        assert changes[1][second] > 1.1 * changes[0][second]
        own = encoder.network(lit)
        alike = own.shape[1] == encoder.width and torch.allclose(own, encoder(lit).mean(1), atol=1e-5)
    assert alike == plain


def test_what_gives_no_grid_is_refused() -> None:
    with pytest.raises(LabError, match="--encoder crossvit_9_240: gives no grid of vectors"):
        Encoder("crossvit_9_240", {"depth": ((1, 1, 0),) * 1, "embed_dim": (8, 8), "num_heads": (1, 1)}, 240, 0)


def test_the_global_vector_is_what_timm_pools() -> None:
    torch.manual_seed(0)
    encoder = Encoder("resnet18", {}, 64, 1)
    pictures = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(encoder(pictures), encoder.network(pictures))
        parts = Encoder("resnet18", {}, 64, 2)
        parts.load_state_dict(encoder.state_dict())
        # A 2 × 2 grid in four parts is the grid itself.
        raw = parts.network.forward_features(pictures)
        torch.testing.assert_close(parts(pictures), raw.flatten(1))
    assert parts.width == 4 * 512
    with pytest.raises(LabError, match="--pool 3"):
        Encoder("resnet18", {}, 64, 3)


@pytest.mark.parametrize(
    ("name", "count", "stages"),
    [
        ("resnet18", 1, ["layer4.0", "layer4.1"]),
        ("resnet18", 2, ["layer3.0", "layer3.1", "layer4.0", "layer4.1"]),
        ("efficientnet_b0", 1, ["blocks.5", "blocks.6", "conv_head", "bn2"]),
        ("vit_tiny_patch16_224", 2, ["blocks.10", "blocks.11", "norm"]),
        ("convnext_atto", 1, ["stages.3"]),
    ],
)
def test_last_stages(name: str, count: int, stages: list[str]) -> None:
    network = timm.create_model(name, num_classes=0)
    assert [stage for stage in last_stages(network, count) if not stage.startswith("head")] == stages
    with pytest.raises(LabError, match="--unfreeze 40"):
        last_stages(network, 40)


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
@pytest.mark.parametrize("count", [0, 1])
def test_front_and_back_are_the_whole(name: str, count: int) -> None:
    torch.manual_seed(0)
    options = EncoderOptions(encoder=name, pretrained=False, image_size=32)
    encoder = make_encoder(options)
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    encoder.train_last(count, frozen_is_kept=True)
    pictures = torch.randn(4, 3, 32, 32)
    rows = encoder.front(pictures)
    assert rows.shape == (4, encoder.row_width)
    encoder.train()
    torch.testing.assert_close(encoder.back(rows), encoder(pictures))
    trained = {key.split(".")[1] for key, parameter in encoder.named_parameters() if parameter.requires_grad}
    assert trained == (set() if not count else {"layer4"} if name == "resnet18" else {"blocks", "norm"})
    if count:
        encoder.back(rows.detach()).square().mean().backward()
        assert all((p.grad is not None) == p.requires_grad for p in encoder.parameters())
    assert all(torch.equal(before[key], value) for key, value in encoder.state_dict().items()), "statistics stay"
    # Without a cache the whole network runs, with the same result.
    encoder.train_last(count, frozen_is_kept=False)
    torch.testing.assert_close(encoder.back(pictures if count else encoder.front(pictures)), encoder(pictures))


def test_weights_from_a_file(tmp_path: Path) -> None:
    torch.manual_seed(1)
    file = tmp_path / "weights.safetensors"
    whole = timm.create_model("resnet18", num_classes=7)
    save_file(whole.state_dict(), file)
    encoder = make_encoder(EncoderOptions(encoder="resnet18", weights=file, pool=1))
    assert torch.equal(encoder.network.conv1.weight, whole.conv1.weight)
    with pytest.raises(LabError, match="first difference"):
        make_encoder(EncoderOptions(encoder="resnet34", weights=file, pool=1))


def test_unknown_networks_and_sizes_are_named() -> None:
    with pytest.raises(LabError, match="resnet50"):
        make_encoder(EncoderOptions(encoder="resnt50"))
    with pytest.raises(LabError, match="--image-size 4"):
        make_encoder(EncoderOptions(encoder="vit_tiny_patch16_224", pretrained=False, image_size=4))
