"""FSDP2 over two processes: each has a part of every weight, and the audit, checkpoints and the result know it."""

import json
import shutil
from pathlib import Path
from signal import SIGKILL

import pytest
import torch
from labs_testing.commands import in_two_processes, losses
from labs_testing.sharded import fsdp_variables
from safetensors.torch import load_file
from test_training import OPTIONS, finish

FSDP = """# Two parts.
distributed_type: FSDP
num_processes: 2
fsdp_config:
  fsdp_version: 2
"""
SMALL = (*OPTIONS, "--epochs", "1", "--dropout", "0")


def sharded(folder: Path, *options: object, codes: tuple[int, int] = (0, 0), **more: str) -> None:
    (folder / "fsdp.yaml").write_text(FSDP)
    variables = fsdp_variables(folder / "fsdp.yaml")
    in_two_processes("toy.training", ["toy.training"], *options, codes=codes, **variables, **more)


def test_a_sharded_run_is_killed_resumed_and_audited(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    sharded(tmp_path, "--output", whole, *SMALL)
    kept = json.loads((whole / "frozen.json").read_text())
    assert len(kept) == 2, "each process has hashes of its own"
    assert kept[0].keys() == kept[1].keys()
    assert kept[0]["0.weight"] != kept[1]["0.weight"]

    finish("--output", tmp_path / "one", *SMALL)
    assert losses(whole) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    expected = load_file(tmp_path / "one" / "model.safetensors")
    for name, tensor in load_file(whole / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=0)

    sharded(tmp_path, "--output", killed, *SMALL, "--signal-at", "4", "--signal-number", int(SIGKILL), codes=(-9, -9))
    assert len(losses(killed)) == 4
    sharded(tmp_path, "--resume", killed)
    for name in ("metrics.jsonl", "model.safetensors", "frozen.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_part_that_moved_in_one_process_stops_both(tmp_path: Path) -> None:
    run = tmp_path / "run"
    sharded(tmp_path, "--output", run, *SMALL, "--signal-at", "4", codes=(130, 130))
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


def test_hashes_that_a_kill_left_unwritten_are_written_on_resume(tmp_path: Path) -> None:
    run = tmp_path / "run"
    sharded(tmp_path, "--output", run, *SMALL, "--signal-at", "4", codes=(130, 130))
    kept = (run / "frozen.json").read_bytes()
    (run / "frozen.json").unlink()
    shutil.rmtree(run / "checkpoints")
    sharded(tmp_path, "--resume", run)
    assert (run / "frozen.json").read_bytes() == kept
