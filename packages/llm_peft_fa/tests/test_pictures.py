"""Bases that also see pictures: what trains is where text goes."""

import dataclasses

import pytest
import torch
from random_models import random_gemma3

from llm_peft_fa.attention import NAME
from llm_peft_fa.config import MethodOptions
from llm_peft_fa.methods import METHODS, Setting, apply_method, resolved
from llm_peft_fa.model import Adapted, PackedCausalLM, virtual_tokens
from llm_peft_fa.packing import packed_row
from llm_peft_fa.templates import Encoded
from llm_peft_fa.verification import choice

pytestmark = pytest.mark.quick
SMALL = {"layers": {"layers": 1}, "oft": {"block_size": 8}, "vera": {"rank": 4}}


def adapted(method: str, **options: object) -> Adapted:
    made = resolved(MethodOptions(method=method, **SMALL.get(method, {}), **options))
    # No tokenizer is there that could make tokens of a text.
    made = dataclasses.replace(made, prompt_init="random" if made.prompt_init else None)
    return apply_method(random_gemma3(), made, Setting(None, 100))


# qlora is lora on a base in 4 bits.
@pytest.mark.parametrize("method", [name for name in METHODS if name != "qlora"])
def test_everything_that_trains_gets_a_gradient(method: str) -> None:
    model = adapted(method)
    rows = [Encoded([2, *range(5, 25)], [True] * 21, "") for _ in range(3)]
    PackedCausalLM(model).train()(packed_row(rows, virtual=virtual_tokens(model))).backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert [name for name, gradient in trained.items() if gradient is None] == []
    assert not [name for name in trained if "vision" in name or "multi_modal" in name]


def test_named_targets_are_those_of_the_language_model() -> None:
    model = adapted("lora", target_modules=("q_proj", "v_proj"))
    names = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    layers = {f"base_model.model.model.language_model.layers.{number}.self_attn" for number in range(3)}
    assert names == {f"{layer}.{part}" for layer in layers for part in ("q_proj", "v_proj")}


def test_its_packed_loss_is_its_own() -> None:
    assert choice(random_gemma3()) == (NAME, "")


def test_a_process_group_trains_it_for_two_steps(tmp_path: object) -> None:
    """DistributedDataParallel stops at the second step when a trained parameter had no gradient in the first."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        model = torch.nn.parallel.DistributedDataParallel(PackedCausalLM(adapted("lora")))
        row = packed_row([Encoded([2, *range(5, 25)], [True] * 21, "")])
        for _ in range(2):
            model(row).backward()
        assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)
    finally:
        torch.distributed.destroy_process_group()
