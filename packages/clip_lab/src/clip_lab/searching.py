"""What a search finds, and the pages and pictures that show it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure as Canvas

from clip_lab.encoder import Encoder
from clip_lab.index import Index
from labs_common.data.images import BadPictureError, decoded
from labs_common.errors import LabError
from labs_common.report import Gallery, Section, Table, Text, asked_section, rerun_section, write_report
from labs_common.report.captioned import shown
from labs_common.run import Run

COLUMNS = 4


@dataclass(frozen=True)
class Result:
    """A picture, or a caption (then without a file)."""

    said: str
    score: float
    file: Path | None


@dataclass(frozen=True)
class Found:
    """What was asked, as a sentence or a picture, and what is most like it."""

    asked: str
    picture: Path | None
    results: list[Result]


def pictures_for(sentences: Sequence[str], encoder: Encoder, index: Index, top: int, search: str) -> list[Found]:
    """The most similar pictures of each sentence."""
    return [Found(sentence, None, results) for sentence, results in zip(
        sentences, _nearest(encoder.read(sentences), index, top, search), strict=True)]  # fmt: skip


def captions_for(
    files: Sequence[Path], captions: Sequence[str], encoder: Encoder, index: Index, top: int, search: str
) -> list[Found]:
    """The most similar captions of each picture, then the most similar pictures.

    Raises:
        LabError: a picture cannot be read.
    """
    try:
        vectors = encoder.embedded(torch.stack([encoder.view(decoded(file)) for file in files]))
    except BadPictureError as error:
        raise LabError(f"--picture: {error}") from error
    found = []
    if captions:
        scores, places = (vectors @ encoder.read(captions).T).topk(min(top, len(captions)), 1)
        for file, of_file, at in zip(files, scores.tolist(), places.tolist(), strict=True):
            results = [Result(captions[place], score, None) for score, place in zip(of_file, at, strict=True)]
            found.append(Found(f"captions for {file}", file, results))
    for file, results in zip(files, _nearest(vectors, index, top, search), strict=True):
        found.append(Found(f"pictures like {file}", file, results))
    return found


def _nearest(queries: torch.Tensor, index: Index, top: int, search: str) -> list[list[Result]]:
    scores, places = index.nearest(queries, top, search)
    return [
        [Result(str(index.files[place]), score, index.files[place]) for score, place in zip(of, at, strict=True)
         if place >= 0]
        for of, at in zip(scores.tolist(), places.tolist(), strict=True)
    ]  # fmt: skip


def write_found(run: Run, config: Any, found: Sequence[Found]) -> tuple[str, str]:
    """Writes grid.png and report.html into the run's directory; returns their paths. Also results.json."""
    grid = run.path / "grid.png"
    grid_figure(found).savefig(grid)
    run.save_json(
        "results.json",
        [{"asked": one.asked, "results": [{"found": r.said, "score": r.score} for r in one.results]} for one in found],
    )
    sections = [Section(one.asked, _blocks(one)) for one in found]
    summary = f"{len(found)} searches; scores are cosines."
    page = write_report(run, "Search", summary, [*sections, asked_section(config), rerun_section(run)])
    return str(grid), page


def _blocks(found: Found) -> list[Any]:
    blocks: list[Any] = []
    if found.picture is not None:
        blocks.append(Gallery([(shown(decoded(found.picture)), found.picture.name)], ""))
    if found.results and found.results[0].file is None:
        return [*blocks, Table(("caption", "cosine"), [(result.said, result.score) for result in found.results])]
    tiles = [
        (shown(decoded(result.file)), f"{result.score:.3f} {result.file.name}")
        for result in found.results
        if result.file
    ]
    return [*blocks, Gallery(tiles, "") if tiles else Text("Nothing found.")]


def grid_figure(found: Sequence[Found]) -> Canvas:
    """All searches below each other, each with its pictures or captions and their scores."""
    rows = [1 + -(-len(one.results) // COLUMNS) if _has_pictures(one) else 2 for one in found]
    canvas = Canvas(figsize=(2.4 * COLUMNS, sum(0.5 + 2.5 * (row - 1) for row in rows)), layout="constrained")
    parts = canvas.subfigures(len(found), 1, height_ratios=[0.5 + 2.5 * (row - 1) for row in rows], squeeze=False)
    for part, one in zip(parts[:, 0], found, strict=True):
        part.suptitle(_plain(one.asked), fontsize=11, fontweight="bold")
        if not _has_pictures(one):
            axes = part.subplots()
            axes.axis("off")
            lines = [f"{result.score:.3f}  {_plain(result.said)}" for result in one.results]
            axes.text(0, 1, "\n".join(lines), va="top", fontsize=9, wrap=True)
            continue
        height = -(-len(one.results) // COLUMNS)
        for place, axes in enumerate(part.subplots(height, COLUMNS, squeeze=False).flat):
            axes.axis("off")
            if place < len(one.results) and (file := one.results[place].file) is not None:
                axes.imshow(shown(decoded(file)))
                axes.set_title(f"{one.results[place].score:.3f}", fontsize=9)
    return canvas


def _has_pictures(found: Found) -> bool:
    return bool(found.results) and found.results[0].file is not None


def _plain(said: str) -> str:
    """Text as matplotlib should show it: a dollar is no formula."""
    return said.replace("$", r"\$")
