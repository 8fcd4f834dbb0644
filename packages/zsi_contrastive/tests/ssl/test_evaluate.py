"""Measures of features against peers, and the attention that the report draws."""

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from labs_common.data.classes import LabelledPictures
from labs_common.report.page import Gallery
from labs_common.run import Run
from zsi_contrastive.ssl import evaluate
from zsi_contrastive.ssl.data import Pixels
from zsi_contrastive.ssl.report import class_attention, map_section, neighbours_section


def test_neighbours_are_lightlys() -> None:
    peer = pytest.importorskip("lightly.utils.benchmarking", reason="lightly is the independent peer").knn_predict
    torch.manual_seed(0)
    bank, labels = torch.randn(300, 12), torch.randint(7, (300,))
    asked = torch.randn(50, 12)
    found = evaluate.knn_classes(evaluate.Features(bank, labels, 7, torch.arange(300)), asked, 21, 0.1)
    normal = torch.nn.functional.normalize
    expected = peer(normal(asked, dim=1), normal(bank, dim=1).T, labels, 7, 21, 0.1)[:, 0]
    assert (found == expected).float().mean() > 0.99  # of equal votes either may win


def test_a_probe_by_sgd_learns_from_crops_and_leaves_the_encoder_alone() -> None:
    """Pictures are red or green, hardly; the encoder's features are their mean colours and a batch norm of them."""
    generator = np.random.default_rng(0)
    levels = generator.integers(100, 140, (60, 8, 8, 3), dtype=np.uint8)
    labels = np.arange(60) % 2
    for place, label in enumerate(labels):
        levels[place, ..., label] += 15
    whole = LabelledPictures(
        source="it", contents=list(levels), names=[str(n) for n in range(60)], classes=("red", "green"), labels=labels
    )
    places = {"train": range(40), "validation": range(40, 50), "test": range(50, 60)}
    pixels = {name: Pixels(whole.subset(part), 8, torch.device("cpu"), False) for name, part in places.items()}
    layers = torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.BatchNorm1d(3)
    encoder = torch.nn.Sequential(*layers).train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    found = evaluate.probe_by_sgd(encoder, pixels, 8, 10, 0, Accelerator(cpu=True))
    assert found == 1.0
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    without = evaluate.probe_by_sgd(encoder, pixels, 8, 0, 0, Accelerator(cpu=True))
    assert without == 0.5


def test_few_pictures_have_few_neighbours_and_no_map() -> None:
    levels = [np.zeros((4, 4, 3), dtype=np.uint8)] * 2
    pictures = LabelledPictures(
        source="it", contents=levels, names=("a", "b"), classes=("x", "y"), labels=np.array([0, 1])
    )
    found = evaluate.Features(torch.eye(2), torch.tensor([0, 1]), 2, torch.arange(2))
    (gallery,) = neighbours_section({"train": pictures, "test": pictures}, {"train": found, "test": found}).blocks
    assert isinstance(gallery, Gallery)
    assert "the 2 training pictures" in gallery.caption
    for kind in ("tsne", "pca"):
        assert map_section(Run(Path("nowhere")), kind, found, ("x", "y"), 0) is None


def test_effective_rank_and_spread() -> None:
    torch.manual_seed(0)
    rows = torch.randn(2000, 16)
    assert evaluate.effective_rank(rows) == pytest.approx(16, abs=0.3)
    assert evaluate.effective_rank(rows[:, :3] @ torch.randn(3, 16)) < 3.1
    assert evaluate.spread(rows) == pytest.approx(1, abs=0.02)
    assert evaluate.spread(torch.ones(10, 16)) == pytest.approx(0, abs=1e-6)


def test_class_attention_is_what_the_block_computes() -> None:
    timm = pytest.importorskip("timm")
    network = timm.create_model("test_vit", num_classes=0, img_size=64).eval()
    pictures = torch.randn(2, 3, 64, 64)
    found = class_attention(network, pictures)
    assert found.shape == (2, network.blocks[-1].attn.num_heads, 4, 4)
    attention = network.blocks[-1].attn
    attention.fused_attn = False
    kept = []
    handle = attention.attn_drop.register_forward_hook(lambda _m, inputs, _o: kept.append(inputs[0]))
    network(pictures)
    handle.remove()
    torch.testing.assert_close(found.flatten(2), kept[0][:, :, 0, 1:])
    tokenless = timm.create_model("test_vit", num_classes=0, img_size=64, class_token=False, global_pool="avg").eval()
    assert class_attention(tokenless, pictures) is None
