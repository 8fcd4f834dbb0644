"""Pictures with captions: Flickr8k in both published forms, split by picture, and as tensors for a network."""

import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image

from labs_common.data.images import (
    NAMED,
    RESAMPLING,
    SUFFIXES,
    BadPictureError,
    Pictures,
    decoding_threads,
    examined,
    print_refused,
    refusal,
    within,
)
from labs_common.errors import LabError, bytes_of
from labs_common.options import CaptionDataOptions, OnBadData
from labs_common.scenes.files import read_truth
from labs_common.scenes.world import Scene

# The official archive has the misspelt one; the others are of copies in use.
PICTURE_FOLDERS = ("Images", "Flicker8k_Dataset", "Flickr8k_Dataset", "images")
CAPTION_FILES = ("captions.txt", "Flickr8k.token.txt", "Flickr8k_text/Flickr8k.token.txt", "captions.csv")
LONGEST = csv.field_size_limit()  # characters of a caption: 131,072
# Within a caption: a quote before it was never closed, and what followed was swallowed.
SWALLOWED = re.compile(rf"\n[^\n,]+(?:{'|'.join(map(re.escape, sorted(SUFFIXES)))}),", re.IGNORECASE)
ASIDE = 0.1  # share of the pictures that is drawn for validation, and again for the test
LISTS = {
    "train": "Flickr_8k.trainImages.txt",
    "validation": "Flickr_8k.devImages.txt",
    "test": "Flickr_8k.testImages.txt",
}


