"""Every method and every command that computes, on a GPU that is pretended: no tensor is on the wrong device."""

from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from commands import LIBRARIES
from labs_testing.pretended import pretended_gpu
from labs_testing.pretended_runs import Asked, Budget, assert_within, on_pretended_gpu

from llm_peft_fa.base import load_model
from llm_peft_fa.methods import METHODS
from llm_peft_fa.model import PackedCausalLM, mean_loss
from llm_peft_fa.packing import packed_row
from llm_peft_fa.templates import Encoded

pytestmark = pytest.mark.pretended

SMALL = ("--conversations", "24", "--batch-size", "4", "--max-steps", "2", "--evaluate-every", "2", "--test-prompts", "1",
         "--max-new-tokens", "2", "--tokens-per-batch", "1500", "--track", "none", "--precision", "bf16",
         "--no-report")  # fmt: skip
# The most that a method may do in a step; those that add rows to a prompt index more, and AdaLoRA moves its ranks about.
METHOD = Budget(operators=1170, syncs=2, copies=10)
ROWS = Budget(operators=400, syncs=8, copies=15)
BUDGETS = {"prompt_tuning": ROWS, "prefix_tuning": ROWS, "p_tuning": ROWS, "adalora": Budget(1900, syncs=17, copies=24)}


def test_every_method(llama_dir: Path, tmp_path: Path) -> None:
    # AdaLoRA does not change its ranks in fewer steps; OFT's blocks must divide the widths of this base.
    more = {"adalora": ("--max-steps", "4", "--evaluate-every", "4"), "oft": ("--block-size", "8")}
    methods = [method for method in METHODS if method != "qlora"]
    asked = [
        ("--model", llama_dir, "--method", method, *SMALL, "--no-answer-base", *more.get(method, ()),
         "--output", tmp_path / method)
        for method in methods
    ]  # fmt: skip
    done = on_pretended_gpu(LIBRARIES, tmp_path / "said", *(Asked("llm_peft_fa.train", one) for one in asked))
    for method, ran in zip(methods, done, strict=True):
        assert_within(ran, BUDGETS.get(method, METHOD))


def test_every_command(gemma_dir: Path, tmp_path: Path) -> None:
    text = tmp_path / "plain.txt"
    text.write_text("پایتخت ایران تهران است.\n\nپایتخت فرانسه پاریس است.\n", encoding="utf-8")
    run = tmp_path / "run"
    compared = ("--methods", "lora:rank=2,prefix_tuning:virtual_tokens=3", "--conversations", "24", "--batch-size", "4",
                "--max-steps", "2", "--test-prompts", "1", "--max-new-tokens", "2", "--tokens-per-batch", "1500")  # fmt: skip
    on_pretended_gpu(
        ["llm_peft_fa.compare"],
        tmp_path / "said",
        Asked("llm_peft_fa.train", ("--model", gemma_dir, *SMALL, "--gradient-checkpointing", "--merge", "--plain-text",
                                    text, "--output", run)),
        Asked("llm_peft_fa.evaluate", ("--checkpoint", run, "--test-prompts", "2", "--max-new-tokens", "3", "--output",
                                       tmp_path / "again")),
        Asked("llm_peft_fa.chat", ("--checkpoint", run, "--max-new-tokens", "3"), typed="سلام\n/quit\n"),
        Asked("llm_peft_fa.inspect", ("--model", gemma_dir, "--output", tmp_path / "inspected")),
        Asked("llm_peft_fa.compare", ("--model", gemma_dir, *compared, "--output", tmp_path / "comparison")),
    )  # fmt: skip
    assert (tmp_path / "comparison" / "comparison.json").exists()


def test_qlora(llama_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs the extra quantization")
    asked = ("--model", llama_dir, "--method", "qlora", *SMALL, "--output", tmp_path / "run")
    (ran,) = on_pretended_gpu(LIBRARIES, tmp_path / "said", Asked("llm_peft_fa.train", asked))
    assert_within(ran, METHOD)


def test_an_evaluation_waits_for_the_gpu_once(llama_dir: Path) -> None:
    waits = []
    with pretended_gpu() as gpu:
        model = PackedCausalLM(load_model(str(llama_dir), "no")).to("cuda")
        accelerator = Mock(device=torch.device("cuda"), reduce=lambda total, how: total)
        for count in (2, 2, 6):  # the first one also tries out the attention's kernels
            rows = [packed_row([Encoded([2, 5, 6, 7], [False, True, True, True], "")])] * count
            before = gpu.syncs.total()
            mean_loss(model, rows, accelerator)
            waits.append(gpu.syncs.total() - before)
    assert waits[1] == waits[2], "as often for six rows as for two"
