"""Pictures, decoded with Pillow, and sets of them: checked once, bad files named, splits recorded with a run."""

import contextlib
import glob
import hashlib
import io
import json
import os
import re
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Self, TypeVar

import numpy as np
from PIL import Image, ImageOps
from PIL import __version__ as PILLOW

from labs_common.cache import cache_directory, recipe_key
from labs_common.device import one_torch_thread
from labs_common.errors import LabError, reason_of
from labs_common.options import OnBadData
from labs_common.progress import console, print_left_out, tracked
from labs_common.run import Run

MOST_PIXELS = 64_000_000  # beyond the largest cameras; a picture that claims more is taken for a decompression bomb
NAMED = 5  # how many bad pictures an error names: enough to see a pattern, in a line that can still be read
# The names are timm's.
RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
SETTLED = 2.0  # seconds after a change
SPECIAL = "is a directory, pipe or device"
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"})

Content = np.ndarray | bytes | Path  # levels (height, width, 3) of 0 to 255; the bytes of a picture file; its path
PicturesType = TypeVar("PicturesType", bound="Pictures")


class BadPictureError(Exception):
    """A picture that cannot be used; the message says why, without its name."""


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """A set of pictures, in memory or on disk. What else is known of each picture, a subclass adds.

    Attributes:
        source: where they are from, for messages and reports.
        contents: what each was stored as.
        names: a name for each, for messages and for the record of the splits.
        digests: a hash of each one's content, after `checked`.
        left_out: reasons why pictures were left out, with counts.
        examples: the first of those left out, each with its reason.
    """

    source: str
    contents: Sequence[Content]
    names: Sequence[str]
    digests: tuple[bytes, ...] = ()
    left_out: Counter[str] = field(default_factory=Counter)
    examples: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def image(self, place: int) -> Image.Image:
        """Reads picture `place` in RGB.

        Raises:
            LabError: it cannot be decoded; it is named.
        """
        try:
            return decoded(self.contents[place])
        except BadPictureError as error:
            raise LabError(f"--data {self.source}: {self.names[place]}: {error}") from error

    def fault(self, place: int) -> str:
        """Says why picture `place` cannot be used although it can be decoded; nothing if it can."""
        return ""

    def subset(self, places: Sequence[int] | np.ndarray) -> Self:
        """Takes the pictures at these places, in this order."""
        return replace(
            self,
            contents=tuple(self.contents[place] for place in places),
            names=tuple(self.names[place] for place in places),
            digests=tuple(self.digests[place] for place in places) if self.digests else (),
        )

    def at_most(self, count: int, seed: int) -> Self:
        """Takes `count` of the pictures by chance, in their order, or all if there are no more."""
        if len(self) <= count:
            return self
        return self.subset(np.sort(np.random.default_rng([seed, 3]).permutation(len(self))[:count]))

    def fingerprint(self) -> str:
        """Returns 24 hexadecimal digits that change with any picture or their order, but not with labels or captions.

        Raises:
            ValueError: the pictures have not been `checked`, which computes their digests.
        """
        if len(self.digests) != len(self):
            raise ValueError("pictures have a fingerprint only after checked()")
        return digests_of(self.digests)


def checked(pictures: PicturesType, on_bad_data: OnBadData, shown: bool = True) -> PicturesType:
    """Decodes every picture once and hashes it, in threads; returns those that can be used.

    Raises:
        LabError: some cannot and `on_bad_data` is "error" (the first five are named), or none can.
    """
    if len(pictures) == 0:
        raise LabError(f"--data {pictures.source}: holds no pictures")
    outcomes = examined(pictures.contents, f"checking {pictures.source}", shown)
    reasons = [reason or pictures.fault(place) for place, (_, reason) in enumerate(outcomes)]
    bad = [(name, reason) for name, reason in zip(pictures.names, reasons, strict=True) if reason]
    pictures = replace(pictures, digests=tuple(digest for digest, _ in outcomes))
    if not bad:
        return pictures
    if on_bad_data == "error" or len(bad) == len(pictures):
        remedy = "mend them, or leave them out with --on-bad-data skip" if len(bad) < len(pictures) else "none is left"
        raise LabError(refusal(pictures.source, bad, remedy, len(pictures)))
    return replace(
        pictures.subset([place for place, reason in enumerate(reasons) if not reason]),
        left_out=pictures.left_out + Counter(reason for _, reason in bad),
        examples=tuple(f"{name}: {reason}" for name, reason in bad[:NAMED]),
    )


