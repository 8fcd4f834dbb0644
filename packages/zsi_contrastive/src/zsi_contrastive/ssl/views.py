"""Random views of pictures, made on the device, a whole batch at a time.

What is sampled is sampled for the whole batch of all processes, from the seed and the step alone: a resumed run, and
one in more processes, sees the same views. Colours change as in SimCLR (Chen et al. 2020, appendix A), but always in
the same order, and hues are rotated in YIQ, where that is one matrix, and not in HSV.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from zsi_contrastive.ssl.config import EncoderOptions, ViewOptions

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, which other labs' networks expect
RATIO = (3 / 4, 4 / 3)  # of a crop's sides, and the attempts at one that lies within the picture: torchvision's
ATTEMPTS = 10
JITTERED = 0.8  # share of views whose colours change, and the hue's change at strength 1, in full turns: SimCLR's
HUE = 0.2
SIGMA = (0.1, 2.0)  # of the blur, in pixels: SimCLR's
LUMINANCE = (0.2989, 0.587, 0.114)  # ITU-R 601, as torchvision has it
YIQ = (LUMINANCE, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))
Sampled = Mapping[str, torch.Tensor]  # every random number of a batch of views (n,), by what it decides


@dataclass(frozen=True)
class Recipe:
    """One kind of view: its side in pixels, the share of the area that it shows, and the strengths of its changes."""

    side: int
    scale: tuple[float, float]
    flip: float
    jitter: float
    grey: float
    blur: float
    solarize: float


def recipes_of(encoder: EncoderOptions, views: ViewOptions, full_views: int) -> list[Recipe]:
    """Lists the recipe of every view of a picture by completed options: `full_views`, then the small ones."""
    changes = (views.flip, views.jitter, views.grey, views.blur, views.solarize)
    full = Recipe(encoder.side, views.crop_scale, *changes)
    small = Recipe(views.local_side, views.local_scale, *changes)
    return [full] * full_views + [small] * views.local_crops


def views_of(
    pixels: torch.Tensor, aspects: torch.Tensor, recipes: Sequence[Recipe], seed: int, step: int, own: slice
) -> list[torch.Tensor]:
    """Makes one batch of normalised views (own, 3, side, side) by each recipe.

    Args:
        pixels: this process's part of the step's batch (own, 3, s, s), from 0 to 255.
        aspects: width by height of every picture of the whole batch (n,), on the CPU.
        recipes: one for each view.
        seed: of the run.
        step: number of the optimizer step.
        own: this process's part of the whole batch.
    """
    generator = torch.Generator().manual_seed(((seed << 32) + step) % 2**63)
    views = []
    for recipe in recipes:
        sampled = {name: all_[own].to(pixels.device) for name, all_ in sample(recipe, aspects, generator).items()}
        views.append(normalised(recoloured(cropped(pixels, sampled, recipe.side), sampled)))
    return views


def sample(recipe: Recipe, aspects: torch.Tensor, generator: torch.Generator) -> Sampled:
    """Samples a crop and colour changes for pictures whose widths are `aspects` (n,) times their heights; on the CPU.

    Crops are torchvision's `RandomResizedCrop`, with sides and places as shares of the picture's sides.
    """
    count = len(aspects)

    def uniform(low: float, high: float, *size: int) -> torch.Tensor:
        return torch.rand(*(size or (count,)), generator=generator) * (high - low) + low

    strength = recipe.jitter
    jittered = uniform(0, 1) < JITTERED * (strength > 0)
    factors = {
        name: torch.where(jittered, uniform(max(0.0, 1 - 0.8 * strength), 1 + 0.8 * strength), 1.0)
        for name in ("brightness", "contrast", "saturation")
    }
    turns = torch.where(jittered, uniform(-HUE * strength, HUE * strength), 0.0)
    area = uniform(*recipe.scale, ATTEMPTS, count)
    ratio = uniform(math.log(RATIO[0]), math.log(RATIO[1]), ATTEMPTS, count).exp()
    width, height = (area * ratio / aspects).sqrt(), (area / ratio * aspects).sqrt()  # (attempts, n)
    fits = (width <= 1) & (height <= 1)
    first = fits.int().argmax(0)
    width, height = (  # of the first attempt that fits (n,), or of the largest square
        torch.where(fits.any(0), side.gather(0, first[None])[0], square)
        for side, square in zip((width, height), _middle_square(aspects), strict=True)
    )
    return {
        "left": uniform(0, 1) * (1 - width),
        "top": uniform(0, 1) * (1 - height),
        "width": width,
        "height": height,
        "mirrored": uniform(0, 1) < recipe.flip,
        **factors,
        "hue": turns * 2 * math.pi,
        "grey": uniform(0, 1) < recipe.grey,
        "blurred": uniform(0, 1) < recipe.blur,
        "sigma": uniform(*SIGMA),
        "solarized": uniform(0, 1) < recipe.solarize,
    }


def cropped(pixels: torch.Tensor, sampled: Sampled, side: int) -> torch.Tensor:
    """Crops each picture (n, 3, s, s), 0 to 255, to (n, 3, side, side), 0 to 1, mirrored where sampled.

    Bilinear between pixels. Pictures are kept hardly larger than a view, so shrinking skips no pixels.
    """
    width, height = sampled["width"], sampled["height"]
    across = torch.where(sampled["mirrored"], -width, width)
    zero = torch.zeros_like(width)
    theta = torch.stack([
        torch.stack([across, zero, 2 * sampled["left"] + width - 1], 1),
        torch.stack([zero, height, 2 * sampled["top"] + height - 1], 1),
    ], 1)  # (n, 2, 3)  # fmt: skip
    grid = F.affine_grid(theta, [len(pixels), 3, side, side], align_corners=False)
    return F.grid_sample(pixels.float() / 255, grid, padding_mode="border", align_corners=False)


def recoloured(pictures: torch.Tensor, sampled: Sampled) -> torch.Tensor:
    """Changes pictures (n, 3, h, w) of 0 to 1: brightness, contrast, saturation, hue, then grey, blur, solarization."""
    weights = torch.tensor(LUMINANCE, device=pictures.device)[:, None, None]
    by = {name: values[:, None, None, None] for name, values in sampled.items()}
    pictures = (pictures * by["brightness"]).clamp(0, 1)
    mean = (pictures * weights).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    pictures = (mean + (pictures - mean) * by["contrast"]).clamp(0, 1)
    luminance = (pictures * weights).sum(1, keepdim=True)
    pictures = (luminance + (pictures - luminance) * by["saturation"]).clamp(0, 1)
    pictures = torch.einsum("nij,njhw->nihw", hue_rotations(sampled["hue"]), pictures).clamp(0, 1)
    pictures = torch.where(by["grey"], (pictures * weights).sum(1, keepdim=True), pictures)
    if bool(sampled["blurred"].any()):  # two convolutions that most runs do without
        pictures = torch.where(by["blurred"], blurred(pictures, sampled["sigma"]), pictures)
    return torch.where(by["solarized"] & (pictures >= 0.5), 1 - pictures, pictures)


def hue_rotations(angles: torch.Tensor) -> torch.Tensor:
    """Matrices (n, 3, 3) that rotate the hues of RGB by `angles` (n,), in radians, and keep the luminance."""
    to = torch.tensor(YIQ, dtype=torch.float64)
    one, zero = torch.ones_like(angles), torch.zeros_like(angles)
    cos, sin = angles.cos(), angles.sin()
    turn = torch.stack([one, zero, zero, zero, cos, -sin, zero, sin, cos], 1).view(-1, 3, 3)
    back, there = to.inverse().to(turn), to.to(turn)
    return back @ turn @ there


def blurred(pictures: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """Blurs each picture by a Gaussian of its own width in pixels `sigmas` (n,), over a tenth of its side (SimCLR)."""
    count, channels, side, _ = pictures.shape
    reach = max(1, side // 20)
    place = torch.arange(-reach, reach + 1, device=pictures.device)
    kernel = (-(place**2) / (2 * sigmas[:, None] ** 2)).exp()
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)[:, None]  # (n · 3, 1, k)
    flat = pictures.reshape(1, count * channels, side, side)  # one group of the convolution for each picture's channel
    flat = F.conv2d(F.pad(flat, [0, 0, reach, reach], "reflect"), kernel[..., None], groups=count * channels)
    flat = F.conv2d(F.pad(flat, [reach, reach, 0, 0], "reflect"), kernel[:, :, None], groups=count * channels)
    return flat.view_as(pictures)


def middle_square(pixels: torch.Tensor, aspects: torch.Tensor, side: int) -> torch.Tensor:
    """Crops the middle square of each picture and normalises it (n, 3, side, side): features are taken from that."""
    width, height = _middle_square(aspects)
    crop = {
        "left": (1 - width) / 2, "top": (1 - height) / 2, "width": width, "height": height,
        "mirrored": torch.zeros_like(width, dtype=torch.bool),
    }  # fmt: skip
    return normalised(cropped(pixels, {name: values.to(pixels.device) for name, values in crop.items()}, side))


def _middle_square(aspects: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Width and height (n,) of the largest square, as shares of the sides of pictures with these aspects (n,)."""
    return (1 / aspects).clamp(max=1), aspects.clamp(max=1)


def normalised(pictures: torch.Tensor) -> torch.Tensor:
    """Subtracts ImageNet's means from pictures (n, 3, h, w) of 0 to 1 and divides by its deviations."""
    mean, std = (torch.tensor(values, device=pictures.device)[:, None, None] for values in (MEAN, STD))
    return (pictures - mean) / std


def pixels_of(pictures: torch.Tensor) -> torch.Tensor:
    """Inverts `normalised`, to pixels (n, h, w, 3) from 0 to 255, uint8."""
    mean, std = (torch.tensor(values, device=pictures.device)[:, None, None] for values in (MEAN, STD))
    return ((pictures * std + mean).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
