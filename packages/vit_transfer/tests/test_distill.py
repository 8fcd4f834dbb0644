"""Distillation: the losses of the paper, the teacher's answers, and the command."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from labs_testing import commands as lab_commands
from labs_testing.commands import losses
from labs_testing.pretended_runs import Budget
from labs_testing.promises import TrainingPromises
from labs_testing.trainings import Training
from safetensors.torch import load_file

from labs_common.errors import LabError
from vit_transfer.config import DistillConfig
from vit_transfer.distill import complete_distillation, hard, soft, soft_mean
from vit_transfer.saved import saved_model
from vit_transfer.train import named_config

LIBRARIES = ["vit_transfer.distill"]


@pytest.mark.parametrize(
    "content", [b"{", b"\xff", b"[" * 100_000, b"[]", b'{"label_names": 3}', b'{"label_names": [3]}']
)
def test_a_teacher_whose_description_is_garbled_is_one_line(tmp_path: Path, content: bytes) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(LabError, match=r"config\.json|knows other classes"):
        saved_model("--teacher", str(tmp_path), ["a"])


def test_losses_are_those_of_the_paper() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 7, dtype=torch.float64), 3 * torch.randn(5, 7, dtype=torch.float64)
    first = complete_distillation(DistillConfig())
    other = complete_distillation(dataclasses.replace(DistillConfig(), distillation="soft"))
    averaged = dataclasses.replace(first, training=dataclasses.replace(first.training, ema=0.5))
    assert named_config("tiny-cnn", averaged).training.ema == 0, "its last block alone trains"
    assert (first.weight, other.weight, other.temperature) == (0.5, 0.1, 3.0)

    def softmax(x: np.ndarray) -> np.ndarray:
        e = np.exp(x - x.max(1, keepdims=True))
        return e / e.sum(1, keepdims=True)

    s, t = student.numpy(), teacher.numpy()
    likeliest = -np.log(softmax(s)[np.arange(5), t.argmax(1)]).mean()
    assert float(hard(student, teacher, 3.0)) == pytest.approx(likeliest)
    p, q = softmax(t / 3), softmax(s / 3)
    divergence = 9 * (p * (np.log(p) - np.log(q))).sum(1).mean()
    assert float(soft(student, teacher, 3.0)) == pytest.approx(divergence)
    assert float(soft(teacher, teacher, 3.0)) == pytest.approx(0, abs=1e-12)
    # facebookresearch/deit, losses.py: the sum over batch and classes, times tau ** 2, over the number of logits.
    summed = 9 * (p * (np.log(p) - np.log(q))).sum() / student.numel()
    assert float(soft_mean(student, teacher, 3.0)) == pytest.approx(summed)


@pytest.fixture(scope="module")
def shared(scenes: Path) -> tuple[object, ...]:
    return ("--data", scenes, "--batch-size", "8", "--epochs", "3", "--views", "2", "--track", "none")


@pytest.fixture(scope="module")
def teacher(shared: tuple[object, ...], cnn_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a CNN."""
    run = tmp_path_factory.mktemp("teacher") / "run"
    lab_commands.here("vit_transfer.train", "--model", "tiny-cnn", "--weights", cnn_file, *shared, "--epochs", "2",
                      "--baselines", "no", "--no-report", "--output", run)  # fmt: skip
    return run


@pytest.mark.alone
@pytest.mark.parametrize("distillation", ["hard", "soft"])
def test_the_command(distillation: str, shared: tuple[object, ...], teacher: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = (
        "--model",
        "tiny-deit",
        "--no-pretrained",
        "--teacher",
        teacher,
        "--distillation",
        distillation,
        "--ema",
        "0.5",
        *shared,
    )
    done = lab_commands.here("vit_transfer.distill", *arguments, "--output", run)
    assert f"report: {run / 'report.html'}" in done.stdout
    results = json.loads((run / "results.json").read_text())
    assert list(results["test"]) == ["this run", "without a teacher", "the teacher"]
    taught = json.loads((teacher / "results.json").read_text())["test"]["this run"]
    assert results["test"]["the teacher"]["accuracy"] == taught["accuracy"], "the teacher is what was trained"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= line["agreement"] <= 1 for line in lines if "loss" in line)
    html = (run / "report.html").read_text(encoding="utf-8")
    for words in ("distilled into tiny-deit", "Student and teacher", "distillation head", "without a teacher"):
        assert words in html
    assert losses(run) != losses(run / "baselines" / "without-a-teacher")


