"""Zero-shot naming, on a model that was trained here."""

import json
from pathlib import Path

import pytest
import torch
from labs_testing import commands as lab_commands

from clip_lab.encoder import load_encoder
from clip_lab.zero_shot import class_embeddings, filled, templates_of


def test_classes_are_named_by_their_sentences(run: Path, things: Path, tmp_path: Path) -> None:
    names, templates = tmp_path / "names.txt", tmp_path / "templates.txt"
    names.write_text("blue circle\ngreen circle\nred circle\n")
    templates.write_text("a {} in the picture\nthere is a {}\n")
    lab_commands.here("clip_lab.zero_shot", "--checkpoint", run, "--data", things, "--names", names, "--templates",
                      templates, "--output", tmp_path / "named")  # fmt: skip
    results = json.loads((tmp_path / "named" / "results.json").read_text())
    assert results["chance"] == pytest.approx(1 / 3)
    assert list(results["by template"]) == ["a {} in the picture", "there is a {}"]
    encoder = load_encoder(str(run))
    classes = class_embeddings(encoder, ["blue circle", "green circle"], ["a {}", "one {}"])
    torch.testing.assert_close(classes.norm(dim=1), torch.ones(2))
    both = encoder.read(["a green circle", "one green circle"])
    torch.testing.assert_close(classes[1], torch.nn.functional.normalize(both.mean(0), dim=0))
    assert "Sentences" in (tmp_path / "named" / "report.html").read_text()


def test_templates() -> None:
    assert filled("a {} in the picture", "aeroplane") == "an aeroplane in the picture"
    assert filled("a {}", "fire_truck") == "a fire truck"
    openai = templates_of("openai")
    assert len(openai) == 80
    assert all(template.count("{}") == 1 for template in openai)
    assert all(template.count("{}") == 1 for kind in ("plain", "short") for template in templates_of(kind))
