import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import toy.training
from labs_testing.commands import in_two_processes
from labs_testing.pretended_runs import Budget
from labs_testing.promises import KILLS
from labs_testing.trainings import Training, killed_and_resumed
from safetensors.torch import load_file
from toy import commands

from labs_common import training
from labs_common.fitting import begin
from labs_common.training import Loop, learning_rate_share

OPTIONS = ("--track", "none", "--save-every", "3", "--keep", "2", "--learning-rate", "0.01")
HERE = Path(__file__).parent


def finish(*arguments: object, code: int = 0) -> str:
    """Runs the toy in this process; returns what it wrote to stderr."""
    said = io.StringIO()
    found = 0
    with contextlib.redirect_stderr(said):
        try:
            commands.training(arguments=[str(argument) for argument in arguments])
        except SystemExit as stop:
            found = stop.code
    assert found == code, said.getvalue()
    return said.getvalue()


def wait_for_steps(run: Path, count: int) -> None:
    for _ in range(3000):
        file = run / "metrics.jsonl"
        if file.exists() and file.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.02)
    raise AssertionError(f"{run} never reached {count} lines")


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / "step-00000030" / "trainable.safetensors")


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("toy") / "whole"
    finish("--output", run, *OPTIONS)
    return run


def test_schedules_against_torch() -> None:
    total, rise = 50, 5
    for name in ("cosine", "linear", "constant", "steps"):
        parameter = torch.nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        after = {
            "cosine": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total - rise),
            "linear": torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total - rise),
            "constant": torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
            # Steps 34 and 46 of 50 are the first after two thirds and after eleven twelfths.
            "steps": torch.optim.lr_scheduler.MultiStepLR(optimizer, [34 - rise, 46 - rise], 0.1),
        }[name]
        for step in range(rise, total):
            assert learning_rate_share(step, total, 0.1, name) == pytest.approx(
                optimizer.param_groups[0]["lr"], abs=1e-9
            )
            optimizer.step()
            after.step()
    assert [learning_rate_share(step, total, 0.1, "linear") for step in range(5)] == pytest.approx(
        [(step + 1) / 6 for step in range(5)]
    )


@pytest.mark.kills
def test_killed_again_and_again_it_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    """With gradients that are accumulated, dropout, a teacher and a queue."""
    options = (*OPTIONS, "--remembers", "--micro-batches", 4)
    finish("--output", tmp_path / "whole", *options)
    whole = Training(
        "toy.training", ["toy.training"], (*options, "--seconds-per-step", 0.005), tmp_path / "whole",
        "checkpoints/step-00000030/trainable.safetensors", ("checkpoints/step-00000030/also.pt", "model.safetensors"),
        gpu=Budget(0, 0, 0),
    )  # fmt: skip
    run = killed_and_resumed(whole, tmp_path, 5 * KILLS)
    whole.assert_same(run)
    assert len(list((run / "checkpoints").iterdir())) == 2, "only --keep checkpoints"