def within(name: object, *folders: Path) -> Path:
    """Returns the file `name` of the first of `folders`: what data name must lie in one of them, links followed.

    Raises:
        BadPictureError: it lies elsewhere, climbs by `..` with either separator, or is no name of a file.
    """
    try:
        file = folders[0] / os.fsdecode(os.fsencode(name))  # type: ignore[arg-type]
        parent, last = os.path.split(file)
        real = os.path.realpath(file) if os.path.islink(file) else os.path.join(_real_path(parent), last)
        climbs = ".." in re.split(r"[/\\]", str(name)) or "\0" in str(name)
        if not climbs and any(real.startswith(_real_path(str(folder)) + os.sep) for folder in folders):
            return file
    except (TypeError, ValueError):  # no text, or none that a file can be called
        pass
    raise BadPictureError("lies outside of the data's directory; copy it there")


@cache
def _real_path(folder: str) -> str:
    return os.path.realpath(folder)


def examined(contents: Sequence[Content], task: str, shown: bool = True) -> list[tuple[bytes, str]]:
    """Returns each content's hash, and why it cannot be used ("" if it can); decoded in threads.

    What could be decoded is remembered in the cache: a file is opened again only after it changed.
    """
    first = [os.path.abspath(content) for content in contents[:1] if isinstance(content, Path)]
    record = cache_directory() / "checked-pictures" / f"{recipe_key([task, *first, PILLOW])}.json"
    known: dict[str, str] = {}
    # It is not there, or damaged.
    with contextlib.suppress(OSError, ValueError, AttributeError, TypeError, RecursionError):
        known = {str(key): str(bytes.fromhex(digest).hex()) for key, digest in json.loads(record.read_text()).items()}
    work = decoding_threads().map(partial(_examined, known), contents)
    found = list(tracked(work, task, len(contents), shown))
    good = {key: digest.hex() for key, digest, reason in found if key and not reason}
    if good != known:
        with contextlib.suppress(OSError):  # a cache that cannot be written costs the time to check again
            record.parent.mkdir(parents=True, exist_ok=True)
            part = record.with_suffix(f".{os.getpid()}")
            part.write_text(json.dumps(good), encoding="ascii")
            part.replace(record)
    return [(digest, reason) for _, digest, reason in found]


def _examined(known: Mapping[str, str], content: Content) -> tuple[str, bytes, str]:
    """Returns also the key under which the content may be remembered, "" if it may not."""
    key = ""
    try:
        if isinstance(content, Path):
            if _is_special(content):
                return "", b"", SPECIAL
            now, file = time.time(), content.stat()
            # One that was changed just now could be changed again within the same tick of its file system's clock.
            if now - file.st_ctime > SETTLED:
                key = recipe_key([os.path.abspath(content), file.st_size, file.st_mtime_ns, file.st_ctime_ns])
                if key in known:
                    return key, bytes.fromhex(known[key]), ""
        data = content.read_bytes() if isinstance(content, Path) else content
    except OSError as error:
        return "", b"", error.strerror or "cannot be read"
    except ValueError:  # a NUL, or half a character
        return "", b"", "has a name that no file can have"
    raw = np.ascontiguousarray(data).data if isinstance(data, np.ndarray) else data
    digest = hashlib.blake2b(raw, digest_size=16).digest()
    key = digest.hex() if isinstance(content, bytes) else key
    try:
        if key not in known:
            decoded(data)
    except BadPictureError as error:
        return "", digest, str(error)
    return key, digest, ""


def _is_special(path: Path) -> bool:
    """Says whether it is there and no file: a pipe would be waited for, and a device never ends."""
    return os.path.exists(path) and not path.is_file()  # Path.exists raises for a name that is too long


def refusal(source: str, faults: Sequence[tuple[str, str]], remedy: str, total: int = 0) -> str:
    """Writes the line that names the first of the faults, each a name and a reason, and the remedy."""
    named = first_of([f"{name}: {reason}" for name, reason in faults])
    of = f"{len(faults)} of {total} pictures" if total else f"{len(faults)} captions or pictures"
    return f"--data {source}: {of} cannot be used: {named}; {remedy}"


def first_of(faults: Sequence[str]) -> str:
    """Joins the first faults, and says how many more there are."""
    return "; ".join(faults[:NAMED]) + (f" and {len(faults) - NAMED} more" if len(faults) > NAMED else "")


def digests_of(digests: Sequence[bytes]) -> str:
    """Returns 24 hexadecimal digits that change with any of the digests or their order."""
    return hashlib.blake2b(b"".join(digests), digest_size=12).hexdigest()


