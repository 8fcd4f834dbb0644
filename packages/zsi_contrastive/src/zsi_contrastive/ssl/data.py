"""Pictures in, batches of random views out, all on the device that trains.

What is random about a view is sampled for the whole batch of all processes, from the seed and the step alone: a resumed
run, and one in more processes, sees the same views. Colours change as in SimCLR (Chen et al. 2020, appendix A), but
always in the same order, and hues are rotated in YIQ, where that is one matrix, and not in HSV.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN as MEAN
from timm.data import IMAGENET_DEFAULT_STD as STD

from labs_common.data.classes import LabelledPictures, read_classes, stratified_parts
from labs_common.data.images import SUFFIXES, checked, decoding_threads, print_refused
from labs_common.device import constant, pinned, to_device
from labs_common.errors import LabError
from labs_common.progress import tracked
from labs_common.scenes.files import cached_parquet
from labs_common.steps import ShuffledSteps
from zsi_contrastive.ssl.config import EncoderOptions, PretrainDataOptions, ViewOptions

DEMO_TASK, DEMO_SIDE = "look", 32
DEMO_SPLITS: dict[str, Sequence[int]] = {
    "train": range(4000),
    "validation": range(4000, 4500),
    "test": range(4500, 5500),
}
HELD = 8 << 30  # bytes of pixels that are kept in memory; larger data is decoded for each step
STORED = 8 / 7  # times the side of a view: as 256 is to 224
UNLABELLED = "picture"
RATIO = (3 / 4, 4 / 3)  # of a crop's sides, and the attempts at one that lies within the picture: torchvision's
ATTEMPTS = 10
JITTERED = 0.8  # share of views whose colours change, and the hue's change at strength 1, in full turns: SimCLR's
HUE = 0.2
SIGMA = (0.1, 2.0)  # of the blur, in pixels: SimCLR's
LUMINANCE = (0.2989, 0.587, 0.114)  # ITU-R 601, as torchvision has it
YIQ = (LUMINANCE, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))
Sampled = Mapping[str, torch.Tensor]  # every random number of a batch of views (n,), by what it decides


def read_splits(options: PretrainDataOptions, seed: int, shown: bool) -> dict[str, LabelledPictures]:
    """Reads training, validation and test pictures; those of a directory without classes are all of class "picture".

    Raises:
        LabError: they cannot be read, or are too few.
    """
    folder = Path(options.data).expanduser() if options.data else None
    files = sorted(folder.iterdir()) if folder is not None and folder.is_dir() else []
    files = [file for file in files if file.suffix.lower() in SUFFIXES]
    if not files:
        return read_classes(options, seed, shown, drawn_scenes)
    labels = np.zeros(len(files), dtype=np.int64)
    whole = LabelledPictures(source=str(options.data), contents=files, names=[file.name for file in files],
                             classes=(UNLABELLED,), labels=labels)  # fmt: skip
    if options.limit:
        whole = whole.subset(np.sort(np.random.default_rng([seed, 1]).permutation(len(whole))[: options.limit]))
    whole = checked(whole, options.on_bad_data, shown)
    if len(whole) < 3:
        raise LabError(f"--data {options.data}: {len(whole)} pictures are too few")
    rest, test = stratified_parts(whole.labels, options.test_fraction, seed)
    train, validation = stratified_parts(whole.labels[rest], options.validation_fraction, seed)
    if shown:
        print_refused({"all": whole})
    parts = {"train": rest[train], "validation": rest[validation], "test": test}
    return {name: whole.subset(places) for name, places in parts.items() if len(places)}


def drawn_scenes() -> Path:
    """Draws scenes of five things that share a colour and a texture, unless they were drawn before."""
    return cached_parquet("look-scenes", DEMO_TASK, DEMO_SPLITS, DEMO_SIDE)


class Pixels:
    """The pictures of a split as 8-bit pixels, each squeezed into a square, with its own proportions beside it.

    Attributes:
        pictures: the pictures that they are from.
        aspects: width by height of each (n,), on the CPU.
        large: whether any pictures have more pixels than these, so that crops are made of the pictures themselves.
    """

    def __init__(self, pictures: LabelledPictures, side: int, device: torch.device, shown: bool) -> None:
        """`side` is that of a full view; pictures are kept a little larger, if any one is."""
        self.pictures, self.device = pictures, device
        self.held: torch.Tensor | None = None
        self.large = max(pictures.image(0).size) > side
        sizes = self._read(side, shown)
        if not self.large and sizes.max() > side:  # only others than the first one are
            self.large, self.held = True, None  # the first copies' memory before the others'
            sizes = self._read(side, shown)
        self.aspects = torch.from_numpy(sizes[:, 0] / sizes[:, 1]).float()

    def _read(self, side: int, shown: bool) -> np.ndarray:
        """Decodes all pictures, keeps them if there is room, and returns their widths and heights (n, 2)."""
        self.side = round(side * STORED) if self.large else side
        count = len(self.pictures)
        sizes, kept = np.empty((count, 2)), count * 3 * self.side**2 <= HELD
        held = torch.empty(count if kept else 0, 3, self.side, self.side, dtype=torch.uint8)

        def read(place: int) -> None:
            image = self.pictures.image(place)
            sizes[place] = image.size
            if kept:
                held[place] = torch.from_numpy(self._squeezed(image))

        for _ in tracked(decoding_threads().map(read, range(count)), "decoding pictures", count, shown):
            pass
        self.held = held.to(self.device) if kept else None
        return sizes

    def __len__(self) -> int:
        return len(self.pictures)

    def batch(self, places: torch.Tensor) -> torch.Tensor:
        """Returns pixels (places, 3, s, s) from 0 to 255 on the device."""
        if self.held is not None:
            return self.held[to_device(pinned(places, self.device), self.device)]
        read = decoding_threads().map(lambda place: self._squeezed(self.pictures.image(place)), places.tolist())
        return to_device(pinned(torch.from_numpy(np.stack(list(read))), self.device), self.device)

    def to_crop(
        self, places: torch.Tensor, recipes: Sequence["Recipe"], aspects: torch.Tensor, seed: int, step: int, own: slice
    ) -> torch.Tensor | list[torch.Tensor]:
        """Returns the pixels that `views_of` makes views of: as `batch` does, or large pictures' crops by each recipe.

        A crop of 8 % of a picture's area has so all the pixels that the picture has there, and none is skipped where it
        has more than the view. `aspects` are of the whole step, of which `places` are this process's part `own`.
        """
        if not self.large:
            return self.batch(places)
        boxes = [torch.stack([of_view[name][own] for name in ("left", "top", "width", "height")], 1).tolist()
                 for of_view in sampled_views(recipes, aspects, seed, step)]  # fmt: skip

        def read(number: int) -> list[np.ndarray]:
            image = self.pictures.image(int(places[number]))
            crops = []
            for recipe, of_view in zip(recipes, boxes, strict=True):
                left, top, width, height = of_view[number]
                box = (left * image.width, top * image.height, min(1.0, left + width) * image.width,
                       min(1.0, top + height) * image.height)  # fmt: skip
                crop = image.resize((recipe.side, recipe.side), Image.Resampling.BILINEAR, box)
                crops.append(np.array(crop).transpose(2, 0, 1))
            return crops

        views = zip(*decoding_threads().map(read, range(len(places))), strict=True)
        return [to_device(pinned(torch.from_numpy(np.stack(view)), self.device), self.device) for view in views]

    def _squeezed(self, image: Image.Image) -> np.ndarray:
        """Resizes an image to pixels (3, s, s), whatever its proportions."""
        size = (self.side, self.side)
        squeezed = image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)
        return np.array(squeezed).transpose(2, 0, 1)


class Batch(NamedTuple):
    """This process's part of a step.

    Attributes:
        pixels: (own, 3, s, s), or of large pictures crops for each view, each (own, 3, side, side).
        aspects: width by height of the whole step's pictures (n,).
        labels: of this process's pictures (own,), on the CPU.
        own: this process's part of the whole step.
        step: number of the optimizer step in the run.
    """

    pixels: torch.Tensor | list[torch.Tensor]
    aspects: torch.Tensor
    labels: torch.Tensor
    own: slice
    step: int


def training_steps(
    data: Pixels, recipes: Sequence["Recipe"], batch_size: int, seed: int, accelerator: Accelerator
) -> ShuffledSteps:
    """Cuts the pictures into steps of whole batches: the losses compare as many pictures in every step."""

    def batch(places: list[int], epoch: int, step: int) -> list[Batch]:
        each = len(places) // accelerator.num_processes
        own = slice(accelerator.process_index * each, (accelerator.process_index + 1) * each)
        whole = torch.tensor(places)
        of = pinned(torch.from_numpy(data.pictures.labels[places[own]]), data.device)
        aspects = data.aspects[whole]
        return [Batch(data.to_crop(whole[own], recipes, aspects, seed, step, own), aspects, of, own, step)]

    return ShuffledSteps(len(data), batch_size, seed, batch, whole=True)


@dataclass(frozen=True)
class Recipe:
    """One kind of view: side in pixels, share of the area that it shows, changes, shares with blur, solarized."""

    side: int
    scale: tuple[float, float]
    changes: ViewOptions
    blur: float
    solarize: float


def recipes_of(encoder: EncoderOptions, views: ViewOptions, full_views: int) -> list[Recipe]:
    """Lists the recipe of every view of a picture by completed options: `full_views`, then the small ones."""
    sizes = [(encoder.side, views.crop_scale)] * 2 + [(views.local_side, views.local_scale)]
    first, second, small = (
        Recipe(side, scale, views, blur, solarize)
        for (side, scale), blur, solarize in zip(sizes, views.blur, views.solarize, strict=True)
    )
    return [first, second][:full_views] + [small] * views.local_crops


def views_of(
    pixels: torch.Tensor | list[torch.Tensor],
    aspects: torch.Tensor,
    recipes: Sequence[Recipe],
    seed: int,
    step: int,
    own: slice,
) -> list[torch.Tensor]:
    """Makes one batch of normalised views (own, 3, side, side) by each recipe, from the run's `seed` and the `step`.

    `pixels` (own, 3, s, s), from 0 to 255, are this process's part `own` of the step's batch, or crops of it by each
    recipe (`Pixels.to_crop`); `aspects` (n,), on the CPU, are width by height of every picture of the whole batch.
    """
    views, drawn = [], sampled_views(recipes, aspects, seed, step)
    # All numbers of all views in one copy; that of truth values to floats and back is exact.
    numbers = torch.stack([all_[own].float() for of_view in drawn for all_ in of_view.values()])
    device = pixels[0].device
    coming = iter(to_device(pinned(numbers, device), device))
    for place, (recipe, of_view) in enumerate(zip(recipes, drawn, strict=True)):
        sampled = {name: next(coming).to(all_.dtype) for name, all_ in of_view.items()}
        if not of_view["blurred"][own].any():  # asked of the CPU, which nobody has to wait for
            del sampled["blurred"]
        if isinstance(pixels, list):
            levels = pixels[place].float() / 255
            view = torch.where(sampled["mirrored"][:, None, None, None], levels.flip(3), levels)
        else:
            view = cropped(pixels, sampled, recipe.side)
        view = normalised(recoloured(view, sampled))
        views.append(view.contiguous(memory_format=torch.channels_last))  # convolutions are faster so
    return views


def sampled_views(recipes: Sequence[Recipe], aspects: torch.Tensor, seed: int, step: int) -> list[Sampled]:
    """Samples what is random of the views by each recipe of all pictures of a step; the same whenever it is asked."""
    generator = torch.Generator().manual_seed(((seed << 32) + step) % 2**63)
    return [sample(recipe, aspects, generator) for recipe in recipes]


def normalised(pictures: torch.Tensor) -> torch.Tensor:
    """Turns pictures (n, 3, h, w) of 0 to 1 into what the networks read."""
    mean, std = (constant(values, pictures.device)[:, None, None] for values in (MEAN, STD))
    return pictures.sub(mean).div_(std)


def sample(recipe: Recipe, aspects: torch.Tensor, generator: torch.Generator) -> Sampled:
    """Samples a crop and colour changes for pictures whose widths are `aspects` (n,) times their heights; on the CPU.

    Crops are torchvision's `RandomResizedCrop`, with sides and places as shares of the picture's sides.
    """
    count, changes = len(aspects), recipe.changes

    def uniform(low: float, high: float, *size: int) -> torch.Tensor:
        return torch.rand(*(size or (count,)), generator=generator) * (high - low) + low

    strength = changes.jitter
    jittered = uniform(0, 1) < JITTERED * (strength > 0)
    factors = {
        name: torch.where(jittered, uniform(max(0.0, 1 - change * strength), 1 + change * strength), 1.0)
        for name, change in (("brightness", 0.8), ("contrast", 0.8), ("saturation", changes.saturation))
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
        "mirrored": uniform(0, 1) < changes.flip,
        **factors,
        "hue": turns * 2 * math.pi,
        "grey": uniform(0, 1) < changes.grey,
        "blurred": uniform(0, 1) < recipe.blur,
        "sigma": uniform(*SIGMA),
        "solarized": uniform(0, 1) < recipe.solarize,
    }


def cropped(pixels: torch.Tensor, sampled: Sampled, side: int) -> torch.Tensor:
    """Crops each picture (n, 3, s, s), 0 to 255, to (n, 3, side, side), 0 to 1, mirrored where sampled.

    Bilinear between pixels. These pictures are hardly larger than a view, so shrinking skips no pixels.
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
    """Changes pictures (n, 3, h, w) of 0 to 1: brightness, contrast, saturation, hue, then grey, blur, solarization.

    Without "blurred" none is.
    """
    weights = constant(LUMINANCE, pictures.device)[:, None, None]
    by = {name: values[:, None, None, None] for name, values in sampled.items()}
    pictures = (pictures * by["brightness"]).clamp(0, 1)
    mean = (pictures * weights).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    pictures = (mean + (pictures - mean) * by["contrast"]).clamp(0, 1)
    luminance = (pictures * weights).sum(1, keepdim=True)
    pictures = (luminance + (pictures - luminance) * by["saturation"]).clamp(0, 1)
    pictures = torch.einsum("nij,njhw->nihw", hue_rotations(sampled["hue"]), pictures).clamp(0, 1)
    pictures = torch.where(by["grey"], (pictures * weights).sum(1, keepdim=True), pictures)
    if "blurred" in by:  # two convolutions that most runs do without
        pictures = torch.where(by["blurred"], blurred(pictures, sampled["sigma"]), pictures)
    return torch.where(by["solarized"] & (pictures >= 0.5), 1 - pictures, pictures)


