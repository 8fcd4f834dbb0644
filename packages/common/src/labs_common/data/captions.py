"""Pictures with captions: checked, split by picture, and as tensors for a network."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from labs_common.data.caption_files import read_described
from labs_common.data.images import NAMED, RESAMPLING, Pictures, decoding_threads, examined, print_refused, refusal
from labs_common.errors import LabError, bytes_of
from labs_common.options import CaptionDataOptions, OnBadData
from labs_common.scenes.files import read_truth
from labs_common.scenes.world import Scene

# Flickr8k has captions of a picture that was never published; more than so many are a sign that pictures are elsewhere.
MOST_WITHOUT, WITHOUT = 0.01, "captions without a picture"
LEAST_AREA, COLOUR = 0.7, 0.25  # of a crop, as captions speak of the whole picture; of brightness and contrast
ASIDE = 0.1  # share of the pictures that is drawn for validation, and again for the test
LISTS = {
    "train": "Flickr_8k.trainImages.txt",
    "validation": "Flickr_8k.devImages.txt",
    "test": "Flickr_8k.testImages.txt",
}


@dataclass(frozen=True, kw_only=True)
class CaptionedPictures(Pictures):
    """Pictures with one or more captions each.

    Attributes:
        given: the split of each picture that the data say; empty where they say none.
        divided: who divided them so; of a split, how it came about.
    """

    captions: tuple[tuple[str, ...], ...]
    given: tuple[str, ...] = ()
    divided: str = ""

    def subset(self, places: Sequence[int] | np.ndarray) -> Self:
        """Takes the pictures at these places, in this order."""
        captions = tuple(self.captions[place] for place in places)
        given = tuple(self.given[place] for place in places) if self.given else ()
        return replace(super().subset(places), captions=captions, given=given)


@dataclass(frozen=True)
class Captions:
    """Pictures with captions in three splits.

    Attributes:
        splits: training, validation and test pictures by name.
        truth: the scene that each drawn picture shows, by the picture's name; empty for photographs.
    """

    splits: dict[str, CaptionedPictures]
    truth: dict[str, Scene]

    @property
    def left_out(self) -> dict[str, int]:
        """Counts of the pictures and captions that were left out, by reason."""
        return dict(self.splits["train"].left_out)


def read_captions(options: CaptionDataOptions, seed: int, shown: bool, drawn: Callable[[], Path]) -> Captions:
    """Reads training, validation and test pictures, each decoded once; what was left out is printed if `shown`.

    `drawn` gives the directory of the scenes that are read without --data.

    Raises:
        LabError: the data cannot be read, or some of it and --on-bad-data says so, or it is too small.
    """
    data = options.data or str(drawn())
    folder = Path(data).expanduser()
    pictures = read_captioned(data, options.on_bad_data, shown)
    if options.data is None:
        pictures = replace(pictures, source="drawn scenes")
    splits = caption_splits(pictures, options.splits or folder, seed=seed)
    if options.limit:
        most = {"train": options.limit, "validation": -(-options.limit // 8), "test": -(-options.limit // 8)}
        splits = {name: part.at_most(most[name], seed) for name, part in splits.items()}
    if shown:
        print_refused(splits)
    return Captions(splits, truth_of(folder, list(splits.values())))


def read_undivided(options: CaptionDataOptions, seed: int, drawn: Callable[[], Path]) -> Captions:
    """Reads all pictures of --data, or of the drawn scenes, as one split "all"; see `read_captions`."""
    folder = Path(options.data) if options.data else drawn()
    pictures = read_captioned(folder, options.on_bad_data)
    print_refused({"all": pictures})
    pictures = pictures.at_most(options.limit, seed) if options.limit else pictures
    return Captions({"all": pictures}, truth_of(folder, [pictures]))


def truth_of(folder: Path, parts: Sequence[CaptionedPictures]) -> dict[str, Scene]:
    """Returns the scene that each picture shows, by its name, where that is known."""
    known = read_truth(folder)
    return {name: known[name] for part in parts for name in part.names if name in known}


def read_captioned(data: str | Path, on_bad_data: OnBadData = "error", shown: bool = True) -> CaptionedPictures:
    """Reads pictures with captions in any layout of `read_described`; every picture is decoded once.

    Captions of which the picture is missing, pictures without captions, empty captions and lines that are not UTF-8
    are faults of the data as broken pictures are. If few captions lack their picture and there is no other fault, they
    are left out and counted without being asked.

    Raises:
        LabError: there is no such data; or some of it cannot be used and `on_bad_data` is "error" (the first five are
            named), or nothing can.
    """
    found = read_described(str(data))
    contents, captions, faults = found.contents, found.captions, found.faults
    without = [name for name in captions if name not in contents]
    faults += [(name, "picture without captions") for name in contents if name not in captions]
    names = [name for name in contents if name in captions]
    outcomes = examined([contents[name] for name in names], f"checking {data}", shown)
    faults += [(name, reason) for name, (_, reason) in zip(names, outcomes, strict=True) if reason]
    few = not faults and len(without) <= MOST_WITHOUT * len(captions)
    faults += [(name, WITHOUT) for name in without]
    if faults and on_bad_data == "error" and not few:
        raise LabError(refusal(str(data), faults, "add --on-bad-data skip to leave them out"))
    digests = {name: digest for name, (digest, reason) in zip(names, outcomes, strict=True) if not reason}
    examples = tuple(f"{what}: {why}" for what, why in faults[:NAMED])
    if not digests:
        raise LabError(": ".join([f"--data {data}: no picture with a caption can be used", *examples[:1]]))
    return CaptionedPictures(
        source=str(data),
        contents=tuple(contents[name] for name in digests),
        names=tuple(digests),
        captions=tuple(tuple(captions[name]) for name in digests),
        digests=tuple(digests.values()),
        left_out=Counter(reason for _, reason in faults),
        examples=examples,
        given=tuple(found.splits.get(name, "") for name in digests) if found.splits else (),
        divided=found.divided,
    )


def captions_alone(options: CaptionDataOptions, drawn: Callable[[], Path]) -> list[list[str]]:
    """Reads the captions of as many pictures as training has, opening none: for sizes, as which they are is not asked.

    Raises:
        LabError: there is no such data.
    """
    found = read_described(options.data or str(drawn()))
    count = Counter(found.splits.values())["train"] or round((1 - 2 * ASIDE) * len(found.captions))
    return list(found.captions.values())[: options.limit or count]


def caption_splits(
    pictures: CaptionedPictures, folder: Path | None = None, seed: int = 0
) -> dict[str, CaptionedPictures]:
    """Divides into training, validation and test: by official lists in `folder`, as the data say, or by the seed.

    No picture is in two splits, neither by name nor by content: drawn, all copies of a picture go to one split; with
    lists, a copy is left out of the split that comes earlier in the order training, validation, test, and counted.
    A split that the data lack is drawn from their training pictures.

    Raises:
        LabError: a list names nothing that is there, or a split would be empty.
    """
    lists, by = _official(folder) if folder is not None else {}, "by the official lists"
    if not lists and pictures.given:
        by, said = pictures.divided, list(zip(pictures.names, pictures.given, strict=True))
        lists = {split: {name for name, given in said if given == split} for split in LISTS}
    aside = [split for split in ("validation", "test") if not lists.get(split)]
    parts = _listed(pictures, lists) if lists else {"train": pictures}
    if aside and (not lists or pictures.given):
        drawn = f"{' and '.join(aside)} drawn with seed {seed}, {ASIDE:.0%} of the pictures each"
        parts, by = parts | _drawn(parts["train"], seed, aside), "; ".join([by, drawn] if lists else [drawn])
    for name, part in parts.items():
        if not len(part):
            line = f"--data {pictures.source}: {len(pictures)} pictures leave the {name} split empty"
            raise LabError(f"{line}; to measure a model on all of them, evaluate with --split all")
    return {name: replace(parts[name], divided=by) for name in LISTS}


def _drawn(pictures: CaptionedPictures, seed: int, aside: Sequence[str]) -> dict[str, CaptionedPictures]:
    copies: dict[bytes, list[int]] = {}
    for place, digest in enumerate(pictures.digests):
        copies.setdefault(digest, []).append(place)
    groups = list(copies.values())
    order = np.random.default_rng([seed, 2]).permutation(len(groups))
    count = max(1, round(ASIDE * len(groups)))
    parts = {name: order[place * count : (place + 1) * count] for place, name in enumerate(aside)}
    parts["train"] = order[len(aside) * count :]
    return {
        name: pictures.subset(sorted(place for group in part for place in groups[group]))
        for name, part in parts.items()
    }


def _official(folder: Path) -> dict[str, set[str]]:
    found = {}
    for split, name in LISTS.items():
        file = next((path for path in (folder / name, folder / "Flickr8k_text" / name) if path.is_file()), None)
        if file is not None:
            lines = bytes_of(file, f"--splits {file}").decode("utf-8", "replace").split("\n")
            found[split] = {line.strip() for line in lines}
    if found and len(found) < len(LISTS):
        missing = ", ".join(LISTS[split] for split in LISTS if split not in found)
        raise LabError(f"--data {folder}: of the lists of pictures {missing} is missing; add it, or remove the others")
    return found


def _listed(pictures: CaptionedPictures, lists: Mapping[str, set[str]]) -> dict[str, CaptionedPictures]:
    taken: set[str | bytes] = set()  # names and digests
    parts = {}
    twice = Counter[str]()
    for split in reversed(LISTS):  # the test first: it loses nothing
        places = []
        for place, (name, digest) in enumerate(zip(pictures.names, pictures.digests, strict=True)):
            if name in lists[split] and (name in taken or digest in taken):
                twice[f"in {split} and in a later split too"] += 1
            elif name in lists[split]:
                places.append(place)
        parts[split] = pictures.subset(places)
        taken |= {*parts[split].names, *parts[split].digests}
    return {split: replace(parts[split], left_out=parts[split].left_out + twice) for split in LISTS}


@dataclass(frozen=True)
class Transform:
    """A picture as the encoder sees it: the whole of it, squeezed into a square, in the encoder's mean and deviation.

    Nothing is cut off, because captions speak of all of it, and nothing is mirrored, because they say left and right.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str

    def __post_init__(self) -> None:
        """Refuses what a damaged file may hold.

        Raises:
            ValueError: mean and deviation are not of three colours, or the interpolation is no name.
        """
        numbers = (*self.mean, *self.std)
        if len(self.mean) != 3 or len(self.std) != 3 or not isinstance(self.interpolation, str):
            raise ValueError("mean and std must be three numbers each, interpolation a name")
        if not all(isinstance(number, (int, float)) and abs(number) < 1e6 for number in numbers) or min(self.std) <= 0:
            raise ValueError("mean and std must be finite numbers, std above 0")

    def levels(self, image: Image.Image) -> np.ndarray:
        """Resizes to (size, size, 3) of 0 to 255."""
        how = RESAMPLING.get(self.interpolation, Image.Resampling.BICUBIC)
        return np.asarray(image.resize((self.size, self.size), how))

    def normalised(self, levels: Sequence[np.ndarray]) -> torch.Tensor:
        """Stacks pictures to (batch, 3, size, size) as the encoder reads them."""
        return self.shifted(torch.from_numpy(np.stack(levels)).permute(0, 3, 1, 2))

    def shifted(self, levels: torch.Tensor) -> torch.Tensor:
        """Turns levels of 0 to 255 (batch, 3, size, size) into what the encoder reads."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (levels.float() / 255 - mean) / std


@dataclass(frozen=True)
class PictureTensors:
    """The pictures of a split as tensors, decoded in threads."""

    pictures: CaptionedPictures
    transform: Transform

    def batch(self, places: Sequence[int]) -> torch.Tensor:
        """Reads pictures (places, 3, size, size) as the network takes them."""
        return self.transform.normalised(self._levels(places))

    def view(self, number: int, places: Sequence[int], seed: int) -> torch.Tensor:
        """Reads them so in a view: 0 is the plain one, in the others a part of each is cut out, always the same."""
        if not number:
            return self.batch(places)
        draws = [drawn_crop(np.random.default_rng([seed, number, place]), "crop") for place in places]
        return self.transform.shifted(augmented(self.levels(places), torch.from_numpy(np.stack(draws))))

    def levels(self, places: Sequence[int]) -> torch.Tensor:
        """Reads pictures (places, 3, size, size) of 0 to 255."""
        return torch.from_numpy(np.stack(self._levels(places))).permute(0, 3, 1, 2).contiguous()

    def _levels(self, places: Sequence[int]) -> list[np.ndarray]:
        return list(decoding_threads().map(lambda place: self.transform.levels(self.pictures.image(place)), places))

    def recipe(self) -> dict[str, Any]:
        """Returns all that the tensors depend on, as JSON values."""
        return asdict(self.transform) | {"pictures": self.pictures.fingerprint()}


def drawn_crop(generator: np.random.Generator, augment: str | None) -> np.ndarray:
    """Draws a row for `augmented`: side of the part, its middle across and down (-1 to 1), brightness and contrast.

    `augment` is "crop", "crop+colour", or "none".
    """
    side = np.sqrt(generator.uniform(LEAST_AREA, 1.0)) if augment not in (None, "none") else 1.0
    middle = generator.uniform(-1, 1, 2) * (1 - side)
    colour = generator.uniform(1 - COLOUR, 1 + COLOUR, 2) if augment == "crop+colour" else np.ones(2)
    return np.array([side, *middle, *colour], dtype=np.float32)


def augmented(pictures: torch.Tensor, crops: torch.Tensor | None) -> torch.Tensor:
    """Crops and colours pictures of 0 to 255 (pictures, 3, size, size), each as its row of `crops` says; floats."""
    pictures = pictures.float()
    if crops is None:
        return pictures
    side, across, down, brightness, contrast = crops.unbind(1)
    zero = torch.zeros_like(side)
    theta = torch.stack([side, zero, across, zero, side, down], 1).unflatten(1, (2, 3))
    # The whole batch is cropped in one call, on its device: decoding threads do not draw, and the cache stays plain.
    grid = F.affine_grid(theta, list(pictures.shape), align_corners=False)
    found = F.grid_sample(pictures, grid, padding_mode="reflection", align_corners=False)
    mean = found.mean((1, 2, 3), keepdim=True)
    return ((found - mean) * contrast[:, None, None, None] + mean * brightness[:, None, None, None]).clamp(0, 255)
