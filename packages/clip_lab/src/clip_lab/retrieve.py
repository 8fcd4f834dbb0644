"""Finds pictures for sentences, captions for pictures: `python -m clip_lab.retrieve "This is a dog" --data photos`."""

from clip_lab import commands

if __name__ == "__main__":  # before the imports below: --help and a wrong option answer at once
    commands.retrieve()

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure as Canvas

from clip_lab.config import RetrieveConfig, TrainConfig
from clip_lab.data import lines_of, read_data
from clip_lab.encoder import Encoder, load_encoder
from clip_lab.index import Index, build_index, pictures_in
from labs_common.cli import config_from_yaml
from labs_common.data.captions import CaptionedPictures, read_captioned
from labs_common.data.images import BadPictureError, decoded, picture_files
from labs_common.errors import LabError
from labs_common.options import OnBadData, RunOptions
from labs_common.report.figures import printable
from labs_common.report.page import Gallery, Section, Table, Text, making_report, shown, write_report
from labs_common.report.sections import asked_section, rerun_section
from labs_common.run import Run, check_run_options

LETTERS = 200  # of a query or caption in the figure: a hundred thousand would take minutes
COLUMNS = 4  # pictures side by side in the grid
SEARCHES, TILES = 20, 48  # of the grid, and results of each: hundreds are more than a PNG can hold; the page has all


@dataclass(frozen=True)
class Result:
    """A picture, or a caption (then without a file)."""

    said: str
    score: float
    file: Path | None


@dataclass(frozen=True)
class Found:
    """A search, for a sentence or a picture, and its results, best first."""

    asked: str
    picture: Path | None
    results: list[Result]


def retrieve(config: RetrieveConfig) -> None:
    """Prints the most similar pictures and captions, and writes a grid as PNG and a page as HTML.

    Raises:
        LabError: nothing is asked for, there is nothing to search, or a picture cannot be read.
    """
    options = RunOptions(output=config.output, track="none")
    check_run_options(options)
    if not config.sentences and not config.picture:
        raise LabError('say what to look for: python -m clip_lab.retrieve "a dog on the beach", or --picture dog.jpg')
    files = picture_files(config.picture) if config.picture else []
    encoder = load_encoder(config.checkpoint)
    index, test = open_index(config.data, encoder, config.index, config.batch_size, config.on_bad_data)
    found = pictures_for(config.sentences, encoder, index, config.top, config.search) if config.sentences else []
    if files:
        captions = known_captions(config.captions, config.data, test)
        found += captions_for(files, captions, encoder, index, config.top, config.search)
    for one in found:
        print(one.asked)
        for result in one.results:
            print(f"  {result.score:.3f}  {result.said}")
    run = Run.start(config, options, "retrieve", encoder.accelerator)
    write_found(run, config, found)


def open_index(
    data: Path | None, encoder: Encoder, kept: Path | None, batch_size: int, on_bad_data: OnBadData = "skip"
) -> tuple[Index, CaptionedPictures | None]:
    """Opens the index of the folder --data; else that of the run's own test pictures, which are returned too.

    Raises:
        LabError: no data is named and the model is no run that knows its pictures; or see `build_index`.
    """
    if data is not None:
        files = pictures_in(data)
        return build_index(files, str(data.resolve()), encoder, kept, batch_size, on_bad_data), None
    file = Path(encoder.name) / "config.yaml"
    if not file.is_file():
        raise LabError(f"--checkpoint {encoder.name}: knows no pictures; name a folder of them with --data")
    trained = config_from_yaml(TrainConfig, file)
    test = read_data(trained.data, trained.run.seed, shown=False).splits["test"]
    files = [content for content in test.contents if isinstance(content, Path)]
    if len(files) < len(test):
        raise LabError(f"--checkpoint {encoder.name}: its pictures lie in tables; name a folder of some with --data")
    return build_index(files, f"test {test.fingerprint()}", encoder, kept, batch_size, on_bad_data), test


def known_captions(file: Path | None, data: Path | None, test: CaptionedPictures | None) -> list[str]:
    """Reads the sentences among which pictures find theirs: of a file with one per line, or of the data.

    Raises:
        LabError: the file cannot be read, or holds none.
    """
    if file is not None:
        return list(dict.fromkeys(lines_of(file, "--captions")))
    if test is None:
        try:
            assert data is not None
            test = read_captioned(data, "skip", shown=False)
        except LabError:
            return []  # then similar pictures are all that can be shown
    return list(dict.fromkeys(caption for of in test.captions for caption in of))


