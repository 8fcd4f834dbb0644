"""Both stages against torchvision's own code, of which they are a faster form."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from labs_testing.pretended import pretended_gpu
from torch import nn
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign, box_iou

from zsi_contrastive.detector.heads import SemanticBoxHead
from zsi_contrastive.detector.proposals import Anchors, Proposals, drawn, matched, numbered, pooled, surviving
from zsi_contrastive.detector.regions import BOX_WEIGHTS, Sampling, ZeroShotRegions

pytestmark = pytest.mark.quick

CHANNELS, D = 4, 6
ALL = 100_000  # more than there are


def features(strides: tuple[int, ...] = (4, 8, 16), height: int = 64, width: int = 128) -> dict[str, torch.Tensor]:
    """Random maps of two pictures."""
    torch.manual_seed(0)
    return {str(n): torch.randn(2, CHANNELS, height // side, width // side) for n, side in enumerate(strides)}


def objects() -> list[dict[str, torch.Tensor]]:
    """Three objects, and none."""
    boxes = torch.tensor([[4.0, 5, 24, 30], [30, 10, 50, 50], [70, 2, 120, 60]])
    masks = torch.zeros(3, 64, 128, dtype=torch.uint8)
    return [
        {"boxes": boxes, "labels": torch.tensor([1, 3, 2]), "masks": masks},
        {"boxes": boxes[:0], "labels": torch.zeros(0, dtype=torch.int64), "masks": masks[:0]},
    ]


def stages(samples: int) -> tuple[Proposals, RegionProposalNetwork]:
    """Ours and torchvision's, with the same weights."""
    torch.manual_seed(0)
    head = RPNHead(CHANNELS, 3)
    for layer in (head.cls_logits, head.bbox_pred):
        nn.init.normal_(layer.weight, std=0.3)
    shapes = ((16,), (28,), (48,)), ((0.5, 1.0, 2.0),) * 3
    numbers = (head, 0.7, 0.3, samples, 0.5, {"training": 200, "testing": 100}, {"training": 60, "testing": 40}, 0.7)
    return Proposals(Anchors(*shapes), *numbers), RegionProposalNetwork(AnchorGenerator(*shapes), *numbers)


@pytest.mark.parametrize("forced", [False, True])
def test_matching_is_torchvisions(forced: bool) -> None:
    torch.manual_seed(0)
    overlaps = (torch.rand(5, 300) ** 2 * 20).round() / 20  # many ties
    overlaps[4] *= 0.2  # an object that only a weak overlap can get
    for low, high in ((0.3, 0.7), (0.5, 0.5)):
        expected = Matcher(high, low, allow_low_quality_matches=forced)(overlaps)
        assert {-1} < set(expected.tolist())
        assert torch.equal(matched(overlaps, low, high, forced), expected)


def test_a_draw_is_of_fixed_size_and_even() -> None:
    torch.manual_seed(0)
    labels = torch.zeros(4, 40, dtype=torch.int64)
    labels[0, :20] = torch.arange(1, 21)  # more things than their share
    labels[1, 5] = 7  # a single one
    labels[2] = -1
    labels[2, 30:] = 0  # too few that may be drawn
    labels[3] = 2  # things alone
    places, filled = drawn(labels.repeat(2000, 1), 16, 0.25)
    assert places.shape == filled.shape == (8000, 16)
    chosen = torch.zeros(8000, 40).scatter_add(1, places, filled.float())
    assert float(chosen.max()) == 1, "none twice"
    assert filled.view(2000, 4, 16).sum(2).unique(dim=0).tolist() == [[16, 16, 10, 4]]
    of_things = (labels.repeat(2000, 1).gather(1, places) > 0) & filled
    assert torch.equal(of_things, of_things.sort(dim=1, descending=True).values), "things stand first"
    share = chosen.view(2000, 4, 40).mean(0)
    # Every one as often as every other: four deviations of a mean of 2,000 draws are at most 0.045.
    for part, expected in (
        (share[0, :20], 4 / 20), (share[0, 20:], 12 / 20), (share[1, 5], 1.0), (share[2, :30], 0.0), (share[3], 4 / 40),
    ):  # fmt: skip
        torch.testing.assert_close(part, torch.full_like(part, expected), atol=0.045, rtol=0)


