"""The whole detector: its parts on and off, other words, odd pictures, backbones."""

from pathlib import Path

import pytest
import torch
from labs_testing.pretended import pretended_gpu
from safetensors.torch import save_file
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes
from torchvision.ops import batched_nms, box_iou

from labs_common.errors import LabError
from zsi_contrastive.detector.backbone import make_backbone
from zsi_contrastive.detector.contrastive import CONTRASTIVE
from zsi_contrastive.detector.heads import Samples, direct
from zsi_contrastive.detector.model import MEAN, STD, Parts, Sizes, ZeroShotMaskRCNN, scaled
from zsi_contrastive.detector.regions import Detections, Query, Sampling

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


def samples(*objects: int) -> Samples:
    """Pictures with so many objects."""
    pictures, targets = zip(*map(sample, objects), strict=True)
    return Samples(list(pictures), list(targets))


BASE = {"objectness", "proposal_box", "classes", "box"}


@pytest.mark.parametrize(
    ("parts", "losses"),
    [
        (Parts(False, False, False, False, False), BASE),
        (Parts(True, False, False, False, False), BASE | {"mask"}),
        (Parts(True, True, False, False, False), BASE | {"mask", "box_reconstruction"}),
        (Parts(True, False, True, False, False), BASE | {"mask", "mask_reconstruction"}),
        (Parts(True, True, True, True, False), BASE | {"mask", "box_reconstruction", "mask_reconstruction"}),
        (Parts(official=True), BASE | {"mask", "box_reconstruction", "mask_reconstruction"}),
        (Parts(), BASE | {"mask", "box_reconstruction", "mask_reconstruction"}),
    ],
)
def test_each_part_can_be_switched_off(parts: Parts, losses: set[str]) -> None:
    model = make(parts).train()
    found = model(samples(2, 1))
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
    found = model(samples(2, 1))
    assert set(CONTRASTIVE) < set(found)
    sum(found.values()).backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert any(name.startswith("greedy.isolated.") for name in model.state_dict()), "as finished runs have it"
    model.eval().detect([sample(1)[0]], [Query(model.seen, (4,))])
    assert Parts.from_plain(parts.plain()) == parts
    assert Parts.from_plain({"mask_head": False, "greedy_infomax": True}).contrastive == ("greedy_infomax",)
    assert Parts.from_plain({"decoders": False}) == Parts(box_decoder=False, mask_decoder=False), "as saved before"


def test_the_detectors_loss_trains_the_background_only_if_synchronised() -> None:
    for parts in (Parts(sync_background=False), Parts(), Parts(official=True)):
        model = make(parts).train()
        found = model(samples(2, 1))
        found["classes"].backward()
        grad = model.rpn.head.background.grad
        assert (grad is not None and bool(grad.abs().sum() > 0)) == (parts == Parts()), "the published code copies it"
        assert torch.equal(model.classes()[0], model.rpn.head.background_vector()) == parts.sync_background
        model.rpn.head.background.data += 1
        assert torch.equal(model.classes()[0], model.rpn.head.background_vector()) == parts.sync_background


def test_cosines_know_directions_alone_and_learn_their_temperature() -> None:
    model = make(Parts(cosine=True))
    scale = model.regions.logit_scale
    assert float(scale.detach().exp()) == pytest.approx(1 / 0.07)
    vectors, classes = torch.randn(3, D), torch.randn(4, D)
    found = model.regions.logits(vectors, classes)
    expected = torch.cosine_similarity(vectors[:, None], classes[None], dim=2) / 0.07
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(model.regions.logits(3 * vectors, 5 * classes), expected)
    model.losses(samples(2))["classes"].backward()
    assert float(scale.grad.abs()) > 0
    with torch.no_grad():
        scale += 100
    assert float(model.regions.logits(vectors, vectors).detach().max()) == pytest.approx(100), "as in CLIP"
    assert model.parts == Parts.from_plain(model.parts.plain())


