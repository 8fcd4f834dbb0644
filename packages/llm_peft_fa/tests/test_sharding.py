"""Real sizes without weights, over eight processes that do not exist: what FSDP2 would gather at a time."""

from unittest.mock import Mock

import pytest
import torch
from labs_testing.sharded import assert_in_layers
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, PretrainedConfig

from labs_common.errors import LabError
from llm_peft_fa.config import MethodOptions, TrainConfig
from llm_peft_fa.methods import METHODS, Setting, apply_method, resolved
from llm_peft_fa.model import PackedCausalLM
from llm_peft_fa.train import check_machine

LLAMA_3B = LlamaConfig(
    vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
    num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
)  # fmt: skip
GEMMA_2B = Gemma2Config()


@pytest.mark.alone
@pytest.mark.parametrize(
    ("kind", "config", "method"),
    [(LlamaForCausalLM, LLAMA_3B, "lora"), (Gemma2ForCausalLM, GEMMA_2B, "prefix_tuning")],
)
def test_a_unit_of_each_layer(kind: type[torch.nn.Module], config: PretrainedConfig, method: str) -> None:
    options = MethodOptions(method=method, prompt_init="random" if method == "prefix_tuning" else None)
    with torch.device("meta"):
        base = kind(config).bfloat16()
        adapted = apply_method(base, resolved(options), Setting(Mock(), 10))  # type: ignore[arg-type]
    assert_in_layers(PackedCausalLM(adapted))


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_four_bits_are_not_sharded(kind: str) -> None:
    accelerator = Mock(distributed_type=kind, deepspeed_plugin=Mock(zero_stage=3))
    quantized = [name for name, method in METHODS.items() if method.quantized]
    assert quantized
    for name in quantized:
        with pytest.raises(LabError, match=f"--method {name}: FSDP and ZeRO-3 do not spread 4-bit weights"):
            check_machine(TrainConfig(method=resolved(MethodOptions(method=name))), accelerator)
