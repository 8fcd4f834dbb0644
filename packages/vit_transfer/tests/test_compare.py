"""The comparison: its plan, its rules and the command."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from labs_testing import commands as lab_commands

from labs_common.compare.collect import Entry, collect
from labs_common.compare.plan import slug
from labs_common.data.classes import LabelledPictures
from labs_common.errors import LabError
from labs_common.run import Run
from vit_transfer.compare import (
    best_of_kind,
    findings,
    hard_pictures,
    kind,
    paper_section,
    plan,
    recommended,
    within_noise,
)
from vit_transfer.config import CompareConfig, DataOptions


class Comparison:
    """The runs of a comparison, written to a directory."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.names, self.seeds = folder, [], 0

    def add(
        self, name: str, model: str, right: list[int], trainable: int, pretrained: bool = True, last: bool = False
    ) -> None:
        """A network that got so many of each seed's ten pictures `right`: the first ones, or the `last`."""
        self.names.append(name)
        self.seeds = max(self.seeds, len(right))
        for seed, count in enumerate(right):
            run = Run(self.folder / slug(name) / f"seed-{seed}")
            run.path.mkdir(parents=True)
            marks = (np.arange(10) < count)[:: -1 if last else 1]
            run.save_json("predictions.json", {"said": marks.astype(int).tolist(), "labels": [1] * 10})
            run.append("metrics.jsonl", {"step": 5, "epoch": 1.0, "loss": 1.0})
            run.append("metrics.jsonl", {"step": 5, "validation/accuracy": 0.5, "validation/loss": 1.0})
            results = {
                "config": {
                    "model": {"model": model, "unfreeze": "block", "pretrained": pretrained, "weights": None},
                    "training": {"learning_rate": 1e-3},
                },
                "validation": {"loss": 1.0},
                "test": {"this run": {"accuracy": count / 10}},
                "cost": {
                    "seconds": 1.0, "steps": 5, "pictures": 50, "pictures per second": 50.0, "peak memory": 2**20,
                    "trainable": trainable, "parameters": 1000, "optimizer bytes": 8, "cache bytes": 2**21,
                    "preparation seconds": 2.0,
                },
                "environment": {"python": "3", "packages": {}},
            }  # fmt: skip
            run.save_json("results.json", results)

    def entries(self) -> dict[str, Entry]:
        return collect(self.folder, self.names, range(self.seeds))


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    return Comparison(tmp_path / "comparison")


def test_specs_become_runs() -> None:
    config = CompareConfig(head="mlp", image_size=64, data=DataOptions(limit=30))

    def planned(spec: str) -> Any:
        return plan(dataclasses.replace(config, models=spec))[spec]

    run = planned("resnet50:unfreeze=head:learning_rate=0.5:no-pretrained:image_size=96")
    assert (run.model.model, run.model.unfreeze, run.model.pretrained) == ("resnet50", "head", False)
    assert (run.model.head, run.model.image_size, run.training.learning_rate) == ("mlp", 96, 0.5)
    assert run.data.limit == 30
    assert run.baselines == "no"
    assert planned("tiny-vit").training.learning_rate == 3e-3
    with pytest.raises(LabError, match="--models resnet50:unfreeze=some"):
        planned("resnet50:unfreeze=some")
    with pytest.raises(LabError, match="--models resnet50:depth=3"):
        planned("resnet50:depth=3")


def test_the_fewest_parameters_within_noise_are_recommended(comparison: Comparison) -> None:
    comparison.add("large", "resnet50", [9, 9], 900)
    comparison.add("small", "resnet18", [9, 8], 300, last=True)
    comparison.add("weak", "vgg11", [3, 4], 100)
    entries = comparison.entries()
    assert within_noise(entries["large"], entries["small"])
    assert not within_noise(entries["large"], entries["weak"])
    best, equal = recommended(entries)
    assert best.name == "small"
    assert {one.name for one in equal} == {"large", "small"}
    test = LabelledPictures(
        source="", classes=("no", "yes"), labels=np.ones(10, dtype=int), contents=[np.zeros((4, 4, 3), np.uint8)] * 10,
        names=[str(place) for place in range(10)],
    )  # fmt: skip
    (comparison.folder / "figures").mkdir(exist_ok=True)
    found = findings(CompareConfig(), test, Run(comparison.folder), entries, {})
    rows = found.rows
    assert [row["network"] for row in rows] == ["large", "small", "weak"]
    assert rows[1]["test accuracy"] == pytest.approx(0.85)
    assert rows[1]["test accuracy ±"] == pytest.approx(np.std([0.9, 0.8], ddof=1))
    assert rows[0]["kind"] == "CNN"
    assert found.recommended == "small"


