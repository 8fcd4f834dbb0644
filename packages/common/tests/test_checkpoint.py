"""Whatever happened to a run's directory, it goes on as it began or is refused in one line."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy.training
from accelerate import Accelerator
from labs_testing.commands import in_two_processes
from test_training import OPTIONS, finish

from labs_common.checkpoint import check_resumed, checkpoints, load_checkpoint, save_checkpoint
from labs_common.data.captions import CaptionedPictures
from labs_common.data.classes import LabelledPictures
from labs_common.data.images import record_splits
from labs_common.errors import LabError
from labs_common.run import Run

SHORT = (*OPTIONS, "--max-steps", 9, "--keep", 3)
SUMS = ".check-sums.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("toy") / "whole"
    finish("--output", run, *SHORT)
    return run


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "run")


def newest(run: Path) -> Path:
    return checkpoints(run / "checkpoints")[-1]


def refusal(run: Path) -> str:
    """What is said before anything is prepared."""
    with pytest.raises(LabError) as caught:
        check_resumed(run / "checkpoints", Accelerator(), {"run": Run(run).id})
    return str(caught.value)


def rewritten(checkpoint: Path, **other: Any) -> None:
    """Puts other values into a checkpoint's position, and the sum that they have."""
    file = checkpoint / "position.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | other))
    sums = json.loads((checkpoint / SUMS).read_text())
    (checkpoint / SUMS).write_text(json.dumps(sums | {file.name: zlib.crc32(file.read_bytes())}))


