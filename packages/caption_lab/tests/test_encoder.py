from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from caption_lab.config import EncoderOptions
from caption_lab.encoder import Encoder, last_stages, make_encoder
from labs_common.errors import LabError


@pytest.mark.parametrize(
    ("name", "size", "grid", "width"),
    [
        ("resnet18", 64, (2, 2), 512),
        ("efficientnet_b0", 64, (2, 2), 1280),
        ("vit_tiny_patch16_224", 32, (2, 2), 192),
        ("convnext_atto", 64, (2, 2), 320),
        ("swin_tiny_patch4_window7_224", 224, (7, 7), 768),
    ],
)
def test_a_vector_for_each_place_of_any_network(name: str, size: int, grid: tuple[int, int], width: int) -> None:
    arguments = {"img_size": size} if "vit" in name else {}
    torch.manual_seed(0)
    encoder = Encoder(name, arguments, size, 0)
    assert (encoder.grid, encoder.width, encoder.places) == (grid, width, grid[0] * grid[1])
    pictures = torch.randn(2, 3, size, size)
    with torch.no_grad():
        features = encoder(pictures)
        raw = encoder.network.forward_features(pictures)
    assert features.shape == (2, encoder.places, width)
    # The second place of the first row is the second vector.
    second = raw[:, encoder.network.num_prefix_tokens + 1] if raw.dim() == 3 else (
        raw[:, 0, 1] if "swin" in name else raw[:, :, 0, 1])  # fmt: skip
    torch.testing.assert_close(features[:, 1], second)


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
