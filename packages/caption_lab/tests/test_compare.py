"""The comparison: its plan and the command."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from labs_testing import commands as lab_commands

from caption_lab.compare import plan
from caption_lab.config import CaptionTrainingOptions, CompareConfig
from caption_lab.report import PUBLISHED
from labs_common.errors import LabError
from labs_common.options import CaptionDataOptions


def test_an_entry_becomes_a_run_with_its_own_options() -> None:
    config = CompareConfig(data=CaptionDataOptions(limit=30), training=CaptionTrainingOptions(label_smoothing=0.2))
    spec = "transformer:mask_words=0.1:encoder=resnet18:no-pretrained:learning_rate=0.5"
    run = plan(replace(config, models=spec))[spec]
    assert (run.model, run.encoder.encoder, run.encoder.pretrained) == ("transformer", "resnet18", False)
    assert (run.decoder.mask_words, run.training.learning_rate, run.training.label_smoothing) == (0.1, 0.5, 0.2)
    assert run.data.limit == 30
    for wrong in ("lstm", "show_tell:mask_words=0.1", "transformer:depth=3", "transformer:mask_words=2"):
        with pytest.raises(LabError, match=f"--models {wrong}"):
            plan(replace(config, models=wrong))


@pytest.mark.long
def test_the_command_goes_on_where_it_was_stopped(scenes: Path, tmp_path: Path) -> None:
    folder = tmp_path / "comparison"
    options = ("--data", scenes, "--epochs", "2", "--batch-size", "32", "--models",
               "show_tell:no-pretrained:width=32,transformer:no-pretrained:width=32", "--output", folder)  # fmt: skip
    done = lab_commands.here("caption_lab.compare", *options)
    assert f"report: {folder / 'report.html'}" in done.stdout
    first = folder / "show_tell-no-pretrained-width=32" / "seed-0" / "results.json"
    results = [json.loads(file.read_text()) for file in folder.glob("*/seed-0/results.json")]
    assert len(results) == 2
    assert len({(result["cost"]["steps"], result["cost"]["captions"]) for result in results}) == 1, "one budget"
    html = (folder / "report.html").read_text(encoding="utf-8")
    for heading in (
        "Numbers",
        "What is true",
        "Beside the papers",
        "Five test pictures",
        "Where they looked",
        "Curves",
    ):
        assert f">{heading}<" in html
    assert "same number of epochs" in html
    assert all(name in html for name in PUBLISHED)
    before, saved = first.stat().st_mtime_ns, (folder / "comparison.json").read_bytes()
    (folder / "transformer-no-pretrained-width=32" / "seed-0" / "results.json").unlink()
    (folder / "report.html").unlink()
    lab_commands.here("caption_lab.compare", *options)
    assert first.stat().st_mtime_ns == before, "what was finished is not run again"
    assert (folder / "report.html").exists()
    rows, again = (json.loads(text)["rows"] for text in (saved, (folder / "comparison.json").read_bytes()))
    assert [row["CIDEr-D"] for row in rows] == [row["CIDEr-D"] for row in again]
    assert "--epochs" in lab_commands.here("caption_lab.compare", *options, "--epochs", "3", code=2).stderr


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("--models", "lstm"), "lstm"),
        (("--models", "show_tell,show_tell"), "occurs twice"),
        (("--models", "show_tell:encoder=resnt18"), "resnet18"),
        (("--data", "missing"), "missing"),
        (("--seeds", "0"), "--seeds"),
        (("--launch", "missing.yaml"), "--launch"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[str, ...], names: str, scenes: Path, tmp_path: Path) -> None:
    filled = [*arguments]
    filled += [] if "--models" in filled else ["--models", "show_tell:no-pretrained"]
    filled += [] if "--data" in filled else ["--data", str(scenes)]
    done = lab_commands.here("caption_lab.compare", *filled, "--output", tmp_path / "out", code=2)
    assert len(done.errors) == 1, done.stderr
    assert names in done.errors[0]
    assert not (tmp_path / "out").exists(), "nothing is left behind"
