"""A report with one of everything, in a browser; and that what is wrong is found."""

from pathlib import Path

from labs_testing.browser import faults_of
from PIL import Image

from labs_common.report.page import Code, Gallery, Section, Table, Text, write_report
from labs_common.run import Run


def test_a_report_of_everything_has_no_faults_and_a_bad_page_has(tmp_path: Path) -> None:
    words = "این یک جملهٔ فارسی است. " * 12
    many = Table(
        [f"column {n}" for n in range(14)], [[f"word {n}", *[1000.5 * n - i for i in range(13)]] for n in range(9)]
    )
    sections = [
        Section(
            "متن", [Text(words), Table(["پرسش", "answer", "score"], [[words, "in English", 3], ["کوتاه", words, 12]])]
        ),
        Section("Wide", [many, Code("python -m a.very.long.command " + "--option value " * 40)]),
        Section("Pictures", [Gallery([(Image.new("RGB", (32, 32), "red"), words)] * 9, "Small ones.")]),
    ]
    run = Run(tmp_path / "run")
    run.path.mkdir()
    write_report(run, "A report of everything, with a title that is long enough for two lines", words, sections)
    assert faults_of([run.path / "report.html"]) == []

    bad = tmp_path / "bad.html"
    bad.write_text("""<body style="background:#fff;color:#ddd"><p dir="auto" style="direction:ltr">سلام</p>
        <p style="width:3000px">wide</p><img src="http://127.0.0.1:9/none.png"><script>nothing.there</script>""")
    found = "\n".join(faults_of([bad]))
    for fault in ("cut off", "left to right", "contrast", "broken", "request: http", "script:"):
        assert fault in found
