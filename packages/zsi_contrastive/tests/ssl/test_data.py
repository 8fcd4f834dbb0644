"""Random views against torchvision's, picture by picture."""

import math

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as V
from torchvision.transforms.v2 import RandomResizedCrop

from labs_common.data.classes import LabelledPictures
from zsi_contrastive.ssl import data
from zsi_contrastive.ssl.config import ViewOptions

FULL = data.Recipe(32, (0.08, 1.0), ViewOptions(flip=0.5, jitter=0.8, saturation=0.8, grey=0.2), 0.5, 0.2)


@pytest.fixture
def pictures() -> torch.Tensor:
    smooth = torch.rand(6, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    return (torch.nn.functional.interpolate(smooth, (40, 40), mode="bicubic").clamp(0, 1) * 255).byte()


def chance(count: int, **given: float | bool) -> dict[str, torch.Tensor]:
    usual = {
        "left": 0.0,
        "top": 0.0,
        "width": 1.0,
        "height": 1.0,
        "mirrored": False,
        "brightness": 1.0,
        "contrast": 1.0,
        "saturation": 1.0,
        "hue": 0.0,
        "grey": False,
        "blurred": False,
        "sigma": 1.0,
        "solarized": False,
    }
    return {name: torch.full((count,), value) for name, value in (usual | given).items()}


def test_crops_are_torchvisions(pictures: torch.Tensor) -> None:
    top, left, height, width = 5, 8, 20, 30
    found = data.cropped(pictures, chance(6, left=left / 40, top=top / 40, width=width / 40, height=height / 40), 60)
    expected = V.resized_crop(pictures.float() / 255, top, left, height, width, [60, 60], antialias=False)
    inner = slice(3, -3)  # at the edge of a crop torchvision has no neighbours, and this the picture's own
    torch.testing.assert_close(found[..., inner, inner], expected[..., inner, inner], atol=1e-4, rtol=0)
    mirrored = data.cropped(
        pictures, chance(6, left=left / 40, top=top / 40, width=width / 40, height=height / 40, mirrored=True), 60
    )
    torch.testing.assert_close(mirrored, found.flip(3))
    whole = data.cropped(pictures, chance(6), 40)
    torch.testing.assert_close(whole, pictures.float() / 255, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "function"), [
    ("brightness", V.adjust_brightness), ("contrast", V.adjust_contrast), ("saturation", V.adjust_saturation)])  # fmt: skip
@pytest.mark.parametrize("factor", [0.3, 1.6])
def test_colours_are_torchvisions(pictures: torch.Tensor, name: str, function, factor: float) -> None:
    levels = pictures.float() / 255
    found = data.recoloured(levels, chance(6, **{name: factor}))
    torch.testing.assert_close(found, function(levels, factor), atol=2e-3, rtol=0)


def test_grey_solarize_and_blur_are_torchvisions(pictures: torch.Tensor) -> None:
    levels = pictures.float() / 255
    torch.testing.assert_close(
        data.recoloured(levels, chance(6, grey=True)), V.rgb_to_grayscale(levels, 3), atol=2e-3, rtol=0
    )
    torch.testing.assert_close(
        data.recoloured(levels, chance(6, solarized=True)), V.solarize(levels, 0.5), atol=2e-3, rtol=0
    )
    blurred = data.recoloured(levels, chance(6, blurred=True, sigma=1.3))
    torch.testing.assert_close(blurred, V.gaussian_blur(levels, [5, 5], [1.3, 1.3]), atol=2e-3, rtol=0)
    one = chance(6) | {"blurred": torch.arange(6) == 2, "sigma": torch.linspace(0.2, 2, 6)}
    found = data.recoloured(levels, one)
    torch.testing.assert_close(found[[0, 1, 3]], levels[[0, 1, 3]], atol=2e-3, rtol=0)
    assert not torch.allclose(found[2], levels[2], atol=1e-2)


def test_hues_turn_and_luminance_stays() -> None:
    angles = torch.tensor([0.0, 2 * math.pi, 1.0])
    turns = data.hue_rotations(angles)
    torch.testing.assert_close(turns[:2], torch.eye(3).expand(2, 3, 3), atol=1e-5, rtol=0)
    colour = torch.tensor([0.6, 0.3, 0.4])
    luminance = torch.tensor(data.LUMINANCE)
    assert float(luminance @ (turns[2] @ colour)) == pytest.approx(float(luminance @ colour), abs=1e-3)
    assert not torch.allclose(turns[2] @ colour, colour, atol=0.05)
    back = data.hue_rotations(-angles)[2] @ turns[2]
    torch.testing.assert_close(back, torch.eye(3), atol=1e-5, rtol=0)


