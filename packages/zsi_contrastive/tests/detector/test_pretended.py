"""Every command that computes, on a GPU that is pretended: no tensor is on the wrong device."""

from pathlib import Path

import pytest
from labs_testing.pretended_runs import Asked, assert_in_bf16, on_pretended_gpu

from zsi_contrastive.detector.compare import LIBRARIES

pytestmark = pytest.mark.pretended


def test_every_command(scenes: Path, tmp_path: Path) -> None:
    small = ("--data", scenes, "--split", "scenes", "--min-side", "48", "--max-side", "64", "--batch-size", "4", "--limit",
             "4", "--max-steps", "2", "--controls", "1")  # fmt: skip
    rows = tmp_path / "rows"
    run = rows / "both" / "seed-0"
    _, evaluated, predicted = on_pretended_gpu(
        LIBRARIES,
        tmp_path / "said",
        Asked("zsi_contrastive.ablate", (*small, "--rows", "both", "--output", rows)),
        Asked("zsi_contrastive.evaluate", ("--checkpoint", run, "--refine", "mean", "--output", tmp_path / "again")),
        Asked("zsi_contrastive.predict", ("--checkpoint", run, "--output", tmp_path / "usual")),
    )  # fmt: skip
    assert (rows / "comparison.json").exists()
    assert_in_bf16(evaluated, predicted)
