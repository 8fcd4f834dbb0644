"""Contrastive heads in the detector, their options, and the pictures that it sees."""

import re
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F

from labs_common.errors import LabError
from zsi_contrastive.detector.backbone import make_backbone
from zsi_contrastive.detector.compare import plan
from zsi_contrastive.detector.config import AblateConfig, ModelOptions, TrainConfig
from zsi_contrastive.detector.contrastive import (
    TEMPERATURE,
    GreedyInfoMaxHead,
    PatchInfoNCEHead,
    _neighbours,
    patch_hadsell,
    patch_info_nce,
    thumbnails,
)
from zsi_contrastive.detector.defaults import check
from zsi_contrastive.detector.heads import Samples
from zsi_contrastive.detector.model import Parts, Sizes, ZeroShotMaskRCNN, sizes_of
from zsi_contrastive.detector.regions import Query, Sampling
from zsi_contrastive.networks import TINY_SIZES


def test_the_head_adds_nothing_at_first_and_takes_no_gradient_from_the_detector() -> None:
    torch.manual_seed(0)
    head = GreedyInfoMaxHead(8, TINY_SIZES)
    pictures = [torch.rand(3, 40, 50), torch.rand(3, 60, 30)]
    assert thumbnails(pictures).shape == (2, 3, 32, 32)
    levels = {"0": torch.randn(2, 8, 10, 12), "1": torch.randn(2, 8, 5, 6)}
    torch.manual_seed(1)
    _, joined = head(pictures, levels, [], (40, 48))
    torch.testing.assert_close(joined, levels)
    torch.nn.init.normal_(head.join.weight)
    loss, joined = head(pictures, levels, [], (40, 48))
    sum(level.square().sum() for level in joined.values()).backward()
    assert head.join.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in head.isolated.parameters())
    loss.backward()
    assert all(parameter.grad is not None for parameter in head.isolated.parameters())
    torch.testing.assert_close(head.eval().joined(pictures, levels), joined)


def test_patch_info_nce_is_its_double_loop() -> None:
    torch.manual_seed(0)
    queries, keys, others = torch.randn(5, 6), torch.randn(5, 6), torch.randn(3, 6)
    labels = torch.tensor([0, 1, 0, 2, 1])
    total = 0.0
    for one in range(5):

        def like(key: torch.Tensor, one: int = one) -> torch.Tensor:
            return (F.cosine_similarity(queries[one], key, dim=0) / TEMPERATURE).exp()

        right = like(keys[one])
        wrong = sum(like(keys[two]) for two in range(5) if labels[two] != labels[one]) + sum(map(like, others))
        total -= float((right / (right + wrong)).log())
    assert float(patch_info_nce(queries, keys, labels, others)) == pytest.approx(total / 5, rel=1e-4)


def test_patches_are_of_things_and_of_background() -> None:
    """A map that is one vector on each thing and another elsewhere has the loss of an answer that is right."""
    torch.manual_seed(0)
    head = PatchInfoNCEHead(3)
    head.embed = torch.nn.Identity()
    masks = torch.zeros(2, 32, 32)
    masks[0, 4:16, 4:16] = 1
    masks[1, 20:30, 20:30] = 1
    maps = torch.zeros(1, 3, 32, 32)
    maps[0, 0] = 1 - masks.sum(0)
    maps[0, 1:] = masks
    target = {"masks": masks, "labels": torch.tensor([1, 2])}
    apart = float(head.loss(maps, [target], (32, 32)))
    alike = float(head.loss(torch.ones(1, 3, 32, 32), [target], (32, 32)))
    assert apart < 0.5 < alike
    nothing = {"masks": masks[:0], "labels": torch.zeros(0, dtype=torch.int64)}
    assert float(head.loss(maps, [nothing], (32, 32))) == 0
    everywhere = {"masks": torch.ones(1, 32, 32), "labels": torch.tensor([1])}
    assert float(head.loss(maps, [everywhere], (32, 32))) == 0, "no background"