def hue_rotations(angles: torch.Tensor) -> torch.Tensor:
    """Returns matrices (n, 3, 3) that rotate hues of RGB by `angles` (n,), in radians, and keep the luminance."""
    one, zero = torch.ones_like(angles), torch.zeros_like(angles)
    cos, sin = angles.cos(), angles.sin()
    turn = torch.stack([one, zero, zero, zero, cos, -sin, zero, sin, cos], 1).view(-1, 3, 3)
    there, back = _yiq(turn.device, turn.dtype)
    return back @ turn @ there


@functools.cache
def _yiq(device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the matrices (3, 3) from RGB to YIQ and back, copied to the device once."""
    there = torch.tensor(YIQ, dtype=torch.float64)
    with torch.inference_mode(False):
        return there.to(dtype).to(device), there.inverse().to(dtype).to(device)


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
    crop = {name: values.to(pixels.device) for name, values in crop.items()}
    return normalised(cropped(pixels, crop, side))


def _middle_square(aspects: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns width and height (n,) of the largest square, as shares of a picture's sides, for these aspects (n,)."""
    return (1 / aspects).clamp(max=1), aspects.clamp(max=1)


def pixels_of(pictures: torch.Tensor) -> torch.Tensor:
    """Turns normalised pictures (n, 3, h, w) back into pixels (n, h, w, 3) from 0 to 255, uint8."""
    mean, std = (constant(values, pictures.device)[:, None, None] for values in (MEAN, STD))
    return ((pictures * std + mean).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
