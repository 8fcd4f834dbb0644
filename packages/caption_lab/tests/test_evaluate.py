import json
from pathlib import Path

import pytest
from labs_testing import commands as lab_commands


def test_evaluate_command(finished: Path, scenes: Path, tmp_path: Path) -> None:
    def said(*arguments: object, code: int = 0) -> lab_commands.Done:
        return lab_commands.here("caption_lab.evaluate", "--checkpoint", finished, *arguments, code=code)

    said("--beams", "1,3", "--output", tmp_path / "own")
    found = json.loads((tmp_path / "own" / "evaluation.json").read_text())
    results = json.loads((finished / "results.json").read_text())
    assert found["by beam"]["3"] == pytest.approx(results["test"]["metrics"]), "the run's own test pictures again"
    assert "Beam widths" in (tmp_path / "own" / "report.html").read_text()
    said("--beams", "1", "--data", scenes, "--split", "all", "--output", tmp_path / "all")
    assert json.loads((tmp_path / "all" / "evaluation.json").read_text())["pictures"] == 60
    assert "--beams" in said("--beams", "none", code=2).stderr
