"""Picture files, decoded with Pillow: bombs are refused, broken files are named."""

import glob
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

MOST_PIXELS = 64_000_000  # a picture that claims more is taken for a decompression bomb
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
