"""A report as pages to hand in: `python -m labs_common.report RUN` writes report.pdf beside report.html."""

import html
import re
import unicodedata
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import tyro

from labs_common.errors import LabError, reason_of, text_of
from labs_common.options import CommandOptions
from labs_common.run import check_file, write_atomically


@dataclass
class PdfConfig:
    """Turns a report into a PDF: a cover, contents with page numbers, numbered figures and tables.

    What report.html folds away (all options, versions) is left out.
    """

    run: tyro.conf.Positional[Path] = Path("report.html")
    """Directory of a finished run, comparison or evaluation, or its report.html."""
    output: Path | None = None
    """Where the PDF goes; by default report.pdf beside the report. One that is there is replaced."""
    title: str = ""
    """On the cover; by default the report's own."""
    author: str = ""
    """Your name, on the cover."""
    student_number: str = ""
    """Your number, on the cover."""
    course: str = ""
    """The course and exercise, on the cover."""
    date: str = ""
    """The date, as it should be read, on the cover."""
    command: CommandOptions = field(default_factory=CommandOptions)


def pdf(config: PdfConfig) -> None:
    """Runs the command.

    Raises:
        LabError: there is no report, the extra is not installed, or the PDF cannot be written there.
    """
    report = config.run / "report.html" if config.run.is_dir() else config.run
    if not report.is_file():
        raise LabError(f"{report}: no report is there; name the directory of a finished run, or its report.html")
    target = config.output or report.with_suffix(".pdf")
    lines = (config.author, config.student_number, config.course, config.date)
    check_file(target)
    content = pages(text_of(report, str(report)), config.title, [line for line in lines if line])
    try:
        write_atomically(target, content)
    except OSError as error:
        raise LabError(f"--output {target}: cannot be written ({reason_of(error)})") from error
    print(f"report: {target}")


def pages(page: str, title: str = "", lines: list[str] | None = None) -> bytes:
    """Returns the PDF of a report's HTML, with a cover of its title and these lines.

    Raises:
        LabError: WeasyPrint, or the Pango that it draws text with, is not installed.
    """
    try:
        import weasyprint  # of an extra
    except ImportError as error:
        raise LabError("a PDF needs WeasyPrint: pip install 'labs-common[pdf]'") from error
    except OSError as error:
        raise LabError(
            f"a PDF needs the library Pango (Debian: apt install libpango-1.0-0): {reason_of(error)}"
        ) from error
    before, heading, rest = page.partition("<h1")
    own = rest.partition(">")[2].partition("</h1>")[0]
    said = "".join(f'<p dir="auto">{html.escape(line)}</p>' for line in lines or ())
    cover = f'<div class="cover"><h1 dir="auto">{html.escape(title) or own}</h1>{said}</div>'
    style = resources.files("labs_common.report").joinpath("templates/pages.css").read_text(encoding="utf-8")
    # A report holds all that it shows: whatever else it names, perhaps out of data, is not fetched.
    fetcher = weasyprint.urls.URLFetcher(allowed_protocols=["data"])
    text = re.sub(r'dir="auto"([^>]*>)([^<]*)', _directed, f"{before}{cover}{heading}{rest}")
    document = weasyprint.HTML(string=text, url_fetcher=fetcher)
    try:
        return document.write_pdf(stylesheets=[weasyprint.CSS(string=style)])
    except RecursionError as error:
        raise LabError("the report's elements lie too deep in one another for WeasyPrint; is it a report?") from error


def _directed(found: re.Match[str]) -> str:
    """Says which way a text goes, by its first letter, as browsers find out by themselves."""
    letters = (unicodedata.bidirectional(letter) for letter in html.unescape(found[2]))
    way = next((kind for kind in letters if kind in ("L", "R", "AL")), "L")
    return f'dir="{"ltr" if way == "L" else "rtl"}"{found[1]}{found[2]}'
