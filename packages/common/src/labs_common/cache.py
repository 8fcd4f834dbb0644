"""Directories that are made once and kept under the user's cache directory, with check sums."""

import hashlib
import json
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

SUMS = ".check-sums.json"  # in each directory


def cache_directory() -> Path:
    """Returns `$XDG_CACHE_HOME/foundation-labs`, by default under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "foundation-labs"


def path_name(model: str) -> str:
    """Makes a model's id or directory a part of a file name: google/gemma-2-2b gives google-gemma-2-2b.

    Of a long one the end is kept: a file's name may have 255 bytes.
    """
    return model.strip("./").replace("/", "-").encode(errors="replace")[-120:].decode(errors="ignore")


def recipe_key(recipe: Any) -> str:
    """Returns 12 hexadecimal digits that change with anything in `recipe` (JSON values)."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]


def cached_directory(name: str, recipe: Any, make: Callable[[Path], None], changes: bool = False) -> Path:
    """Returns the directory that `make` filled for this `recipe`, now or in an earlier process.

    `make` writes into a new directory that takes its final name in one move at the end, so that one
    interrupted half-way leaves nothing, and of two processes that make the same one the first wins.
    What was damaged since is made again, unless the directory `changes` after `make`.
    """
    final = cache_directory() / f"{name}-{recipe_key(recipe)}"
    if final.is_dir():
        if changes or _is_whole(final):
            return final
        print(f"{final} is damaged: it is made again", file=sys.stderr, flush=True)
    final.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    damaged = part.with_name(f"{part.name}.damaged")
    try:
        make(part)
        if not changes:
            (part / SUMS).write_text(json.dumps(_check_sums(part)), encoding="utf-8")
            if final.is_dir() and not _is_whole(final):
                final.rename(damaged)
        try:
            part.rename(final)
        except OSError:
            if not final.is_dir():  # else another process was first, and made the same
                raise
    finally:
        for left in (part, damaged):
            shutil.rmtree(left, ignore_errors=True)
    return final


def _check_sums(folder: Path) -> dict[str, int]:
    """Returns the CRC-32 of every file but that of the sums, by its path in `folder`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / SUMS)
    return {path.relative_to(folder).as_posix(): zlib.crc32(path.read_bytes()) for path in files}


def _is_whole(folder: Path) -> bool:
    """Says whether every file is as it was made."""
    try:
        made = json.loads((folder / SUMS).read_text(encoding="utf-8"))
        return all(zlib.crc32((folder / name).read_bytes()) == crc for name, crc in made.items())
    except FileNotFoundError as error:
        return Path(error.filename) == folder / SUMS  # made before there were sums
    except (OSError, ValueError):
        return False
