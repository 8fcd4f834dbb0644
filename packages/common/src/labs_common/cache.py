"""Directories that are made once and kept under the user's cache directory, with check sums."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from labs_common.errors import LabError

SUMS = ".check-sums.json"  # in each directory
REMEDY = "set XDG_CACHE_HOME to a directory that can be written"


def cache_directory() -> Path:
    """Returns `$XDG_CACHE_HOME/foundation-labs`, by default under ~/.cache.

    Raises:
        LabError: there is neither that variable nor a home.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "foundation-labs"
    except RuntimeError as error:  # in a container whose user has no entry in /etc/passwd
        raise LabError(f"there is no home directory for the cache: {REMEDY}") from error


def check_cache(writes: bool = False) -> None:
    """Makes the cache's directory; one that is there may be read-only unless something `writes` to it.

    Every command begins with it: other libraries keep under the same directory, or home, what they download, and each
    would say in its own words that it cannot.

    Raises:
        LabError: it cannot be made, or written.
    """
    folder = cache_directory()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if writes and not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "it cannot be written")
    except OSError as error:
        raise LabError(f"the cache {folder} cannot be used ({error.strerror}): {REMEDY}") from error
    for name in ("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "TORCH_HOME"):
        try:
            if os.environ.get(name):
                Path(os.environ[name]).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LabError(f"{name}={os.environ[name]}: cannot be used ({error.strerror}): set it to a directory that "
                           "can be written, or unset it") from error  # fmt: skip


def check_variables() -> None:
    """Refuses what no launcher says of its processes, which this and other libraries would read as a number.

    Raises:
        LabError: a variable is no number; it is named.
    """
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK", "ACCELERATE_DEEPSPEED_ZERO_STAGE"):
        if not re.fullmatch(r"-?\d{1,9}", said := os.environ.get(name, "0"), re.ASCII):
            raise LabError(f"{name}={said}: is no number; start with accelerate launch or torchrun, or unset it")


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
    What was damaged since is made again, unless the directory `changes` after `make`. Machines may share the cache: a
    move is whole on a network's file system too, and nothing is locked.

    Raises:
        LabError: the cache cannot be written, and the directory is not there.
    """
    final = cache_directory() / f"{name}-{recipe_key(recipe)}"
    check_cache()
    if final.is_dir():
        if changes or _is_whole(final):
            return final
        print(f"{final} is damaged: it is made again", file=sys.stderr, flush=True)
    check_cache(writes=True)
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


def cached_by_one(name: str, recipe: Any, make: Callable[[Path, Path], None]) -> Path:
    """Returns a directory as `cached_directory` does, for what takes minutes: one process makes it, the others wait.

    `make` gets the new directory and another for finished parts, which outlives a kill and goes when all is made. On a
    file system without locks each process makes its own, and the first wins.

    Raises:
        LabError: the cache cannot be written, and the directory is not there.
    """
    final = cache_directory() / f"{name}-{recipe_key(recipe)}"
    parts = final.with_name(f".{final.name}.parts")
    before = _identity(final)
    with contextlib.ExitStack() as until:  # the directory has its name

        def alone(folder: Path) -> None:
            parts.mkdir(exist_ok=True)
            lock = until.enter_context((parts / "lock").open("a"))
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"{final}: another process makes it, and is waited for", file=sys.stderr, flush=True)
                fcntl.lockf(lock, fcntl.LOCK_EX)
            except OSError:
                pass
            parts.mkdir(exist_ok=True)  # one that was waited for and failed takes it away
            if _identity(final) in (None, before):
                make(folder, parts)

        try:
            return cached_directory(name, recipe, alone)
        finally:
            if final.is_dir() or (parts.is_dir() and os.listdir(parts) == ["lock"]):
                shutil.rmtree(parts, ignore_errors=True)


def _identity(folder: Path) -> int | None:
    return folder.stat().st_ino if folder.exists() else None


def file_sum(path: Path) -> int:
    """Returns the CRC-32 of a file: it finds any flipped bit, at a tenth of what it costs to write the file."""
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise OSError(errno.EINVAL, "is no file", str(path))
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc


def files_in(folder: Path) -> list[str]:
    """Lists the paths of all files in `folder` but that of the sums."""
    files = (path for path in folder.rglob("*") if path.is_file() and path != folder / SUMS)
    return sorted(path.relative_to(folder).as_posix() for path in files)


def _check_sums(folder: Path) -> dict[str, int]:
    return {name: file_sum(folder / name) for name in files_in(folder)}


def _is_whole(folder: Path) -> bool:
    """Says whether every file is as it was made."""
    try:
        made = json.loads((folder / SUMS).read_text(encoding="utf-8"))
        return all(file_sum(folder / name) == crc for name, crc in made.items())
    except (OSError, ValueError, AttributeError):  # of sums that are no mapping
        return False