def pictures_for(sentences: Sequence[str], encoder: Encoder, index: Index, top: int, search: str) -> list[Found]:
    """Finds the most similar pictures of each sentence."""
    every = nearest(encoder.read(sentences), index, top, search)
    return [Found(sentence, None, results) for sentence, results in zip(sentences, every, strict=True)]


def captions_for(
    files: Sequence[Path], captions: Sequence[str], encoder: Encoder, index: Index, top: int, search: str
) -> list[Found]:
    """Finds the most similar captions of each picture, then the most similar pictures.

    Raises:
        LabError: a picture cannot be read.
    """
    try:
        vectors = encoder.embedded(torch.stack([encoder.view(decoded(file)) for file in files]))
    except BadPictureError as error:
        raise LabError(f"--picture: {error}") from error
    found = []
    if captions:
        every = nearest_captions(vectors, captions, encoder.read(captions), top)
        found = [Found(f"captions for {file}", file, results) for file, results in zip(files, every, strict=True)]
    alike = nearest(vectors, index, top, search)
    return found + [Found(f"pictures like {file}", file, results) for file, results in zip(files, alike, strict=True)]


def nearest(queries: torch.Tensor, index: Index, top: int, search: str = "exact") -> list[list[Result]]:
    """Finds the most similar pictures of each query (queries, width)."""

    def result(place: int, score: float) -> Result:
        return Result(str(index.files[place]), score, index.files[place])

    scores, places = index.nearest(queries, top, search)
    return [  # FAISS says -1 where it found too few
        [result(place, score) for place, score in zip(at, of, strict=True) if place >= 0]
        for at, of in zip(places.tolist(), scores.tolist(), strict=True)
    ]


def nearest_captions(
    queries: torch.Tensor, captions: Sequence[str], vectors: torch.Tensor, top: int
) -> list[list[Result]]:
    """Finds the most similar captions, which have these `vectors`, of each query (queries, width)."""
    if not captions:
        return [[] for _ in queries]
    scores, places = (queries @ vectors.T).topk(min(top, len(captions)), 1)
    return [
        [Result(captions[place], score, None) for place, score in zip(at, of, strict=True)]
        for at, of in zip(places.tolist(), scores.tolist(), strict=True)
    ]


def write_found(run: Run, config: RetrieveConfig, found: Sequence[Found]) -> None:
    """Writes results.json, grid.png and report.html into the run's directory, and prints where they are.

    The grid has the first searches and results.
    """
    run.save_json(
        "results.json",
        [{"asked": one.asked, "results": [{"found": r.said, "score": r.score} for r in one.results]} for one in found],
    )
    grid = run.path / "grid.png"
    with making_report():
        few = [replace(one, results=one.results[:TILES]) for one in found[:SEARCHES]]
        grid_figure(few).savefig(grid)
        sections = [Section(one.asked, _blocks(one)) for one in found]
        summary = f"{len(found)} searches; scores are cosines."
        page = write_report(run, "Search", summary, [*sections, asked_section(config), rerun_section(run)])
    print(f"grid: {grid}")
    print(f"page: {page}")


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
    """Draws all searches below each other, each with its pictures or captions and their scores."""
    # Rows of pictures; captions take the height of one.
    rows = [-(-len(one.results) // COLUMNS) if _has_pictures(one) else 1 for one in found]
    heights = [0.5 + 2.5 * count for count in rows]  # inches: a title, and pictures as high as their column is wide
    canvas = Canvas(figsize=(2.4 * COLUMNS, sum(heights)), layout="constrained")
    parts = canvas.subfigures(len(found), 1, height_ratios=heights, squeeze=False)
    for part, one, count in zip(parts[:, 0], found, rows, strict=True):
        part.suptitle(printable(one.asked, LETTERS), fontsize=11, fontweight="bold")
        if not _has_pictures(one):
            axes = part.subplots()
            axes.axis("off")
            lines = [f"{result.score:.3f}  {printable(result.said, LETTERS)}" for result in one.results]
            axes.text(0, 1, "\n".join(lines), va="top", fontsize=9, wrap=True)
            continue
        for place, axes in enumerate(part.subplots(count, COLUMNS, squeeze=False).flat):
            axes.axis("off")
            if place < len(one.results) and (file := one.results[place].file) is not None:
                axes.imshow(shown(decoded(file)))
                axes.set_title(f"{one.results[place].score:.3f}", fontsize=9)
    return canvas


def _has_pictures(found: Found) -> bool:
    return bool(found.results) and found.results[0].file is not None
