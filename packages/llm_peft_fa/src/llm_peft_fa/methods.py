"""One function per fine-tuning method: (model, options, setting) -> model with exactly its own parameters training.

The options are complete (`method_options.resolved`). Soft prompts and the LoRA family are PEFT's; `layers` and `full`
train weights of the base itself.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft import PeftConfig, PeftModel, get_peft_model, initialize_kv_prefix_from_text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from labs_common.errors import LabError
from labs_common.freezing import train_only
from llm_peft_fa.method_options import MethodOptions

Adapted = PreTrainedModel | PeftModel


@dataclass(frozen=True)
class Setting:
    """What some methods must know besides their options: the tokenizer, and how many steps will be taken."""

    tokenizer: PreTrainedTokenizerBase
    steps: int


def prompt_tuning(model: PreTrainedModel, options: MethodOptions, setting: Setting) -> PeftModel:
    """Prompt tuning (Lester et al. 2021, section 2): virtual tokens' embeddings before each conversation."""
    inits = {"random": "RANDOM", "text": "TEXT", "vocabulary": "SAMPLE_VOCAB"}
    more: dict[str, Any] = {}
    if options.prompt_init == "text":
        more["prompt_tuning_init_text"] = options.prompt_text
        more["tokenizer_name_or_path"] = setting.tokenizer.name_or_path
    config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=_set(options.virtual_tokens),
        prompt_tuning_init=inits[str(options.prompt_init)],
        **more,
    )
    return _adapted(model, options, config, "prompt_encoder.")


def prefix_tuning(model: PreTrainedModel, options: MethodOptions, setting: Setting) -> PeftModel:
    """Prefix tuning (Li & Liang 2021, eq. 3): keys and values before each conversation, in every layer.

    With --encoder-width they are made by a two-layer network in training (section 4.3). From a text: the keys and
    values that the base has for it.
    """
    count = _set(options.virtual_tokens)
    projection = bool(options.encoder_width)
    text_config = model.config.get_text_config()
    window = getattr(text_config, "sliding_window", None)
    if window is not None and count >= window:
        raise LabError(f"--virtual-tokens {count}: must be fewer than the model's sliding window of {window}")
    heads = getattr(text_config, "num_key_value_heads", None) or text_config.num_attention_heads
    width = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=count,
        token_dim=heads * width,
        num_attention_heads=heads,
        prefix_projection=projection,
        encoder_hidden_size=_set(options.encoder_width),
    )
    adapted = _adapted(model, options, config, "prompt_encoder.")
    if options.prompt_init == "text":
        ids = setting.tokenizer(str(options.prompt_text)).input_ids
        repeats = -(-count // len(ids))
        initialize_kv_prefix_from_text(
            adapted, setting.tokenizer, text=" ".join([str(options.prompt_text)] * repeats), use_chat_template=False
        )
    return adapted


def p_tuning(model: PreTrainedModel, options: MethodOptions, setting: Setting) -> PeftModel:
    """P-tuning (Liu et al. 2021, section 3): virtual tokens made by a network that trains with its inputs."""
    width = options.encoder_width or model.config.get_text_config().hidden_size
    config = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=_set(options.virtual_tokens), encoder_hidden_size=width
    )
    return _adapted(model, options, config, "prompt_encoder.")


def lora(model: PreTrainedModel, options: MethodOptions, setting: Setting) -> PeftModel:
    """LoRA (Hu et al. 2021, eq. 3): W x + (alpha / r) B A x, with A random and B zero at the start."""
    return _low_rank(model, options)


def rslora(model: PreTrainedModel, options: MethodOptions, setting: Setting) -> PeftModel:
    """LoRA scaled by alpha / sqrt(r) (Kalajdzievski 2023, theorem 3.2)."""
    return _low_rank(model, options, use_rslora=True)


def dora(model: PreTrainedModel, options: MethodOptions, setting: Setting) -> PeftModel:
    """DoRA (Liu et al. 2024, eq. 5): m (W + B A) / |W + B A| by columns, with the magnitudes m training too."""
    return _low_rank(model, options, use_dora=True)


def pissa(model: PreTrainedModel, options: MethodOptions, setting: Setting) -> PeftModel:
    """PiSSA (Meng et al. 2024, eq. 2 to 4): B A starts as the largest singular part of W, which W then lacks."""
    return _low_rank(model, options, init_lora_weights="pissa")


def olora(model: PreTrainedModel, options: MethodOptions, setting: Setting) -> PeftModel:
    """OLoRA (Büyükakyüz 2024, section 3): B A starts from a QR decomposition of W, which W then lacks."""
    return _low_rank(model, options, init_lora_weights="olora")


