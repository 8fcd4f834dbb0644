"""The architectures of real models, each as a tiny random one with all of its parts."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 64
# Names of the same size differ between families.
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
    "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1,
}  # fmt: skip
BOTH = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
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
    "phi": {}, "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32}, "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8}, "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 256},
    "gptj": GPT2 | {"rotary_dim": 4}, "falcon_h1": {}, "exaone4": BOTH | {"sliding_window_pattern": 2}, "granitemoehybrid": {"layer_types": ["mamba", "attention"], "num_local_experts": 4, "mamba_n_heads": 8},
    "nanochat": {}, "llama4_text": {"num_local_experts": 4, "intermediate_size_mlp": 48, "attention_chunk_size": 8}, "ministral": {**BOTH}, "ministral3": {},
    "minimax_m2": {}, "glm4_moe": EXPERTS, "ernie4_5": {}, "hunyuan_v1_dense": {}, "seed_oss": {}, "afmoe": {}, "bitnet": {}, "helium": {}, "jamba": {}, "bamba": {}, "nemotron": {}, "apertus": {}, "olmo": {}, "gemma": {}, "minicpm3": {}, "zamba2": {}, "dots1": {}, "qwen2_moe": {},
}  # fmt: skip


def random_model(name: str, attention: str = "eager") -> PreTrainedModel:
    """Makes the tiny model; the same name gives the same weights, whatever the attention."""
    sizes = SIZES if name != "falcon" else {key: value for key, value in SIZES.items() if key != "head_dim"}
    config = AutoConfig.for_model(name, **sizes | ARCHITECTURES[name])
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