def test_killed_before_the_first_checkpoint_it_starts_anew(whole_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "early"
    shutil.copytree(whole_run, run)
    shutil.rmtree(run / "checkpoints")
    finish("--resume", run)
    assert (run / "metrics.jsonl").read_bytes() == (whole_run / "metrics.jsonl").read_bytes()


def test_accumulation_equals_one_batch(tmp_path: Path) -> None:
    lines = []
    for parts in (1, 4):
        run = tmp_path / str(parts)
        finish("--output", run, "--micro-batches", parts, "--dropout", 0, "--max-steps", 5, *OPTIONS)
        lines.append([json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()])
    for one, two in zip(*lines, strict=True):
        assert one == pytest.approx(two, rel=1e-5)


def test_nan_stops_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "nan"
    said = finish("--output", run, "--nan-at", 7, *OPTIONS, code=1)
    assert "at step 8" in said
    assert "step-00000006" in said
    assert "Traceback" not in said
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000003", "step-00000006"]
    saved = load_file(run / "checkpoints" / "step-00000006" / "trainable.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in saved.values())


@pytest.mark.parametrize("option", [("--patience", 1), ("--keep-best",)])
def test_the_best_weights_are_kept_and_early_stopping_ends_there(option: tuple[object, ...], tmp_path: Path) -> None:
    run = tmp_path / "patient"
    finish("--output", run, *option, "--evaluate-every", 2, "--learning-rate", "0.3", *OPTIONS[:-2])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scores = {line["step"]: line["validation/loss"] for line in lines if "validation/loss" in line}
    best = min(scores, key=lambda step: scores[step])
    assert best < max(scores) == (best + 2 if "--patience" in option else 30), (
        "one evaluation after the best, or the end"
    )
    (kept,) = (run / "checkpoints").glob("best-*")
    assert kept.name == f"best-{best:08d}"
    weight = load_file(kept / "trainable.safetensors")["3.weight"]
    assert abs(float(weight.double().sum()) - 1) == pytest.approx(scores[best])
    assert torch.equal(load_file(run / "model.safetensors")["3.weight"], weight)


@pytest.fixture(params=[(0, 7), (1, 1), (1, 4)], ids=lambda value: f"{value[0]} kept, every {value[1]}")
def looking(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[object, ...]:
    """The loop looks at its figures later, as on a GPU; returns the option."""
    kept, every = request.param
    make = Loop.__init__

    def on_a_gpu(loop: Loop, *arguments: Any, **more: Any) -> None:
        make(loop, *arguments, **more)
        loop._kept = kept

    monkeypatch.setattr(Loop, "__init__", on_a_gpu)
    return ("--log-every", every)


def test_looking_later_changes_nothing(whole_run: Path, tmp_path: Path, looking: tuple[object, ...]) -> None:
    run = tmp_path / "later"
    finish("--output", run, *OPTIONS, *looking, "--signal-at", 16, code=130)
    (first, *_) = sorted((run / "checkpoints").iterdir(), reverse=True)
    assert int(first.name.removeprefix("step-")) in range(17, 17 + 7), "a step or a few later"
    finish("--resume", run)
    assert (run / "metrics.jsonl").read_bytes() == (whole_run / "metrics.jsonl").read_bytes()
    same = weights(whole_run)
    assert all(torch.equal(tensor, same[name]) for name, tensor in weights(run).items())
    timing = [json.loads(line) for line in (run / "timing.jsonl").read_text().splitlines()]
    assert [line["step"] for line in timing] == list(range(1, 31))
    assert all(line["seconds"] > 0 for line in timing)


@pytest.mark.parametrize("at", [7, 8, 9])  # the steps before, at and after a checkpoint and an evaluation are due
def test_nan_that_is_seen_later_is_never_saved(tmp_path: Path, at: int, looking: tuple[object, ...]) -> None:
    run = tmp_path / "nan"
    options = ("--nan-at", at, "--evaluate-every", 9, "--patience", 5)
    said = finish("--output", run, *OPTIONS, *options, *looking, code=1)
    last = "step-00000009" if at == 9 else "step-00000006"
    assert f"at step {at + 1} (" in said
    assert last in said
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == list(range(at + 1)), "all before it are logged"
    assert newest_step(run).name == last
    for file in (run / "checkpoints").rglob("trainable.safetensors"):
        assert all(torch.isfinite(tensor).all() for tensor in load_file(file).values()), file


def newest_step(run: Path) -> Path:
    return max((run / "checkpoints").glob("step-*"))


def test_steps_that_fp16_skips_are_logged_and_are_no_reason_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scale that overflows in the first steps: the same whether the loop looks at once or a step later."""

    def scaled(*options: Any) -> Any:
        accelerator = begin(*options)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-20)
        return accelerator

    monkeypatch.setattr(toy.training, "begin", scaled)
    make, lines = Loop.__init__, []
    for kept in (0, 1):

        def looking(loop: Loop, *arguments: Any, kept: int = kept, **more: Any) -> None:
            make(loop, *arguments, **more)
            loop._kept = kept

        monkeypatch.setattr(Loop, "__init__", looking)
        finish("--output", tmp_path / str(kept), *OPTIONS, "--clip-norm", 0)
        lines.append((tmp_path / str(kept) / "metrics.jsonl").read_bytes())
    assert lines[0] == lines[1]
    norms = [line["gradient_norm"] for line in map(json.loads, lines[0].splitlines()) if "gradient_norm" in line]
    assert norms[0] is None
    assert None not in norms[10:]
    assert torch.isfinite(weights(tmp_path / "1")["3.weight"]).all()


def test_the_peak_of_memory_is_of_training_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the allocator: a step holds 1, an evaluation 100."""
    held = {"now": 50}  # of what came before
    step, evaluated = Loop.step, Loop.evaluated

    def stepped(loop: Loop, *arguments: Any, **more: Any) -> None:
        held["now"] = max(held["now"], 1)
        step(loop, *arguments, **more)

    def measured(loop: Loop, *arguments: Any, **more: Any) -> None:
        held["now"] = 100
        evaluated(loop, *arguments, **more)

    monkeypatch.setattr(Loop, "step", stepped)
    monkeypatch.setattr(Loop, "evaluated", measured)
    monkeypatch.setattr(training, "peak_memory", lambda: held["now"])
    monkeypatch.setattr(training, "reset_peak_memory", lambda: held.update(now=0))
    finish("--output", tmp_path / "run", *OPTIONS, "--evaluate-every", 2, "--max-steps", 5)
    timing = map(json.loads, (tmp_path / "run" / "timing.jsonl").read_text().splitlines())
    assert [line["peak_memory"] for line in timing] == [1] * 5


def test_the_compiled_network_trains_and_the_plain_one_is_saved(
    whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's compiler with a back end that runs what it is given: the same bytes."""
    graphs = []

    def plain(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=plain))
    run = tmp_path / "compiled"
    finish("--output", run, *OPTIONS, "--compile", "--signal-at", 12, code=130)
    finish("--resume", run)
    assert graphs
    assert (run / "metrics.jsonl").read_bytes() == (whole_run / "metrics.jsonl").read_bytes()
    same = weights(whole_run)
    assert weights(run).keys() == same.keys()
    assert all(torch.equal(tensor, same[name]) for name, tensor in weights(run).items())


@pytest.mark.alone
@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 1)])
def test_another_number_of_processes_is_refused_in_all(tmp_path: Path, first: int, then: int) -> None:
    """Each has generators of its own; and none may wait for one that has stopped."""
    run = tmp_path / "run"

    def begin(count: int, code: int, *options: object) -> None:
        if count == 1:
            finish(*options, code=code)
        else:
            in_two_processes("toy.training", ["toy.training"], *options, codes=(code, code))

    begin(first, 0, "--output", run, "--max-steps", 4, *OPTIONS)
    before = (run / "metrics.jsonl").read_bytes()
    begin(then, 2, "--resume", run)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_moved_frozen_tensor_fails_the_run(tmp_path: Path) -> None:
    said = finish("--output", tmp_path / "moved", "--move-frozen", "--epochs", 1, *OPTIONS, code=1)
    assert "0.bias" in said
    assert not (tmp_path / "moved" / "results.json").exists()


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("--learnin-rate", "1"), "--learning-rate"),
        (("--epochs", "many"), "--epochs"),
        (("--schedule", "wavy"), "cosine"),
        (("--output", Path(__file__)), "--output"),
        (("--output", "/proc/labs"), "/proc"),
        (("--config", "/nowhere.yaml"), "/nowhere.yaml"),
        (("--resume", "/nowhere"), "/nowhere"),
        (("--precision", "fp16"), "--precision"),
        (("--epochs", "0"), "--epochs: must be a whole number at least 1 and at most 2147483647, not '0'"),
        (("--max-steps", "0"), "--max-steps: must be a whole number at least 1 and at most 2147483647, or None"),
        (("--batch-size", "0"), "--batch-size: must be a whole number at least 1"),
        (("--save-every", "0"), "--save-every: must be a whole number at least 1"),
        (("--keep", "0"), "--keep: must be a whole number at least 1"),
        (("--warmup", "5"), "--warmup: must be a number at least 0 and at most 1, not '5'"),
        (("--learning-rate", "nan"), "--learning-rate: must be a number at least 0"),
        (("--clip-norm", "-1"), "--clip-norm: must be a number at least 0"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[object, ...], names: str) -> None:
    said = finish(*arguments, code=2).splitlines()
    assert len(said) == 1, said
    assert said[0].startswith("error: ")
    assert names in said[0]