def decoded(content: Content, upright: bool = True) -> Image.Image:
    """Decodes a picture to RGB, turned as its camera says; without `upright` it stays as it is stored.

    Raises:
        BadPictureError: the file is missing, empty, truncated, no picture, or claims more than 64 megapixels.
    """
    if isinstance(content, np.ndarray):
        return Image.fromarray(content)
    source = io.BytesIO(content) if isinstance(content, bytes) else content
    if isinstance(source, Path) and _is_special(source):
        raise BadPictureError(SPECIAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(source) as image:
                if image.format == "EPS":  # Pillow would have Ghostscript run it
                    raise BadPictureError("is a PostScript program")
                if image.width * image.height > MOST_PIXELS:
                    raise BadPictureError(f"{image.width} × {image.height} pixels, more than {MOST_PIXELS:,}")
                if image.mode.startswith("I;16"):  # Pillow would clip 16 bits to 8
                    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
                return (ImageOps.exif_transpose(image) if upright else image).convert("RGB")
    except BadPictureError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadPictureError("decompression bomb: claims far more pixels than a picture has") from error
    except FileNotFoundError as error:
        raise BadPictureError("no such file") from error
    except Image.UnidentifiedImageError as error:
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        raise BadPictureError("no picture that Pillow knows" if size else "empty") from error
    except Exception as error:  # the decoders of the many formats raise many kinds
        raise BadPictureError(f"truncated or broken ({reason_of(error)})") from error


@cache
def decoding_threads() -> ThreadPoolExecutor:
    """Returns threads in which pictures are decoded and resized: Pillow does both without the interpreter's lock."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2
    # The processes of a machine share what a scheduler gave to all of them.
    count = max(2, allowed // (int(os.environ.get("LOCAL_WORLD_SIZE", "1")) or 1))
    return ThreadPoolExecutor(count, "decoding", one_torch_thread)


def picture_files(named: Sequence[str]) -> list[Path]:
    """Finds the files that are named: themselves, those of a directory, those that fit a pattern; each once.

    Raises:
        LabError: a name stands for nothing.
    """
    if not named:
        raise LabError("name pictures: files, directories or patterns")
    found: dict[Path, None] = {}
    for name in named:
        path = Path(name)
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        elif path.exists():
            files = [path]
        else:
            files = sorted(map(Path, glob.glob(name, recursive=True)))
        if not files:
            raise LabError(f"{name}: " + ("no picture in that directory" if path.is_dir() else "no such file"))
        found |= dict.fromkeys(files)
    return list(found)


def readable(files: Sequence[Path], on_bad_data: OnBadData) -> list[tuple[Path, Image.Image]]:
    """Decodes files one by one; prints which ones are left out.

    Raises:
        LabError: some cannot be read and `on_bad_data` is "error" (the first five are named), or none can.
    """
    images: list[tuple[Path, Image.Image]] = []
    faults: list[str] = []
    for file in files:
        try:
            images.append((file, decoded(file)))
        except BadPictureError as error:
            faults.append(f"{file}: {error}")
    if faults and (on_bad_data == "error" or not images):
        raise LabError(f"{first_of(faults)}; add --on-bad-data skip to leave out what cannot be read")
    for fault in faults:
        console.print(f"left out {fault}")
    return images


Splits = Mapping[str, Pictures]  # by their names: train, validation, test


def record_splits(run: Run, splits: Splits) -> None:
    """Writes which picture is in which split to splits.json; of labels and captions the checkpoints keep a sum.

    Raises:
        LabError: the run is being resumed, and its pictures were others.
    """
    now = {name: {"fingerprint": part.fingerprint(), "pictures": list(part.names)} for name, part in splits.items()}
    said = [(list(getattr(part, "labels", ())), getattr(part, "captions", ())) for part in splits.values()]
    run.data = zlib.crc32(repr(said).encode())
    before = run.load_json("splits.json") if run.resumed else None
    if before is None:
        if (run.path / "checkpoints").exists() and run.is_main:
            console.print(f"{run.path / 'splits.json'} is missing: the pictures are taken as they are now")
        run.save_json("splits.json", now)
    elif before != now:
        known = before if isinstance(before, dict) else {}
        changed = next((name for name in splits if known.get(name) != now[name]), "recorded")
        raise LabError(
            f"--resume {run.path}: the {changed} pictures have changed since the run began; bring them back or start a "
            "new run"
        )


def print_refused(splits: Splits) -> None:
    """Prints what was left out of each source: how much by reason, and the first few by name."""
    for source, pictures in {part.source: part for part in splits.values() if part.left_out}.items():
        print_left_out(source, pictures.left_out, pictures.examples)
