"""The comparison of objectives."""

import dataclasses
import json
from pathlib import Path

import pytest
from labs_testing import commands as lab_commands

from clip_lab.compare import plan
from clip_lab.config import BatchOptions, ClipTrainingOptions, CompareConfig
from labs_common.errors import LabError


def test_an_entry_of_the_comparison_becomes_a_run() -> None:
    config = CompareConfig(training=ClipTrainingOptions(epochs=5), batch=BatchOptions(chunk=7))
    (run,) = plan(dataclasses.replace(config, objectives="coca:queries=9:caption_weight=1:learning_rate=0.5")).values()
    assert (run.objective, run.head.queries, run.head.caption_weight) == ("coca", 9, 1.0)
    assert (run.training.learning_rate, run.training.epochs, run.batch.chunk) == (0.5, 5, 7)
    for wrong in ("blip", "clip:depth=3", "clip:caption_weight=1", "clip:learning_rate=nan"):
        with pytest.raises(LabError, match=f"--objectives {wrong}"):
            plan(dataclasses.replace(config, objectives=wrong))


@pytest.mark.long
def test_the_comparison_goes_on_where_it_was_stopped(scenes: Path, things: Path, tmp_path: Path) -> None:
    folder = tmp_path / "comparison"
    options = ("--data", scenes, "--image", "tiny-cnn", "--classes", things, "--epochs", "1", "--batch-size", "16",
               "--text-width", "32", "--text-layers", "1", "--ranked", "6", "--output", folder)  # fmt: skip
    lab_commands.here("clip_lab.compare", *options)
    rows = {row["objective"]: row for row in json.loads((folder / "comparison.json").read_text())["rows"]}
    assert list(rows) == ["clip", "coca", "simvlm"]
    assert "perplexity" not in rows["clip"]
    assert "R@1 by embedding" not in rows["simvlm"]
    assert {"R@1 by embedding", "R@1 by likelihood", "perplexity", "linear probe"} <= rows["coca"].keys()
    for name, writes in (("clip", False), ("coca", True), ("simvlm", True)):
        assert ("CIDEr-D" in rows[name]) == ("BLEU-4" in rows[name]) == writes
        assert "linear probe of the image tower" in rows[name]
    assert rows["clip"]["linear probe"] == rows["clip"]["linear probe of the image tower"], "both read its image tower"
    html = (folder / "report.html").read_text()
    for heading in ("Differences", "Numbers", "Five test pictures", "Curves", "Cost"):
        assert f">{heading}<" in html
    results = folder / "clip" / "seed-0" / "results.json"
    before = results.stat().st_mtime_ns
    (folder / "report.html").unlink()
    (folder / "simvlm" / "seed-0" / "results.json").unlink()
    lab_commands.here("clip_lab.compare", *options)
    assert results.stat().st_mtime_ns == before, "what was finished is not run again"
    assert (folder / "report.html").exists()
    assert "--epochs" in lab_commands.here("clip_lab.compare", *options, "--epochs", "3", code=2).stderr
