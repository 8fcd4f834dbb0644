"""`accelerate launch` with DeepSpeed, as a user starts it; elsewhere its environment is made without importing anew."""

from pathlib import Path

import pytest
from labs_testing.commands import command, free_port, losses, one_cpu
from random_models import random_gemma
from test_entry_points import ROOT


def test_deepspeed_through_the_launcher(tmp_path: Path) -> None:
    """ZeRO-2 takes the whole road, with one process on a CPU, to the losses of a plain run."""
    pytest.importorskip("deepspeed", reason="needs the extra llm-peft-fa[deepspeed]")
    gemma = tmp_path / "gemma"
    gemma.mkdir()
    random_gemma(gemma)
    file = one_cpu(ROOT / "packages/llm_peft_fa/launch/deepspeed_zero2.yaml", tmp_path)
    arguments = ("-m", "llm_peft_fa.train", "--model", gemma, "--conversations", 40, "--max-steps", 3, "--batch-size", 8,
                 "--test-prompts", 2, "--max-new-tokens", 4, "--track", "none", "--no-report", "--output")  # fmt: skip
    command("accelerate.commands.launch", "--config_file", file, *arguments, tmp_path / "zero",
            DS_ACCELERATOR="cpu", MASTER_PORT=free_port())  # fmt: skip
    command(*arguments[1:], tmp_path / "plain")
    assert list(tmp_path.glob("zero/checkpoints/*/sharded")), "DeepSpeed took part"
    assert losses(tmp_path / "zero") == pytest.approx(losses(tmp_path / "plain"), abs=1e-4)