@pytest.mark.parametrize("aspect", [1.0, 2.0])
def test_crops_are_sampled_as_torchvision_samples_them(aspect: float) -> None:
    count = 4000
    found = data.sample(FULL, torch.full((count,), aspect), torch.Generator().manual_seed(0))
    crop = RandomResizedCrop(32, scale=(0.08, 1.0))
    canvas = torch.zeros(3, 500, round(500 * aspect))
    torch.manual_seed(0)
    theirs = torch.tensor(
        [[p["width"], p["height"], p["left"]] for p in (crop.make_params([canvas]) for _ in range(count))]
    )
    theirs = theirs / torch.tensor([500 * aspect, 500, 500 * aspect])
    ours = torch.stack([found["width"], found["height"], found["left"]], 1)
    torch.testing.assert_close(ours.mean(0), theirs.mean(0), atol=0.015, rtol=0)
    torch.testing.assert_close(ours.std(0), theirs.std(0), atol=0.015, rtol=0)
    assert bool((found["left"] + found["width"] <= 1 + 1e-6).all())
    assert float(found["grey"].float().mean()) == pytest.approx(0.2, abs=0.03)


def test_a_process_has_its_part_of_what_one_would_have(pictures: torch.Tensor) -> None:
    aspects = torch.ones(6)
    whole = data.views_of(pictures, aspects, [FULL, FULL], 3, 17, slice(0, 6))
    part = data.views_of(pictures[2:4], aspects, [FULL, FULL], 3, 17, slice(2, 4))
    for all_, own in zip(whole, part, strict=True):
        torch.testing.assert_close(own, all_[2:4])
    assert not torch.allclose(whole[0], whole[1])
    other = data.views_of(pictures, aspects, [FULL], 3, 18, slice(0, 6))
    assert not torch.allclose(other[0], whole[0])


def test_large_pictures_are_cropped_as_they_are(pictures: torch.Tensor) -> None:
    """As torchvision crops them, antialiased; from copies that were shrunk first, fine stripes would be gone."""
    large = torch.nn.functional.interpolate(pictures.float(), (90, 180), mode="bicubic").clamp(0, 255).byte()
    large[..., ::2, :] //= 4
    levels = [picture.permute(1, 2, 0).numpy() for picture in large]
    split = LabelledPictures(
        source="it", contents=levels, names=tuple("abcdef"), classes=("x",), labels=np.zeros(6, int)
    )
    pixels = data.Pixels(split, 24, torch.device("cpu"), False)
    plain = data.Recipe(24, (0.05, 0.1), ViewOptions(jitter=0.0, grey=0.0), 0.0, 0.0)
    found, sampled = [], data.sampled_views([plain, plain], pixels.aspects, 3, 5)
    for own in (slice(0, 2), slice(2, 6)):  # of two processes
        crops = pixels.to_crop(torch.arange(6)[own], [plain, plain], pixels.aspects, 3, 5, own)
        found.append(data.views_of(crops, pixels.aspects, [plain, plain], 3, 5, own))
    for view, of_view in zip([torch.cat(parts) for parts in zip(*found, strict=True)], sampled, strict=True):
        for place, image in enumerate(large):
            left, top, width, height = (float(of_view[name][place]) for name in ("left", "top", "width", "height"))
            box = [round(top * 90), round(left * 180), round(height * 90), round(width * 180)]
            expected = V.resized_crop(image, *box, [24, 24], antialias=True)
            if of_view["mirrored"][place]:
                expected = expected.flip(2)
            pixel = data.pixels_of(view[place : place + 1])[0].permute(2, 0, 1)
            # Whole pixels in torchvision, parts of them here: alike in the deviation that the stripes make.
            assert float(pixel.float().std()) == pytest.approx(float(expected.float().std()), rel=0.2)
            assert float((pixel.float() - expected.float()).abs().mean()) < 25
    copies = data.views_of(pixels.batch(torch.arange(6)), pixels.aspects, [plain], 3, 5, slice(0, 6))[0]
    stripes = [view.diff(dim=2).abs().mean() for view in (copies, torch.cat([parts[0] for parts in found]))]
    assert stripes[0] < 0.5 * stripes[1]


def test_large_pictures_after_a_small_one_keep_their_pixels() -> None:
    levels = [np.full((side, side, 3), side, dtype=np.uint8) for side in (16, 90, 24)]
    split = LabelledPictures(source="it", contents=levels, names=tuple("abc"), classes=("x",), labels=np.zeros(3, int))
    pixels = data.Pixels(split, 24, torch.device("cpu"), False)
    kept = pixels.batch(torch.arange(3))
    assert kept.shape == (3, 3, 27, 27), "8/7 of a view"
    assert kept[:, 0, 13, 13].tolist() == [16, 90, 24]
    plain = data.Recipe(24, (0.05, 0.1), ViewOptions(), 0.0, 0.0)
    crops = pixels.to_crop(torch.arange(3), [plain], pixels.aspects, 0, 0, slice(0, 3))
    assert isinstance(crops, list), "of the pictures themselves"


def test_features_are_taken_from_the_middle_square() -> None:
    wide = torch.zeros(1, 3, 10, 10, dtype=torch.uint8)
    wide[..., 3:7] = 255  # squeezed from 25 × 10: the middle ten columns are these four
    found = data.middle_square(wide, torch.tensor([2.5]), 10)
    torch.testing.assert_close(data.pixels_of(found)[..., 1:-1, :], torch.full((1, 10, 8, 3), 255, dtype=torch.uint8))
