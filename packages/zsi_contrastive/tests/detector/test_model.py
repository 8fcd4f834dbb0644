"""The whole detector: its parts on and off, other words, odd pictures, backbones."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from labs_common.errors import LabError
from zsi_contrastive.detector.backbone import make_backbone
from zsi_contrastive.detector.heads import CONTRASTIVE
from zsi_contrastive.detector.model import Parts, Sizes, ZeroShotMaskRCNN, pasted
from zsi_contrastive.detector.regions import Query, Sampling

D = 6
SIZES = Sizes(16, 8, 1, (8, 16, 24), 48, 64, 16, (40, 40, 20, 20), 16, (5, 7), 1, True)


def make(parts: Parts | None = None, backbone: torch.nn.Module | None = None) -> ZeroShotMaskRCNN:
    torch.manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(5, D), dim=1)
    backbone = backbone or make_backbone("tiny", False, None, 0, 8)
    return ZeroShotMaskRCNN(backbone, vectors[0], vectors[1:], parts or Parts(), SIZES, Sampling(16))


def sample(objects: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(objects)
    masks = torch.zeros(objects, 48, 56, dtype=torch.uint8)
    boxes = torch.tensor([[4.0 + 6 * n, 5.0, 24.0 + 6 * n, 30.0] for n in range(objects)]).reshape(-1, 4)
    for mask, box in zip(masks, boxes.int().tolist(), strict=True):
        mask[box[1] : box[3], box[0] : box[2]] = 1
    labels = torch.arange(1, objects + 1)
    return torch.rand(3, 48, 56), {"boxes": boxes, "labels": labels, "masks": masks}


BASE = {"objectness", "proposal_box", "classes", "box"}


@pytest.mark.parametrize(
    ("parts", "losses"),
    [
        (Parts(False, False, False, False), BASE),
        (Parts(True, False, False, False), BASE | {"mask"}),
        (Parts(True, True, False, False), BASE | {"mask", "box_reconstruction", "mask_reconstruction"}),
        (Parts(True, True, True, False), BASE | {"mask", "box_reconstruction", "mask_reconstruction"}),
        (Parts(), BASE | {"mask", "box_reconstruction", "mask_reconstruction"}),
    ],
)
def test_each_part_can_be_switched_off(parts: Parts, losses: set[str]) -> None:
    model = make(parts).train()
    found = model(*map(list, zip(sample(2), sample(1), strict=True)))
    assert set(found) == losses
    sum(found.values()).backward()
    without = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert not without, "every parameter that there is takes part"
    names = {name for name, _ in model.named_parameters()}
    assert any("background" in name for name in names) == parts.background_rpn
    learnt = model.rpn.head.background_vector() if parts.background_rpn else None
    assert torch.equal(model.classes()[0], learnt if parts.sync_background else model.background.word)


def test_contrastive_heads_are_parts() -> None:
    parts = Parts(contrastive=tuple(CONTRASTIVE))
    model = make(parts).train()
    found = model(*map(list, zip(sample(2), sample(1), strict=True)))
    assert set(CONTRASTIVE) < set(found)
    sum(found.values()).backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert any(name.startswith("greedy.isolated.") for name in model.state_dict()), "as finished runs have it"
    model.eval().detect([sample(1)[0]], [Query(model.seen, torch.zeros(4, dtype=torch.int64))])
    assert Parts.from_plain(parts.plain()) == parts
    assert Parts.from_plain({"mask_head": False, "greedy_infomax": True}).contrastive == ("greedy_infomax",)


def test_the_detectors_loss_trains_the_background_only_if_synchronised() -> None:
    for sync in (False, True):
        model = make(Parts(sync_background=sync)).train()
        found = model(*map(list, zip(sample(2), sample(1), strict=True)))
        found["classes"].backward()
        grad = model.rpn.head.background.grad
        assert (grad is not None and bool(grad.abs().sum() > 0)) == sync


def test_pictures_without_objects() -> None:
    model = make().train()
    found = model(*map(list, zip(sample(0), sample(0), strict=True)))
    assert all(bool(value.isfinite()) for value in found.values())
    sum(found.values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad), "processes stay in step"


def test_a_model_scores_words_that_it_was_never_given() -> None:
    model = make().eval()
    model.regions.keep(0.05, 0.5, 10)
    pictures = [sample(1)[0], torch.rand(3, 40, 40)]
    vectors = torch.randn(11, D)
    queries = [
        Query(model.seen, torch.zeros(4, dtype=torch.int64)),
        Query(vectors, torch.tensor([0] * 4 + [1] * 7)),
    ]
    one, two = model.detect(pictures, queries)
    assert all(int(found.classes.max()) < 4 for found in one)
    for found, picture in zip(two, pictures, strict=True):
        groups = queries[1].groups[found.classes]
        assert (groups == 0).sum() <= 10
        assert (groups == 1).sum() <= 10
        assert pasted(found, *picture.shape[1:]).shape == (len(found.boxes), *picture.shape[1:])
        assert float(found.boxes[:, 2].max()) <= picture.shape[2] + 1e-3
    # Classes do not know of each other: a list with more of them gives the same scores, in its own order.
    (alone,) = model.detect(pictures, [Query(vectors[:4], torch.zeros(4, dtype=torch.int64))])
    for found, whole in zip(alone, two, strict=True):
        first = queries[1].groups[whole.classes] == 0
        torch.testing.assert_close(found.scores, whole.scores[first])
        torch.testing.assert_close(found.boxes, whole.boxes[first])
    other = make()
    other.load_state_dict(model.state_dict())
    assert not any(tensor.shape[:1] == (11,) for tensor in other.state_dict().values()), "no class count is baked in"


def test_half_precision() -> None:
    model = make().train()
    with torch.autocast("cpu", torch.bfloat16):
        found = model(*map(list, zip(sample(2), sample(1), strict=True)))
    full = make().train()(*map(list, zip(sample(2), sample(1), strict=True)))
    assert found.keys() == full.keys()
    assert all(bool(value.isfinite()) for value in found.values())
    with torch.autocast("cpu", torch.bfloat16):
        model.eval().detect([sample(1)[0]], [Query(torch.randn(3, D), torch.zeros(3, dtype=torch.int64))])


@pytest.mark.parametrize("name", ["resnet18", "timm/resnet10t", "tiny"])
def test_frozen_stages_keep_no_gradient(name: str) -> None:
    backbone = make_backbone(name, False, None, 1, 16)
    frozen = {child for child, p in backbone.body.named_parameters() if not p.requires_grad}
    stem = {"resnet18": ("conv1", "layer1"), "timm/resnet10t": ("conv1", "layer1"), "tiny": ("0", "1")}[name]
    assert {child.split(".")[0] for child in frozen} == set(stem) or name == "timm/resnet10t"
    assert any(child.startswith(stem[1]) for child in frozen)
    assert not any(child.startswith(("layer2", "layer3", "2", "3")) for child in frozen)
    levels = backbone(torch.randn(1, 3, 64, 64))
    assert all(level.shape[1] == 16 or name == "resnet18" for level in levels.values())
    part = backbone.body
    kept: dict[str, bool] = {}
    for child, module in part.named_children():
        module.register_forward_hook(lambda _m, _i, out, child=child: kept.update({child: out.requires_grad}))
    backbone(torch.randn(1, 3, 64, 64))
    assert not kept[stem[1]], "autograd keeps nothing of what is frozen"


def test_backbones_that_cannot_be_had(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="resnet5x: timm has no such model"):
        make_backbone("resnet5x", False, None, 0, 8)
    with pytest.raises(LabError, match="not at 4, 8, 16 and 32"):
        make_backbone("vit_tiny_patch16_224", False, None, 0, 8)
    file = tmp_path / "other.safetensors"
    save_file({"conv1.weight": torch.zeros(2, 2)}, file)
    with pytest.raises(LabError, match="another architecture"):
        make_backbone("resnet18", False, file, 0, 8)
    body = make_backbone("resnet18", False, None, 0, 8).body
    save_file({name: tensor.contiguous() for name, tensor in body.state_dict().items()}, file)
    again = make_backbone("resnet18", True, file, 0, 8).body
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in body.state_dict().items())