@pytest.mark.alone
def test_a_cached_front_gives_what_it_gives_without_a_cache(
    shared: tuple[object, ...], teacher: Path, tmp_path: Path
) -> None:
    """Only the last block and the heads train."""
    block = ("--model", "tiny-deit", "--no-pretrained", "--teacher", teacher, *shared, "--unfreeze", "block",
             "--baselines", "no", "--no-report", "--boundary-precision", "fp32")  # fmt: skip
    lab_commands.here("vit_transfer.distill", *block, "--output", tmp_path / "cached")
    lab_commands.here("vit_transfer.distill", *block, "--no-cache", "--output", tmp_path / "plain")
    assert losses(tmp_path / "plain") == pytest.approx(losses(tmp_path / "cached"), abs=1e-4)
    expected = load_file(tmp_path / "cached" / "model" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "plain" / "model" / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-4, rtol=0)


@pytest.mark.alone
def test_resumed_it_gives_the_same_bytes(shared: tuple[object, ...], teacher: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    lab_commands.here(
        "vit_transfer.distill", "--model", "tiny-deit", "--no-pretrained", "--teacher", teacher, "--unfreeze", "block",
        *shared, "--save-every", "5", "--no-report", "--output", run,
    )  # fmt: skip
    _, *later = sorted((run / "checkpoints").glob("step-*"))
    assert later
    paths = [run / "model" / "model.safetensors", run / "metrics.jsonl", run / "predictions.json"]
    before = [path.read_bytes() for path in paths]
    for path in (*later, run / "model", run / "baselines" / "without-a-teacher" / "model"):
        shutil.rmtree(path)
    lab_commands.here("vit_transfer.distill", "--resume", run, "--no-report")
    (run / "teacher.json").write_text((run / "teacher.json").read_text().replace(": ", ": 1", 1))
    changed = lab_commands.here("vit_transfer.distill", "--resume", run, code=2)
    assert "the teacher changed" in changed.errors[0]
    assert [path.read_bytes() for path in paths] == before


class TestPromises(TrainingPromises):
    @pytest.fixture(scope="class")
    def training(self, shared: tuple[object, ...], teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Training:
        options = ("--model", "tiny-deit", "--no-pretrained", "--teacher", teacher, "--baselines", "no", *shared)
        whole = tmp_path_factory.mktemp("runs") / "distilled"
        lab_commands.here("vit_transfer.distill", *options, "--no-report", "--output", whole)
        return Training("vit_transfer.distill", LIBRARIES, options, whole, "model/model.safetensors",
                        ("predictions.json",), frozen=("--unfreeze", "block"),
                        planned=True, gpu=Budget(operators=325, syncs=2, copies=4))  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("--model", "tiny-vit"), "no distillation token"),
        (("--teacher", "runs/missing"), "runs/missing"),
        (("--teacher", "resnt18"), "resnt18"),
        (("--teacher", "{empty}"), "--teacher"),
        (("--teacher", "{cut}"), "config.json: is not JSON"),
        (("--weight", "2"), "--weight"),
        (("--temperature", "2"), "--distillation soft"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[str, ...], names: str, scenes: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "config.json").write_text('{"label_names": ["a"')
    filled = [argument.format(empty=tmp_path / "empty", cut=tmp_path / "cut") for argument in arguments]
    filled += ["--no-pretrained", "--data", str(scenes), "--output", str(tmp_path / "run")]
    done = lab_commands.here("vit_transfer.distill", *filled, code=2)
    assert len(done.errors) == 1, done.stderr
    assert names in done.errors[0]
    assert not (tmp_path / "run").exists()
