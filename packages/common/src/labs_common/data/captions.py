"""Pictures with sentences about them: Flickr8k in both published forms, checked once, split by picture."""

import csv
import io
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from labs_common.data.images import (
    NAMED,
    RESAMPLING,
    SUFFIXES,
    decoding_threads,
    digests_of,
    examined,
    named_picture,
    refusal,
)
from labs_common.data.splits import print_left_out
from labs_common.errors import LabError
from labs_common.options import CaptionDataOptions, OnBadData
from labs_common.scenes import Scene

PICTURE_FOLDERS = ("Images", "Flicker8k_Dataset", "Flickr8k_Dataset", "images")
CAPTION_FILES = ("captions.txt", "Flickr8k.token.txt", "Flickr8k_text/Flickr8k.token.txt", "captions.csv")
LISTS = {
    "train": "Flickr_8k.trainImages.txt",
    "validation": "Flickr_8k.devImages.txt",
    "test": "Flickr_8k.testImages.txt",
}


@dataclass(frozen=True)
class CaptionedPictures:
    """Pictures with one or more sentences each.

    Attributes:
        source: where they are from, for messages and reports.
        captions: the sentences of each picture.
        contents: where each picture lies.
        names: their file names.
        digests: a hash of each one's content.
        left_out: reasons why something was left out, with counts; `examples` names the first of them.
    """

    source: str
    captions: tuple[tuple[str, ...], ...]
    contents: tuple[Path, ...]
    names: tuple[str, ...]
    digests: tuple[bytes, ...]
    left_out: Counter[str] = field(default_factory=Counter)
    examples: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def image(self, place: int) -> Image.Image:
        """Picture `place` in RGB.

        Raises:
            LabError: it cannot be decoded; it is named.
        """
        return named_picture(self.contents[place], self.source, self.names[place])

    def subset(self, places: Sequence[int] | np.ndarray) -> "CaptionedPictures":
        """The pictures at these places, in this order."""
        chosen = [int(place) for place in places]
        return replace(
            self,
            captions=tuple(self.captions[place] for place in chosen),
            contents=tuple(self.contents[place] for place in chosen),
            names=tuple(self.names[place] for place in chosen),
            digests=tuple(self.digests[place] for place in chosen),
        )

    def fingerprint(self) -> str:
        """Twenty-four hexadecimal digits that change with any picture or their order (captions do not count)."""
        return digests_of(self.digests)


def read_captioned(data: str | Path, on_bad_data: OnBadData = "error", shown: bool = True) -> CaptionedPictures:
    """Reads a directory with pictures and `captions.txt` (CSV `image,caption`) or `Flickr8k.token.txt` (tabs).

    The pictures lie in `Images`, in `Flicker8k_Dataset` as the first form has it, or beside the file. Every picture is
    decoded once. Captions of which the picture is missing, pictures without captions, empty captions and lines that
    are not UTF-8 are faults of the data as broken pictures are.

    Raises:
        LabError: there is no such directory or caption file; or some of it cannot be used and `on_bad_data` is
            "error" (the first five are named), or nothing can.
    """
    folder = Path(data)
    if not folder.is_dir():
        raise LabError(f"--data {data}: no such directory")
    file = next((folder / name for name in CAPTION_FILES if (folder / name).is_file()), None)
    if file is None:
        raise LabError(f"--data {data}: has neither captions.txt nor Flickr8k.token.txt")
    pictures = next((folder / name for name in PICTURE_FOLDERS if (folder / name).is_dir()), folder)
    faults: list[tuple[str, str]] = []  # what, why
    sentences: dict[str, list[str]] = {}
    for line, name, sentence in caption_lines(file):
        if name is None:
            faults.append((f"{file.name}:{line}", sentence))
        elif not sentence.strip():
            faults.append((f"{file.name}:{line}", "empty caption"))
        else:
            sentences.setdefault(name, []).append(sentence.strip())
    there = {path.name: path for path in sorted(pictures.iterdir()) if path.suffix.lower() in SUFFIXES}
    faults += [(name, "captions without a picture") for name in sentences if name not in there]
    faults += [(name, "picture without captions") for name in there if name not in sentences]
    names = [name for name in there if name in sentences]
    outcomes = examined([there[name] for name in names], f"checking {data}", shown)
    faults += [(name, reason) for name, (_, reason) in zip(names, outcomes, strict=True) if reason]
    if faults and on_bad_data == "error":
        raise LabError(refusal(str(data), faults, "add --on-bad-data skip to leave them out"))
    kept = [(name, digest) for name, (digest, reason) in zip(names, outcomes, strict=True) if not reason]
    if not kept:
        raise LabError(f"--data {data}: no picture with a caption can be used" + (
            f": {faults[0][0]}: {faults[0][1]}" if faults else ""))  # fmt: skip
    return CaptionedPictures(
        str(data),
        tuple(tuple(sentences[name]) for name, _ in kept),
        tuple(there[name] for name, _ in kept),
        tuple(name for name, _ in kept),
        tuple(digest for _, digest in kept),
        Counter(reason for _, reason in faults),
        tuple(f"{what}: {why}" for what, why in faults[:NAMED]),
    )