def test_hadsells_loss_on_patches_is_its_double_loop() -> None:
    torch.manual_seed(0)
    queries, keys, others = torch.randn(5, 6), torch.randn(5, 6), torch.randn(3, 6)
    labels = torch.tensor([0, 1, 0, 2, 1])
    total, pairs = 0.0, 0
    for one in range(5):
        unrelated = [keys[two] for two in range(5) if labels[two] != labels[one]] + list(others)
        for column, related in [(keys[one], True), *((column, False) for column in unrelated)]:
            distance = float((queries[one] / queries[one].norm() - column / column.norm()).norm())
            total += distance**2 if related else max(0.0, 1 - distance) ** 2
            pairs += 1
    assert float(patch_hadsell(queries, keys, labels, others)) == pytest.approx(total / pairs, rel=1e-4)


def test_neighbours_lie_a_patch_away_and_inside() -> None:
    torch.manual_seed(0)
    spots, other = _neighbours((40, 60), 500, 12, torch.device("cpu"))
    for rows in (spots, other):
        assert bool((rows >= 0).all() and (rows < torch.tensor([40, 60])).all())
    assert (spots - other).abs().amax(1).tolist() == [12] * 500
    assert len({tuple(way) for way in (spots - other).sign().tolist()}) == 8, "in all directions"
    spots, other = _neighbours((3, 60), 100, 12, torch.device("cpu"))  # too narrow
    assert int(other[:, 0].amax()) <= 2


D = 6
SIZES = Sizes(16, 8, 1, (8, 16, 24), 48, 64, 16, (40, 40, 20, 20), 16, (5, 7), 1, True)


def make(sizes: Sizes) -> ZeroShotMaskRCNN:
    """A small detector with a Greedy InfoMax head, of the same weights every time."""
    torch.manual_seed(0)
    vectors = F.normalize(torch.randn(5, D), dim=1)
    body = make_backbone("tiny", False, None, 0, 8)
    return ZeroShotMaskRCNN(body, vectors[0], vectors[1:], Parts(contrastive=("greedy_infomax",)), sizes, Sampling(16))


