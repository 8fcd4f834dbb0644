"""Prefix tuning under several processes and DeepSpeed, whose saved adapters are a known trouble elsewhere."""

from pathlib import Path

import pytest
import torch
from commands import LAUNCH, LIBRARIES, SMALL, forked, here, trained, without_rank
from labs_testing.commands import free_port, in_two_processes, with_deepspeed
from labs_testing.sharded import fsdp_variables
from peft import PeftModel
from transformers import AutoModelForCausalLM

PREFIX = ("--method", "prefix_tuning", "--virtual-tokens", "4", "--encoder-width", "8", "--learning-rate", "0.01")


def options(model: Path, run: Path) -> list[object]:
    return [
        "--model",
        model,
        "--output",
        run,
        *without_rank(SMALL),
        *PREFIX,
        "--epochs",
        "1",
        "--no-answer-base",
        "--no-report",
    ]


@pytest.fixture(scope="module")
def prefix(gemma_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of prefix tuning with projection, in this process."""
    run = tmp_path_factory.mktemp("prefix") / "run"
    here("train", *options(gemma_dir, run))
    return run


def assert_same_prefix(run: Path, reference: Path, model: Path, tolerance: float) -> None:
    """The saved prefixes are alike, and plain PEFT answers with the one as with the other."""
    one, two = trained(run), trained(reference)
    assert one.keys() == two.keys() == {"prompt_embeddings"}
    scale = two["prompt_embeddings"].abs().max()
    torch.testing.assert_close(
        one["prompt_embeddings"] / scale, two["prompt_embeddings"] / scale, atol=tolerance, rtol=0
    )
    ids = torch.randint(300, 700, (1, 9))
    logits = []
    for folder in (run, reference):
        plain = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager")
        logits.append(
            PeftModel.from_pretrained(plain, folder / "adapter")(ids, attention_mask=torch.ones_like(ids)).logits
        )
    torch.testing.assert_close(logits[0], logits[1], atol=tolerance * 10, rtol=0)


@pytest.mark.long
def test_two_processes_save_a_prefix_that_loads(prefix: Path, gemma_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "two"
    shared = {"ACCELERATE_USE_CPU": "true", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    # What torchrun sets; the LoRA test below goes through torchrun itself.
    processes = [forked(*options(gemma_dir, run), **shared, RANK=rank, LOCAL_RANK=rank) for rank in ("0", "1")]
    for process in processes:
        process.join(timeout=200)
    assert [process.exitcode for process in processes] == [0, 0]
    assert_same_prefix(run, prefix, gemma_dir, 1e-5)


@pytest.mark.long
def test_two_that_shard_save_a_prefix_that_loads(prefix: Path, gemma_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "two"
    variables = fsdp_variables(LAUNCH / "fsdp.yaml")
    in_two_processes("llm_peft_fa.train", LIBRARIES, *options(gemma_dir, run), **variables)
    assert_same_prefix(run, prefix, gemma_dir, 1e-3)


@pytest.mark.long
def test_deepspeed_saves_a_prefix_that_loads(prefix: Path, gemma_dir: Path, tmp_path: Path) -> None:
    """ZeRO-3 is the hard one: the encoder's weights lie in parts when the prefix is made for saving.

    The base is read by one of the two processes alone, and so is what was saved.
    """
    pytest.importorskip("deepspeed", reason="needs the extra llm-peft-fa[deepspeed]")
    run = tmp_path / "run"
    with_deepspeed(LAUNCH / "deepspeed_zero3.yaml", tmp_path, "llm_peft_fa.train", LIBRARIES,
                   *options(gemma_dir, run), ranks=2)  # fmt: skip
    assert list(run.glob("checkpoints/*/sharded")), "DeepSpeed took part"
    assert_same_prefix(run, prefix, gemma_dir, 1e-3)