@dataclass(frozen=True, kw_only=True)
class CaptionedPictures(Pictures):
    """Picture files with one or more captions each."""

    contents: Sequence[Path]
    captions: tuple[tuple[str, ...], ...]

    def subset(self, places: Sequence[int] | np.ndarray) -> Self:
        """Takes the pictures at these places, in this order."""
        return replace(super().subset(places), captions=tuple(self.captions[place] for place in places))


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
    folder = Path(options.data) if options.data else drawn()
    pictures = read_captioned(folder, options.on_bad_data, shown)
    if options.data is None:
        pictures = replace(pictures, source="drawn scenes")
    splits = caption_splits(pictures, options.splits or folder, seed=seed)
    if options.limit:
        most = {"train": options.limit, "validation": -(-options.limit // 8), "test": -(-options.limit // 8)}
        splits = {name: part.at_most(most[name], seed) for name, part in splits.items()}
    if shown:
        print_refused(splits)
    return Captions(splits, truth_of(folder, list(splits.values())))


def truth_of(folder: Path, parts: Sequence[CaptionedPictures]) -> dict[str, Scene]:
    """Returns the scene that each picture shows, by its name, where that is known."""
    known = read_truth(folder)
    return {name: known[name] for part in parts for name in part.names if name in known}


def read_captioned(data: str | Path, on_bad_data: OnBadData = "error", shown: bool = True) -> CaptionedPictures:
    """Reads a directory with pictures and `captions.txt` (CSV `image,caption`) or `Flickr8k.token.txt` (tabs).

    The pictures lie in `Images`, in `Flicker8k_Dataset` as the first form has it, or beside the file. Every picture is
    decoded once. Captions of which the picture is missing, pictures without captions, empty captions and lines that
    are not UTF-8 are faults of the data as broken pictures are.

    Raises:
        LabError: there is no such directory or caption file; or some of it cannot be used and `on_bad_data` is
            "error" (the first five are named), or nothing can.
    """
    folder, file = Path(data), _caption_file(data)
    pictures = next((folder / name for name in PICTURE_FOLDERS if (folder / name).is_dir()), folder)
    faults: list[tuple[str, str]] = []  # what is bad, and why
    captions: dict[str, list[str]] = {}
    for line, name, caption in caption_lines(file):
        if name is None:
            faults.append((f"{file.name}:{line}", caption))
        elif reason := _caption_fault(caption):
            faults.append((f"{file.name}:{line}", reason))
        else:
            captions.setdefault(name, []).append(caption.strip())
    there = {path.name: path for path in sorted(pictures.iterdir()) if path.suffix.lower() in SUFFIXES}
    for name in [name for name, path in there.items() if path.is_symlink()]:
        try:
            within(name, pictures, folder)
        except BadPictureError as error:
            faults.append((name, str(error)))
            del there[name]
    faults += [(name, "captions without a picture") for name in captions if name not in there]
    faults += [(name, "picture without captions") for name in there if name not in captions]
    names = [name for name in there if name in captions]
    outcomes = examined([there[name] for name in names], f"checking {data}", shown)
    faults += [(name, reason) for name, (_, reason) in zip(names, outcomes, strict=True) if reason]
    if faults and on_bad_data == "error":
        raise LabError(refusal(str(data), faults, "add --on-bad-data skip to leave them out"))
    digests = {name: digest for name, (digest, reason) in zip(names, outcomes, strict=True) if not reason}
    examples = tuple(f"{what}: {why}" for what, why in faults[:NAMED])
    if not digests:
        raise LabError(": ".join([f"--data {data}: no picture with a caption can be used", *examples[:1]]))
    return CaptionedPictures(
        source=str(data),
        contents=tuple(there[name] for name in digests),
        names=tuple(digests),
        captions=tuple(tuple(captions[name]) for name in digests),
        digests=tuple(digests.values()),
        left_out=Counter(reason for _, reason in faults),
        examples=examples,
    )


def _caption_fault(caption: str) -> str:
    if len(caption) > LONGEST:
        return f"caption of more than {LONGEST:,} characters"
    return "quote that is not closed" if SWALLOWED.search(caption) else "" if caption.strip() else "empty caption"


def _caption_file(data: str | Path) -> Path:
    folder = Path(data)
    if not folder.is_dir():
        raise LabError(f"--data {data}: no such directory")
    file = next((folder / name for name in CAPTION_FILES if (folder / name).is_file()), None)
    if file is None:
        raise LabError(f"--data {data}: has neither captions.txt nor Flickr8k.token.txt")
    return file


def captions_alone(options: CaptionDataOptions, drawn: Callable[[], Path]) -> list[list[str]]:
    """Reads the captions of as many pictures as training has, opening none: for sizes, as which they are is not asked.

    Raises:
        LabError: there is no such directory or caption file.
    """
    found: dict[str, list[str]] = {}
    for _, name, caption in caption_lines(_caption_file(options.data or drawn())):
        if name is not None and caption.strip():
            found.setdefault(name, []).append(caption.strip())
    return list(found.values())[: options.limit or round((1 - 2 * ASIDE) * len(found))]


def caption_lines(file: Path) -> Iterator[tuple[int, str | None, str]]:
    """Yields the line number, picture name and text of each caption; for a bad line no name, and why it is bad.

    Raises:
        LabError: the file cannot be read, or has no columns `image` and `caption`.
    """
    raw = bytes_of(file, f"--data {file}").removeprefix(b"\xef\xbb\xbf")  # the mark with which Windows begins UTF-8
    texts: list[str] = []
    for number, line in enumerate(raw.splitlines(), 1):
        try:
            texts.append(line.decode("utf-8"))
        except UnicodeDecodeError:
            texts.append("")  # so that those after it keep their numbers
            yield number, None, "not UTF-8"
    if file.name.endswith("token.txt"):  # NAME#NUMBER, tab, caption
        for number, text in enumerate(texts, 1):
            if text:
                name, tab, caption = text.partition("\t")
                name = name.rpartition("#")[0] or name
                yield (number, name, caption) if tab else (number, None, "no tab between picture and caption")
        return
    rows = csv.reader(io.StringIO("\n".join(texts)))
    header = [cell.strip().lower() for cell in next(rows, [])]
    if "image" not in header or "caption" not in header:
        raise LabError(f"--data {file}: its first line must name the columns image,caption")
    image, text_ = header.index("image"), header.index("caption")
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error:  # it goes on after the line
            yield rows.line_num, None, f"caption of more than {LONGEST:,} characters"
            continue
        if row:
            whole = len(row) > max(image, text_)
            yield (rows.line_num, row[image], row[text_]) if whole else (rows.line_num, None, "too few columns")


def caption_splits(
    pictures: CaptionedPictures, folder: Path | None = None, seed: int = 0
) -> dict[str, CaptionedPictures]:
    """Divides into training, validation and test: by the official lists if they lie in `folder`, else by the seed.

    No picture is in two splits, neither by name nor by content: drawn, all copies of a picture go to one split; with
    lists, a copy is left out of the split that comes earlier in the order training, validation, test, and counted.

    Raises:
        LabError: a list names nothing that is there, or a split would be empty.
    """
    lists = _official(folder) if folder is not None else {}
    parts = _listed(pictures, lists) if lists else _drawn(pictures, seed)
    for name, part in parts.items():
        if not len(part):
            raise LabError(f"--data {pictures.source}: {len(pictures)} pictures leave the {name} split empty")
    return parts


def _drawn(pictures: CaptionedPictures, seed: int) -> dict[str, CaptionedPictures]:
    copies: dict[bytes, list[int]] = {}
    for place, digest in enumerate(pictures.digests):
        copies.setdefault(digest, []).append(place)
    groups = list(copies.values())
    order = np.random.default_rng([seed, 2]).permutation(len(groups))
    count = max(1, round(ASIDE * len(groups)))
    parts = {"train": order[2 * count :], "validation": order[:count], "test": order[count : 2 * count]}
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

    def levels(self, image: Image.Image) -> np.ndarray:
        """Resizes to (size, size, 3) of 0 to 255."""
        how = RESAMPLING.get(self.interpolation, Image.Resampling.BICUBIC)
        return np.asarray(image.resize((self.size, self.size), how))

    def normalised(self, levels: Sequence[np.ndarray]) -> torch.Tensor:
        """Stacks pictures to (batch, 3, size, size) as the encoder reads them."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (torch.from_numpy(np.stack(levels)).permute(0, 3, 1, 2).float() / 255 - mean) / std


@dataclass(frozen=True)
class PictureTensors:
    """The pictures of a split as tensors, decoded in threads."""

    pictures: CaptionedPictures
    transform: Transform

    def batch(self, places: Sequence[int]) -> torch.Tensor:
        """Reads pictures (places, 3, size, size) as the network takes them."""
        return self.transform.normalised(self._levels(places))

    def levels(self, places: Sequence[int]) -> torch.Tensor:
        """Reads pictures (places, 3, size, size) of 0 to 255."""
        return torch.from_numpy(np.stack(self._levels(places))).permute(0, 3, 1, 2).contiguous()

    def _levels(self, places: Sequence[int]) -> list[np.ndarray]:
        return list(decoding_threads().map(lambda place: self.transform.levels(self.pictures.image(place)), places))

    def recipe(self) -> dict[str, Any]:
        """Returns all that the tensors depend on, as JSON values."""
        return asdict(self.transform) | {"pictures": self.pictures.fingerprint()}
