"""The training command, with the options that a user types."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from labs_testing import commands as lab_commands
from labs_testing.commands import losses
from labs_testing.pretended_runs import Budget
from labs_testing.promises import TrainingPromises
from labs_testing.trainings import Otherwise, Training
from safetensors.torch import load_file

from labs_common.cli import config_to_yaml, parse
from labs_common.run import Run
from vit_transfer.compare import plan
from vit_transfer.config import CompareConfig, PictureTrainingOptions, TrainConfig, complete
from vit_transfer.report import kept_scores
from vit_transfer.saved import class_names, load_model

LIBRARIES = ["vit_transfer.train"]
LAUNCH = Path(__file__).parents[1] / "launch"
SMALL = ("--batch-size", "8", "--epochs", "3", "--track", "none", "--image-size", "32")


def here(*arguments: object, code: int = 0) -> lab_commands.Done:
    return lab_commands.here("vit_transfer.train", *arguments, code=code)


def trained(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def options(vit_file: Path, scenes: Path) -> tuple[object, ...]:
    # The file has positions for 48-pixel pictures.
    return ("--model", "tiny-vit", "--weights", vit_file, "--data", scenes, *SMALL[:-2], "--baselines", "no")


@pytest.fixture(scope="module")
def finished(options: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    done = here(*options, "--output", run, "--save-every", "4")
    assert f"report: {run / 'report.html'}" in done.stdout
    return run


def test_a_run_leaves_everything_that_it_promises(finished: Path, scenes: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert {
        "config.yaml", "environment.json", "metrics.jsonl", "timing.jsonl", "results.json", "predictions.json",
        "splits.json", "report.html", "figures", "checkpoints", "model", "frozen.json",
    } <= names  # fmt: skip
    results = json.loads((finished / "results.json").read_text())
    predictions = json.loads((finished / "predictions.json").read_text())
    said, labels = np.array(predictions["said"]), np.array(predictions["labels"])
    assert results["test"]["this run"]["accuracy"] == pytest.approx((said == labels).mean())
    assert len(labels) == 24
    assert results["cost"]["cache bytes"] == (48 + 12) * 37 * 96 * 2, "bf16 of what the block reads, nothing more"
    html = (finished / "report.html").read_text(encoding="utf-8")
    for heading in (
        "What was asked",
        "Data",
        "What trained",
        "Curves",
        "Numbers",
        "Classes",
        "Mistakes",
        "Where it looked",
        "Cost",
    ):
        assert heading in html
    assert "attention roll-out" in html
    assert "hashed before and after training: all are unchanged" in html
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    by_epoch = [line for line in lines if "validation/loss" in line]
    assert len(by_epoch) == 3
    assert {"training/loss", "training/accuracy", "validation/accuracy"} <= by_epoch[0].keys()
    assert by_epoch[-1]["training/loss"] < by_epoch[0]["training/loss"]


class TestPromises(TrainingPromises):
    killed_sharded = True

    @pytest.fixture(scope="class")
    def training(self, finished: Path, options: tuple[object, ...]) -> Training:
        return Training(
            "vit_transfer.train",
            LIBRARIES,
            options,
            finished,
            "model/model.safetensors",
            ("predictions.json",),
            two=Otherwise(weights=1e-4),
            launch=LAUNCH,
            zero=(),
            zero_stage=3,
            sharded=Otherwise(losses=1e-3, weights=2e-3),
            planned=True,
            gpu=Budget(operators=165, syncs=2, copies=3),
        )


def test_the_papers_recipe_is_below_the_flags(tmp_path: Path) -> None:
    config = complete(parse(TrainConfig, "train", ["--recipe", "paper", "--epochs", "3"]))
    model, data, training = config.model, config.data, config.training
    assert (model.unfreeze, model.head, model.head_width, model.image_size) == ("block", "paper", 256, 224)
    assert (data.interpolation, data.views, data.augment) == ("bilinear", 2, "mirror")
    assert (training.learning_rate, training.schedule, training.batch_size) == (1e-4, "plateau", 512)
    assert (training.weight_decay, training.clip_norm, training.warmup, training.epochs) == (0, 0, 0, 3)
    file = tmp_path / "config.yaml"
    file.write_text(config_to_yaml(config))
    again = parse(TrainConfig, "train", ["--config", str(file)])
    assert (again.model, again.data, again.training) == (model, data, training)
    file.write_text("recipe: paper\nmodel: swin_base_patch4_window7_224\nepochs: 5\n")
    swin = complete(parse(TrainConfig, "train", ["--config", str(file)])).training
    assert (swin.batch_size, swin.epochs, swin.schedule) == (256, 5, "plateau")
    given = parse(TrainConfig, "train", ["--config", str(file), "--batch-size", "512"])
    assert complete(given).training.batch_size == 512
    file.write_text(file.read_text() + "batch_size: 256\n")  # as a resumed run reads what it had
    assert parse(TrainConfig, "train", ["--config", str(file), "--recipe", "paper"]).training.batch_size == 256
    (compared,) = plan(parse(CompareConfig, "compare", ["--recipe", "paper", "--models", "vgg19"])).values()
    alone = complete(parse(TrainConfig, "train", ["--recipe", "paper", "--model", "vgg19"]))
    assert (compared.model, compared.data, compared.training) == (alone.model, alone.data, alone.training)


@pytest.mark.parametrize("rate", [3e-3, 3e-7])
def test_a_plateau_lowers_the_rate_and_resumes_exactly(
    rate: float, cnn_file: Path, scenes: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    here("--model", "tiny-cnn", "--weights", cnn_file, "--data", scenes, *SMALL, "--schedule", "plateau", "--warmup", "0",
         "--learning-rate", rate, "--evaluate-every", "2", "--save-every", "5", "--keep", "9", "--head", "paper",
         "--unfreeze", "all", "--no-report", "--output", run)  # fmt: skip
    expected, best = rate, -1.0  # the rule of arXiv 2110.05270, section 3
    falls, rises = 0, 0
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        if "learning_rate" in line:
            assert line["learning_rate"] == pytest.approx(max(expected, 1e-7))
        elif line["validation/accuracy"] > best:
            best, rises = line["validation/accuracy"], rises + 1
        else:
            expected, falls = 0.6 * expected, falls + 1
    best_lines = [line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
                  if line.get("validation/accuracy") == best]  # fmt: skip
    options = PictureTrainingOptions(schedule="plateau", patience=99)
    assert kept_scores(Run(run, is_main=True), options)["loss"] == best_lines[0]["validation/loss"]
    assert falls > 3 if rate < 1e-6 else rises > 1
    _, *later = sorted((run / "checkpoints").glob("step-*"))
    paths = [run / "model" / "model.safetensors", run / "metrics.jsonl"]
    before = [path.read_bytes() for path in paths]
    for path in (*later, run / "model"):
        shutil.rmtree(path)
    here("--resume", run, "--no-report")
    assert [path.read_bytes() for path in paths] == before


def test_the_moving_average_is_saved_and_resumed(cnn_file: Path, scenes: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    here("--model", "tiny-cnn", "--weights", cnn_file, "--data", scenes, *SMALL, "--unfreeze", "all", "--ema", "0.6",
         "--max-steps", "3", "--save-every", "1", "--keep", "9", "--no-report", "--output", run)  # fmt: skip
    after = [load_file(file) for file in sorted((run / "checkpoints").glob("step-*/trainable.safetensors"))]
    assert len(after) == 3
    saved, first = trained(run), load_file(cnn_file)
    followed = {name for name, weights in after[0].items() if weights.is_floating_point() and ".fc." not in name}
    assert len(followed) > 20
    for name in followed:  # the head has other classes than the file
        expected = first[name.removeprefix("model.")]
        for weights in after:
            expected = 0.6 * expected + 0.4 * weights[name]
        torch.testing.assert_close(saved[name.removeprefix("model.")], expected)
    before = (run / "model" / "model.safetensors").read_bytes()
    for path in (*sorted((run / "checkpoints").glob("step-*"))[1:], run / "model"):
        shutil.rmtree(path)
    here("--resume", run, "--no-report")
    assert (run / "model" / "model.safetensors").read_bytes() == before


def test_only_what_should_move_has_moved(finished: Path, vit_file: Path) -> None:
    before, after = load_file(vit_file), trained(finished)
    moved = {name for name in before if name in after and not torch.equal(before[name], after[name])}
    assert moved == {name for name in after if name.startswith(("blocks.3.", "norm.", "head."))}


@pytest.mark.alone
def test_baselines_and_views(cnn_file: Path, scenes: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    here("--model", "tiny-cnn", "--weights", cnn_file, "--data", scenes, *SMALL, "--epochs", "2", "--views", "2",
         "--augment", "crop", "--baselines", "yes", "--output", run)  # fmt: skip
    results = json.loads((run / "results.json").read_text())
    assert list(results["test"]) == ["this run", "head only", "from scratch"]
    base, block, head, scratch = (
        load_file(cnn_file),
        trained(run),
        trained(run / "baselines" / "head-only"),
        trained(run / "baselines" / "from-scratch"),
    )
    same = {name for name in base if name in block and torch.equal(base[name], block[name])}
    assert {name.split(".")[0] for name in base if name not in same} == {"layer4", "fc"}
    changed = {name for name in head if name in base and not torch.equal(base[name], head[name])}
    assert {name.split(".")[0] for name in changed} == {"fc"}
    assert not any(torch.equal(base[name], scratch[name]) for name in base if name.endswith("conv1.weight"))
    assert "Grad-CAM" in (run / "report.html").read_text(encoding="utf-8")


@pytest.mark.long
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18"])
@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_real_pictures_cached_uncached_and_exported(name: str, head: str, real_pictures: Path, tmp_path: Path) -> None:
    """Random weights of the real network, on real pictures; the export in timm and in transformers."""
    shared = ("--model", name, "--no-pretrained", "--image-size", "64", "--data", real_pictures, "--limit", "60",
              "--batch-size", "20", "--epochs", "2", "--head", head, "--no-report", "--track", "none")  # fmt: skip
    here(*shared, "--output", tmp_path / "cached")
    if head == "linear":  # the cache ends where the last block begins, whatever the head
        here(*shared, "--output", tmp_path / "again")  # what the first one kept
        assert losses(tmp_path / "again") == losses(tmp_path / "cached")
        here(*shared, "--output", tmp_path / "plain", "--no-cache")
        assert losses(tmp_path / "plain") == pytest.approx(losses(tmp_path / "cached"), abs=1e-4)
    folder = tmp_path / "cached" / "model"
    assert class_names(folder) == [
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    ]
    images = torch.randn(2, 3, 64, 64)
    own = load_model(folder)
    config = json.loads((folder / "config.json").read_text())
    built = timm.create_model(
        config["architecture"], num_classes=10, checkpoint_path=str(folder / "model.safetensors"),
        **config["model_args"],
    ).eval()  # fmt: skip
    transformers: Any = pytest.importorskip("transformers", reason="reads the export too")
    wrapped = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(built(images), own(images))
        torch.testing.assert_close(wrapped(images).logits, own(images))
    assert wrapped.config.id2label[3] == "cat"


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("--data", "missing-pictures"), "missing-pictures"),
        (("--data", "{broken}"), "broken.parquet"),
        (("--data", "{truncated}"), "truncated"),
        (("--model", "resnt18"), "resnet18"),
        (("--model", "convnext_tiny"), "--block"),
        (("--block", "blocks.9"), "blocks.9"),
        (("--ema", "0.9"), "--unfreeze all"),
        (("--block", "blocks.3", "--unfreeze", "head"), "--block"),
        (("--weights", "missing.safetensors"), "--weights"),
        (("--weights", "{broken}"), "--weights"),
        (("--weights", "{other}"), "--weights"),
        (("--views", "0"), "--views"),
        (("--augment", "deit"), "--views 16"),
        (("--validation-fraction", "1"), "--validation-fraction"),
        (("--unfreeze", "nothing"), "--unfreeze"),
        (("--output", "/proc/run"), "--output"),
        (("--resume", "{broken}"), "--resume"),
        (("--baselines", "yes", "--no-pretrained"), "--baselines"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    arguments: tuple[str, ...], names: str, scenes: Path, cnn_file: Path, tmp_path: Path
) -> None:
    broken, truncated = tmp_path / "broken.parquet", tmp_path / "truncated"
    broken.write_bytes(b"PAR1 and no more")
    for kind in ("cat", "dog"):
        (truncated / kind).mkdir(parents=True)
        for number in range(3):
            (truncated / kind / f"{number}.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    filled = [argument.format(broken=broken, truncated=truncated, other=cnn_file) for argument in arguments]
    if "--resume" not in filled:
        for flag, value in (("--model", "tiny-vit"), ("--data", str(scenes)), ("--output", str(tmp_path / "run"))):
            filled += [] if flag in filled else [flag, value]
        if "--weights" not in filled and "--no-pretrained" not in filled:
            filled.append("--no-pretrained")
    done = here(*filled, code=2)
    assert len(done.errors) == 1, done.stderr
    assert names in done.errors[0]
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.parquet", "truncated"]
    assert "Traceback" in here(*filled, "--debug", code=2).stderr


@pytest.mark.alone
def test_resume_with_other_options_pictures_or_a_broken_checkpoint(
    options: tuple[object, ...], scenes: Path, tmp_path: Path
) -> None:
    run, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(scenes, data)
    changed = [data if argument == scenes else argument for argument in options]
    here(*changed, "--output", run, "--max-steps", "4", "--save-every", "2")
    assert "--head-width" in here("--resume", run, "--head-width", "8", code=2).stderr
    (newest,) = sorted((run / "checkpoints").glob("step-*"))[-1:]
    file = newest / "trainable.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:100])
    done = here("--resume", run, code=2)
    assert str(newest) in done.stderr
    assert "Traceback" not in done.stderr
    file.write_bytes(whole)
    (data / "validation.parquet").unlink()
    assert "have changed since the run began" in here("--resume", run, code=2).stderr


def test_skipped_pictures_are_counted(tmp_path: Path, scenes: Path) -> None:
    from PIL import Image

    for kind in ("cat", "dog"):
        (tmp_path / "data" / kind).mkdir(parents=True)
        for number in range(8):
            Image.new("RGB", (20, 20), (number * 20, 0, 0)).save(tmp_path / "data" / kind / f"{number}.png")
    (tmp_path / "data" / "cat" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    shared = ("--model", "tiny-vit", "--no-pretrained", "--data", tmp_path / "data", "--epochs", "1", "--test-fraction",
              "0.3", "--validation-fraction", "0.3", "--track", "none")  # fmt: skip
    assert "0.png" in here(*shared, "--output", tmp_path / "run", code=2).stderr
    done = here(*shared, "--on-bad-data", "skip", "--output", tmp_path / "run")
    assert "left out 1" in done.stderr
    assert "left out because" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
