"""Backbones of others by any names, and files of other things."""

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from labs_testing.commands import here
from safetensors.torch import load_file
from torch import nn
from torchvision.models import get_model
from torchvision.models.detection import maskrcnn_resnet50_fpn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from zsi_contrastive.detector.backbone import make_backbone
from zsi_contrastive.detector.convert import plain, spelt


@pytest.fixture(scope="module")
def resnet18() -> nn.Module:
    torch.manual_seed(0)
    return get_model("resnet18").eval()


# What others call a tensor of torchvision's ResNet or of its pyramid.
def of_detectron(name: str) -> str:
    if name.startswith("fpn."):
        _, kind, level, _, what = name.split(".")
        return f"backbone.fpn_{'lateral' if kind == 'inner_blocks' else 'output'}{int(level) + 2}.{what}"
    stage, _, rest = name.rpartition("layer")[2].partition(".") if name.startswith("layer") else ("", "", name)
    for old, new in (("downsample.0", "shortcut"), ("downsample.1", "shortcut.norm")):
        rest = rest.replace(old, new)
    for number in "123":
        rest = rest.replace(f"bn{number}", f"conv{number}.norm")
    return f"backbone.bottom_up.{f'res{int(stage) + 1}' if stage else 'stem'}.{rest}"


@pytest.mark.parametrize(
    ("names", "more", "pyramid", "key"),
    [
        (lambda name: f"module.encoder_q.{name}", ("module.encoder_k.conv1.weight", "module.queue"), False, "state_dict"),
        (lambda name: f"backbone.{'' if name.startswith('fpn') else 'body.'}{name}", ("rpn.head.conv.weight",), True, ""),
        (  # torchvision's of before 0.13
            lambda name: f"backbone.{'' if name.startswith('fpn') else 'body.'}{name}".replace(".0.weight", ".weight")
            .replace(".0.bias", ".bias") if name.startswith("fpn") else f"backbone.body.{name}",
            ("roi_heads.box_predictor.cls_score.weight",), True, "",
        ),
        (of_detectron, ("roi_heads.box_head.fc1.weight",), True, "model"),
        (lambda name: name, ("fc.weight",), False, ""),
        (lambda name: name, ("roi_heads.box_predictor.cls_score.weight",), False, ""),
    ],
    ids=["moco", "torchvision", "torchvision before", "detectron2", "plain", "without a pyramid"],
)  # fmt: skip
def test_backbones_by_any_names(
    names: Callable[[str], str], more: tuple[str, ...], pyramid: bool, key: str, resnet18: nn.Module, tmp_path: Path
) -> None:
    network = resnet18
    ours = {name: value for name, value in network.state_dict().items() if not name.startswith("fc.")}
    fpn = FeaturePyramidNetwork([64, 128, 256, 512], 256, LastLevelMaxPool())
    if pyramid:
        ours |= {f"fpn.{name}": value for name, value in fpn.state_dict().items()}
    theirs = {names(name): value for name, value in ours.items()} | {name: torch.zeros(1) for name in more}
    torch.save({key: theirs, "epoch": 3} if key else theirs, tmp_path / "r18.pth.tar")
    done = here("zsi_contrastive.convert", tmp_path / "r18.pth.tar", "--output", tmp_path / "made")
    assert "--backbone resnet18" in done.stdout
    taught = any(name.startswith(("rpn.", "roi_heads.")) for name in more)
    assert ("a detector's backbone has seen its classes" in done.stdout) == taught
    assert all(name.removeprefix("module.") in done.stdout for name in more)
    file = tmp_path / "made" / "backbone.safetensors"
    assert set(load_file(file)) == set(ours)
    found = make_backbone("resnet18", False, file, 0, 256).eval()
    picture = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        x = network.maxpool(network.relu(network.bn1(network.conv1(picture))))
        maps = {}
        for number in range(4):
            x = getattr(network, f"layer{number + 1}")(x)
            maps[str(number)] = x
        torch.testing.assert_close(found.body(picture), maps)
        if pyramid:
            torch.testing.assert_close(found(picture), fpn(maps))


def test_names_are_those_of_torchvisions_own_detector() -> None:
    with torch.device("meta"):
        theirs = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None).state_dict()
    found = {spelt(name) for name in theirs}
    assert {name for name in plain("resnet50") if not name.endswith("num_batches_tracked")} <= found
    assert sum(name.startswith("fpn.") for name in found) == 16


class Harmful:
    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return (print, ("run",))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"state_dict": {"conv1.weight": torch.zeros(1)}, "hook": Harmful()}, "it holds "),
        ({"conv1.weight": torch.zeros(1)}, "holds no ResNet of torchvision"),
        ({"epoch": 3}, "holds no state_dict"),
        ({"conv1.weight": torch.tensor([[float("nan")]])}, "conv1.weight is no tensor of finite numbers"),
        ({"conv1.weight": torch.ones(2, 2).to_sparse()}, "conv1.weight is no tensor of finite numbers"),
        ({"a": torch.zeros(1), "module.a": torch.zeros(1)}, "with and without module."),
        ({"mask_head.conv_vec.weight": torch.zeros(3)}, "has the shape (3,)"),
        (b"\x80no pickle", "cannot be read alone"),
        (pickle.dumps({"model": {"stem.conv1.weight": np.zeros(3)}}), "cannot be read alone"),  # Detectron2's .pkl
    ],
    ids=["code", "another network", "no tensors", "nan", "sparse", "twice", "shape", "damaged", "pickle"],
)
def test_a_file_of_other_things_is_refused(content: object, said: str, tmp_path: Path) -> None:
    file = tmp_path / "their.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    done = here("zsi_contrastive.convert", file, "--output", tmp_path / "made", code=2)
    assert len(done.errors) == 1
    assert str(file) in done.errors[0]
    assert said in done.errors[0]
    assert done.stdout == ""
    assert not (tmp_path / "made").exists()