def test_rivals_take_their_share() -> None:
    """Of a group's softmax: a class scores the same whether its rivals are looked for or not."""
    background, asked = torch.randn(5, 1), torch.randn(5, 6)
    whole = direct(background, asked, (4, 2), 2.0)
    rivals = [asked[:, 1:4], asked[:, 5:]]
    torch.testing.assert_close(direct(background, asked[:, [0, 4]], (1, 1), 2.0, rivals), whole[:, [0, 4]])


def test_pictures_without_objects() -> None:
    model = make().train()
    found = model(samples(0, 0))
    assert all(bool(value.isfinite()) for value in found.values())
    sum(found.values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad), "processes stay in step"


def test_a_model_scores_words_that_it_was_never_given() -> None:
    model = make().eval()
    model.regions.keep(0.05, 0.5, 10)
    pictures = [sample(1)[0], torch.rand(3, 40, 40)]
    vectors = torch.randn(11, D)
    queries = [
        Query(model.seen, (4,)),
        Query(vectors, (4, 7)),
    ]
    proposed: list[torch.Tensor] = []
    hook = model.rpn.register_forward_hook(lambda _, given, answer: proposed.extend(answer[0]))
    one, proposals, two = model.detect(pictures, [queries[0], Query(vectors[:0], ()), queries[1]])
    hook.remove()
    for found, boxes, picture in zip(proposals, proposed, pictures, strict=True):
        size = model.transform.resize(picture)[0].shape[-2:]
        torch.testing.assert_close(found.boxes, resize_boxes(boxes, tuple(size), tuple(picture.shape[-2:])))
        assert (found.masks, len(found.scores), len(found.classes)) == (None, len(boxes), len(boxes))
    assert all(int(found.classes.max()) < 4 for found in one)
    for found, picture in zip(two, pictures, strict=True):
        first = int((found.classes < 4).sum())
        assert first <= 10
        assert len(found.classes) - first <= 10
        assert found.masks.shape == (len(found.boxes), 14, 14)
        assert float(found.boxes[:, 2].max()) <= picture.shape[2] + 1e-3
    # Classes do not know of each other: a list with more of them gives the same scores, in its own order.
    (alone,) = model.detect(pictures, [Query(vectors[:4], (4,))])
    for found, whole in zip(alone, two, strict=True):
        first = whole.classes < 4
        torch.testing.assert_close(found.scores, whole.scores[first])
        torch.testing.assert_close(found.boxes, whole.boxes[first])
    other = make()
    other.load_state_dict(model.state_dict())
    assert not any(tensor.shape[:1] == (11,) for tensor in other.state_dict().values()), "no class count is baked in"


@pytest.mark.parametrize(("groups", "numbers"), [((4, 3), [1, 3, 1, 2, 2, 1, 2]), ((7,), [1, 3, 1, 2, 2, 3, 4])])
def test_a_known_class_has_its_own_box_and_others_have_them_in_turn(
    groups: tuple[int, ...], numbers: list[int]
) -> None:
    """Official boxes: each class moves a proposal by a tenth of its width, times its number."""
    model = make(Parts(official=True)).eval()
    model.regions.keep(-100.0, 1.0, 1000)
    torch.nn.init.zeros_(model.regions.box_head.box.weight)
    model.regions.box_head.box.bias.data = torch.tensor([[1.0 * n, 0, 0, 0] for n in range(5)]).flatten()
    boxes = torch.tensor([[4.0, 4, 14, 14], [10, 20, 30, 30]])
    asked = torch.randn(7, D)
    asked[[1, 2, 4]] = model.seen[[2, 0, 1]]
    query = Query(asked, groups, masks=False)
    with torch.no_grad():
        levels = model.backbone(torch.rand(1, 3, 48, 64))
        ((found,),) = model.regions.detections(
            levels, [boxes], 48, [(48, 64)], model.classes(), model.background.word, [query]
        )
    rows = {
        (int(label), round(float(box[1]))): float(box[0]) for box, label in zip(found.boxes, found.classes, strict=True)
    }
    assert len(rows) == len(found.boxes) == 14
    for (label, top), left in rows.items():
        box = boxes[int(top == 20)]
        assert left == pytest.approx(float(box[0] + 0.1 * numbers[label] * (box[2] - box[0])), abs=1e-4)


