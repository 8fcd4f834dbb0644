"""Every command that computes, on a GPU that is pretended: no tensor is on the wrong device."""

from pathlib import Path

import pytest
from labs_testing.pretended_runs import Asked, assert_in_bf16, on_pretended_gpu

pytestmark = pytest.mark.pretended


def test_every_objective_and_every_command(scenes: Path, things: Path, tmp_path: Path) -> None:
    folder = tmp_path / "comparison"
    small = ("--data", scenes, "--image", "test_vit", "--no-image-pretrained", "--image-size", "32", "--text-width", "32", "--text-layers", "1",
             "--epochs", "1", "--max-steps", "2", "--batch-size", "16")  # fmt: skip
    run = folder / "clip" / "seed-0"
    classes = ("--checkpoint", run, "--data", things)
    _, _, retrieved, named, *_ = on_pretended_gpu(
        ["clip_lab.compare"],
        tmp_path / "said",
        Asked("clip_lab.compare", (*small, "--objectives", "clip,siglip,coca,simvlm", "--classes", things, "--ranked",
                                   "6", "--output", folder)),
        Asked("clip_lab.train", (*small, "--augment", "crop+colour", "--chunk", "5", "--loss-chunk", "3",
                                 "--track", "none", "--precision", "bf16", "--output", tmp_path / "parts")),
        Asked("clip_lab.retrieve", ("one circle", "--picture", next(scenes.rglob("*.jpg")), "--checkpoint", run, "--data",
                                    scenes, "--top", "3", "--output", tmp_path / "found")),
        Asked("clip_lab.zero_shot", (*classes, "--templates", "plain", "--output", tmp_path / "named")),
        Asked("clip_lab.probe", (*classes, "--shots", "1,all", "--draws", "1", "--output", tmp_path / "probe")),
        Asked("clip_lab.probe", (*classes, "--solver", "sgd", "--epochs", "1", "--shots", "", "--output",
                                 tmp_path / "sgd")),
        Asked("clip_lab.export", ("--checkpoint", run, "--output", tmp_path / "exported")),
    )  # fmt: skip
    assert (folder / "comparison.json").exists()
    assert_in_bf16(retrieved)
    assert named.products["torch.bfloat16"] > 10, "the sentences; the probe beside it is fitted in float32"
