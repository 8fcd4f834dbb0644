"""The comparison: its plan and the command."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from labs_testing import commands as lab_commands

from caption_lab.compare import equal_to, judges_of, plan
from caption_lab.config import CaptionTrainingOptions, CompareConfig
from caption_lab.data import read_data
from caption_lab.report import PUBLISHED, published_section
from labs_common.caption_metrics import caption_words
from labs_common.data.captions import CaptionedPictures
from labs_common.errors import LabError
from labs_common.options import CaptionDataOptions
from labs_common.report.page import Table


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


def test_each_seeds_captions_are_judged_by_its_own_pictures(scenes: Path) -> None:
    """Without lists every seed has other test pictures: true captions of seed 1's are nothing beside seed 0's."""
    config = CompareConfig(data=CaptionDataOptions(data=str(scenes)))
    tests = {seed: read_data(config.data, seed, shown=False).splits["test"] for seed in (0, 1)}
    assert set(tests[0].names) != set(tests[1].names)
    true = {seed: [its[0] for its in test.captions] for seed, test in tests.items()}
    captions = {"true": true, "wrong": {0: true[1], 1: true[0]}}
    judges = judges_of(config, tests[0], (0, 1))
    assert equal_to("true", captions, judges) == ["true"]
    assert min(judges[1].scores([*map(caption_words, true[1])], range(6))) > 1


@pytest.mark.parametrize(
    ("count", "divided", "split", "drawn", "beside"),
    [
        (1000, "by the official lists", "test", False, True),
        (1000, "as Karpathy's dataset_flickr8k.json says", "test", False, True),
        (1000, "by the official lists", "train", False, False),
        (1000, "by the official lists", "test", True, False),
        (125, "by the official lists", "test", False, False),
        (1000, "as Karpathy's dataset_coco.json says", "test", False, False),
        (1000, "validation and test drawn with seed 0, 10% of the pictures each", "test", False, False),
    ],
)
def test_published_figures_stand_beside_the_same_pictures_alone(
    count: int, divided: str, split: str, drawn: bool, beside: bool
) -> None:
    names = [str(number) for number in range(count)]
    pictures = CaptionedPictures(
        source="here", contents=names, names=names, captions=(("a",),) * count, divided=divided
    )
    ours = {"ours": {"bleu-1": 50.0, "bleu-4": 20.0, "length-ratio": 0.9}}
    tables = [block for block in published_section(ours, pictures, split, drawn).blocks if isinstance(block, Table)]
    assert [[row[0] for row in table.rows] for table in tables] == (
        [["ours", *PUBLISHED]] if beside else [["ours"], [*PUBLISHED]]
    )
    assert all(len(row) == len(table.columns) for table in tables for row in table.rows)
    assert beside or (f"split: {split}" in tables[0].caption and "Not to be compared" in tables[1].caption)


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
