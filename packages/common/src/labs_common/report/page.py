"""One HTML file that needs no network: sections of text, tables, figures and code."""

import base64
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jinja2
from PIL import Image

from labs_common.cli import making_again
from labs_common.errors import LabError, RunStopped, reason_of
from labs_common.run import Run, write_atomically


@dataclass
class Text:
    """A paragraph; right-to-left when it begins in Persian."""

    text: str


@dataclass
class Table:
    """Rows under column names. Numbers stand right and are grouped; text goes the way of its own script."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""
    folded: bool = False
    """Behind a line that opens it."""


@dataclass
class Figure:
    """An SVG of labs_common.report.figures and what it shows."""

    svg: str
    caption: str


@dataclass
class Gallery:
    """Pictures side by side, each with a line below it."""

    pictures: Sequence[tuple[Image.Image, str]]
    caption: str


@dataclass
class Code:
    """A command or a file, as it is typed."""

    text: str


@dataclass
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: list[Text | Table | Figure | Gallery | Code] = field(default_factory=list)


@contextmanager
def making_report(again: str | None = None) -> Iterator[None]:
    """Turns whatever goes wrong with a report into one line: the results are on disk, and `again` says what to do.

    Without it, the command is named that makes the report again.

    Raises:
        RunStopped: instead of any other error.
    """
    try:
        yield
    except Exception as error:  # of a picture, a name, a font: nothing of it may look as if the work were lost
        said = reason_of(error) if isinstance(error, LabError) else f"{type(error).__name__}: {reason_of(error)}"
        raise RunStopped(f"the report cannot be made ({said}); all else is saved: {again or making_again()}") from error


def write_report(run: Run, title: str, summary: str, sections: Sequence[Section]) -> str:
    """Writes report.html into the run's directory in one move and returns its path."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("labs_common.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["cell"] = _cell
    environment.filters["picture"] = _picture
    environment.tests["numeric"] = lambda value: isinstance(value, (int, float)) and not isinstance(value, bool)
    page = environment.get_template("page.html").render(title=title, summary=summary, sections=sections)
    path = run.path / "report.html"
    if run.is_main:
        write_atomically(path, page)
    return str(path)


def save_figure(run: Run, name: str, svg: str) -> str:
    """Keeps a figure of the report under `figures/NAME.svg` too, black on transparent; returns the SVG."""
    if run.is_main:
        (run.path / "figures").mkdir(exist_ok=True)
        write_atomically(run.path / "figures" / f"{name}.svg", svg.replace("currentColor", "#000000"))
    return svg


def shown(image: Image.Image, side: int = 200) -> Image.Image:
    """Resizes a picture as a report wants it; very small ones keep their edges."""
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST if scale > 2 else Image.Resampling.BICUBIC)


def _picture(image: Image.Image) -> str:
    """Writes the picture as a URL that holds it."""
    stream = io.BytesIO()
    image.save(stream, "png")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float) and 0.001 <= abs(value) < 1000:
        return f"{value:.3f}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)