def qlora(model: PreTrainedModel, options: MethodOptions, setting: Setting) -> PeftModel:
    """LoRA on a base in 4-bit NF4 (Dettmers et al. 2023, eq. 5); `load_model` loads it so."""
    return _low_rank(model, options)


def adalora(model: PreTrainedModel, options: MethodOptions, setting: Setting) -> PeftModel:
    """AdaLoRA (Zhang et al. 2023, eq. 3): P diag(e) Q; the least important e are masked until rank is the mean.

    It starts with half as much rank again, and spends the first tenth and the last third of the steps at the fixed
    budgets, as the paper's schedule (eq. 12) does with its t_i and t_f.
    """
    start, end = max(1, setting.steps // 10), max(1, setting.steps // 3)
    if setting.steps < 4:
        raise LabError(f"--method adalora: needs at least 4 optimizer steps to change ranks, not {setting.steps}")
    rank = _set(options.rank)
    config = peft.AdaLoraConfig(
        task_type="CAUSAL_LM", init_r=rank + max(1, rank // 2), target_r=rank, lora_alpha=_set(options.alpha),
        lora_dropout=_set(options.dropout), target_modules=_targets(options), total_step=setting.steps, tinit=start,
        tfinal=end, deltaT=max(1, setting.steps // 50),
    )  # fmt: skip
    return _adapted(model, options, config, ".lora_A.", ".lora_B.", ".lora_E.")


def vera(model: PreTrainedModel, options: MethodOptions, setting: Setting) -> PeftModel:
    """VeRA (Kopiczko et al. 2024, eq. 2): b B d A x with shared random A and B; only the vectors b and d train."""
    config = peft.VeraConfig(
        task_type="CAUSAL_LM",
        r=_set(options.rank),
        vera_dropout=_set(options.dropout),
        target_modules=_targets(options),
    )
    return _adapted(model, options, config, ".vera_lambda_")


def loha(model: PreTrainedModel, options: MethodOptions, setting: Setting) -> PeftModel:
    """LoHa (Hyeon-Woo et al. 2022, proposition 2): the product, entry by entry, of two low-rank updates."""
    return _adapted(model, options, peft.LoHaConfig(**_products(options)), ".hada_")


def lokr(model: PreTrainedModel, options: MethodOptions, setting: Setting) -> PeftModel:
    """LoKr (Yeh et al. 2024, section 3): the Kronecker product of a small matrix and a low-rank one."""
    return _adapted(model, options, peft.LoKrConfig(**_products(options)), ".lokr_")


def oft(model: PreTrainedModel, options: MethodOptions, setting: Setting) -> PeftModel:
    """OFT (Qiu et al. 2023, eq. 5): W rotated by a block-diagonal orthogonal matrix, the Cayley map of what trains."""
    block = _set(options.block_size)
    config = peft.OFTConfig(
        task_type="CAUSAL_LM", r=0, oft_block_size=block, module_dropout=_set(options.dropout),
        target_modules=_targets(options),
    )  # fmt: skip
    adapted = _adapted(model, options, config, ".oft_R.")
    for name, module in adapted.named_modules():
        if (used := getattr(module, "oft_block_size", {}).get("default", block)) != block:
            raise LabError(f"--block-size {block}: does not divide the width of {name.rpartition('.')[2]}; try {used}")
    return adapted


def ia3(model: PreTrainedModel, options: MethodOptions, setting: Setting) -> PeftModel:
    """(IA)³ (Liu et al. 2022, section 3.3): keys, values and inner activations scaled by vectors that train."""
    targets = _targets(options)
    inner = [name for name in targets if name in ("down_proj", "fc2", "dense_4h_to_h", "c_proj", "wo")]
    config = peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=targets, feedforward_modules=inner if isinstance(targets, list) else []
    )
    return _adapted(model, options, config, ".ia3_l.")


def layers(model: PreTrainedModel, options: MethodOptions, setting: Setting) -> PreTrainedModel:
    """The first and last decoder layers of the base; embeddings, final norm and head by switches of their own.

    Below the first layer that trains nothing asks for a gradient, so autograd records nothing there.
    """
    decoder = model.get_decoder()
    count, total = _set(options.layers), len(decoder.layers)
    if count > total:
        raise LabError(f"--layers {count}: the model has {total} decoder layers")
    chosen: list[torch.nn.Module] = []
    if options.which in ("first", "both"):
        chosen += decoder.layers[:count]
    if options.which in ("last", "both"):
        chosen += decoder.layers[-count:]
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is embeddings.weight and options.train_embeddings != options.train_head:
        raise LabError("this model's embeddings are its head: give --train-embeddings and --train-head, or neither")
    if options.train_embeddings:
        chosen.append(embeddings)
    if options.train_final_norm:
        chosen.append(decoder.norm)
    if options.train_head:
        chosen.append(head)
    return _training(model, {id(parameter) for module in chosen for parameter in module.parameters()})


def full(model: PreTrainedModel, options: MethodOptions, setting: Setting) -> PreTrainedModel:
    """Every weight of the base."""
    return _training(model, {id(parameter) for parameter in model.parameters()})


METHODS: dict[str, Callable[[PreTrainedModel, MethodOptions, Setting], Adapted]] = {
    "prompt_tuning": prompt_tuning, "prefix_tuning": prefix_tuning, "p_tuning": p_tuning,
    "lora": lora, "rslora": rslora, "dora": dora, "pissa": pissa, "olora": olora, "adalora": adalora, "vera": vera,
    "loha": loha, "lokr": lokr, "oft": oft, "ia3": ia3, "qlora": qlora,
    "layers": layers, "full": full,
}  # fmt: skip


def check_machine(options: MethodOptions, accelerator: Accelerator) -> None:
    """Makes sure that the method can run on this machine and under this launcher, before any work is done.

    Raises:
        LabError: it cannot; the line says what to take instead.
    """
    kind = accelerator.distributed_type
    stage_3 = kind == DistributedType.DEEPSPEED and accelerator.deepspeed_plugin.zero_stage == 3
    if options.method == "adalora" and kind in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        raise LabError(
            "--method adalora: chooses ranks by whole gradients, which DeepSpeed and FSDP cut up; launch with "
            "multi_gpu.yaml, or take lora"
        )
    if (options.method == "full" or options.train_head) and stage_3:
        raise LabError("a head that trains is not supported under DeepSpeed ZeRO-3: launch with deepspeed_zero2.yaml")
    if options.method == "qlora":
        check_quantization()


def check_quantization() -> None:
    """Makes sure that this machine can hold a model in 4 bits.

    Raises:
        LabError: bitsandbytes is missing, or has no kernels for this machine.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise LabError("--method qlora: needs bitsandbytes; install the extra llm-peft-fa[quantization]")
    try:
        import bitsandbytes

        device = "cuda" if torch.cuda.is_available() else "cpu"
        layer = bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32).to(device)
        layer(torch.ones(1, 64, device=device, requires_grad=True)).sum().backward()
    except Exception as error:  # each platform's missing kernel raises something else
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise LabError(f"--method qlora: 4-bit layers do not run on this machine ({reason}); use lora") from error


def _low_rank(model: PreTrainedModel, options: MethodOptions, **more: Any) -> PeftModel:
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=_set(options.rank),
        lora_alpha=_set(options.alpha),
        lora_dropout=_set(options.dropout),
        target_modules=_targets(options),
        **more,
    )
    return _adapted(model, options, config, ".lora_")


def _products(options: MethodOptions) -> dict[str, Any]:
    """What LoHa and LoKr are configured with."""
    return {
        "task_type": "CAUSAL_LM", "r": options.rank, "alpha": options.alpha, "module_dropout": options.dropout,
        "target_modules": _targets(options),
    }  # fmt: skip


def _adapted(model: PreTrainedModel, options: MethodOptions, config: PeftConfig, *trained: str) -> PeftModel:
    """PEFT's model, with the parameters training whose name has one of the parts `trained` in it.

    Raises:
        LabError: PEFT refuses, for instance because no layer has a name in --target-modules.
    """
    try:
        adapted = get_peft_model(model, config)
    except (ValueError, ImportError, TypeError) as error:
        raise LabError(f"--method {options.method}: {str(error).splitlines()[0]}") from error
    train_only(adapted, lambda name: any(part in name for part in trained))
    return adapted


def _training(model: PreTrainedModel, wanted: set[int]) -> PreTrainedModel:
    """The model with the parameters training whose id is in `wanted`; those are in float32 whatever the base is in."""
    names = {name for name, parameter in model.named_parameters() if id(parameter) in wanted}
    train_only(model, lambda name: name in names)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def _targets(options: MethodOptions) -> str | list[str]:
    targets = list(options.target_modules or ())
    return "all-linear" if targets == ["all-linear"] else targets


def _set(value: float | None) -> Any:
    """An option of the method. Any: PEFT's types say int where any number will do."""
    assert value is not None, "options are complete"
    return value