def caption_lines(file: Path) -> Iterator[tuple[int, str | None, str]]:
    """The line number, picture name and sentence of each caption; for a bad line no name, and why.

    Raises:
        LabError: the file cannot be read, or has no columns `image` and `caption`.
    """
    try:
        raw = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise LabError(f"--data {file}: {error.strerror or 'cannot be read'}") from error
    texts: list[str] = []
    for number, line in enumerate(raw.splitlines(), 1):
        try:
            texts.append(line.decode("utf-8"))
        except UnicodeDecodeError:
            texts.append("")
            yield number, None, "not UTF-8"
    if file.name.endswith("token.txt"):
        for number, text in enumerate(texts, 1):
            if text:
                name, tab, sentence = text.partition("\t")
                found = name.rpartition("#")[0] or name
                yield (number, found, sentence) if tab else (number, None, "no tab between picture and caption")
        return
    rows = csv.reader(io.StringIO("\n".join(texts)))
    header = [cell.strip().lower() for cell in next(rows, [])]
    if "image" not in header or "caption" not in header:
        raise LabError(f"--data {file}: its first line must name the columns image,caption")
    image, caption = header.index("image"), header.index("caption")
    for row in rows:
        if row:
            whole = len(row) > max(image, caption)
            yield (rows.line_num, row[image], row[caption]) if whole else (rows.line_num, None, "too few columns")


def caption_splits(
    pictures: CaptionedPictures, folder: Path | None = None, shares: tuple[float, float] = (0.1, 0.1), seed: int = 0
) -> dict[str, CaptionedPictures]:
    """Training, validation and test pictures: by the official lists if they lie in `folder`, else drawn by the seed.

    `shares` are those of validation and test. No picture is in two splits, neither by name nor by content: drawn, all
    copies of a picture go to one split; with lists, a copy is left out of the split that comes earlier in the order
    training, validation, test, and counted.

    Raises:
        LabError: a list names nothing that is there, or a split would be empty.
    """
    lists = _official(folder) if folder is not None else {}
    if lists:
        parts = _listed(pictures, lists)
    else:
        groups: dict[bytes, list[int]] = {}
        for place, digest in enumerate(pictures.digests):
            groups.setdefault(digest, []).append(place)
        order = np.random.default_rng([seed, 2]).permutation(len(groups))
        members = list(groups.values())
        counts = [max(1, round(share * len(groups))) for share in shares]
        ends = {"validation": counts[0], "test": counts[0] + counts[1], "train": len(groups)}
        first, places = 0, {}
        for name, end in ends.items():
            places[name] = sorted(place for group in order[first:end] for place in members[group])
            first = end
        parts = {name: pictures.subset(places[name]) for name in LISTS}
    for name, part in parts.items():
        if not len(part):
            raise LabError(f"--data {pictures.source}: {len(pictures)} pictures leave the {name} split empty")
    return parts