def test_the_best_that_survive_are_those_of_all_candidates() -> None:
    """80 regions around each of five things, of 20 classes: of the best 2,000 of 8,000 too few survive."""
    torch.manual_seed(0)
    regions = make().regions
    regions.keep(0.05, 0.5, 60)
    corners = torch.rand(2, 5, 1, 2) * 500
    boxes = (corners + torch.randn(2, 5, 80, 2) * 4).flatten(1, 2)
    boxes = torch.cat([boxes, boxes + 60], 2)
    boxes[1, :40] += torch.rand(40, 1) * 900  # the second picture needs fewer
    scores = 1 - 0.03 * torch.arange(20) - 0.01 * torch.rand(2, 400, 20)
    found = regions._kept(boxes[:, :, None], scores, None, 7, [8000, 8000])
    enough = []
    for (box, score, label), all_boxes, all_scores in zip(found, boxes, scores, strict=True):
        row, column = torch.arange(8000) // 20, torch.arange(8000) % 20
        keep = batched_nms(all_boxes[row], all_scores.flatten(), column, 0.5)[:60]
        assert len(keep) == 60
        assert torch.equal(box, all_boxes[row[keep]])
        assert torch.equal(score, all_scores.flatten()[keep])
        assert torch.equal(label, 7 + column[keep])
        enough.append(bool(score[-1] >= all_scores.flatten().topk(2000).values[-1]))
    assert enough == [False, True], "the first picture needs more than 2,000"


@pytest.mark.parametrize("transfer", ["code", "direct", "things"])
def test_transfer_is_of_boxes_and_masks(transfer: str) -> None:
    model = make().eval()
    model.regions.keep(-100.0, 1.0, 1000)
    asked = torch.cat([model.seen[:2], torch.randn(3, D)])
    levels, boxes = model.backbone(torch.rand(1, 3, 48, 64)), torch.tensor([[4.0, 4, 14, 14]])
    with torch.no_grad():
        ((found,),) = model.regions.detections(
            levels, [boxes], 48, [(48, 64)], model.classes(), model.background.word,
            [Query(asked, (2, 3), transfer=transfer)],
        )  # fmt: skip
        vectors, _, _ = model.regions.box_head(model.regions._pooled(levels, [boxes], 48, 0))
        pixels, _ = model.regions.semantic_masks(model.regions._pooled(levels, [found.boxes], 48, 1))
    known, own = model.classes(), torch.cat([model.background.word[None], model.seen])
    share = (vectors[0] @ known.T).softmax(0).detach()
    for place, label in enumerate(found.classes.tolist()):
        one, group = asked[label], asked[:2] if label < 2 else asked[2:]
        score, mask = {
            "code": (share @ known @ one, one if label < 2 else own.T @ (own @ one)),
            "direct": ((vectors[0] @ one).exp() / (vectors[0] @ torch.cat([known[:1], group]).T).exp().sum(), one),
            "things": ((1 - share[0]) * (share[1:] / share[1:].sum()) @ known[1:] @ one, one),
        }[transfer]
        assert float(found.scores[place]) == pytest.approx(float(score), abs=1e-5)
        expected = torch.einsum("dhw,d->hw", pixels[place], mask).sigmoid()
        torch.testing.assert_close(found.masks[place], expected, rtol=1e-3, atol=1e-4)


def test_a_gpu_finds_the_same_and_is_waited_for_a_few_times() -> None:
    model = make().eval()
    model.regions.keep(0.05, 0.5, 10)
    pictures = [sample(1)[0], torch.rand(3, 40, 40), torch.rand(3, 48, 48)]
    queries = [Query(model.seen, (3, 1)), Query(torch.randn(11, D), (4, 7))]
    expected = model.detect(pictures, queries)
    with pretended_gpu() as gpu:
        model, pictures = model.cuda(), [picture.cuda() for picture in pictures]
        queries = [query.to(pictures[0].device) for query in queries]
        model.detect(pictures, queries)  # constants are sent once
        before = gpu.totals()["syncs"]
        found = model.detect(pictures, queries)
        # Proposals, their levels and candidates (4); each of 4 groups twice; each query's masks by level.
        assert gpu.totals()["syncs"] - before <= 4 + 4 * 2 + 2
        found = [[Detections(*(part.cpu() for part in one)) for one in of_query] for of_query in found]
    for of_query, others in zip(found, expected, strict=True):
        for one, other in zip(of_query, others, strict=True):
            assert len(other.boxes) > 5
            torch.testing.assert_close(one, other)
    model.regions.keep(2.0, 0.5, 10)
    with pretended_gpu():
        assert all(len(one.boxes) == 0 for of_query in model.cuda().detect(pictures, queries) for one in of_query)