def flipped(file: Path) -> None:
    """One bit in the middle is another."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def piped(file: Path) -> None:
    """A pipe takes its place."""
    file.unlink()
    os.mkfifo(file)


def test_sums_are_of_every_file(whole: Path) -> None:
    for checkpoint in checkpoints(whole / "checkpoints"):
        sums = json.loads((checkpoint / SUMS).read_text())
        files = [file for file in checkpoint.iterdir() if file.name != SUMS]
        assert {file.name for file in files} >= {"trainable.safetensors", "optimizer.pt", "random-0.pt"}
        assert sums == {file.name: zlib.crc32(file.read_bytes()) for file in files}


def test_any_damaged_file_is_named_and_the_checkpoint_before_is_offered(run: Path) -> None:
    for file in sorted(newest(run).iterdir()):
        content = file.read_bytes()
        for damage in (flipped, lambda file: file.write_bytes(file.read_bytes()[:-1]), Path.unlink, piped):
            damage(file)
            said = refusal(run)
            assert str(file if file.name != SUMS else file.parent) in said
            assert said.endswith(f"; delete step-00000009 in {run / 'checkpoints'} to go on from step-00000006")
            file.unlink(missing_ok=True)
            file.write_bytes(content)
    check_resumed(run / "checkpoints", Accelerator(), {"run": Run(run).id, "steps": 9, "epoch": 10})


def test_after_the_damaged_ones_are_deleted_it_goes_on(whole: Path, run: Path) -> None:
    *_, before, last = checkpoints(run / "checkpoints")
    flipped(before / "random-0.pt")
    flipped(last / "optimizer.pt")
    said = finish("--resume", run, code=2)
    assert len(said.splitlines()) == 1
    assert f"{last / 'optimizer.pt'}: is damaged" in said
    wanted = re.search(r"delete (\S+), (\S+) in (\S+) to go on from step-00000003", said)
    assert wanted
    for name in wanted.group(1, 2):
        shutil.rmtree(Path(wanted[3]) / name)
    finish("--resume", run)
    for name in ("metrics.jsonl", "model.safetensors"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    for checkpoint in checkpoints(run / "checkpoints"):
        flipped(checkpoint / "optimizer.pt")
    assert "to begin again: no earlier one is whole" in refusal(run)


def test_best_weights_that_are_damaged_are_named(run: Path) -> None:
    shutil.copytree(newest(run), run / "checkpoints" / "best-of-all")  # somebody keeps it: it is none of the run's
    best = shutil.copytree(checkpoints(run / "checkpoints")[1], run / "checkpoints" / "best-00000006")
    flipped(best / "trainable.safetensors")
    assert re.search(r"best-00000006/trainable\S+: is damaged.*delete best-00000006, step-00000006, step-00000009 in "
                     r".* to go on from step-00000003$", refusal(run))  # fmt: skip


def test_another_runs_checkpoint_is_refused(run: Path, tmp_path: Path) -> None:
    """Of the same options, so that it fits; or an earlier one under a later name."""
    other = tmp_path / "other"
    finish("--output", other, *SHORT)
    own = newest(run).rename(tmp_path / "own")
    for foreign in (newest(other), checkpoints(run / "checkpoints")[0]):
        shutil.copytree(foreign, run / "checkpoints" / "step-00000009")
        assert "is of another run or another step; delete step-00000009" in refusal(run)
        shutil.rmtree(newest(run))
    own.rename(run / "checkpoints" / "step-00000009")
    finish("--resume", run)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"precision": "bf16"}, "computes in bf16, and --precision auto is fp32 here"),
        ({"launch": "FSDP"}, "was launched with FSDP, not no sharding; launch it as before"),
        ({"options": {"learning_rate": 0.5}}, "--learning-rate was 0.5 when it was written and is 0.01 in the run's"),
        ({"options": {"micro_batches": 1}}, "--micro-batches was 1 when"),
        ({"steps": 8}, "the data have changed since (8 steps then, 9 now)"),
        ({"epoch": 11}, "the data have changed"),
        ({"data": 5}, "the data have changed"),
    ],
)
def test_what_would_go_on_with_other_numbers_is_refused(run: Path, other: dict[str, Any], said: str) -> None:
    rewritten(newest(run), **other)
    found = finish("--resume", run, code=2).splitlines()
    assert len(found) == 1
    assert said in found[0]
    assert str(newest(run)) in found[0]


def lines_of(run: Path, file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / file).read_text().splitlines()]


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("metrics.jsonl", lambda lines: lines[0].update(loss=1.0), "was changed since step 9"),
        ("metrics.jsonl", lambda lines: lines[0].update(step=True), "metrics.jsonl:1: is no line of a run"),
        ("metrics.jsonl", lambda lines: lines.insert(5, lines[1]), "metrics.jsonl:6: is no line of a run, or not in"),
        ("metrics.jsonl", lambda lines: lines.pop(2), "was changed since step 9"),
        ("timing.jsonl", lambda lines: lines[0].update(seconds=None), "lacks what a step took"),
        ("timing.jsonl", lambda lines: lines[0].update(seconds=10**400), "lacks what a step took"),
        ("timing.jsonl", lambda lines: lines.reverse(), "timing.jsonl:2: is no line of a run, or not in its place"),
    ],
)
def test_lines_that_somebody_changed_are_refused(
    run: Path, file: str, change: Callable[[list[dict[str, Any]]], object], said: str
) -> None:
    lines = lines_of(run, file)
    change(lines)
    (run / file).write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = finish("--resume", run, code=2).splitlines()
    assert len(found) == 1
    assert f"{run / file}" in found[0]
    assert said in found[0]


def test_lines_after_the_checkpoint_may_be_anything_that_a_kill_leaves(whole: Path, run: Path) -> None:
    shutil.rmtree(newest(run))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    finish("--resume", run)
    assert (run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("file", "content"),
    [("frozen.json", "null"), ("frozen.json", '{"0.weight": 1}'), ("frozen.json", '[{"0.weight": "a"}, null]'),
     ("environment.json", "null"), ("environment.json", {"packages": 3}), ("environment.json", {"chosen": 3})],
)  # fmt: skip
def test_records_that_hold_something_else_are_refused(run: Path, file: str, content: Any) -> None:
    if isinstance(content, dict):
        content = json.dumps(json.loads((run / file).read_text()) | content)
    (run / file).write_text(content)
    found = finish("--resume", run, code=2).splitlines()
    assert len(found) == 1
    assert f"{run / file}" in found[0]


def test_another_device_or_torch_is_said(whole: Path, run: Path) -> None:
    options = {"an_option_of_another_version": 1}
    rewritten(newest(run), **{"device": "NVIDIA X", "torch": "1.0", "CPU threads": 64}, options=options)
    (run / "model.safetensors").unlink()
    said = " ".join(finish("--resume", run).split())
    assert "device NVIDIA X, and goes on with cpu: numbers may differ" in said
    assert "torch 1.0, and goes on with" in said
    assert f"CPU threads 64, and goes on with {torch.get_num_threads()}: numbers may differ" in said
    assert (run / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_checkpoints_of_earlier_versions_are_taken_as_they_are(whole: Path, run: Path) -> None:
    about = json.loads((run / "environment.json").read_text())
    assert re.fullmatch("[0-9a-f]{32}", about.pop("run"))
    (run / "environment.json").write_text(json.dumps(about))
    for checkpoint in checkpoints(run / "checkpoints"):
        (checkpoint / SUMS).unlink()
        position = json.loads((checkpoint / "position.json").read_text())
        kept = {name: position[name] for name in ("step", "count", "best", "precision")}
        (checkpoint / "position.json").write_text(json.dumps(kept))
    shutil.rmtree(newest(run))
    assert "has no check sums" in finish("--resume", run)
    for name in ("metrics.jsonl", "model.safetensors"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    beyond = newest(run).rename(run / "checkpoints" / "step-00000010")
    (beyond / SUMS).unlink()
    (beyond / "position.json").write_text(json.dumps(kept | {"step": 10}))
    assert "(10 steps then, 9 now)" in finish("--resume", run, code=2)


def test_labels_and_captions_of_other_data_are_noticed(tmp_path: Path) -> None:
    pictures = {"source": "here", "contents": [Path("a"), Path("b")], "names": ["a", "b"], "digests": (b"1", b"2")}
    found = []
    for labels, caption in (([0, 1], "a dog"), ([0, 1], "a dog"), ([1, 1], "a dog"), ([0, 1], "a cat")):
        labelled = LabelledPictures(**pictures, classes=("x", "y"), labels=np.array(labels))
        captioned = CaptionedPictures(**pictures, captions=((caption,), ("a tree", "two trees")))
        run = Run(tmp_path)
        record_splits(run, {"train": labelled, "test": captioned})
        found.append(run.data)
    assert found[0] == found[1]
    assert len({*found}) == 3


LOCKING = """import fcntl, sys
with open(sys.argv[1], "a+") as file:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit("held")
    file.write("process 1 on another-machine")
    file.flush()
    print("locked", flush=True)
    sys.stdin.read()