def sample() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A picture, and two things in it."""
    torch.manual_seed(2)
    boxes = torch.tensor([[4.0, 5, 24, 30], [10, 5, 30, 30]])
    masks = torch.zeros(2, 48, 56, dtype=torch.uint8)
    masks[0, 5:30, 4:24] = 1
    masks[1, 5:30, 10:30] = 1
    return torch.rand(3, 48, 56), {"boxes": boxes, "labels": torch.tensor([1, 2]), "masks": masks}


def patches(**options: object) -> PatchInfoNCEHead:
    torch.manual_seed(3)
    return PatchInfoNCEHead(4, ModelOptions(**options))  # type: ignore[arg-type]


def test_by_place_no_label_and_no_mask_is_looked_at() -> None:
    """Neighbours of a smooth map are easier to tell from the rest than those of noise."""
    head = patches(patches_by="place")
    head.embed = torch.nn.Identity()
    y, x = torch.meshgrid(torch.linspace(0, 3, 24), torch.linspace(0, 3, 24), indexing="ij")
    smooth = torch.stack([y.sin(), y.cos(), x.sin(), x.cos()])[None]
    found = {}
    for name, maps in (("smooth", smooth), ("noise", torch.randn(1, 4, 24, 24))):
        for masks, labels in ((torch.zeros(0, 96, 96), []), (torch.ones(2, 96, 96), [1, 2])):
            torch.manual_seed(0)
            target = {"masks": masks, "labels": torch.tensor(labels)}
            found[name, len(labels)] = float(head.loss(maps, [target], (96, 96)))
    assert found["smooth", 0] == found["smooth", 2]
    assert found["smooth", 0] < found["noise", 0] - 0.5


@pytest.mark.parametrize(
    "options",
    [{"patch_size": 5}, {"patches": 3}, {"patch_temperature": 0.5}, {"patch_loss": "hadsell"}, {"patches_by": "place"}],
    ids=str,
)
def test_every_option_changes_the_loss(options: dict[str, object]) -> None:
    maps, (_, target) = torch.randn(1, 4, 24, 28, generator=torch.Generator().manual_seed(0)), sample()
    losses = []
    for head in (patches(), patches(**options)):
        torch.manual_seed(0)
        losses.append(float(head.loss(maps, [target], (48, 56)).detach()))
    assert losses[0] != losses[1]


ROWS = "patch-place,patch-hadsell,patch-size,patch-number,patch-temperature,thumbnail,contrast,sharpness,none"


def changed(config: TrainConfig) -> set[str]:
    """The options of the network that a row has otherwise than the row `none`."""
    usual = vars(plan(AblateConfig(rows="none"))["none"].model)
    return {name for name, value in vars(config.model).items() if value != usual[name]}


def test_rows_of_ablate_change_one_option_each() -> None:
    rows = {name: changed(config) for name, config in plan(AblateConfig(rows=ROWS)).items()}
    heads = {"contrastive", "patch_infonce", "greedy_infomax"}
    assert {name: options - heads for name, options in rows.items()} == {
        "patch-place": {"patches_by"}, "patch-hadsell": {"patch_loss"}, "patch-size": {"patch_size"},
        "patch-number": {"patches"}, "patch-temperature": {"patch_temperature"}, "thumbnail": {"thumbnail"},
        "contrast": {"contrast"}, "sharpness": {"sharpness"}, "none": set(),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "said"),
    [(ModelOptions(thumbnail=33), "--thumbnail 33: must be a multiple of 8"),
     (ModelOptions(patch_size=4), "--patch-size 4: must be odd")],
    ids=["thumbnail", "patch size"],
)  # fmt: skip
def test_sizes_that_do_not_fit(options: ModelOptions, said: str) -> None:
    with pytest.raises(LabError, match=re.escape(said)):
        check(TrainConfig(model=options))


def test_pictures_are_seen_with_more_contrast_and_sharper_in_training_and_in_use() -> None:
    """By the formulas of Pillow's ImageEnhance, which torchvision's are after; and as loading a run has them."""
    config = TrainConfig(model=ModelOptions(contrast=1.5, sharpness=2.0, thumbnail=64, min_side=48, max_side=64))
    sizes = sizes_of(config)[0]
    assert (sizes.contrast, sizes.sharpness, sizes.thumbnail) == (1.5, 2.0, 64)
    again = Sizes(**asdict(sizes))
    plain = make(SIZES)
    model = make(replace(SIZES, contrast=again.contrast, sharpness=again.sharpness))
    assert make(replace(SIZES, thumbnail=64)).get_submodule("greedy").thumbnail == 64
    picture, target = sample()
    grey = (picture * torch.tensor([0.2989, 0.587, 0.114])[:, None, None]).sum(0).mean()
    contrast = (1.5 * picture - 0.5 * grey).clamp(0, 1)
    kernel = torch.ones(3, 1, 3, 3) / 13
    kernel[:, :, 1, 1] = 5 / 13
    blurred = contrast.clone()
    blurred[:, 1:-1, 1:-1] = F.conv2d(contrast[None], kernel, groups=3)[0]
    wanted = (2 * contrast - blurred).clamp(0, 1)
    (found,) = model.enhanced([picture])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert plain.enhanced([picture])[0] is picture
    for one in (model, plain):
        one.regions.keep(0.0, 0.5, 5)
    query = Query(model.seen, (4,), masks=False)
    of_model, of_plain = model.eval().detect([picture], [query]), plain.eval().detect([found], [query])
    torch.testing.assert_close(of_model[0][0].scores, of_plain[0][0].scores)
    losses = []
    for one, shown in ((model, picture), (plain, found)):
        torch.manual_seed(5)
        losses.append(one.train()(Samples([shown], [target])))
    torch.testing.assert_close(*losses)
