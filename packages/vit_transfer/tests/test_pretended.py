"""Every command that computes, on a GPU that is pretended: no tensor is on the wrong device."""

from pathlib import Path

import pytest
from labs_testing.pretended_runs import Asked, on_pretended_gpu

pytestmark = pytest.mark.pretended


def test_every_command(scenes: Path, tmp_path: Path) -> None:
    folder = tmp_path / "comparison"
    small = ("--data", scenes, "--epochs", "1", "--max-steps", "2", "--batch-size", "8")
    train = (*small, "--track", "none", "--precision", "bf16", "--no-pretrained")
    vit = folder / "tiny-vit-no-pretrained" / "seed-0"
    on_pretended_gpu(
        ["vit_transfer.compare", "vit_transfer.attack"],
        tmp_path / "said",
        Asked("vit_transfer.compare", (*small, "--models", "tiny-vit:no-pretrained,tiny-cnn:no-pretrained:unfreeze=head",
                                       "--output", folder)),
        Asked("vit_transfer.train", ("--model", "tiny-cnn", *train, "--no-cache", "--unfreeze", "all", "--augment", "crop",
                                     "--views", "2", "--baselines", "no", "--output", tmp_path / "cnn")),
        Asked("vit_transfer.attack", ("--models", f"{vit},{tmp_path / 'cnn'}", "--used", "4", "--passes", "1", "--radius",
                                      "60", "--data", scenes, "--output", tmp_path / "attack")),
    )  # fmt: skip
    assert (folder / "comparison.json").exists()
    assert (tmp_path / "attack" / "results.json").exists()