def _official(folder: Path) -> dict[str, set[str]]:
    found = {}
    for split, name in LISTS.items():
        file = next((path for path in (folder / name, folder / "Flickr8k_text" / name) if path.is_file()), None)
        if file is not None:
            found[split] = set(file.read_text(encoding="utf-8", errors="replace").split())
    if found and len(found) < len(LISTS):
        missing = ", ".join(LISTS[split] for split in LISTS if split not in found)
        raise LabError(f"--data {folder}: of the lists of pictures {missing} is missing; add it, or remove the others")
    return found


def _listed(pictures: CaptionedPictures, lists: Mapping[str, set[str]]) -> dict[str, CaptionedPictures]:
    taken_names: set[str] = set()
    taken_digests: set[bytes] = set()
    parts = {}
    twice = Counter[str]()
    for split in reversed(LISTS):  # the test first: it loses nothing
        places = []
        for place, (name, digest) in enumerate(zip(pictures.names, pictures.digests, strict=True)):
            if name not in lists[split]:
                continue
            if name in taken_names or digest in taken_digests:
                twice[f"in {split} and in a later split too"] += 1
            else:
                places.append(place)
        parts[split] = pictures.subset(places)
        taken_names |= set(parts[split].names)
        taken_digests |= set(parts[split].digests)
    if twice:
        parts = {split: replace(part, left_out=part.left_out + twice) for split, part in parts.items()}
    return {split: parts[split] for split in LISTS}


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
        """(size, size, 3) of 0 to 255."""
        how = RESAMPLING.get(self.interpolation, Image.Resampling.BICUBIC)
        return np.asarray(image.resize((self.size, self.size), how))

    def normalised(self, levels: Sequence[np.ndarray]) -> torch.Tensor:
        """Pictures (batch, 3, size, size) as the encoder reads them."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (torch.from_numpy(np.stack(levels)).permute(0, 3, 1, 2).float() / 255 - mean) / std


@dataclass(frozen=True)
class PictureTensors:
    """The pictures of a split as tensors, decoded in threads."""

    pictures: CaptionedPictures
    transform: Transform

    def batch(self, places: Sequence[int]) -> torch.Tensor:
        """Pictures (places, 3, size, size) as the network reads them."""
        return self.transform.normalised(self._levels(places))

    def levels(self, places: Sequence[int]) -> torch.Tensor:
        """Pictures (places, 3, size, size) of 0 to 255."""
        return torch.from_numpy(np.stack(self._levels(places))).permute(0, 3, 1, 2).contiguous()

    def _levels(self, places: Sequence[int]) -> list[np.ndarray]:
        return list(decoding_threads().map(lambda place: self.transform.levels(self.pictures.image(place)), places))

    def recipe(self) -> dict[str, Any]:
        """All that the tensors depend on, as JSON values."""
        return asdict(self.transform) | {"pictures": self.pictures.fingerprint()}


@dataclass(frozen=True)
class Captions:
    """The three splits, and what drawn pictures show.

    Attributes:
        splits: by name.
        truth: the scene of each picture by its name; empty for photographs.
    """

    splits: dict[str, CaptionedPictures]
    truth: dict[str, Scene]

    @property
    def left_out(self) -> dict[str, int]:
        """How many pictures and captions were left out, by reason."""
        return dict(self.splits["train"].left_out)


def read_captions(options: CaptionDataOptions, seed: int, shown: bool, drawn: Callable[[], Path]) -> Captions:
    """Training, validation and test pictures, every one decoded once; what was left out is printed if `shown`.

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
        splits = {name: at_most(part, most[name], seed) for name, part in splits.items()}
    if shown:
        print_left_out(splits)
    return Captions(splits, truth_of(folder, list(splits.values())))


def truth_of(folder: Path, parts: Sequence[CaptionedPictures]) -> dict[str, Scene]:
    """What the pictures show, where that is known."""
    from labs_common.scenes.files import read_truth

    known = read_truth(folder)
    return {name: known[name] for part in parts for name in part.names if name in known}


def at_most(pictures: CaptionedPictures, count: int, seed: int) -> CaptionedPictures:
    """`count` of the pictures by chance, in their order, or all if there are no more."""
    if len(pictures) <= count:
        return pictures
    return pictures.subset(np.sort(np.random.default_rng([seed, 3]).permutation(len(pictures))[:count]))