def test_the_best_of_each_kind_starts_from_pretrained_weights(comparison: Comparison) -> None:
    comparison.add("cnn", "resnet50", [5], 1)
    comparison.add("scratch", "resnet18", [9], 1, pretrained=False)
    comparison.add("vit", "deit_small_patch16_224", [6], 1)
    comparison.add("other", "convnext_tiny", [9], 1)
    comparison.add("tiny", "tiny-deit", [2], 1)
    entries = comparison.entries()
    assert {name: one.name for name, one in best_of_kind(entries).items()} == {"CNN": "cnn", "transformer": "vit"}
    assert kind(entries["other"]) == "other"
    assert kind(entries["tiny"]) == "transformer"
    assert hard_pictures(entries.values(), 0).tolist() == [9]


def test_ours_beside_the_papers_table(comparison: Comparison) -> None:
    comparison.add("mine", "timm/densenet201.tv_in1k", [9], 1)
    lines = [{"step": step, "validation/accuracy": accuracy, "validation/loss": loss}
             for step, accuracy, loss in ((10, 0.5, 2.0), (15, 0.9, 1.0), (20, 0.8, 1.5))]  # fmt: skip
    entries = comparison.entries()
    for line in lines:
        entries["mine"].run.append("metrics.jsonl", line)
    _, shown, whole = paper_section(entries.values(), None).blocks
    (row,) = [dict(zip(shown.columns, row, strict=True)) for row in shown.rows]
    assert (row["network"], row["paper, %"], row["trainable there"]) == ("densenet201", "94.757", 6_982_400)
    assert [row[name] for name in ("maximum, %", "last epoch, %", "its loss", "test, %")] == [90, 80, 1.5, 90]
    assert len(whole.rows) == 10


@pytest.mark.long
def test_the_command_goes_on_where_it_was_stopped(scenes: Path, tmp_path: Path) -> None:
    folder = tmp_path / "comparison"
    options = ("--data", scenes, "--epochs", "2", "--batch-size", "8", "--models",
               "tiny-vit:no-pretrained,tiny-cnn:no-pretrained:unfreeze=head", "--output", folder)  # fmt: skip
    done = lab_commands.here("vit_transfer.compare", *options)
    assert f"report: {folder / 'report.html'}" in done.stdout
    first = folder / "tiny-vit-no-pretrained" / "seed-0" / "results.json"
    results = [json.loads(file.read_text()) for file in folder.glob("*/seed-0/results.json")]
    assert len(results) == 2
    assert len({(result["cost"]["steps"], result["cost"]["pictures"]) for result in results}) == 1, "one budget"
    html = (folder / "report.html").read_text(encoding="utf-8")
    for heading in ("Which network", "Numbers", "CNNs beside transformers", "Beside the paper", "cost", "Hard for all"):
        assert heading in html
    before, saved = first.stat().st_mtime_ns, (folder / "comparison.json").read_bytes()
    (folder / "tiny-cnn-no-pretrained-unfreeze=head" / "seed-0" / "results.json").unlink()
    (folder / "report.html").unlink()
    lab_commands.here("vit_transfer.compare", *options)
    assert first.stat().st_mtime_ns == before, "what was finished is not run again"
    assert (folder / "report.html").exists()
    rows, again = (json.loads(text)["rows"] for text in (saved, (folder / "comparison.json").read_bytes()))
    assert [row["test accuracy"] for row in rows] == [row["test accuracy"] for row in again]
    assert "--epochs" in lab_commands.here("vit_transfer.compare", *options, "--epochs", "3", code=2).stderr


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("--models", "resnt18"), "resnt18"),
        (("--models", "resnet18,resnet18"), "occurs twice"),
        (("--models", "resnet18", "--data", "missing"), "missing"),
        (("--seeds", "0"), "--seeds"),
        (("--launch", "missing.yaml"), "--launch"),
        (("--models", "tiny-vit:no-pretrained", "--output", "{full}"), "--output"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[str, ...], names: str, scenes: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").write_text("x")
    filled = [argument.format(full=tmp_path / "full") for argument in arguments]
    filled += [] if "--data" in filled else ["--data", str(scenes)]
    filled += [] if "--output" in filled else ["--output", str(tmp_path / "out")]
    done = lab_commands.here("vit_transfer.compare", *filled, code=2)
    assert len(done.errors) == 1, done.stderr
    assert names in done.errors[0]
    assert not (tmp_path / "out").exists(), "nothing is left behind"
