"""Random views of pictures, a whole batch at a time and on its device.

What is drawn by chance is drawn for the whole batch of all processes, from the seed and the step alone: a resumed run,
and one in more processes, sees the same views. Colours change as in SimCLR (Chen et al. 2020, appendix A), but in one
order, and hues are turned in YIQ, where that is a rotation.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from zsi_contrastive.ssl.config import PretrainConfig

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RATIO = (3 / 4, 4 / 3)
ATTEMPTS = 10  # at a crop that lies within the picture; then it is the whole
JITTERED = 0.8  # share of views
HUE = 0.2  # of a full turn, at strength 1
SIGMA = (0.1, 2.0)
LUMINANCE = (0.2989, 0.587, 0.114)
YIQ = ((0.2989, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))
Chance = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Recipe:
    """How one kind of view is made: its side in pixels, the share of the area that it shows, and how often what."""

    side: int
    scale: tuple[float, float]
    flip: float
    jitter: float
    grey: float
    blur: float
    solarize: float


def recipes_of(config: PretrainConfig) -> list[Recipe]:
    """The recipe of every view that a completed config's method takes of a picture, full ones first."""
    views = config.views
    rest = (views.flip, views.jitter, views.grey, views.blur, views.solarize)
    full = Recipe(config.encoder.side, views.crop_scale, *rest)
    small = Recipe(views.local_side, views.local_scale, *rest)
    count = 1 if config.method in ("gim", "cpc") else 2
    return [full] * count + [small] * views.local_crops


def drawn(recipe: Recipe, aspects: torch.Tensor, generator: torch.Generator) -> Chance:
    """What chance decides for a batch of pictures whose widths are `aspects` (n,) times their heights; on the CPU."""
    count = len(aspects)

    def uniform(low: float, high: float, *size: int) -> torch.Tensor:
        return torch.rand(*(size or (count,)), generator=generator) * (high - low) + low

    strength = recipe.jitter
    jittered = uniform(0, 1) < JITTERED * (strength > 0)
    factors = {
        name: torch.where(jittered, uniform(max(0.0, 1 - 0.8 * strength), 1 + 0.8 * strength), 1.0)
        for name in ("brightness", "contrast", "saturation")
    }
    turned = torch.where(jittered, uniform(-HUE * strength, HUE * strength), 0.0)
    area = uniform(*recipe.scale, ATTEMPTS, count)
    ratio = uniform(math.log(RATIO[0]), math.log(RATIO[1]), ATTEMPTS, count).exp()
    width, height = (area * ratio / aspects).sqrt(), (area / ratio * aspects).sqrt()  # shares of the picture's sides
    fits = (width <= 1) & (height <= 1)
    first = fits.int().argmax(0)
    width, height = (
        torch.where(fits.any(0), side.gather(0, first[None])[0], whole)
        for side, whole in ((width, (1 / aspects).clamp(max=1)), (height, aspects.clamp(max=1)))
    )
    return {
        "left": uniform(0, 1) * (1 - width),
        "top": uniform(0, 1) * (1 - height),
        "width": width,
        "height": height,
        "mirrored": uniform(0, 1) < recipe.flip,
        **factors,
        "hue": turned * 2 * math.pi,
        "grey": uniform(0, 1) < recipe.grey,
        "blurred": uniform(0, 1) < recipe.blur,
        "sigma": uniform(*SIGMA),
        "solarized": uniform(0, 1) < recipe.solarize,
    }


def views_of(
    pictures: torch.Tensor, aspects: torch.Tensor, recipes: Sequence[Recipe], seed: int, step: int, own: slice
) -> list[torch.Tensor]:
    """The views (own, 3, side, side) by each recipe, as networks read them.

    Args:
        pictures: this process's part of the step's batch (own, 3, s, s), levels from 0 to 255.
        aspects: width by height of every picture of the whole batch (n,), on the CPU.
        recipes: one for each view.
        seed: of the run.
        step: number of the optimizer step.
        own: which of the whole batch this process has.
    """
    generator = torch.Generator().manual_seed(((seed << 32) + step) % 2**63)
    found = []
    for recipe in recipes:
        chance = {name: values[own].to(pictures.device) for name, values in drawn(recipe, aspects, generator).items()}
        found.append(normalised(coloured(cropped(pictures, chance, recipe.side), chance)))
    return found


