"""The training command, with the options that a user types."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from labs_testing import commands as lab_commands
from labs_testing.commands import in_two_processes, losses
from labs_testing.pretended_runs import Budget
from labs_testing.promises import TrainingPromises
from labs_testing.sharded import fsdp_variables
from labs_testing.trainings import Otherwise, Training
from safetensors.torch import load_file

from labs_common.cli import parse
from labs_common.training import learning_rate_share
from zsi_contrastive.detector import train as detector_train
from zsi_contrastive.detector.annotations import Instances
from zsi_contrastive.detector.compare import LIBRARIES
from zsi_contrastive.detector.config import TrainConfig
from zsi_contrastive.detector.defaults import complete
from zsi_contrastive.detector.model import sizes_of
from zsi_contrastive.detector.pictures import instance_pictures

LAUNCH, CONFIGS = (Path(__file__).parents[2] / name for name in ("launch", "configs"))
SMALL = ("--split", "scenes", "--min-side", "48", "--max-side", "64", "--batch-size", "4", "--epochs", "2",
         "--controls", "1", "--track", "none")  # fmt: skip


def here(*arguments: object, code: int = 0) -> lab_commands.Done:
    return lab_commands.here("zsi_contrastive.train", *arguments, code=code)


def trained(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def options(scenes: Path) -> tuple[object, ...]:
    return ("--data", scenes, *SMALL, "--save-every", "2")


@pytest.fixture(scope="module")
def finished(options: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    done = here(*options, "--output", run)
    assert f"report: {run / 'report.html'}" in done.stdout
    return run


def test_a_run_leaves_everything_that_it_promises(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert {
        "config.yaml", "environment.json", "metrics.jsonl", "timing.jsonl", "results.json", "detections.json",
        "splits.json", "report.html", "figures", "checkpoints", "model", "frozen.json",
    } <= names  # fmt: skip
    results = json.loads((finished / "results.json").read_text())
    assert results["config"]["detection"]["temperature"] == 4.0
    assert set(results["test"]["zsi"]) == {"box", "mask"}
    assert set(results["test"]["gzsi"]["mask"]) == {"seen", "unseen", "harmonic mean"}
    assert list(results["test"]["other rules"]) == [
        "random vectors (mean of 1)", "shuffled names (mean of 1)", "nearest seen class", "the published code's transfer"
    ]  # fmt: skip
    assert set(results["test"]["sweep"]) == {"validation", "test"}
    html = (finished / "report.html").read_text(encoding="utf-8")
    for heading in (
        "What was asked", "Data", "Words", "What trained", "Curves", "Numbers", "Seen–unseen trade-off", "Classes",
        "Failures", "Confusions", "Cost", "How to run it again",
    ):  # fmt: skip
        assert f">{heading}<" in html
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    weights = {name: 0.05 if "reconstruction" in name else 1.0 for name in steps[0] if name.endswith("_loss")}
    assert len(weights) == 7
    assert steps[0]["loss"] == pytest.approx(sum(weight * steps[0][name] for name, weight in weights.items()), 1e-4)
    assert sum(line["loss"] for line in steps[-3:]) < sum(line["loss"] for line in steps[:3])


class TestPromises(TrainingPromises):
    @pytest.fixture(scope="class")
    def training(self, finished: Path, options: tuple[object, ...]) -> Training:
        return Training(
            "zsi_contrastive.train",
            LIBRARIES,
            options,
            finished,
            "model/model.safetensors",
            ("detections.json",),
            frozen=("--frozen-stages", 1),
            launch=LAUNCH,
            zero=("--max-steps", 2),
            sharded=Otherwise(("--frozen-stages", 1), first=0.2, weights=None),  # as in test_two_processes
            planned=True,
            gpu=Budget(operators=1200, syncs=4, copies=4),
        )

    def test_two_processes(self, training: Training, tmp_path: Path) -> None:
        """Regions are drawn by chance in each process, so that two are not one; but both hold the same weights."""
        run = tmp_path / "two"
        in_two_processes(
            "zsi_contrastive.train", LIBRARIES, *training.options, "--output", run, "--max-steps", "3", "--no-report",
            XDG_CACHE_HOME=str(tmp_path),
        )  # fmt: skip
        assert losses(run)[0] == pytest.approx(losses(training.whole)[0], rel=0.2)
        results = json.loads((run / "results.json").read_text())
        assert results["cost"]["pictures"] == 12
        found = json.loads((run / "detections.json").read_text())
        pictures = json.loads((run / "splits.json").read_text())["test"]["pictures"]
        assert len({row["image_id"] for row in found}) == len(pictures), "each process looked at its share"


@pytest.mark.long
def test_sharded_over_two_processes_it_measures_what_one_does(options: tuple[object, ...], tmp_path: Path) -> None:
    """FSDP2, with a model that stays as it began: scores on validation pictures and detections are one process's.

    The only validation picture is the first process's: the other has none, and has to take part all the same.
    """
    # A rate that moves nothing, and frozen stages, whose batch norms keep their statistics.
    still = ("--learning-rate", "1e-12", "--frozen-stages", "4", "--seed", "4")
    shared = (*options, *still, "--max-steps", "1", "--validation-pictures", "1", "--score-threshold", "0.01",
              "--no-report")  # fmt: skip
    here(*shared, "--output", tmp_path / "one")
    in_two_processes(
        "zsi_contrastive.train", LIBRARIES, *shared, "--output", tmp_path / "two",
        **fsdp_variables(LAUNCH / "fsdp.yaml"),
    )  # fmt: skip
    one, two = (
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("one", "two")
    )
    assert [line for line in two if "loss" not in line] == [line for line in one if "loss" not in line]
    assert one[-1]["validation/harmonic_mean"] > 0.1
    found = (tmp_path / "one" / "detections.json").read_bytes()
    assert len(found) > 1000
    assert (tmp_path / "two" / "detections.json").read_bytes() == found


@pytest.mark.long
def test_what_the_main_process_cannot_read_stops_both(tmp_path: Path) -> None:
    in_two_processes("zsi_contrastive.train", LIBRARIES, *SMALL, "--data", tmp_path / "none", "--output",
                     tmp_path / "run", codes=(2, 2))  # fmt: skip
    assert not list(tmp_path.iterdir())


@pytest.mark.alone
def test_parts_of_a_step_are_the_step(options: tuple[object, ...], tmp_path: Path) -> None:
    here(*options, "--output", tmp_path / "parts", "--at-once", "2", "--max-steps", "2", "--no-report")
    here(*options, "--output", tmp_path / "sgd", "--optimizer", "sgd", "--schedule", "steps", "--max-steps", "2",
         "--frozen-stages", "1", "--validation-fraction", "0")  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert [line["pictures"] for line in lines if "loss" in line] == [4, 8]
    frozen = json.loads((tmp_path / "sgd" / "frozen.json").read_text())
    assert any(name.startswith("backbone.body.1.") for name in frozen), "the audit has the frozen stage"
    assert not any(name.startswith("backbone.body.2.0.0.weight") for name in frozen)


@pytest.mark.long
def test_real_pictures_and_word_vectors(coco: Path, coco_vectors: Path, tmp_path: Path) -> None:
    """COCO as it is on disk, a ResNet with random weights; both tasks; pycocotools takes what is written."""
    pycoco = pytest.importorskip("pycocotools.coco", reason="reads what is written")
    matrix, words = coco_vectors / "word_w2v_withbg_48_17.txt", tmp_path / "words.txt"
    np.savetxt(words, np.random.default_rng(0).normal(size=(300, 400)), fmt="%.4f", delimiter=",")
    run = tmp_path / "run"
    shared = ("--config", CONFIGS / "zsi_48_17.yaml", "--data", coco, "--word-vectors", matrix, "--vocabulary", words,
              "--min-side", "96", "--max-side", "128")  # fmt: skip
    done = here(*shared, "--backbone", "resnet18", "--no-backbone-pretrained", "--batch-size", "2", "--max-steps", "1",
                "--limit", "2", "--controls", "0", "--score-threshold", "0", "--kept", "5", "--output", run,
                "--track", "none")  # fmt: skip
    assert "fit the names" in done.stderr
    assert all(0 < loss < 100 for loss in losses(run))
    found = json.loads((run / "detections.json").read_text())
    assert found
    assert {"image_id", "category_id", "bbox", "score", "segmentation"} == found[0].keys()
    gold = pycoco.COCO(str(coco / "annotations" / "instances_val2017.json"))
    assert {row["category_id"] for row in found} <= set(gold.getCatIds())
    assert len(gold.loadRes(str(run / "detections.json")).anns) == len(found)
    frozen = json.loads((run / "frozen.json").read_text())
    assert any("layer1" in name for name in frozen)
    assert not any("layer2.0.conv1" in name for name in frozen)
    results = json.loads((run / "results.json").read_text())
    assert results["config"]["training"]["schedule"] == "steps"
    first = next(line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in line)
    assert first["learning_rate"] == pytest.approx(0.01 / 3), "a warm-up from a third"
    assert json.loads((run / "model" / "zsi.json").read_text())["parts"]["official"]
    assert trained(run)["regions.box_head.to_words.weight"].shape == (400, 300)
    assert ">Published, not to be compared<" in (run / "report.html").read_text(encoding="utf-8")
    # The same detector, other classes: those of the other split.
    other = lab_commands.here(
        "zsi_contrastive.evaluate", "--checkpoint", run, "--split", "65_15", "--word-vectors",
        coco_vectors / "word_w2v_withbg_65_15.txt", "--output", tmp_path / "other", "--limit", "2", "--no-report",
    )  # fmt: skip
    assert "unseen alone" in other.stderr
    assert len(json.loads((tmp_path / "other" / "evaluation.json").read_text())["classes"]) == 80


@pytest.mark.parametrize(("split", "rate", "warmup"), [("48_17", 0.01, 500), ("65_15", 0.0075, 7000)])
def test_the_papers_configs_are_those_of_the_published_code(split: str, rate: float, warmup: int) -> None:
    """The numbers of configs/zsi there: schedule, losses, pictures, sampling, rules of inference."""
    config = complete(parse(TrainConfig, "train", ["--config", str(CONFIGS / f"zsi_{split}.yaml"), "--data", "coco"]))
    training, detection, model = config.training, config.detection, config.model
    assert (config.data.split, config.data.validation_fraction) == (split, 0)
    assert config.words.word_vectors == f"word_w2v_withbg_{split}.txt"
    assert str(config.words.vocabulary) == "vocabulary_w2v.txt"
    assert (training.optimizer, training.learning_rate, training.weight_decay) == ("sgd", rate, 1e-4)
    assert (training.epochs, training.batch_size, training.clip_norm) == (12, 2 * 4, 35)
    assert (training.reconstruction, training.precision) == (0.5, "fp32")
    assert (model.backbone, model.form, model.frozen_stages) == ("resnet101", "official", 1)
    assert (detection.transfer, detection.temperature, detection.kept) == ("code", 1, 100)
    assert (detection.score_threshold, detection.nms_threshold) == (0.05, 0.5)
    sizes, sampling = sizes_of(config)
    assert (sizes.min_side, sizes.max_side, sizes.rpn_samples, sizes.proposals) == (800, 1333, 256, (2000, 1000) * 2)
    assert (sampling.per_picture, sampling.thing_share) == (512, 0.25)
    # A warm-up from a third, and falls after 8 and 11 epochs.
    steps, epoch = 12 * 10_000, 10_000

    def share(step: int) -> float:
        return learning_rate_share(step, steps, warmup / steps, training.schedule, training.warmup_from)

    assert [share(step) for step in (0, warmup // 2, warmup, 8 * epoch - 1)] == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert [share(step) for step in (8 * epoch, 11 * epoch - 1, 11 * epoch)] == pytest.approx([0.1, 0.1, 0.01])


@pytest.mark.parametrize(
    ("asked", "expected"), [((), 200), (("--backbone", "resnet18"), 20), (("--save-every", "7"), 7)]
)
def test_checkpoints_once_per_epoch(asked: tuple[str, ...], expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """40 pictures, two a step: 20 steps; tiny, whose epochs are short, as all labs."""
    config = complete(parse(TrainConfig, "train", ["--batch-size", "2", *asked]))

    def started(*given: Any) -> None:
        raise InterruptedError(given[5].save_every)

    monkeypatch.setattr(detector_train.Fitting, "start", started)
    images = [{"id": n, "file_name": str(n), "width": 9, "height": 9} for n in range(40)]
    pictures = instance_pictures(Instances("x", [{"id": 1, "name": "cat"}], images, []), (), ("cat",))
    data: Any = SimpleNamespace(pictures={"train": pictures})
    model: Any = torch.nn.Conv2d(3, 4, 3)
    with pytest.raises(InterruptedError, match=f"^{expected}$"):
        detector_train.fit(config, model, cast(Any, None), Accelerator(cpu=True), data)


def test_colabs_config() -> None:
    config = complete(parse(TrainConfig, "train", ["--config", str(CONFIGS / "zsi_colab.yaml"), "--data", "coco"]))
    training, model = config.training, config.model
    assert (model.backbone, model.min_side, training.precision, training.optimizer) == ("resnet50", 480, "fp16", "sgd")
    assert (training.max_steps, training.batch_size, training.at_once, training.save_every) == (6000, 8, 4, 500)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("--data", "missing-pictures"), "missing-pictures"),
        (("--data", "{tmp}"), "--train-annotations"),
        (("--split", "49_16", "--word-vectors", "any.txt"), "--split 49_16"),
        (("--split", "48_17"), "--word-vectors"),
        (("--split", "48_17", "--word-vectors", "missing.txt"), "missing.txt"),
        (("--backbone", "resnt18"), "resnet18"),
        (("--backbone-weights", "weights.pth"), "--backbone-weights"),
        (("--backbone-weights", "missing.safetensors"), "--backbone-weights"),
        (("--no-background-rpn",), "--sync-background"),
        (("--frozen-stages", "7"), "--frozen-stages"),
        (("--vocabulary", "missing.txt"), "--vocabulary"),
        (("--refine", "median"), "--refine"),
        (("--refine-share", "2"), "--refine-share"),
        (("--temperature", "-1"), "--temperature"),
        (("--kept", "0"), "--kept"),
        (("--validation-fraction", "1"), "--validation-fraction"),
        (("--validation-fraction", "0", "--patience", "2"), "--patience"),
        (("--output", "/proc/run"), "--output"),
        (("--contrastive", "patch_infonce", "--plan"), "patch_infonce"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    arguments: tuple[str, ...], names: str, scenes: Path, tmp_path: Path
) -> None:
    filled = [argument.format(tmp=tmp_path) for argument in arguments]
    given = [*filled, *(() if "--data" in filled else ("--data", str(scenes)))]
    small = SMALL[2:] if "--split" in given else SMALL
    done = here("--output", tmp_path / "run", *small, *given, code=2)
    assert len(done.errors) == 1, done.stderr
    assert names in done.errors[0]
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.alone
def test_a_broken_picture_is_named_or_left_out(scenes: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(scenes, data)
    name = sorted(path.name for path in (data / "val").iterdir())[0]
    for path in (data / "train").iterdir():
        path.touch()
    (data / "val" / name).write_bytes((data / "val" / name).read_bytes()[:300])
    train = json.loads((data / "annotations" / "instances_train.json").read_text())
    train["annotations"][0]["bbox"][2] = 0
    (data / "annotations" / "instances_train.json").write_text(json.dumps(train))
    shared: tuple[Any, ...] = ("--data", data, *SMALL, "--max-steps", "1", "--output", tmp_path / "run")
    test_names = json.loads((data / "annotations" / "instances_val.json").read_text())
    shown = {row["image_id"] for row in test_names["annotations"]}
    assert shown
    done = here(*shared, "--on-bad-data", "skip")
    assert "left out 1 × box without area" in done.stderr


@pytest.mark.alone
def test_resume_with_other_options(options: tuple[object, ...], tmp_path: Path) -> None:
    run = tmp_path / "run"
    here(*options, "--output", run, "--max-steps", "2", "--no-report")
    assert "--reconstruction" in here("--resume", run, "--reconstruction", "1", code=2).stderr
