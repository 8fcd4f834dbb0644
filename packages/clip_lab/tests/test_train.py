"""The training command, with the options that a user types."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from labs_testing import commands as lab_commands
from labs_testing.commands import losses
from labs_testing.pretended_runs import Budget
from labs_testing.promises import TrainingPromises
from labs_testing.trainings import Otherwise, Training
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

from clip_lab.saved import load_model

LAUNCH = Path(__file__).parents[1] / "launch"
SMALL = ("--image", "test_vit", "--no-image-pretrained", "--image-size", "32", "--text-width", "32", "--text-layers", "1", "--text-heads", "4",
         "--embedding", "32", "--queries", "4", "--batch-size", "16", "--epochs", "3", "--learning-rate", "2e-3",
         "--track", "none")  # fmt: skip


def here(*arguments: object, code: int = 0) -> lab_commands.Done:
    return lab_commands.here("clip_lab.train", *arguments, code=code)


def trained(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def tower_of(run: Path, file: Path) -> Path:
    """The run's image tower as a file of weights."""
    start = "image.network."
    save_file({name.removeprefix(start): value for name, value in trained(run).items() if name.startswith(start)}, file)
    return file


def of_first_step(run: Path) -> dict[str, float]:
    return dict(json.loads((run / "metrics.jsonl").read_text().splitlines()[0]))


@pytest.fixture(scope="module")
def options(scenes: Path) -> tuple[object, ...]:
    return ("--data", scenes, "--augment", "crop+colour", *SMALL)


