"""FSDP2 over two processes: each has a part of every weight, and the audit, checkpoints and the result know it."""

import json
import shutil
from pathlib import Path
from signal import SIGKILL

import pytest
import torch
from accelerate import Accelerator
from labs_testing.commands import in_two_processes, losses, with_deepspeed
from labs_testing.sharded import fsdp_variables
from safetensors.torch import load_file
from test_training import OPTIONS, finish

from labs_common.checkpoint import check_resumed, checkpoints
from labs_common.errors import LabError
from labs_common.run import Run

FSDP = """# Two parts.
distributed_type: FSDP
num_processes: 2
fsdp_config:
  fsdp_version: 2
"""
ZERO = """# One process.
distributed_type: DEEPSPEED
num_processes: 1
deepspeed_config:
  zero_stage: STAGE
  gradient_accumulation_steps: 1
  zero3_init_flag: false
  zero3_save_16bit_model: true
"""
pytestmark = pytest.mark.long
SMALL = (*OPTIONS, "--epochs", "1", "--dropout", "0")


def sharded(folder: Path, *options: object, codes: tuple[int, int] = (0, 0), **more: str) -> None:
    (folder / "fsdp.yaml").write_text(FSDP)
    variables = fsdp_variables(folder / "fsdp.yaml")
    in_two_processes("toy.training", ["toy.training"], *options, codes=codes, **variables, **more)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over two processes that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole")
    sharded(folder, "--output", folder / "run", *SMALL)
    return folder / "run"


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in one process, unsharded."""
    run = tmp_path_factory.mktemp("one") / "run"
    finish("--output", run, *SMALL)
    return run


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over two processes that was interrupted after four steps."""
    folder = tmp_path_factory.mktemp("interrupted")
    sharded(folder, "--output", folder / "run", *SMALL, "--signal-at", "4", codes=(130, 130))
    return folder / "run"


def test_a_sharded_run_is_killed_resumed_and_audited(whole: Path, one: Path, tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    kept = json.loads((whole / "frozen.json").read_text())
    assert len(kept) == 2, "each process has hashes of its own"
    assert kept[0].keys() == kept[1].keys()
    assert kept[0]["0.weight"] != kept[1]["0.weight"]

    assert losses(whole) == pytest.approx(losses(one), rel=1e-5)
    expected = load_file(one / "model.safetensors")
    for name, tensor in load_file(whole / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=0)

    sharded(tmp_path, "--output", killed, *SMALL, "--signal-at", "4", "--signal-number", int(SIGKILL), codes=(-9, -9))
    assert len(losses(killed)) == 4
    sharded(tmp_path, "--resume", killed)
    for name in ("metrics.jsonl", "model.safetensors", "frozen.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_part_that_moved_in_one_process_stops_both(interrupted: Path, tmp_path: Path) -> None:
    run = shutil.copytree(interrupted, tmp_path / "run")
    kept = json.loads((run / "frozen.json").read_text())
    kept[1]["0.weight"] = kept[0]["0.weight"]  # as if the base had changed where only process 1 sees it
    (run / "frozen.json").write_text(json.dumps(kept))
    sharded(tmp_path, "--resume", run, codes=(1, 1))
    assert not (run / "results.json").exists()


def test_patience_goes_back_to_the_best_weights(tmp_path: Path) -> None:
    early = ("--patience", "1", "--evaluate-every", "2", "--learning-rate", "0.3")
    options = (*OPTIONS[:-2], "--dropout", "0", *early)
    sharded(tmp_path, "--output", tmp_path / "two", *options)
    finish("--output", tmp_path / "one", *options)
    assert len(losses(tmp_path / "two")) == len(losses(tmp_path / "one")) < 30
    expected = load_file(tmp_path / "one" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "two" / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=0)


def test_hashes_that_a_kill_left_unwritten_are_written_on_resume(interrupted: Path, tmp_path: Path) -> None:
    run = shutil.copytree(interrupted, tmp_path / "run")
    kept = (run / "frozen.json").read_bytes()
    (run / "frozen.json").unlink()
    shutil.rmtree(run / "checkpoints")
    sharded(tmp_path, "--resume", run)
    assert (run / "frozen.json").read_bytes() == kept


def test_checkpoints_are_those_of_unsharded_runs(whole: Path, one: Path) -> None:
    """Of what trains alone, whole, in files that are read without running anything."""
    two, plain = (next(iter(checkpoints(run / "checkpoints"))) for run in (whole, one))
    assert {file.name for file in two.iterdir()} == {file.name for file in plain.iterdir()} | {"random-1.pt"}
    weights, expected = (load_file(path / "trainable.safetensors") for path in (two, plain))
    assert weights.keys() == expected.keys() >= {"3.weight"}
    assert not {name for name in weights if name.startswith("0.")}, "the frozen base"
    moments, known = (torch.load(path / "optimizer.pt", weights_only=True)["optimizer"] for path in (two, plain))
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, atol=1e-6, rtol=0)
    for number, state in known["state"].items():
        for name, value in state.items():
            assert type(moments["state"][number][name]) is torch.Tensor
            torch.testing.assert_close(moments["state"][number][name], value, atol=1e-6, rtol=0)


@pytest.mark.kills
@pytest.mark.parametrize("stage", [2, 3])
def test_under_deepspeed_it_is_killed_and_resumes_to_the_same_bytes(stage: int, one: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="needs the extra deepspeed")
    (tmp_path / "zero.yaml").write_text(ZERO.replace("STAGE", str(stage)))
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    def run(*options: object, code: int = 0) -> None:
        with_deepspeed(tmp_path / "zero.yaml", tmp_path, "toy.training", ["toy.training"], *options, ranks=2, code=code)

    run("--output", whole, *SMALL)
    assert losses(whole) == pytest.approx(losses(one), rel=1e-5)
    run("--output", killed, *SMALL, "--signal-at", "4", "--signal-number", int(SIGKILL), code=-9)
    (part,) = killed.glob("checkpoints/step-00000003/sharded/*/*_rank_1_*optim*")  # what the last one wrote
    content = part.read_bytes()
    part.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    with pytest.raises(LabError, match=f"{part.name}: is damaged"):
        check_resumed(killed / "checkpoints", Accelerator(), {"run": Run(killed).id})
    part.write_bytes(content)
    run("--resume", killed)
    for name in ("metrics.jsonl", "model.safetensors"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
