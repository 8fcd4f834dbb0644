"""Embeddings of a folder's pictures on disk: only new and changed pictures are computed again.

An index is a directory: `vectors.safetensors` (pictures, width), `pictures.json` with each one's path, size and time of
change, and, after a search with FAISS, `inverted.faiss`. It is written in one move. While a large one is made, small
ones beside it hold what is done so far, so that a kill loses the last few pictures only.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from clip_lab.encoder import Encoder
from labs_common.cache import cache_directory, check_cache, file_sum, recipe_key
from labs_common.data.images import SUFFIXES, BadPictureError, decoded, decoding_threads, first_of
from labs_common.errors import LabError, json_of, reason_of
from labs_common.lock import locked
from labs_common.options import OnBadData
from labs_common.progress import console, tracked
from labs_common.run import written_whole

# Of an inverted file: lists per root of the pictures, of which FAISS's guide gives 4 as the least; how many of them are
# searched; pictures that FAISS wants to learn a list from, else it warns.
LISTS, PROBES, PER_LIST = 4, 32, 39
ADDED = 8192  # vectors that FAISS sorts into lists at once, between two looks at the progress
PART = 1024  # pictures that are embedded between two writes: a minute or so of a ViT-B on a CPU
OWN = ("pictures.json", "vectors.safetensors", "inverted.faiss", "inverted.part")  # files of an index


@dataclass(frozen=True)
class Index:
    """Pictures and their embeddings.

    Attributes:
        files: their paths.
        vectors: of length 1 (pictures, width).
        folder: the directory that it is kept in.
    """

    files: tuple[Path, ...]
    vectors: torch.Tensor
    folder: Path

    def nearest(self, queries: torch.Tensor, top: int, search: str = "exact") -> tuple[torch.Tensor, torch.Tensor]:
        """Finds the most similar pictures: their scores and places (queries, top), best first.

        Raises:
            LabError: FAISS is asked for and not installed.
        """
        top = min(top, len(self.files))
        if search == "exact":
            scores, places = (queries @ self.vectors.T).topk(top, 1)
            return scores, places
        scores, places = self.inverted.search(queries.numpy(), top)
        return torch.from_numpy(scores), torch.from_numpy(places)

    @cached_property
    def inverted(self) -> Any:
        """Reads FAISS's inverted file of the vectors from disk, or makes it now."""
        try:
            import faiss  # an extra
        except ImportError as error:
            raise LabError("--search faiss: needs FAISS; install the extra clip-lab[faiss]") from error
        file = self.folder / "inverted.faiss"
        found: Any = None
        if file.is_file():
            with contextlib.suppress(RuntimeError):  # a damaged one is made again
                found = faiss.read_index(str(file))
        if found is None:
            count, width = self.vectors.shape
            lists = max(1, min(round(LISTS * count**0.5), count // PER_LIST))
            found = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, lists, faiss.METRIC_INNER_PRODUCT)
            found.train(self.vectors.numpy())
            parts = self.vectors.split(ADDED)
            for vectors in tracked(parts, "sorting pictures into FAISS's lists", len(parts), len(parts) > 1):
                found.add(vectors.numpy())
            part = file.with_suffix(".part")
            faiss.write_index(found, str(part))
            part.replace(file)
        found.nprobe = PROBES
        return found


def pictures_in(folder: Path) -> list[Path]:
    """Lists all pictures in a folder and its folders.

    Raises:
        LabError: there is no such folder, or none in it.
    """
    if not folder.is_dir():
        raise LabError(f"--data {folder}: no such directory")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if not files:
        raise LabError(f"--data {folder}: holds no pictures")
    return files


def build_index(
    files: Sequence[Path], name: str, encoder: Encoder, kept: Path | None, batch_size: int, on_bad_data: OnBadData
) -> Index:
    """Builds the index of these pictures: reads what is kept of it and computes the rest.

    `name` says which pictures they are; `kept` is --index, by default a directory in the user's cache.

    Raises:
        LabError: some cannot be read and `on_bad_data` says so, or none can; the index is of another model; or another
            process makes it.
    """
    recipe = encoder.recipe()
    where = kept or cache_directory() / f"index-{recipe_key([recipe, name])}"
    # Of one that was not finished, with the same model.
    parts = where.with_name(f".{where.name}-{recipe_key(recipe)}.parts")
    stamps = {file: _stamp(file) for file in files}
    known, done = _read(where, recipe, f"--index {kept}" if kept else ""), list[Path]()

    def unknown() -> list[Path]:
        return [file for file in files if str(file) not in known or known[str(file)][0] != stamps[file]]

    def clear() -> None:
        if not done:
            shutil.rmtree(parts, ignore_errors=True)

    with contextlib.ExitStack() as until:
        if missing := unknown():
            if kept is None:
                check_cache(writes=True)  # before everything is embedded in vain
            parts.mkdir(parents=True, exist_ok=True)
            if trouble := locked(parts, until):
                raise LabError(f"{name} is being indexed: {trouble}")
            until.callback(clear)  # of what is ours, and before another process gets the lock
            done = sorted(parts.glob("[0-9]*"))
            for folder in done:
                known |= _read(folder, recipe, "")
            missing = unknown()
        every = {file: known[str(file)][1] for file in set(files).difference(missing)}
        bad: list[str] = []
        unwritten: dict[Path, torch.Tensor] = {}
        for found, unreadable in _embedded(missing, encoder, batch_size):
            every |= found
            unwritten |= found
            bad += unreadable
            if len(unwritten) >= PART:
                part, unwritten = unwritten, {}
                done.append(parts / f"{len(done):06d}")
                _write(done[-1], recipe, [(file, stamps[file]) for file in part], torch.stack([*part.values()]))
        if bad:
            _say_bad(name, bad, on_bad_data, len(bad) == len(files))
        there = tuple(file for file in files if file in every)
        index = Index(there, torch.stack([every[file] for file in there]), where)
        if done or len(missing) > len(bad) or len(there) != len(known):
            _write(where, recipe, [(file, stamps[file]) for file in there], index.vectors)
            done = []
            console.print(f"index: {len(there):,} pictures in {where} ({len(missing) - len(bad):,} computed now)")
    return index


def _embedded(
    files: Sequence[Path], encoder: Encoder, batch_size: int
) -> Iterator[tuple[dict[Path, torch.Tensor], list[str]]]:
    """Embeds files, a batch after the other: the vector of each, and a line on each that could not be read."""

    def seen(file: Path) -> torch.Tensor | str:
        try:
            return encoder.view(decoded(file))
        except BadPictureError as error:
            return f"{file}: {error}"

    starts = range(0, len(files), batch_size)
    for first in tracked(starts, "embedding pictures", len(starts), len(starts) > 1):
        batch = files[first : first + batch_size]
        outcomes = dict(zip(batch, decoding_threads().map(seen, batch), strict=True))
        good = {file: one for file, one in outcomes.items() if isinstance(one, torch.Tensor)}
        vectors = encoder.embedded(torch.stack([*good.values()])) if good else torch.empty(0)
        yield dict(zip(good, vectors, strict=True)), [one for one in outcomes.values() if isinstance(one, str)]


def _say_bad(name: str, bad: Sequence[str], on_bad_data: OnBadData, all_of_them: bool) -> None:
    said = first_of(bad)
    if on_bad_data == "error" or all_of_them:
        raise LabError(f"--data {name}: {said}; --on-bad-data skip leaves out what cannot be read")
    console.print(f"left out {len(bad)} pictures that cannot be read: {said}")


def _stamp(file: Path) -> list[int]:
    """Tells a changed file by its size and time of change: reading all of it would take as long as embedding."""
    known = file.stat()
    return [known.st_size, known.st_mtime_ns]


def _read(where: Path, recipe: dict[str, Any], option: str) -> dict[str, tuple[list[int], torch.Tensor]]:
    """Reads what is kept: stamp and vector of each file."""
    if not (where / "pictures.json").is_file():
        if option and where.exists() and any(where.iterdir()):
            raise LabError(f"{option}: is not empty and no index; name another directory")
        return {}
    if more := sorted(file.name for file in where.iterdir() if file.name not in OWN):  # an index is written as a whole
        raise LabError(f"{option or where}: holds {more[0]}, which is no part of an index; move it elsewhere")
    try:
        known = json_of(where / "pictures.json", "pictures.json")
        pictures = {str(file): list(stamp) for file, stamp in known["pictures"]}
        vectors, made_by = load_file(where / "vectors.safetensors")["vectors"], known["recipe"]
        if known.get("sum", now := file_sum(where / "vectors.safetensors")) != now:  # earlier versions kept none
            raise LabError("its vectors were changed")
        if len(vectors) != len(pictures):
            raise LabError(f"{len(pictures)} pictures, {len(vectors)} vectors")
    except (LabError, OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        said = f"the index cannot be read ({reason_of(error)}); delete it"
        raise LabError(f"{option or where}: {said}") from error
    if made_by != json.loads(json.dumps(recipe)):
        raise LabError(
            f"{option or where}: was made by another model, or on another device or by other versions; name "
            "another directory, or delete it"
        )
    return {file: (stamp, vector) for (file, stamp), vector in zip(pictures.items(), vectors, strict=True)}


def _write(where: Path, recipe: dict[str, Any], there: Sequence[tuple[Path, list[int]]], vectors: torch.Tensor) -> None:
    where.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(where) as part:
        save_file({"vectors": vectors.contiguous()}, part / "vectors.safetensors")
        crc = file_sum(part / "vectors.safetensors")
        said = {"recipe": recipe, "sum": crc, "pictures": [[str(file), stamp] for file, stamp in there]}
        (part / "pictures.json").write_text(json.dumps(said), encoding="utf-8")
