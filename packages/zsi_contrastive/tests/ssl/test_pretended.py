"""Every method of pre-training, and what is measured of it, on a GPU that is pretended."""

from pathlib import Path

import pytest
from labs_testing.pretended_runs import Asked, on_pretended_gpu

from zsi_contrastive.ssl.compare import LIBRARIES
from zsi_contrastive.ssl.methods import METHODS

pytestmark = pytest.mark.pretended


def test_every_method_and_the_comparison(looks: Path, tmp_path: Path) -> None:
    small = ("--data", looks, "--side", "16", "--batch-size", "32", "--epochs", "1", "--max-steps", "2", "--hidden", "16",
             "--outputs", "12", "--queue", "64", "--map", "none")  # fmt: skip
    others = [method for method in METHODS if method not in ("moco", "dino")]  # which keep all promises, this one too
    compared = ("--methods", ",".join(others), "--no-probe", "--output", tmp_path / "compared")
    probed = ("--method", "simclr", "--track", "none", "--precision", "bf16", "--output", tmp_path / "probed")
    on_pretended_gpu(
        LIBRARIES,
        tmp_path / "said",
        Asked("zsi_contrastive.compare", (*small, *compared)),
        Asked("zsi_contrastive.pretrain", (*small, *probed)),  # with a linear probe and a report
    )
    assert (tmp_path / "compared" / "comparison.json").exists()
