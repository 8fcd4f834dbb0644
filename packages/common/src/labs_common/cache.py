"""What is made once and kept under the user's cache directory."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def cache_directory() -> Path:
    """`$XDG_CACHE_HOME/foundation-labs`, by default under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "foundation-labs"


def path_name(model: str) -> str:
    """A model's id or directory as a part of a file name: google/gemma-2-2b gives google-gemma-2-2b."""
    return model.strip("./").replace("/", "-")


def recipe_key(recipe: Any) -> str:
    """Twelve hexadecimal digits that change with anything in `recipe` (JSON values)."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]


def cached_directory(name: str, recipe: Any, make: Callable[[Path], None]) -> Path:
    """The directory that `make` filled for this `recipe`, now or in an earlier process.

    `make` writes into a new directory that takes its final name in one move at the end, so that one
    interrupted half-way leaves nothing, and of two processes that make the same one the first wins.
    """
    final = cache_directory() / f"{name}-{recipe_key(recipe)}"
    if final.is_dir():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    try:
        make(part)
        try:
            part.rename(final)
        except OSError:
            if not final.is_dir():
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return final
