import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from labs_common.errors import LabError
from labs_common.saved import load_exactly, load_model, read_weights, save_model

pytestmark = pytest.mark.quick


def build(description: dict[str, Any], state: dict[str, torch.Tensor]) -> torch.nn.Module:
    width = description["width"]
    return torch.nn.Linear(width if isinstance(width, int) else width.size, 2)


def test_a_model_goes_around_and_is_written_in_one_move(tmp_path: Path) -> None:
    layer = torch.nn.Linear(3, 2)
    folder = tmp_path / "run" / "model"
    save_model(folder, "toy.json", {"width": 3}, layer.state_dict(), lambda part: (part / "words.txt").write_text("a"))
    for path in (tmp_path / "run", folder):  # a run, and the directory itself
        loaded, description, there = load_model(path, "toy.json", "--checkpoint", build)
        assert (description, there) == ({"width": 3}, folder)
        assert torch.equal(loaded.weight, layer.weight)
        assert not loaded.training
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert (folder / "words.txt").read_text() == "a"

    def failing(part: Path) -> None:
        raise OSError("no space")

    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(OSError, match="no space"):
        save_model(folder, "toy.json", {"width": 4}, torch.nn.Linear(4, 2).state_dict(), failing)
    assert (folder / "model.safetensors").read_bytes() == before, "the old one is there until the new one is whole"


@pytest.mark.parametrize(
    "damage", ["cut weights", "no json", "another width", "missing", "not json", "odd", "without bias"]
)
def test_what_is_wrong_with_a_model_is_one_line(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "model"
    save_model(folder, "toy.json", {"width": 3}, torch.nn.Linear(3, 2).state_dict())
    weights, description = folder / "model.safetensors", folder / "toy.json"
    if damage == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-5])
    elif damage == "no json":
        description.unlink()
    elif damage == "another width":
        description.write_text(json.dumps({"width": 5}))
    elif damage == "missing":
        weights.unlink()
    elif damage == "without bias":
        save_file({"weight": torch.zeros(2, 3)}, weights)
    elif damage == "odd":  # fails in the code that builds from it, with an error of its own
        description.write_text(json.dumps({"width": [[]]}))
    else:
        description.write_text("{")
    with pytest.raises(LabError, match=f"--checkpoint {tmp_path}") as caught:
        load_model(tmp_path, "toy.json", "--checkpoint", build)
    assert "\n" not in str(caught.value)
    assert damage != "without bias" or 'Missing key(s) in state_dict: "bias"' in str(caught.value)


def test_weights_of_another_network_are_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"not weights")
    with pytest.raises(LabError, match=r"--weights .*weights\.safetensors: cannot be read"):
        read_weights(file, "--weights")
    with pytest.raises(LabError, match=r"--weights: is of another architecture .*first difference: weight"):
        load_exactly(torch.nn.Linear(3, 2), torch.nn.Linear(4, 2).state_dict(), "--weights")