def test_half_precision() -> None:
    model = make().train()
    with torch.autocast("cpu", torch.bfloat16):
        found = model(samples(2, 1))
    full = make().train()(samples(2, 1))
    assert found.keys() == full.keys()
    assert all(bool(value.isfinite()) for value in found.values())


def test_detections_under_autocast_are_those_of_32_bits() -> None:
    """Of the same proposals, in a picture 1,600 pixels wide, where bfloat16 knows only every eighth pixel."""
    model = make().eval()
    model.regions.keep(-10.0, 1.0, 1000)  # all that are proposed: nothing depends on an order that may differ
    torch.manual_seed(1)
    boxes = torch.rand(40, 4) * torch.tensor([1500.0, 30, 90, 15])
    boxes[:, 2:] += boxes[:, :2] + 4
    pictures = torch.rand(1, 3, 48, 1600)
    query = Query(torch.nn.functional.normalize(torch.randn(1, D), dim=1), (1,), masks=True)

    def detected() -> Detections:
        with torch.no_grad():
            levels = model.backbone(pictures)
            ((found,),) = model.regions.detections(
                levels, [boxes], 48, [(48, 1600)], model.classes(), model.background.word, [query]
            )
        return found

    full = detected()
    with torch.autocast("cpu", torch.bfloat16):
        half = detected()
    assert half.boxes.dtype == half.scores.dtype == half.masks.dtype == torch.float32
    overlaps = box_iou(full.boxes, half.boxes)
    same = overlaps.argmax(1)
    assert float(overlaps.max(1).values.min()) > 0.95
    torch.testing.assert_close(half.boxes[same], full.boxes, atol=1.0, rtol=0)
    torch.testing.assert_close(half.scores[same], full.scores, atol=0.02, rtol=0)
    torch.testing.assert_close(half.masks[same], full.masks, atol=0.02, rtol=0)
    assert float(full.scores.std()) > 1e-4


def test_losses_under_autocast_are_near_those_of_32_bits() -> None:
    """The same regions are drawn: but for those at a threshold, the proposals differ little."""
    found = []
    for half in (False, True):
        model = make().train()
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            found.append(model(samples(2, 1)))
    full, half = found
    for name, value in full.items():
        assert half[name].dtype == torch.float32
        assert float(half[name].detach()) == pytest.approx(float(value.detach()), rel=0.05, abs=0.02), name


def test_the_transform_is_torchvisions() -> None:
    """To the bit, for pictures that are made larger, smaller, and left as they are."""
    theirs = GeneralizedRCNNTransform(48, 64, MEAN, STD, 16)
    for height, width in ((48, 56), (30, 41), (97, 61)):
        picture = torch.rand(3, height, width)
        target = {"boxes": torch.rand(4, 4) * 30, "masks": torch.randint(0, 2, (4, height, width), dtype=torch.uint8)}
        batch, (found,) = make().transform([picture], [target])
        expected, (right,) = theirs([picture], [target])
        assert torch.equal(batch.tensors, expected.tensors)
        assert batch.image_sizes == expected.image_sizes
        assert all(torch.equal(found[name], right[name]) for name in ("boxes", "masks"))
        size, original = batch.image_sizes[0], (height, width)
        assert torch.equal(scaled(found["boxes"], size, original), resize_boxes(right["boxes"], size, original))


def test_a_strip_keeps_a_pixel() -> None:
    batch, _ = make().transform([torch.rand(3, 1, 3000), torch.rand(3, 3000, 1)])
    assert batch.image_sizes == [(1, 64), (64, 1)]


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