@pytest.fixture(scope="module")
def finished(options: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    done = here(*options, "--output", run, "--save-every", "4")
    assert f"report: {run / 'report.html'}" in done.stdout
    return run


def test_a_run_leaves_everything_that_it_promises(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert {
        "config.yaml", "environment.json", "metrics.jsonl", "timing.jsonl", "results.json", "splits.json", "report.html",
        "figures", "checkpoints", "model", "frozen.json",
    } <= names  # fmt: skip
    assert {path.name for path in (finished / "model").iterdir()} == {
        "clip.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    results = json.loads((finished / "results.json").read_text())
    splits = json.loads((finished / "splits.json").read_text())
    assert [len(splits[name]["pictures"]) for name in ("train", "validation", "test")] == [48, 6, 6]
    assert (results["test"]["pictures"], results["test"]["captions"]) == (6, 30)
    assert results["test"]["chance"]["text_to_image/recall@1"] == pytest.approx(1 / 6)
    assert results["queries"]["one thing"]["count"] > 0, "what is drawn is searched"
    html = (finished / "report.html").read_text(encoding="utf-8")
    for heading in ("What was asked", "Data", "What trained", "Curves", "Numbers", "Searches",
                    "Similarity of captions and pictures",
                    "Captions and what they find", "Errors", "Cost"):  # fmt: skip
        assert f">{heading}<" in html, heading
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    by_epoch = [line for line in lines if "validation/loss" in line]
    assert len(by_epoch) == 3
    assert by_epoch[-1]["training/loss"] < by_epoch[0]["training/loss"]
    assert all(0 <= line["validation/recall"] <= 1 for line in by_epoch)
    scales = [line["logit_scale"] for line in lines if "loss" in line]
    assert scales[0] == pytest.approx(1 / 0.07)
    assert scales[-1] != scales[0], "the temperature is learnt"


class TestPromises(TrainingPromises):
    @pytest.fixture(scope="class")
    def training(
        self, finished: Path, options: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory
    ) -> Training:
        tower = tower_of(finished, tmp_path_factory.mktemp("tower") / "tower.safetensors")
        return Training(
            "clip_lab.train",
            ["clip_lab.train"],
            options,
            finished,
            "model/model.safetensors",
            frozen=("--freeze-image", "--image-weights", tower),
            two=Otherwise(("--no-cache", "--chunk", 3, "--loss-chunk", 5), losses=1e-3, weights=5e-3),
            launch=LAUNCH,
            zero=("--chunk", 5),
            sharded=Otherwise(("--no-cache", "--chunk", 3, "--loss-chunk", 5), losses=1e-3, weights=5e-3),
            planned=True,
            gpu=Budget(operators=640, syncs=2, copies=5),
        )


def test_in_parts_it_is_the_same(finished: Path, options: tuple[object, ...], tmp_path: Path) -> None:
    """In parts of three pictures, nothing cached: the same first step. Two processes have more steps, above."""
    run = tmp_path / "parts"
    here(*options, "--output", run, "--no-cache", "--chunk", 3, "--loss-chunk", 5, "--max-steps", 1, "--no-report")
    one, two = of_first_step(finished), of_first_step(run)
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
    assert two["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=1e-5)


@pytest.mark.alone
@pytest.mark.parametrize("objective", ["siglip", "coca", "simvlm"])
def test_the_other_objectives_train(objective: str, options: tuple[object, ...], tmp_path: Path) -> None:
    done = here(*options, "--objective", objective, "--output", tmp_path / "run", "--epochs", "4", "--patience", "3",
                "--watch", "loss", "--no-report")  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    by_epoch = [line["validation/loss"] for line in lines if "validation/loss" in line]
    assert min(by_epoch[1:]) < by_epoch[0]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["test"]["perplexity"] is not None) == (objective in ("coca", "simvlm"))
    assert ("perplexity" in done.stderr) == (objective in ("coca", "simvlm"))
    if objective == "coca":
        line = next(line for line in lines if "loss" in line)
        assert line["loss"] == pytest.approx(line["contrastive_loss"] + 2 * line["caption_loss"], rel=1e-5)


@pytest.mark.alone
def test_frozen_towers_are_computed_once_and_do_not_move(scenes: Path, finished: Path, tmp_path: Path) -> None:
    """Both towers frozen; cached and computed each time give the same."""
    weights = load_file(tower_of(finished, tmp_path / "tower.safetensors"))
    bert = tmp_path / "bert"
    BertModel(BertConfig(vocab_size=400, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                         intermediate_size=32, bos_token_id=2, eos_token_id=3, pad_token_id=0)).save_pretrained(bert)  # fmt: skip
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(finished / "model" / name, bert / name)
    shared = ("--data", scenes, *SMALL, "--image-weights", tmp_path / "tower.safetensors", "--freeze-image", "--text",
              bert, "--freeze-text", "--boundary-precision", "fp32", "--no-report")  # fmt: skip
    here(*shared, "--output", tmp_path / "cached")
    here(*shared, "--output", tmp_path / "plain", "--no-cache")
    assert losses(tmp_path / "plain") == pytest.approx(losses(tmp_path / "cached"), abs=1e-5)
    found = trained(tmp_path / "cached")
    assert all(torch.equal(found[f"image.network.{name}"], tensor) for name, tensor in weights.items())
    assert json.loads((tmp_path / "cached" / "frozen.json").read_text())
    results = json.loads((tmp_path / "cached" / "results.json").read_text())
    assert results["cost"]["trainable"] == 32 * (64 + 16) + 1, "two projections and the temperature"
    views = tmp_path / "views"
    here(*shared, "--output", views, "--views", "2", "--augment", "crop")
    assert losses(views)[:3] == pytest.approx(losses(tmp_path / "cached")[:3], abs=1e-5), "the first view is plain"
    assert losses(views)[3:6] != pytest.approx(losses(tmp_path / "cached")[3:6], abs=1e-6)
    assert load_model(tmp_path / "cached").model.text.width == 16


@pytest.mark.long
def test_real_photographs_are_learnt_from(real_pictures: Path, tmp_path: Path) -> None:
    """The mechanics; how much is learnt in minutes is a benchmark."""
    here("--data", real_pictures, "--limit", "64", *SMALL, "--image-size", "64", "--tokenizer", "clip", "--output",
         tmp_path / "run", "--epochs", "6", "--captions-per-picture", "5", "--no-report")  # fmt: skip
    found = losses(tmp_path / "run")
    assert sum(found[-4:]) < 0.97 * sum(found[:4])
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["test"]["pictures"], results["test"]["captions"]) == (8, 40)
    assert not results["queries"], "nothing is known of photographs"


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("--image", "resnt50"), "resnet50"),
        (("--freeze-image",), "--freeze-image"),
        (("--text", "no-such-text"), "--text no-such-text"),
        (("--tokenizer", "no-such-tokenizer"), "--tokenizer"),
        (("--text-width", "33"), "--text-width"),
        (("--captions-per-picture", "0"), "--captions-per-picture"),
        (("--chunk", "-1"), "--chunk"),
        (("--max-length", "2"), "--max-length"),
        (("--objective", "blip"), "--objective"),
        (("--scale", "0"), "--scale"),
        (("--splits", "missing-lists"), "--splits"),
        (("--objective", "simvlm", "--patience", "2"), "--watch"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    arguments: tuple[str, ...], names: str, scenes: Path, tmp_path: Path
) -> None:
    done = here("--data", scenes, *SMALL, "--output", tmp_path / "run", *arguments, code=2)
    assert len(done.errors) == 1, done.stderr
    assert names in done.errors[0]
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.alone
def test_bad_pictures_and_captions_are_named_counted_and_left_out(scenes: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(scenes, data)
    (data / "Flickr8k.token.txt").unlink()
    names = sorted(path.name for path in (data / "Images").iterdir())
    (data / "Images" / names[0]).write_bytes(b"")
    (data / "Images" / names[1]).unlink()
    shared = ("--data", data, *SMALL, "--epochs", "1")
    done = here(*shared, "--output", tmp_path / "run", code=2)
    assert len(done.errors) == 1
    assert names[0] in done.errors[0]
    assert not (tmp_path / "run").exists()
    done = here(*shared, "--output", tmp_path / "run", "--on-bad-data", "skip")
    assert "left out 1 × captions without a picture" in done.stderr
    assert "left out because" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.alone
def test_resume_with_other_options_or_pictures(options: tuple[object, ...], scenes: Path, tmp_path: Path) -> None:
    run, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(scenes, data)
    changed = [data if argument == scenes else argument for argument in options]
    here(*changed, "--output", run, "--max-steps", "2", "--save-every", "1", "--no-report")
    assert "--embedding" in here("--resume", run, "--embedding", "8", code=2).stderr
    Image.new("RGB", (8, 8)).save(data / "Images" / "scene_000000.jpg")
    assert "have changed since the run began" in here("--resume", run, code=2).stderr
