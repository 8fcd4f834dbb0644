"""Tiny random models of real architectures, with a real tokenizer."""

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
)

from llm_peft_fa import persian, tiny
from llm_peft_fa.attention import NAME

# Llama's own turn markers, with its system role.
LLAMA_TEMPLATE = """\
{{ bos_token }}{% for message in messages %}<start_of_turn>{{ message['role'] }}

{{ message['content'] | trim }}<end_of_turn>{% endfor %}{% if add_generation_prompt %}<start_of_turn>assistant

{% endif %}"""


def random_gemma(folder: Path) -> Path:
    """A random Gemma 2: soft-caps, a sliding window shorter than some conversations, grouped heads."""
    tokenizer = tiny._tokenizer(list(persian.plain_text(500, seed=1)), folder)
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, sliding_window=16, max_position_embeddings=4096,
        attn_logit_softcapping=5.0, final_logit_softcapping=3.0, initializer_range=0.3,
        pad_token_id=0, bos_token_id=2, eos_token_id=[1, tokenizer.convert_tokens_to_ids("<end_of_turn>")],
    )  # fmt: skip
    Gemma2ForCausalLM(config).save_pretrained(folder)
    return folder


def random_llama(folder: Path) -> Path:
    """A random Llama with grouped heads and an untied head."""
    tokenizer = tiny._tokenizer(list(persian.plain_text(500, seed=1)), folder)
    tokenizer.chat_template = LLAMA_TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, initializer_range=0.3, tie_word_embeddings=False,
        pad_token_id=0, bos_token_id=2, eos_token_id=[1, tokenizer.convert_tokens_to_ids("<end_of_turn>")],
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def random_gemma3() -> Gemma3ForConditionalGeneration:
    """A random Gemma 3 that sees pictures: a vision tower, and layers of both kinds of attention."""
    torch.manual_seed(0)
    text = {
        "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 32, "initializer_range": 0.3,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14,
    }  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return AutoModelForCausalLM.from_config(config, attn_implementation=NAME).eval()
