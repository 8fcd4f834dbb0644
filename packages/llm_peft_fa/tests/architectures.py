"""The architectures of real models, each as a tiny random one with all of its parts."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 64
# Names of the same size differ between families.
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 256, "hidden_dropout": 0.0, "attention_dropout": 0.0,
    "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}  # which most have, and those of UNGROUPED do not
UNGROUPED = ("falcon", "gpt_neox", "gpt2", "bloom", "mamba2")
BOTH = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
GPT2 = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4, "linear_num_key_heads": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
    "n_shared_experts": 1, "moe_intermediate_size": 24, "first_k_dense_replace": 1,
}  # fmt: skip

# By transformers' model type, what differs from SIZES.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama4_text": {
        "intermediate_size_mlp": 48, "num_local_experts": 4, "moe_layers": [1], "no_rope_layers": [1, 0],
        "attention_chunk_size": 8, "floor_scale": 4,
    },
    "mistral": {"sliding_window": 8},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {"use_sliding_window": True, **BOTH},
    "qwen3": {},
    "qwen3_moe": EXPERTS,
    "qwen3_next": {**EXPERTS, **LINEAR, "shared_expert_intermediate_size": 24},
    "qwen3_5_text": LINEAR,
    "gemma2": {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8, **BOTH},
    "gemma3_text": {"query_pre_attn_scalar": 8, **BOTH},
    "gemma3n_text": {
        "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8, "num_hidden_layers": 4,
        "num_kv_shared_layers": 2, "laurel_rank": 4, "activation_sparsity_pattern": None,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8, "intermediate_size": 48,
    },
    "gemma4_text": {
        "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8, "num_hidden_layers": 4,
        "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8,
        "global_head_dim": 16,
    },
    "phi3": {"sliding_window": 8},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "olmo2": {},
    "olmo3": BOTH,
    "smollm3": {"no_rope_layers": [1, 0]},
    "granite": {"logits_scaling": 4.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25, **BOTH},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, **BOTH},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "glm4": {"partial_rotary_factor": 0.5},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "stablelm": {"partial_rotary_factor": 0.5},
    "gpt_neox": {},
    "gpt2": GPT2,
    "bloom": {"n_head": 4, "n_layer": 2},
    "starcoder2": {"sliding_window": 8},
    "deepseek_v3": LATENT,
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "expand": 2},
}  # fmt: skip


def random_model(name: str, **more: Any) -> PreTrainedModel:
    """Makes the tiny model, with its own eager attention; the same name gives the same weights."""
    sizes = SIZES if name in UNGROUPED else SIZES | GROUPED
    config = AutoConfig.for_model(name, **sizes | ARCHITECTURES[name] | more)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