"""


@contextmanager
def locked(run: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process works on the run, until it is killed."""
    run.mkdir(exist_ok=True)
    process = subprocess.Popen([sys.executable, "-S", "-c", LOCKING, str(run / ".lock")],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_run_that_is_worked_on_is_not_resumed(run: Path) -> None:
    (run / ".lock").unlink()
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    with locked(run):
        said = finish("--resume", run, code=2)
        assert said == (f"error: {run}: process 1 on another-machine is at work there; wait for its end, or stop it "
                        "first\n")  # fmt: skip
        in_two_processes("toy.training", ["toy.training"], "--resume", run, codes=(2, 2))
        now = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != ".lock"}
    assert {path: moment for path, moment in now.items() if path != run} == {
        path: moment for path, moment in before.items() if path != run
    }
    finish("--resume", run)  # the lock of a process that was killed is no more


@pytest.mark.parametrize("resumed", [False, True])
def test_a_training_holds_its_run(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resumed: bool) -> None:
    here = run if resumed else tmp_path / "new"
    tried, freeze = [], toy.training.train_only

    def trying(*asked: Any) -> None:
        freeze(*asked)
        begin = [sys.executable, "-S", "-c", LOCKING, str(here / ".lock")]
        done = subprocess.run(begin, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        tried.append((done.stderr.strip(), (here / ".lock").read_text()))

    monkeypatch.setattr(toy.training, "train_only", trying)
    finish(*(("--resume", run) if resumed else ("--output", here, *SHORT)), code=0)
    assert tried == [("held", f"process {os.getpid()} on {socket.gethostname()}")]
    with locked(here):
        pass  # it was given back at the end


def test_a_file_system_without_locks_is_said(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.lockf", none)
    assert "has no locks (No locks available)" in finish("--resume", run)


def test_copies_of_the_best_stay(run: Path) -> None:
    shutil.copytree(newest(run), run / "checkpoints" / "best-00000006.bak")
    check_resumed(run / "checkpoints", Accelerator(), {"run": Run(run).id, "steps": 9})


def test_the_best_weights_are_missed_before_training(run: Path) -> None:
    file = newest(run) / "position.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"best": {"step": 6, "score": 1.0, "waited": 0}}))
    (newest(run) / SUMS).write_text(json.dumps(json.loads((newest(run) / SUMS).read_text())
                                               | {"position.json": zlib.crc32(file.read_bytes())}))  # fmt: skip
    with pytest.raises(LabError, match="best-00000006: the best weights so far are missing"):
        check_resumed(run / "checkpoints", Accelerator(), {"run": Run(run).id, "steps": 9})


@pytest.mark.parametrize("name", [SUMS, "position.json", "optimizer.pt"])
def test_a_pipe_in_a_checkpoint_is_not_waited_for(run: Path, name: str) -> None:
    (newest(run) / name).unlink()
    os.mkfifo(newest(run) / name)
    assert name in refusal(run)


def test_sums_that_no_file_can_have(run: Path) -> None:
    (newest(run) / SUMS).write_text('{"a\\u0000b": 1}')
    assert "missing" in refusal(run)
    (newest(run) / SUMS).write_text("[" * 100_000)
    assert "missing or damaged" in refusal(run)


def test_a_file_whose_sum_was_taken_out(run: Path) -> None:
    sums = json.loads((newest(run) / SUMS).read_text())
    del sums["optimizer.pt"]
    (newest(run) / SUMS).write_text(json.dumps(sums))
    assert "optimizer.pt: has no check sum" in refusal(run)


def test_moments_have_the_layout_of_their_weights(tmp_path: Path) -> None:
    """A fused optimizer goes through both as they lie in memory, and a GPU's convolutions lie otherwise than a CPU's."""

    def made(memory_format: torch.memory_format) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        layer = torch.nn.Conv2d(3, 4, 3).to(memory_format=memory_format)
        return layer, torch.optim.AdamW(layer.parameters(), 0.1, fused=True)

    def step(layer: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        layer(torch.ones(2, 3, 5, 5)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    accelerator, first = Accelerator(), made(torch.channels_last)
    step(*first)
    save_checkpoint(tmp_path / "step-1", accelerator, *first, {})
    then = made(torch.contiguous_format)
    load_checkpoint(tmp_path / "step-1", accelerator, *then)
    step(*first)
    step(*then)
    torch.testing.assert_close(then[0].weight, first[0].weight, rtol=0, atol=1e-6)

    state = torch.load(tmp_path / "step-1" / "optimizer.pt", weights_only=True)
    state["optimizer"]["param_groups"][0]["fused"] = None  # as in a run of before
    torch.save(state, tmp_path / "step-1" / "optimizer.pt")
    load_checkpoint(tmp_path / "step-1", accelerator, *then)
    assert then[1].param_groups[0]["fused"] is True
