"""Picture files, decoded with Pillow: bombs are refused, broken files are named."""

import glob
import hashlib
import io
import os
import struct
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from labs_common.errors import LabError
from labs_common.progress import tracked

MOST_PIXELS = 64_000_000  # a picture that claims more is taken for a decompression bomb
NAMED = 5  # how many bad pictures an error names
# As timm names them.
RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"})


class BadPictureError(Exception):
    """A picture that cannot be used; the message says why, without its name."""


def decoded(content: bytes | Path | np.ndarray, upright: bool = True) -> Image.Image:
    """The picture in RGB, turned as its camera says; from a file, the bytes of one, or levels (height, width, 3).

    Without `upright` it stays as it is stored.

    Raises:
        BadPictureError: the file is missing, empty, truncated, no picture, or claims more than 64 megapixels.
    """
    if isinstance(content, np.ndarray):
        return Image.fromarray(content)
    source = io.BytesIO(content) if isinstance(content, bytes) else content
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(source) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise BadPictureError(f"{image.width} × {image.height} pixels, more than {MOST_PIXELS:,}")
                if image.mode.startswith("I;16"):  # Pillow would clip 16 bits to 8
                    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
                return (ImageOps.exif_transpose(image) if upright else image).convert("RGB")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadPictureError("decompression bomb: claims far more pixels than a picture has") from error
    except FileNotFoundError as error:
        raise BadPictureError("no such file") from error
    except Image.UnidentifiedImageError as error:
        raise BadPictureError("empty" if _size(content) == 0 else "no picture that Pillow knows") from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        raise BadPictureError(f"truncated or broken ({str(error).splitlines()[0]})") from error


@cache
def decoding_threads() -> ThreadPoolExecutor:
    """Threads in which pictures are decoded and resized: Pillow does both without the interpreter's lock."""
    return ThreadPoolExecutor(max(2, os.cpu_count() or 2), "decoding")


def picture_files(named: Sequence[str]) -> list[Path]:
    """The files that are named: themselves, those of a directory, those that fit a pattern; each once.

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


def _size(content: bytes | Path) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def named_picture(content: np.ndarray | bytes | Path, source: str, name: str) -> Image.Image:
    """The picture in RGB.

    Raises:
        LabError: it cannot be decoded; it is named.
    """
    try:
        return decoded(content)
    except BadPictureError as error:
        raise LabError(f"--data {source}: {name}: {error}") from error


def examined(contents: Sequence[np.ndarray | bytes | Path], task: str, shown: bool = True) -> list[tuple[bytes, str]]:
    """Each content's hash, and why it cannot be used ("" if it can); decoded in threads."""
    with ThreadPoolExecutor(max(2, os.cpu_count() or 2)) as pool:
        return list(tracked(pool.map(_examined, contents), task, len(contents), shown))


def refusal(source: str, faults: Sequence[tuple[str, str]], remedy: str, total: int = 0) -> str:
    """The line that names the first of the faults, each a name and a reason, and the remedy."""
    named = "; ".join(f"{name}: {reason}" for name, reason in faults[:NAMED])
    more = f" and {len(faults) - NAMED} more" if len(faults) > NAMED else ""
    of = f"{len(faults)} of {total} pictures" if total else f"{len(faults)} captions or pictures"
    return f"--data {source}: {of} cannot be used: {named}{more}; {remedy}"


def digests_of(digests: Sequence[bytes]) -> str:
    """Twenty-four hexadecimal digits that change with any of the digests or their order."""
    return hashlib.blake2b(b"".join(digests), digest_size=12).hexdigest()


def _examined(content: np.ndarray | bytes | Path) -> tuple[bytes, str]:
    """The content's hash, and why it cannot be used ("" if it can)."""
    try:
        data = content.read_bytes() if isinstance(content, Path) else content
    except OSError as error:
        return b"", error.strerror or "cannot be read"
    raw = np.ascontiguousarray(data).data if isinstance(data, np.ndarray) else data
    digest = hashlib.blake2b(raw, digest_size=16).digest()
    try:
        decoded(data)
    except BadPictureError as error:
        return digest, str(error)
    return digest, ""
