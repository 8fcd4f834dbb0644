"""The base model and its tokenizer: the tiny offline one, or any causal language model of transformers."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from labs_common.errors import LabError
from llm_peft_fa.attention import NAME
from llm_peft_fa.templates import set_template
from llm_peft_fa.tiny import tiny_base


def model_path(model: str) -> str:
    """Where transformers finds the model that `--model` names; makes the tiny one on first use."""
    return str(tiny_base()) if model == "tiny" else model


def load_tokenizer(model: str, template: str = "auto") -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with the chat template that `--template` names.

    Raises:
        LabError: there is no such model, or its tokenizer cannot tell which characters a token covers.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model_path(model))
    except (OSError, ValueError) as error:
        raise LabError(_no_model(model, error)) from error
    if not tokenizer.is_fast:
        raise LabError(f"--model {model}: its tokenizer has no fast version, which maps tokens to characters")
    set_template(tokenizer, template)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:  # only generation pads, and there a mask hides it
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(model: str, precision: str = "no", quantized: bool = False) -> PreTrainedModel:
    """A causal language model in evaluation mode whose attention can be packed.

    With Accelerate's `precision` bf16 the weights are kept in bfloat16, which suits a frozen base; else in
    float32. `quantized`: the linear layers in 4-bit NF4 with double quantisation (Dettmers et al. 2023).

    Raises:
        LabError: there is no such model, or its files cannot be read.
    """
    # Under ZeRO-3 transformers would load a model in parts that cannot run before the engine is there.
    unset_hf_deepspeed_config()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    more: dict[str, Any] = {}
    if quantized:
        more["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    try:
        loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            model_path(model), dtype=dtype, attn_implementation=NAME, use_safetensors=True, **more
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise LabError(_no_model(model, error)) from error
    return loaded.eval()


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens at which generation stops."""
    configured = model.generation_config.eos_token_id
    ids = set(configured if isinstance(configured, list) else [configured])
    return {token for token in ids | {tokenizer.eos_token_id} if token is not None}


def _no_model(model: str, error: BaseException) -> str:
    reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    kind = "directory" if Path(model).is_dir() else "name"
    return f"--model {model}: no model can be loaded from this {kind} ({reason}); give tiny, a directory or a hub id"