def cropped(pictures: torch.Tensor, chance: Chance, side: int) -> torch.Tensor:
    """The drawn part of each picture, `side` pixels wide and high, mirrored or not; in 0 to 1.

    Bilinear between pixels. Pictures are kept hardly larger than a view, so nothing is skipped by shrinking.
    """
    width, height = chance["width"], chance["height"]
    across = torch.where(chance["mirrored"], -width, width)
    zero = torch.zeros_like(width)
    theta = torch.stack([
        torch.stack([across, zero, 2 * chance["left"] + width - 1], 1),
        torch.stack([zero, height, 2 * chance["top"] + height - 1], 1),
    ], 1)  # fmt: skip
    grid = F.affine_grid(theta, [len(pictures), 3, side, side], align_corners=False)
    return F.grid_sample(pictures.float() / 255, grid, padding_mode="border", align_corners=False)


def coloured(pictures: torch.Tensor, chance: Chance) -> torch.Tensor:
    """Brightness, contrast, saturation and hue as drawn, then grey, blur and solarization where drawn; in 0 to 1."""
    weights = torch.tensor(LUMINANCE, device=pictures.device)[:, None, None]
    by = {name: values[:, None, None, None] for name, values in chance.items()}
    pictures = (pictures * by["brightness"]).clamp(0, 1)
    mean = (pictures * weights).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    pictures = (mean + (pictures - mean) * by["contrast"]).clamp(0, 1)
    luminance = (pictures * weights).sum(1, keepdim=True)
    pictures = (luminance + (pictures - luminance) * by["saturation"]).clamp(0, 1)
    pictures = torch.einsum("nij,njhw->nihw", hue_turns(chance["hue"]), pictures).clamp(0, 1)
    pictures = torch.where(by["grey"], (pictures * weights).sum(1, keepdim=True), pictures)
    if bool(chance["blurred"].any()):
        pictures = torch.where(by["blurred"], blurred(pictures, chance["sigma"]), pictures)
    return torch.where(by["solarized"] & (pictures >= 0.5), 1 - pictures, pictures)


def hue_turns(angles: torch.Tensor) -> torch.Tensor:
    """What turns the hues of RGB by `angles` (n,), in radians, and leaves the luminance (n, 3, 3)."""
    to = torch.tensor(YIQ, dtype=torch.float64)
    one, zero = torch.ones_like(angles), torch.zeros_like(angles)
    cos, sin = angles.cos(), angles.sin()
    turn = torch.stack([one, zero, zero, zero, cos, -sin, zero, sin, cos], 1).view(-1, 3, 3)
    back, there = to.inverse().to(turn), to.to(turn)
    return back @ turn @ there


def blurred(pictures: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """Each picture under a Gaussian of its own width in pixels `sigmas` (n,), over a tenth of its side as in SimCLR."""
    count, channels, side, _ = pictures.shape
    reach = max(1, side // 20)
    place = torch.arange(-reach, reach + 1, device=pictures.device)
    kernel = (-(place**2) / (2 * sigmas[:, None] ** 2)).exp()
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)[:, None]  # (n · 3, 1, k)
    flat = pictures.reshape(1, count * channels, side, side)
    flat = F.conv2d(F.pad(flat, [0, 0, reach, reach], "reflect"), kernel[..., None], groups=count * channels)
    flat = F.conv2d(F.pad(flat, [reach, reach, 0, 0], "reflect"), kernel[:, :, None], groups=count * channels)
    return flat.view_as(pictures)


def plain(pictures: torch.Tensor, aspects: torch.Tensor, side: int) -> torch.Tensor:
    """The middle square of each picture, as networks read it: what features are taken from."""
    width, height = (1 / aspects).clamp(max=1), aspects.clamp(max=1)
    chance = {
        "left": (1 - width) / 2, "top": (1 - height) / 2, "width": width, "height": height,
        "mirrored": torch.zeros_like(width, dtype=torch.bool),
    }  # fmt: skip
    return normalised(cropped(pictures, {name: value.to(pictures.device) for name, value in chance.items()}, side))


def normalised(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures (n, 3, h, w) of 0 to 1 with the means and deviations of ImageNet taken out."""
    mean, std = (torch.tensor(values, device=pictures.device)[:, None, None] for values in (MEAN, STD))
    return (pictures - mean) / std


def shown(pictures: torch.Tensor) -> torch.Tensor:
    """The inverse of `normalised`, as levels (n, h, w, 3) from 0 to 255, uint8."""
    mean, std = (torch.tensor(values, device=pictures.device)[:, None, None] for values in (MEAN, STD))
    return ((pictures * std + mean).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
