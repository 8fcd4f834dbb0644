import json
from pathlib import Path

import pytest
from labs_testing import commands as lab_commands

from caption_lab.compare import scorer_notes
from caption_lab.config import EvaluateConfig
from caption_lab.evaluate import _shown
from labs_common.caption_metrics import SCORER
from labs_common.compare.collect import Entry
from labs_common.options import DecodingOptions


@pytest.mark.alone
def test_evaluate_command(finished: Path, scenes: Path, tmp_path: Path) -> None:
    def said(*arguments: object, code: int = 0) -> lab_commands.Done:
        return lab_commands.here("caption_lab.evaluate", "--checkpoint", finished, *arguments, code=code)

    said("--beams", "1,3", "--output", tmp_path / "own")
    found = json.loads((tmp_path / "own" / "evaluation.json").read_text())
    results = json.loads((finished / "results.json").read_text())
    assert found["by beam"]["3"] == pytest.approx(results["test"]["metrics"]), "the run's own test pictures again"
    assert (tmp_path / "own" / "captions.json").read_bytes() == (finished / "captions.json").read_bytes()
    assert "What follows is of beam 3" in (tmp_path / "own" / "report.html").read_text()
    assert found["scorer"] == results["test"]["scorer"] == SCORER
    beams = (([1, 5], 3, 1, 1), ([1, 3], 3, 3, 3), ([1, 3], 3, 1, 1), ([1, 3, 5], 5, 1, 5))
    for widths, asked, of_run, shown in beams:  # whatever their scores
        (tmp_path / "config.yaml").write_text(f"decoding:\n  beam: {of_run}\n")
        assert _shown(EvaluateConfig(decoding=DecodingOptions(beam=asked)), widths, tmp_path) == shown
    said("--beams", "1", "--data", scenes, "--split", "all", "--output", tmp_path / "all")
    assert json.loads((tmp_path / "all" / "evaluation.json").read_text())["pictures"] == 60
    assert "--beams" in said("--beams", "none", code=2).stderr
    assert "--prompt: works with a released model only" in said("--prompt", "a", code=2).errors[0]


def test_pictures_that_a_run_learnt_from_are_not_its_test(
    options: tuple[object, ...], scenes: Path, tmp_path: Path
) -> None:
    """Without lists the seed divides: a run with --seed 1 has other test pictures than one with --seed 0."""
    run, out = tmp_path / "run", tmp_path / "out"
    lab_commands.here("caption_lab.train", *options, "--max-steps", "1", "--seed", "1", "--no-report", "--output", run)
    said = ("--checkpoint", run / "model", "--data", scenes, "--beams", "1", "--output", out)
    refused = lab_commands.here("caption_lab.evaluate", *said, "--seed", "0", code=2).errors
    assert len(refused) == 1
    assert "of these 6 pictures; divide them as it did: --seed 1" in refused[0]
    lab_commands.here("caption_lab.evaluate", *said)
    splits, asked = (json.loads((run / "splits.json").read_text()), json.loads((out / "captions.json").read_text()))
    assert [row["image"] for row in asked] == splits["test"]["pictures"]
    scst = ("--model", "show_attend_tell", "--objective", "scst", "--data", scenes, "--output", tmp_path / "scst")
    refused = lab_commands.here("caption_lab.train", *scst, "--start", run, code=2).errors
    assert len(refused) == 1
    assert f"--start {run}: was trained on" in refused[0]


def test_scores_of_an_earlier_version_are_marked() -> None:
    def entry(name: str, *scorers: str | None) -> Entry:
        results = {seed: {"test": {} if one is None else {"scorer": one}} for seed, one in enumerate(scorers)}
        return Entry(name, {}, results)

    new, old = entry("new", SCORER, SCORER), entry("old", SCORER, None)
    assert scorer_notes({"new": new}) == []
    (note,) = scorer_notes({"new": new, "old": old})
    assert note.text.startswith("old: scored by an earlier version")
