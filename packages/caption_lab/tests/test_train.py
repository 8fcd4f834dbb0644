"""The command, with the options that a user types."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from labs_testing import commands as lab_commands
from labs_testing.commands import losses
from labs_testing.pretended_runs import Budget
from labs_testing.promises import TrainingPromises
from labs_testing.trainings import Otherwise, Training
from PIL import Image
from safetensors.torch import load_file

from labs_common.caption_metrics import caption_metrics, caption_words

LAUNCH = Path(__file__).parents[1] / "launch"
LIBRARIES = ["caption_lab.train"]
SMALL = ("--no-pretrained", "--width", "32", "--batch-size", "32", "--epochs", "3", "--track", "none")


def here(*arguments: object, code: int = 0) -> lab_commands.Done:
    return lab_commands.here("caption_lab.train", *arguments, code=code)


def trained(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def test_a_run_leaves_everything_that_it_promises(finished: Path, scenes: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert {
        "config.yaml", "environment.json", "metrics.jsonl", "timing.jsonl", "samples.jsonl", "results.json",
        "captions.json", "splits.json", "report.html", "figures", "checkpoints", "model", "frozen.json",
    } <= names  # fmt: skip
    assert {path.name for path in (finished / "model").iterdir()} == {
        "config.json", "model.safetensors", "vocabulary.json", "tokenizer.json",
    }  # fmt: skip
    results = json.loads((finished / "results.json").read_text())
    splits = json.loads((finished / "splits.json").read_text())
    assert [len(splits[name]["pictures"]) for name in ("train", "validation", "test")] == [48, 6, 6]
    said = json.loads((finished / "captions.json").read_text())
    assert [row["image"] for row in said] == splits["test"]["pictures"]
    # The metrics are those of the captions that are there.
    references: dict[str, list[list[str]]] = {}
    for line in (scenes / "Flickr8k.token.txt").read_text().splitlines():
        name, caption = line.split("\t")
        references.setdefault(name.split("#")[0], []).append(caption_words(caption))
    again = caption_metrics([caption_words(row["caption"]) for row in said], [references[row["image"]] for row in said])
    assert results["test"]["metrics"] == pytest.approx(again)
    assert results["claims"]["of another picture"]["by kind"], "drawn scenes are judged"
    html = (finished / "report.html").read_text(encoding="utf-8")
    for heading in ("What was asked", "Data", "What trained", "Curves", "Numbers", "Captions", "Where it looked",
                    "Errors", "Beside the papers", "Cost"):  # fmt: skip
        assert f">{heading}<" in html, heading
    assert "hashed before and after training: all are unchanged" in html
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    by_epoch = [line for line in lines if "validation/loss" in line]
    assert len(by_epoch) == 3
    assert by_epoch[-1]["validation/loss"] < by_epoch[0]["validation/loss"]
    assert all("penalty" in line for line in lines if "loss" in line)
    # The best epoch is what was saved.
    best = max(by_epoch, key=lambda line: line["validation/cider"])
    kept = load_file(finished / "checkpoints" / f"best-{best['step']:08d}" / "trainable.safetensors")
    assert all(torch.equal(trained(finished)[name], tensor) for name, tensor in kept.items())
    assert f"Kept are the weights after step {best['step']:,}" in html
    samples = [json.loads(line) for line in (finished / "samples.jsonl").read_text().splitlines()]
    assert Counter(line["step"] for line in samples) == {line["step"]: 5 for line in by_epoch}
    assert len({line["picture"] for line in samples}) == 5
    assert "captions, drawn by chance" in html


class TestPromises(TrainingPromises):
    @pytest.fixture(scope="class")
    def training(self, finished: Path, options: tuple[object, ...]) -> Training:
        return Training(
            "caption_lab.train",
            LIBRARIES,
            options,
            finished,
            "model/model.safetensors",
            ("samples.jsonl", "captions.json"),
            two=Otherwise(("--no-cache",), same=("captions.json",)),
            launch=LAUNCH,
            zero=("--watch-pictures", 1),
            zero_stage=3,
            sharded=Otherwise(losses=1e-3, weights=3e-3),
            planned=True,
            gpu=Budget(operators=1550, syncs=2, copies=4),
        )


@pytest.mark.alone
@pytest.mark.parametrize("model", ["show_tell", "transformer"])
def test_unfrozen_stages_train_and_nothing_else(model: str, scenes: Path, tmp_path: Path) -> None:
    shared = ("--model", model, "--data", scenes, *SMALL, "--epochs", "1", "--unfreeze", "1", "--no-report",
              "--encoder-learning-rate", "1e-2", "--label-smoothing", "0.1", "--scheduled-sampling", "0.5")  # fmt: skip
    here(*shared, "--output", tmp_path / "cached", "--boundary-precision", "fp32")
    here(*shared, "--output", tmp_path / "plain", "--no-cache", "--boundary-precision", "fp32")
    assert losses(tmp_path / "plain") == pytest.approx(losses(tmp_path / "cached"), abs=1e-4)
    here(*shared, "--output", tmp_path / "none", "--max-steps", "1", "--learning-rate", "1e-12",
         "--encoder-learning-rate", "1e-12")  # fmt: skip
    before, after = trained(tmp_path / "none"), trained(tmp_path / "cached")
    moved = {name for name in before if not torch.allclose(before[name], after[name], atol=1e-6)}
    assert {name for name in moved if name.startswith("encoder")}
    assert all("layer4" in name for name in moved if name.startswith("encoder"))
    assert not any("running" in name for name in moved)


@pytest.mark.alone
def test_early_stopping_self_critical_training_and_captions(finished: Path, scenes: Path, tmp_path: Path) -> None:
    run = tmp_path / "scst"
    shared = ("--data", scenes, "--objective", "scst", "--batch-size", "16", "--track", "none")
    assert "--model show_attend_tell" in here(*shared, "--start", finished, code=2).stderr
    here("--model", "show_attend_tell", *shared, "--start", finished, "--epochs", "2", "--learning-rate", "1e-3",
         "--watch", "cider", "--patience", "1", "--no-report", "--output", run)  # fmt: skip
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all("reward" in line for line in lines if "loss" in line)
    changed = [name for name, tensor in trained(run).items() if not torch.equal(tensor, trained(finished)[name])]
    assert changed
    assert all(name.startswith("decoder") for name in changed)
    here("--resume", run, "--no-report")  # what --start brought is not taken for options that were given with it
    assert "--start" in here(*shared, "--model", "show_tell", code=2).stderr
    assert "drop their options" in here(*shared, "--start", finished, "--width", "8", code=2).stderr


@pytest.mark.long
@pytest.mark.parametrize("model", ["show_attend_tell", "transformer"])
def test_real_photographs(model: str, real_pictures: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    here("--model", model, "--encoder", "resnet18", "--no-pretrained", "--image-size", "64", "--width", "64",
         "--layers", "1", "--data", real_pictures, "--limit", "160", "--epochs", "3", "--batch-size", "40",
         "--learning-rate", "3e-3", "--track", "none", "--output", run)  # fmt: skip
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    by_epoch = [line["validation/loss"] for line in lines if "validation/loss" in line]
    assert by_epoch[-1] < by_epoch[0]
    results = json.loads((run / "results.json").read_text())
    assert results["test"]["metrics"]["bleu-1"] > 5
    assert not results["claims"], "nobody knows what is true of a photograph"
    html = (run / "report.html").read_text(encoding="utf-8")
    assert (">Where it looked<" in html) == (model != "show_tell")
    other = sorted((real_pictures / "Images").iterdir())[0]
    assert lab_commands.here("caption_lab.caption", other, "--checkpoint", run).stdout.startswith(str(other))


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("--data", "missing-pictures"), "missing-pictures"),
        (("--encoder", "resnt50"), "resnet50"),
        (("--weights", "missing.safetensors"), "--weights"),
        (("--unfreeze", "9"), "--unfreeze"),
        (("--mask-words", "0.1", "--model", "show_tell"), "--mask-words"),
        (("--plain",), "--plain: works with --model show_attend_tell only"),
        (("--scheduled-sampling", "1.5"), "--scheduled-sampling"),
        (("--objective", "scst"), "--start"),
        (("--beam", "0"), "--beam"),
        (("--top-p", "2"), "--top-p"),
        (("--min-count", "10000"), "--min-count"),
        (("--splits", "missing-lists"), "--splits"),
        (("--model", "lstm"), "--model"),
        (("--output", "/proc/run"), "--output"),
        (("--pool", "40", "--model", "show_tell"), "--pool"),
        (("--pool", "2", "--model", "transformer"), "--pool"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    arguments: tuple[str, ...], names: str, scenes: Path, tmp_path: Path
) -> None:
    filled = [*arguments, "--no-pretrained"]
    for flag, value in (("--data", str(scenes)), ("--output", str(tmp_path / "run"))):
        filled += [] if flag in filled else [flag, value]
    done = here(*filled, code=2)
    assert len(done.errors) == 1, done.stderr
    assert names in done.errors[0]
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_captions_that_it_writes_have_no_plan(tmp_path: Path) -> None:
    done = here("--objective", "scst", "--start", tmp_path, "--plan", code=2)
    assert "--plan: --objective scst learns from captions that it writes" in done.errors[0]


@pytest.mark.alone
def test_bad_pictures_and_captions_are_named_counted_and_left_out(scenes: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(scenes, data)
    (data / "Flickr8k.token.txt").unlink()
    names = sorted(path.name for path in (data / "Images").iterdir())
    (data / "Images" / names[0]).write_bytes(b"")
    (data / "Images" / names[1]).unlink()
    huge = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (60000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0\0\0\0\0"
    (data / "Images" / names[2]).write_bytes(huge)
    Image.new("RGB", (8, 8)).save(data / "Images" / "nobody.jpg")
    with (data / "captions.txt").open("ab") as stream:
        stream.write(names[5].encode() + b",\xff\xfe caption\n" + names[6].encode() + b",  \n")
    shared = ("--data", data, *SMALL, "--epochs", "1")
    done = here(*shared, "--output", tmp_path / "run", code=2)
    assert len(done.errors) == 1
    assert names[1] in done.errors[0] or names[0] in done.errors[0]
    assert not (tmp_path / "run").exists()
    done = here(*shared, "--output", tmp_path / "run", "--on-bad-data", "skip")
    for reason in ("not UTF-8", "empty caption", "captions without a picture", "picture without captions"):
        assert f"left out 1 × {reason}" in done.stderr
    html = (tmp_path / "run" / "report.html").read_text()
    assert "left out because" in html
    splits = json.loads((tmp_path / "run" / "splits.json").read_text())
    kept = {name for part in splits.values() for name in part["pictures"]}
    assert kept == set(names[3:])


@pytest.mark.alone
def test_resume_with_other_options_or_pictures(options: tuple[object, ...], scenes: Path, tmp_path: Path) -> None:
    run, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(scenes, data)
    changed = [data if argument == scenes else argument for argument in options]
    here(*changed, "--output", run, "--max-steps", "2", "--save-every", "1", "--no-report")
    assert "--width" in here("--resume", run, "--width", "8", code=2).stderr
    Image.new("RGB", (8, 8)).save(data / "Images" / "scene_000000.jpg")
    assert "have changed since the run began" in here("--resume", run, code=2).stderr