def test_pooling_is_torchvisions() -> None:
    maps = features()
    boxes = torch.rand(2, 30, 4) * 60
    boxes[..., 2:] += boxes[..., :2]
    boxes[:, :10, 2:] = boxes[:, :10, :2] + 300  # large ones, of the coarsest level
    expected = MultiScaleRoIAlign(list(maps), 5, 2)(maps, list(boxes), [(64, 128), (64, 128)])
    found = pooled(list(maps.values()), numbered(list(boxes)), 64, 5, 2)
    assert torch.equal(found, expected)
    assert pooled(list(maps.values()), numbered([boxes[0, :0]]), 64, 5, 2).shape == (0, CHANNELS, 5, 5)


def test_proposals_are_torchvisions() -> None:
    ours, theirs = (stage.eval() for stage in stages(64))
    # The second picture is smaller than the batch: anchors beyond its edge have no area.
    batch = ImageList(torch.zeros(2, 3, 64, 128), [(64, 128), (40, 90)])
    found, none = ours(batch, features())
    expected, _ = theirs(batch, features())
    assert none == {}
    for one, two in zip(found, expected, strict=True):
        assert len(one) > 20
        torch.testing.assert_close(one, two)


def test_on_a_gpu_suppression_is_one_call_and_proposals_are_filled_up() -> None:
    ours, theirs = stages(64)
    batch = ImageList(torch.zeros(2, 3, 64, 128), [(64, 128), (40, 90)])
    theirs._pre_nms_top_n = {"testing": 200}
    theirs._post_nms_top_n = ours._post_nms_top_n = {"training": ALL, "testing": ALL}
    expected, _ = theirs.eval()(batch, features())
    with pretended_gpu() as gpu:
        there = {name: level.cuda() for name, level in features().items()}
        ours.cuda()(ImageList(batch.tensors.cuda(), batch.image_sizes), there)
        before = gpu.totals()["syncs"]
        found, _ = ours.train()(ImageList(batch.tensors.cuda(), batch.image_sizes), there)
        assert gpu.totals()["syncs"] - before == 2, "the picture's copy and suppression"
        found = [part.cpu() for part in found]
    assert len({part.shape for part in found}) == 1
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one[: len(two)], two)
        assert len(two) < len(one)
        assert not one[len(two) :].any(), "fillers have no area"


def test_suppression_on_a_gpu_is_exact_where_boxes_nearly_tie() -> None:
    """Pairs whose overlap is at the threshold, to a part in a million: as each pair alone in 64 bits."""
    torch.manual_seed(0)
    corner, sides = torch.rand(2, 200, 2) * 1000, torch.rand(2, 200, 2) * 90 + 10
    one = torch.cat([corner, corner + sides], 2)
    two = one.clone()
    two[..., 2] = one[..., 0] + sides[..., 0] * 0.7 * (1 + (torch.rand(2, 200) - 0.5) * 2e-6)
    boxes, scores = torch.cat([one, two], 1), torch.tensor([0.9, 0.5]).repeat_interleave(200).expand(2, -1)
    pairs = torch.stack([one, two], 2).flatten(0, 1).double()  # (400, 2, 4)
    apart = torch.stack([box_iou(pair[:1], pair[1:])[0, 0] <= 0.7 for pair in pairs]).view(2, 200)
    assert 50 < int(apart.sum()) < 350
    with pretended_gpu():
        groups = torch.arange(200).repeat(2, 2).cuda()
        kept = surviving(boxes.cuda(), scores.cuda(), groups, 0.7).cpu()
    assert bool(kept[:, :200].all())
    assert torch.equal(kept[:, 200:], apart)


def test_losses_of_proposals_are_torchvisions_if_all_anchors_are_drawn() -> None:
    ours, theirs = (stage.train() for stage in stages(ALL))
    batch = ImageList(torch.zeros(2, 3, 64, 128), [(64, 128), (64, 128)])
    _, losses = ours(batch, features(), objects())
    _, expected = theirs(batch, features(), objects())
    gradients = {}
    for name, stage, value in (("ours", ours, losses), ("theirs", theirs, expected)):
        stage.head.zero_grad()
        sum(value.values()).backward()
        gradients[name] = [parameter.grad.clone() for parameter in stage.head.parameters()]
    near = {"rtol": 1e-4, "atol": 1e-8}
    torch.testing.assert_close(losses["objectness"], expected["loss_objectness"], **near)
    torch.testing.assert_close(losses["proposal_box"], expected["loss_rpn_box_reg"], **near)
    torch.testing.assert_close(gradients["ours"], gradients["theirs"], **near)