def test_resume_refuses_other_options_and_broken_checkpoints(whole_run: Path, tmp_path: Path) -> None:
    said = finish("--resume", whole_run, "--learning-rate", "0.5", code=2)
    assert "--learning-rate" in said
    run = tmp_path / "broken"
    finish("--output", run, "--max-steps", 4, *OPTIONS)
    for name in ("trainable.safetensors", "optimizer.pt", "position.json", "random-0.pt"):
        file = run / "checkpoints" / "step-00000004" / name
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        said = finish("--resume", run, code=2)
        assert str(file.parent) in said
        assert "Traceback" not in said
        file.write_bytes(whole)
    for name, left in (
        ("metrics.jsonl", b'{"step": 3'),
        ("timing.jsonl", b'{"step": 3}\n'),
        ("environment.json", b"{}"),
    ):
        whole = (run / name).read_bytes()
        (run / name).write_bytes(left)
        assert str(run / name) in finish("--resume", run, code=2)
        assert (run / name).read_bytes() == left, "what is refused is not written over"
        (run / name).write_bytes(whole)
    (run / "environment.json").unlink()
    finish("--resume", run)
    assert (run / "environment.json").exists()


@pytest.mark.long
def test_two_processes_give_the_result_of_one(tmp_path: Path) -> None:
    options = (*OPTIONS, "--epochs", "1", "--micro-batches", "2", "--dropout", "0")
    finish("--output", tmp_path / "one", *options)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(HERE)}
    command = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29517", "-m", "toy.training")
    done = subprocess.run(
        [sys.executable, *command, "--output", str(tmp_path / "two"), *options],
        env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, two = ((tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "two"))
    for mine, theirs in zip(one, two, strict=True):
        assert json.loads(mine) == pytest.approx(json.loads(theirs), rel=1e-5)


def test_tensorboard_gets_the_curves(tmp_path: Path) -> None:
    finish("--output", tmp_path / "run", "--track", "tensorboard", "--max-steps", 2)
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))
