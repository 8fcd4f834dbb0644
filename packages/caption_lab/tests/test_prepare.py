import json
from pathlib import Path

from labs_testing import commands as lab_commands


def test_prepare(scenes: Path, tmp_path: Path) -> None:
    run = tmp_path / "prepared"
    lab_commands.here("caption_lab.prepare", "--data", scenes, "--vocabulary-size", "12", "--output", run)
    found = json.loads((run / "statistics.json").read_text())
    assert found["pictures"] == 60
    assert found["captions"] == 300
    assert 0 < found["unknown words, test"] < 0.5
    html = (run / "report.html").read_text()
    for said in ("&lt;start&gt;", "20 most frequent words", "Lengths", "copies of pictures"):
        assert said in html
    assert {"vocabulary.json", "tokenizer.json", "splits.json"} <= {path.name for path in run.iterdir()}