@pytest.mark.parametrize("official", [0, 4])
def test_losses_of_regions_are_torchvisions_if_all_are_drawn(official: int) -> None:
    """With one box for all classes, and with one for each and another beta, as in the published code."""
    torch.manual_seed(0)
    beta = 1.0 if official else 1 / 9
    head = SemanticBoxHead(CHANNELS * 25, 16, D, decoder=True, official=official)
    torch.nn.init.normal_(head.box.bias)
    regions = ZeroShotRegions(("0", "1", "2"), head, None, Sampling(ALL, 1.0), (5, 7), 1, beta)
    classes = torch.randn(4, D)
    near = [target["boxes"] + torch.tensor([[2.0, 1, 3, -2]]) for target in objects()]
    far = torch.rand(2, 25, 4) * 50
    far[..., 2:] += far[..., :2] + 5
    proposals = [torch.cat(pair) for pair in zip(near, far, strict=True)]
    found = regions.losses(features(), proposals, 64, objects(), classes)
    pool = MultiScaleRoIAlign(["0", "1", "2"], 5, 1)
    theirs = RoIHeads(pool, head, nn.Identity(), 0.5, 0.5, ALL, 1.0, BOX_WEIGHTS, 0.05, 0.5, 100)
    boxes, _, labels, shifts = theirs.select_training_samples(list(proposals), objects())
    assert [int((part > 0).sum()) >= 6 for part in labels] == [True, False], "objects, and what lies near them"
    vectors, moves, seen = head(pool(features(), boxes, [(64, 128)] * 2))
    label = torch.cat(labels)
    things = label > 0
    moves = moves[things, label[things] if official else 0]
    off = F.smooth_l1_loss(moves, torch.cat(shifts)[things], beta=beta, reduction="sum")
    torch.testing.assert_close(found["classes"], F.cross_entropy(vectors @ classes.T, label))
    torch.testing.assert_close(found["box"], off / len(label))
    torch.testing.assert_close(found["box_reconstruction"], F.mse_loss(head.decoder(vectors), seen))


def test_regions_that_are_drawn_are_what_they_are_called() -> None:
    head = SemanticBoxHead(CHANNELS * 25, 16, D, decoder=False)
    stage = ZeroShotRegions(("0", "1", "2"), head, None, Sampling(8, 0.5), (5, 7), 1)
    (target, empty), proposals = objects(), torch.rand(2, 40, 4) * 40
    proposals[..., 2:] += proposals[..., :2] + 5
    regions = stage._drawn(list(proposals), [target, empty])
    for slot in range(8):
        overlaps = box_iou(target["boxes"], regions.boxes[0, slot][None])[:, 0]
        label = int(regions.labels[0, slot])
        assert (label > 0) == bool(overlaps.max() >= 0.5)
        if label:
            assert label == int(target["labels"][overlaps.argmax()])
            assert torch.equal(regions.wanted[0, slot], target["boxes"][overlaps.argmax()])
    assert int((regions.labels[0] > 0).sum()) >= 3, "an object's own box is a region too"
    assert int(regions.labels[1].sum()) == 0


def test_fillers_are_never_drawn() -> None:
    stage = ZeroShotRegions(
        ("0",), SemanticBoxHead(CHANNELS, 16, D, decoder=False), None, Sampling(ALL, 1.0), (5, 7), 1
    )
    proposals = list(torch.rand(2, 10, 4) * 40 + torch.tensor([0.0, 0, 45, 45]))
    for fillers in (0, 5):
        regions = stage._drawn([F.pad(part, (0, 0, 0, fillers)) for part in proposals], objects())
        assert regions.filled.sum(1).tolist() == [13, 10]
        assert bool((regions.boxes[regions.filled] > 0).any(1).all())


def autocast(run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """What a function gives in 32 bits and under bfloat16's autocast."""
    with torch.autocast("cpu", torch.bfloat16):
        half = run()
    return run(), half


def test_boxes_are_exact_under_autocast() -> None:
    """A picture 2,048 pixels wide: in bfloat16 its right half knows only every eighth pixel."""
    ours, _ = stages(64)
    ours.eval().nms_thresh = 1.0  # all that are there
    ours._pre_nms_top_n["testing"] = ours._post_nms_top_n["testing"] = ALL
    batch = ImageList(torch.zeros(2, 3, 16, 2048), [(16, 2048)] * 2)

    def proposals() -> torch.Tensor:
        with torch.no_grad():
            return ours(batch, features((8, 16), 16, 2048) | {"2": torch.randn(2, CHANNELS, 1, 32)})[0][0]

    full, half = autocast(proposals)
    assert half.dtype == torch.float32
    right = full[full[:, 0] > 1024]
    assert len(right) > 200
    assert float(box_iou(right, half).max(1).values.min()) > 0.9
