"""The base model and its tokenizer: the tiny offline one, or any causal language model of transformers."""

import importlib.util
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.utils.logging import disable_progress_bar

from labs_common.device import mixed_precision
from labs_common.errors import LabError, reason_of
from labs_common.saved import load_auto, load_network
from llm_peft_fa.attention import NAME
from llm_peft_fa.config import Thinking, TrainConfig
from llm_peft_fa.templates import set_template
from llm_peft_fa.tiny import tiny_base

REMEDY = "give tiny, a directory or a hub id"
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # of weights, by Accelerate's precision
# PEFT asks for an old name at every model.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
if not sys.stderr.isatty():
    disable_progress_bar()  # of reading weights, which would fill a log with characters meant for a terminal


def model_path(model: str) -> str:
    """Returns the name or path under which transformers finds `--model`; makes the tiny one on first use.

    Raises:
        LabError: it is written as a directory, and there is none.
    """
    if model == "tiny":
        return str(tiny_base())
    path = Path(model).expanduser()
    # A hub id has one slash at most, and may begin with the name of a directory that happens to be here.
    if (model.startswith((".", "/", "~")) or model.count("/") > 1) and not path.exists():
        raise LabError(f"--model {model}: no such directory; {REMEDY}")
    return str(path) if model.startswith("~") else model


def _said(model: str) -> str:
    missing = not Path(model).exists() and Path(model).parent != Path() and Path(model).parent.is_dir()
    return f"--model {model}{' (no such directory)' * missing}"


def load_tokenizer(model: str, template: str = "auto", thinking: Thinking | None = None) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a model, with what `--template` and `--thinking` say of its chats, see `set_template`.

    Raises:
        LabError: there is no such model, or its tokenizer cannot tell which characters a token covers.
    """
    tokenizer = _tokenizer(model)
    if not tokenizer.is_fast:
        raise LabError(f"--model {model}: its tokenizer has no fast version, which maps tokens to characters")
    set_template(tokenizer, template, thinking)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:  # only generation pads, and there a mask hides it
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def own_template(model: str) -> bool:
    """Tells whether the model's tokenizer comes with a chat template."""
    return bool(_tokenizer(model).chat_template)


def _tokenizer(model: str) -> PreTrainedTokenizerBase:
    return load_auto(AutoTokenizer.from_pretrained, model_path(model), said=_said(model), remedy=REMEDY)


def load_model(model: str, precision: str | None = None, quantized: bool = False, read: bool = True) -> PreTrainedModel:
    """Loads a causal language model, in evaluation mode, whose attention can be packed.

    With Accelerate's `precision` bf16 or fp16 the weights are kept in 16 bits, which suits a frozen base, else in
    float32; what trains is put into float32 by the methods. None takes what inference takes on this machine, the
    precision that a GPU is fast in. `quantized`: the linear layers in 4-bit NF4 with double quantisation (Dettmers et
    al. 2023). With fp16 the model computes under autocast only, see `model.arithmetic`. Without `read` it has no
    weights, and gets those of the main process where the launch spreads them, see `sharding.spreads_weights`.

    Raises:
        LabError: there is no such model, or its files cannot be read.
    """
    # Under ZeRO-3 transformers would load a model in parts that cannot run before the engine is there.
    unset_hf_deepspeed_config()
    precision = precision or mixed_precision("auto")
    dtype = DTYPES[precision]
    more: dict[str, Any] = {} if read else {"device_map": "meta"}
    if quantized:
        more["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    loaded: PreTrainedModel = load_network(
        AutoModelForCausalLM, model_path(model), f"--model {model}", REMEDY, dtype=dtype, **more
    )
    for layer in loaded.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            # On such a CPU bitsandbytes would repack the weights in place when they are first used for inference.
            layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    return _adding_in_float32(_attending(loaded)).eval()


def _attending(model: PreTrainedModel) -> PreTrainedModel:
    """Gives a model our attention, which can be packed; one that has its attention built in keeps it."""
    if model._supports_attention_backend:
        model.set_attn_implementation(NAME)
    return model


def _adding_in_float32(model: PreTrainedModel) -> PreTrainedModel:
    """Lets a float16 model add its layers' outputs up in float32: float16 ends at 65,504, which Gemma's sums exceed."""
    if model.dtype == torch.float16:
        model.get_input_embeddings().register_forward_hook(lambda module, given, out: out.float())
    return model


def base_config(model: str) -> PretrainedConfig:
    """Reads the configuration of a model, for which no weights need to be there.

    Raises:
        LabError: there is no such model.
    """
    return load_auto(AutoConfig.from_pretrained, model_path(model), said=_said(model), remedy=REMEDY)


def positions(config: PretrainedConfig) -> int:
    """Returns how many tokens a model can read at once; with ALiBi, or if it does not say (Mamba), there is no limit.

    What rotary positions are scaled by may be in `max_position_embeddings` already (DeepSeek's YaRN, Gemma's linear
    scaling), or not (Qwen's YaRN). With linear scaling nothing says which; it is taken as counted, as a row that is too
    short is a smaller harm than one that the model cannot read. FastChat's Vicuna says its length beside it.
    """
    text = config.get_text_config()
    limit: int | None = getattr(text, "max_position_embeddings", None)
    if limit is None or getattr(text, "alibi", False):
        return sys.maxsize
    rope: dict[str, Any] = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") == "linear":
        return max(limit, getattr(text, "max_sequence_length", 0))
    if rope.get("rope_type") != "yarn":
        return limit
    return max(limit, int((rope.get("original_max_position_embeddings") or limit) * (rope.get("factor") or 1)))


def longest_row(config: TrainConfig) -> int:
    """Returns the longest conversation in tokens: --max-length, or what the model can read after virtual tokens."""
    room = positions(base_config(config.model.model)) - (config.method.virtual_tokens or 0)
    return min(config.data.max_length, room)


def unloaded_model(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Builds the model without its weights, on PyTorch's meta device: its parts and their shapes."""
    unset_hf_deepspeed_config()  # it would wait for the other processes, which need not build this
    with torch.device("meta"):
        made: PreTrainedModel = load_auto(
            AutoModelForCausalLM.from_config, config, said=f"--model {config.name_or_path}", remedy=REMEDY, dtype=dtype,
        )  # fmt: skip
    made.tie_weights()
    return _adding_in_float32(_attending(made))


def device() -> str:
    """Names the device on which models answer: the GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_quantization() -> None:
    """Makes sure that this machine can hold a model in 4 bits.

    Raises:
        LabError: bitsandbytes is missing, or has no kernels for this machine.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise LabError("--method qlora: needs bitsandbytes; install the extra llm-peft-fa[quantization]")
    try:
        import bitsandbytes  # of an extra

        layer = bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32).to(device())
        layer(torch.ones(1, 64, device=device(), requires_grad=True)).sum().backward()
    except Exception as error:  # each platform's missing kernel raises something else
        raise LabError(
            f"--method qlora: 4-bit layers do not run on this machine ({reason_of(error)}); use lora"
        ) from error


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Collects the tokens at which generation stops: of the model's configuration and of the tokenizer."""
    configured = model.generation_config.eos_token_id
    ids = set(configured if isinstance(configured, list) else [configured])
    return {token for token in ids | {tokenizer.eos_token_id} if token is not None}
