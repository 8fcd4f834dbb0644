import json
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from test_training import OPTIONS, finish

from labs_common.device import inference_accelerator
from labs_common.errors import LabError
from labs_common.fitting import channels_last, count_parameters, share_batch_norms
from labs_common.options import TrainingOptions
from labs_common.training import make_accelerator


def test_a_training_leaves_weights_counts_and_hashes(tmp_path: Path) -> None:
    finish("--output", tmp_path / "run", *OPTIONS, "--max-steps", 3)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["trained"], results["parameters"]) == (17, 97)
    assert load_file(tmp_path / "run" / "model.safetensors").keys() >= {"0.weight", "3.weight", "2.running_mean"}
    assert json.loads((tmp_path / "run" / "frozen.json").read_text()).keys() >= {"0.weight", "2.running_mean"}


def test_a_base_that_changed_between_two_starts_is_noticed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    finish("--output", run, *OPTIONS, "--epochs", 1, "--signal-at", 4, code=130)
    kept = json.loads((run / "frozen.json").read_text())
    (run / "frozen.json").write_text(json.dumps(kept | {"0.weight": "0" * 32}))
    assert "first 0.weight" in finish("--resume", run, code=1)
    assert not (run / "results.json").exists()


@pytest.mark.parametrize("content", ['{"0.weight": ', "5", "[]", '["a"]'])
def test_damaged_hashes_are_named_in_one_line(tmp_path: Path, content: str) -> None:
    run = tmp_path / "run"
    finish("--output", run, *OPTIONS, "--epochs", 1, "--signal-at", 4, code=130)
    (run / "frozen.json").write_text(content)
    said = finish("--resume", run, code=2).splitlines()[-1]
    assert f"error: {run / 'frozen.json'}: " in said


def test_a_sharded_run_is_not_resumed_unsharded(tmp_path: Path) -> None:
    run = tmp_path / "run"
    finish("--output", run, *OPTIONS, "--epochs", 1, "--signal-at", 4, code=130)
    kept = json.loads((run / "frozen.json").read_text())
    (run / "frozen.json").write_text(json.dumps([kept]))
    assert "launch it as before" in finish("--resume", run, code=2)


def test_variables_that_accelerate_does_not_know_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no such thing")
    with pytest.raises(LabError, match="ACCELERATE_"):
        inference_accelerator()


def test_the_parameters_that_train_are_counted() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    model[0].requires_grad_(False)
    assert count_parameters(model) == (10, 26)


def test_memory_format_and_batch_norms_of_one_process() -> None:
    accelerator = make_accelerator(TrainingOptions())
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    channels_last(network, accelerator)
    assert network[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert share_batch_norms(network, accelerator) is network


@pytest.mark.parametrize("sharded", [True, False])
def test_weights_that_are_sharded_stay_contiguous(sharded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = make_accelerator(TrainingOptions())
    if sharded:
        monkeypatch.setattr("labs_common.fitting.SHARDED", (accelerator.distributed_type,))
    network = torch.nn.Conv2d(3, 4, 3)
    channels_last(network, accelerator)
    assert network.weight.is_contiguous() is sharded


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [("WORLD_SIZE", "many", "is no number"), ("LOCAL_RANK", "0", "unset WORLD_SIZE, RANK and LOCAL_RANK")],
)
def test_variables_of_a_launcher_alone_are_one_line(
    name: str, value: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv(name, value)
    said = finish("--output", tmp_path / "run", *OPTIONS, code=2).splitlines()
    AcceleratorState._reset_state(reset_partial_state=True)
    assert len(said) == 1
    assert name in said[0]
    assert says in said[0]


def test_a_working_directory_that_is_gone_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert finish("--output", "run", *OPTIONS, code=2) == (
        "error: the directory in which this was started is gone; change to another\n"
    )
