"""A report as pages, read back by another library: PDFium, which Chromium shows PDFs with."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from labs_common.errors import LabError
from labs_common.report.figures import curve_figure
from labs_common.report.page import Figure, Gallery, Section, Table, Text, write_report
from labs_common.report.pdf import PdfConfig, pages, pdf
from labs_common.run import Run


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = Run(tmp_path_factory.mktemp("report"))
    figure = Figure(curve_figure({"a": ([1, 2], [3.0, 4.0])}, "step", "loss"), "A curve.")
    gallery = Gallery([(Image.new("RGB", (40, 40), (255, 0, 0)), "red")], "Pictures.")
    folded = Table(("option",), [("hidden-option",)], "every option", folded=True)
    sections = [
        Section("Curves", [figure, gallery]),
        Section("سؤال‌ها", [Text("مدل پاسخ را می‌نویسد."), Table(("model", "n"), [("lora", 3)]), folded]),
    ]
    write_report(run, "A title", "A summary.", sections)
    return run.path


def test_pages_have_a_cover_contents_numbers_and_persian_from_the_right(report: Path) -> None:
    pdfium = pytest.importorskip("pypdfium2")
    pytest.importorskip("weasyprint", exc_type=(ImportError, OSError), reason="WeasyPrint, or its library Pango")
    before = {path.name for path in report.iterdir()}
    pdf(PdfConfig(run=report, author="Sara <Ahmadi>", course="Deep learning, 3"))
    assert {path.name for path in report.iterdir()} - before == {"report.pdf"}
    document = pdfium.PdfDocument(report / "report.pdf")
    cover, contents, body = (document[place].get_textpage().get_text_bounded() for place in range(len(document)))
    assert "A title" in cover
    assert "Sara <Ahmadi>" in cover
    assert "1 / 3" not in cover
    assert "2 / 3" in contents
    assert [line.split(".")[-1].strip() for line in contents.splitlines() if line.startswith("Curves")] == ["3"]
    assert all(said in body for said in ("Figure 1. A curve.", "Figure 2. Pictures.", "Table 1", "3 / 3")), body
    assert "hidden-option" not in body
    drawn = np.asarray(document[2].render(scale=1).to_pil().convert("RGB")).astype(int)
    assert ((drawn[..., 0] > 200) & (drawn[..., 1] < 50)).sum() > 1000, "the red picture"
    text = document[2].get_textpage()
    place = text.search("پاسخ").get_next()
    left, *_ = text.get_charbox(place[0])
    assert left > document[2].get_width() / 2, "a Persian line begins on the right"


def test_what_a_report_names_is_not_fetched(tmp_path: Path) -> None:
    pytest.importorskip("weasyprint", exc_type=(ImportError, OSError), reason="WeasyPrint, or its library Pango")
    pdfium = pytest.importorskip("pypdfium2")
    Image.new("RGB", (300, 300), (255, 0, 0)).save(tmp_path / "secret.png")
    page = f'<h1>Title</h1><img src="{(tmp_path / "secret.png").as_uri()}">'
    document = pdfium.PdfDocument(pages(page))
    for sheet in document:
        drawn = np.asarray(sheet.render(scale=1).to_pil().convert("RGB")).astype(int)
        assert not ((drawn[..., 0] > 200) & (drawn[..., 1] < 50)).any()


def test_what_is_missing_is_one_line(report: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LabError, match=r"no report is there"):
        pdf(PdfConfig(run=tmp_path))
    monkeypatch.setitem(sys.modules, "weasyprint", None)
    with pytest.raises(LabError, match=r"pip install 'labs-common\[pdf\]'"):
        pdf(PdfConfig(run=report))


def test_a_report_that_cannot_be_read_or_written_is_one_line(report: Path, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_bytes("<h1>é</h1>".encode("latin-1"))
    with pytest.raises(LabError, match=r"is not UTF-8"):
        pdf(PdfConfig(run=tmp_path))
    for output in (Path(), Path("/"), tmp_path):
        with pytest.raises(LabError, match=r"is no file that could be written"):
            pdf(PdfConfig(run=report, output=output))
