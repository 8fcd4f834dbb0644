"""A cut network computes what the whole one does."""

import json
from pathlib import Path

import pytest
import timm
import torch
from timm.models import save_for_hf
from torch import nn

from labs_common.errors import LabError
from labs_common.frozen.cut import Cut
from vit_transfer.config import ModelOptions
from vit_transfer.data import transform_of
from vit_transfer.model import create, transfer
from vit_transfer.saved import load_model, save_model

# One of each family, with the smallest pictures that it takes.
SIZES = {
    "vgg11": 32, "resnet18": 32, "densenet121": 32, "inception_v3": 75, "legacy_xception": 71, "xception41": 64,
    "efficientnet_b0": 32, "mobilenetv2_100": 32, "mobilenetv3_small_100": 32, "vit_tiny_patch16_224": 64,
    "deit_tiny_distilled_patch16_224": 64, "swin_tiny_patch4_window7_224": 224, "tiny-vit": 48, "tiny-deit": 48,
}  # fmt: skip


def made(name: str, **options: object) -> tuple[nn.Module, ModelOptions, int]:
    torch.manual_seed(0)
    size = SIZES.get(name, 32)
    chosen = ModelOptions(model=name, pretrained=False, image_size=size, **options)
    return create(chosen, 10), chosen, size


@pytest.mark.alone
@pytest.mark.parametrize("name", SIZES)
def test_front_and_back_are_the_whole(name: str) -> None:
    network, options, size = made(name)
    images = torch.randn(3, 3, size, size)
    model = transfer(network, options, cached=True).eval()
    with torch.no_grad():
        whole = network(images)
        assert model.cut is not None
        rows = model.cut.front(images)
        assert rows.shape == (3, model.cut.width)
        # Random weights of a deep network give logits of very different sizes.
        scale = float(whole.abs().max())
        torch.testing.assert_close(model(rows), whole, atol=2e-5 * scale, rtol=0)
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert not {key for key, _ in model.cut.front.named_parameters()} & {key.removeprefix("model.") for key in trained}


@pytest.mark.parametrize("trained", [("head",), ("blocks.2", "head"), ("blocks.0", "head")])
def test_gradients_through_the_cut(trained: tuple[str, ...]) -> None:
    network, _, size = made("tiny-vit")
    images, targets = torch.randn(4, 3, size, size), torch.tensor([0, 1, 2, 3])
    cut = Cut(network.eval(), trained, images[:2])
    parameters = [p for name, p in network.named_parameters() if name.startswith(tuple(f"{t}." for t in trained))]
    plain = torch.autograd.grad(nn.functional.cross_entropy(network(images), targets), parameters)
    rows = cut.front(images).detach()
    through = torch.autograd.grad(nn.functional.cross_entropy(cut.back(rows), targets), parameters)
    for one, other in zip(plain, through, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_weights_that_blocks_share_are_behind_the_cut() -> None:
    """CoaT's last block has its position encodings in common with those before it."""
    torch.manual_seed(0)
    network = create(options := ModelOptions(model="coat_lite_tiny", pretrained=False, image_size=32), 10)
    model = transfer(network, options, cached=True)
    images, targets = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    trained = {name: own for name, own in network.named_parameters() if own.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"cpe4", "crpe4", "serial_blocks4", "norm4", "head"}
    plain = torch.autograd.grad(nn.functional.cross_entropy(network(images), targets), [*trained.values()])
    assert model.cut is not None
    through = nn.functional.cross_entropy(model(model.cut.front(images).detach()), targets)
    for one, other in zip(plain, torch.autograd.grad(through, [*trained.values()]), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_timm_builds_the_papers_head_again() -> None:
    with torch.device("meta"):
        own = create(ModelOptions(model="vgg11", pretrained=False, head="paper", head_width=16), 3)
        again = timm.create_model("with_paper_head", base="vgg11", hidden=16, num_classes=3)
    assert {name: value.shape for name, value in again.state_dict().items()} == {
        name: value.shape for name, value in own.state_dict().items()
    }


def test_weights_with_several_names_are_saved_and_read(tmp_path: Path) -> None:
    network, options, size = made("coat_lite_tiny")
    model, images = transfer(network, options, cached=False).eval(), torch.randn(1, 3, size, size)
    transform = transform_of(network, size, "flip", 0)
    save_model(model, options, transform, [str(name) for name in range(10)], tmp_path, model.state_dict())
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "model")(images), network.eval()(images))


def test_by_head_gives_both_in_training_and_their_mean_otherwise() -> None:
    network, options, size = made("tiny-deit")
    images = torch.randn(2, 3, size, size)
    model = transfer(network, options, cached=True, by_head=True)
    assert model.cut is not None
    rows = model.cut.front(images)
    one, two = model.train()(rows)
    features = network.eval().forward_features(images)
    torch.testing.assert_close(one, network.head(features[:, 0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(two, network.head_dist(features[:, 1]), atol=1e-5, rtol=0)
    torch.testing.assert_close(model.eval()(rows), (one + two) / 2)
    network, options, size = made("tiny-vit")
    with pytest.raises(LabError, match="no distillation token"):
        transfer(network, options, cached=True, by_head=True)


@pytest.mark.parametrize("unfreeze", ["block", "all"])
def test_pictures_that_are_too_small_are_named_before_a_run_begins(unfreeze: str) -> None:
    options = ModelOptions(model="tiny-vit", pretrained=False, image_size=7, unfreeze=unfreeze)
    with torch.device("meta"), pytest.raises(LabError, match=r"^--image-size 7: tiny-vit takes no such pictures"):
        transfer(create(options, 10), options, cached=False)


@pytest.mark.parametrize(("name", "values"), [("mean", "grey"), ("mean", [0.5]), ("std", [0, 0.2, 0.2]), ("std", None)])
def test_a_network_that_says_nothing_of_its_pictures_is_one_line(name: str, values: object, tmp_path: Path) -> None:
    save_for_hf(timm.create_model("test_resnet"), tmp_path, safe_serialization=True)
    assert load_model(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    said["pretrained_cfg"][name] = values
    (tmp_path / "config.json").write_text(json.dumps(said))
    with pytest.raises(LabError, match="saved network"):
        load_model(tmp_path)
