"""The linear probe, on a model that was trained here."""

import json
from pathlib import Path

import pytest
import torch
from labs_testing import commands as lab_commands
from PIL import Image
from safetensors.torch import load_file

from clip_lab.config import ProbeConfig
from clip_lab.encoder import load_encoder
from clip_lab.probe import shots_of
from labs_common.errors import LabError


@pytest.mark.alone
def test_the_probe_is_measured_on_what_it_wrote(run: Path, things: Path, tmp_path: Path) -> None:
    lab_commands.here("clip_lab.probe", "--checkpoint", run, "--data", things, "--shots", "1,4,all", "--draws", "2",
                      "--output", tmp_path / "probe")  # fmt: skip
    results = json.loads((tmp_path / "probe" / "results.json").read_text())
    assert results["accuracy"] > 0.8, "three colours"
    assert {name: len(values) for name, values in results["few-shot"].items()} == {"1": 2, "4": 2, "all": 1}
    layer, encoder = load_file(tmp_path / "probe" / "layer.safetensors"), load_encoder(str(run))
    right = 0
    for label, name in enumerate(sorted(path.name for path in (things / "test").iterdir())):
        for file in (things / "test" / name).iterdir():
            with Image.open(file) as image, torch.no_grad():
                feature = encoder.features(encoder.view(image.convert("RGB"))[None]).bfloat16().float()
            right += int((feature @ layer["weight"].T + layer["bias"]).argmax()) == label
    assert results["accuracy"] == pytest.approx(right / 18)
    html = (tmp_path / "probe" / "report.html").read_text()
    for heading in ("Data", "What trained", "Numbers", "Few pictures", "Penalty", "Classes", "Mistakes",
                    "Beside published figures"):  # fmt: skip
        assert f">{heading}<" in html
    assert "ViT-L/14" in html
    lab_commands.here("clip_lab.probe", "--checkpoint", run, "--data", things, "--solver", "sgd", "--features",
                      "embedding", "--epochs", "20", "--shots", "", "--no-cache", "--output", tmp_path / "sgd")  # fmt: skip
    assert json.loads((tmp_path / "sgd" / "results.json").read_text())["accuracy"] > 0.8


@pytest.mark.parametrize("shots", ["0", "many", "9" * 5000])
def test_shots_are_counts(shots: str) -> None:
    with pytest.raises(LabError, match="--shots"):
        shots_of(ProbeConfig(shots=shots))


@pytest.mark.long
def test_real_classes_are_probed_and_named(run: Path, real_classes: Path, tmp_path: Path) -> None:
    shared = ("--checkpoint", run, "--data", real_classes, "--limit", "300")
    lab_commands.here("clip_lab.probe", *shared, "--shots", "4,all", "--draws", "1", "--output", tmp_path / "probe")
    assert json.loads((tmp_path / "probe" / "results.json").read_text())["accuracy"] > 0.12
    lab_commands.here("clip_lab.zero_shot", *shared, "--templates", "plain", "--output", tmp_path / "named")
    assert json.loads((tmp_path / "named" / "results.json").read_text())["chance"] == pytest.approx(0.1)
