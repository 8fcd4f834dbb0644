"""The fine-tuning methods: METHODS, at the end, is the one table in which a method is registered.

A method is a function (base, options, setting) -> model that leaves exactly its own parameters training; `apply_method`
calls it with options that `resolved` has completed. Soft prompts and updates are PEFT's, `layers` and `full` train
weights of the base itself.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import peft
import torch
from peft import PeftConfig, PeftModel, get_peft_model, initialize_kv_prefix_from_text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from labs_common.errors import LabError, reason_of
from labs_common.frozen.audit import train_only
from llm_peft_fa.adalora import RankBudget
from llm_peft_fa.config import MethodOptions, TrainConfig
from llm_peft_fa.model import Adapted, arithmetic, decoder_layers, final_norm, in_text, text_parameters
from llm_peft_fa.pissa import from_leading_part


@dataclass(frozen=True)
class Setting:
    """The tokenizer and the number of optimizer steps, which some methods need besides their options."""

    tokenizer: PreTrainedTokenizerBase
    steps: int


@dataclass(frozen=True)
class Method:
    """An entry of METHODS.

    Attributes:
        adapt: makes the model in which the method's parameters train, and no others.
        kind: a soft prompt stands before each conversation; an update stands beside the base's weights and can be
            merged into them; weights are the base's own, and the result is a whole model.
        defaults: the options that the method takes, with its own values for them.
        rates: highest learning rates, with the tiny base and with a real one of some billion parameters. The first are
            the best of one to four tried values by validation loss, the second are common practice.
        description: one line for reports, with its source.
        also: makes of model and optimizer what else must be saved with checkpoints.
        counts_as: the method with the same parameters, where this one needs the base's weights to begin.
        quantized, whole_gradients, trains_head: the base is held in 4 bits; gradients must be whole, not sharded; the
            head trains whatever the options say.
    """

    adapt: Callable[..., Adapted]
    kind: Literal["soft prompt", "update", "weights"]
    defaults: dict[str, Any]
    rates: tuple[float, float]
    description: str
    also: Callable[[Adapted, torch.optim.Optimizer], Any] | None = None
    counts_as: str | None = None
    quantized: bool = False
    whole_gradients: bool = False
    trains_head: bool = False


def apply_method(base: PreTrainedModel, options: MethodOptions, setting: Setting) -> Adapted:
    """Returns the base, or PEFT's model around it, with exactly the parameters of `options.method` training.

    The options are complete (see `resolved`).

    Raises:
        LabError: the model has no layers of these names, or its sizes do not fit the options.
    """
    return METHODS[options.method].adapt(base, options, setting)


def complete(config: TrainConfig) -> TrainConfig:
    """Puts the method's own defaults in the place of what was not given, the learning rate among them.

    Raises:
        LabError: options that the method does not have, or that contradict each other.
    """
    options = resolved(config.method)
    method = METHODS[options.method]
    if config.merge and method.kind != "update":
        why = "writes a whole model already" if method.kind == "weights" else "has no update that could be merged"
        raise LabError(f"--merge: {options.method} {why}; drop --merge")
    rate = config.training.learning_rate or method.rates[config.model.model != "tiny"]
    training = dataclasses.replace(config.training, learning_rate=rate)
    return dataclasses.replace(config, method=options, training=training)


def resolved(options: MethodOptions) -> MethodOptions:
    """Puts the method's own defaults in the place of options that were not given.

    Raises:
        LabError: an option was given that the method does not have, or options that contradict each other.
    """
    takes = METHODS[options.method].defaults
    given = {
        field.name: value
        for field in dataclasses.fields(options)
        if field.name != "method" and (value := getattr(options, field.name)) is not None and value is not False
    }
    for name in given:
        if name not in takes:
            known = ", ".join(_flag(option) for option in takes) or "none of the method options"
            has = ", ".join(other for other, method in METHODS.items() if name in method.defaults)
            raise LabError(f"{_flag(name)}: --method {options.method} takes {known}; it is of {has}")
    found = dataclasses.replace(options, **{name: given.get(name, value) for name, value in takes.items()})
    _check(found, given)
    if found.prompt_init not in (None, "text"):
        found.prompt_text = None
    return found


def _check(options: MethodOptions, given: dict[str, Any]) -> None:
    if "prompt_text" in given and options.prompt_init != "text":
        raise LabError(f"--prompt-text: is used by --prompt-init text only, not by {options.prompt_init}")
    if options.method == "prefix_tuning":
        if options.prompt_init == "vocabulary":
            raise LabError("--prompt-init vocabulary: is of prompt_tuning; prefix_tuning takes random or text")
        if options.encoder_width:
            if "prompt_init" in given and options.prompt_init == "text":
                raise LabError(
                    "--prompt-init text: the projection of --encoder-width cannot be started from a real prefix; "
                    "take --prompt-init random or --encoder-width 0"
                )
            options.prompt_init = "random"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def prompt_tuning(model: PreTrainedModel, options: MethodOptions, setting: Setting) -> PeftModel:
    """Puts virtual tokens' embeddings, which train, before each conversation."""
    inits = {"random": "RANDOM", "text": "TEXT", "vocabulary": "SAMPLE_VOCAB"}
    more: dict[str, Any] = {}
    if options.prompt_init == "text":
        more["prompt_tuning_init_text"] = options.prompt_text
        more["tokenizer_name_or_path"] = setting.tokenizer.name_or_path
    return _with_adapter(
        model, options, peft.PromptTuningConfig, ("prompt_encoder.",), num_virtual_tokens=options.virtual_tokens,
        prompt_tuning_init=inits[str(options.prompt_init)], **more,
    )  # fmt: skip


def prefix_tuning(model: PreTrainedModel, options: MethodOptions, setting: Setting) -> PeftModel:
    """Puts keys and values, which train, before each conversation in every layer.

    With --encoder-width they are made by a two-layer network in training (Li & Liang 2021, section 4.3). Started from a
    text, they are the keys and values that the base computes for it.
    """
    count = _set(options.virtual_tokens)
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    if window is not None and count >= window:
        raise LabError(f"--virtual-tokens {count}: must be fewer than the model's sliding window of {window}")
    adapted = _with_adapter(
        model, options, peft.PrefixTuningConfig, ("prompt_encoder.",), num_virtual_tokens=count,
        prefix_projection=bool(options.encoder_width), encoder_hidden_size=options.encoder_width,
    )  # fmt: skip
    if options.prompt_init == "text":
        ids = setting.tokenizer(str(options.prompt_text)).input_ids
        text = " ".join([str(options.prompt_text)] * -(-count // len(ids)))  # PEFT takes the first `count` tokens
        with arithmetic(model):
            initialize_kv_prefix_from_text(adapted, setting.tokenizer, text=text, use_chat_template=False)
    return adapted


def p_tuning(model: PreTrainedModel, options: MethodOptions, setting: Setting) -> PeftModel:
    """Puts virtual tokens before each conversation that a network makes, which trains with its inputs."""
    width = options.encoder_width or model.config.get_text_config().hidden_size
    return _with_adapter(
        model, options, peft.PromptEncoderConfig, ("prompt_encoder.",), num_virtual_tokens=options.virtual_tokens,
        encoder_hidden_size=width,
    )  # fmt: skip


def low_rank(model: PreTrainedModel, options: MethodOptions, setting: Setting, **more: Any) -> PeftModel:
    """Adapts the model with LoRA; `more` of PEFT's options make it rsLoRA, DoRA or OLoRA."""
    return _with_adapter(
        model, options, peft.LoraConfig, (".lora_",), r=options.rank, lora_alpha=options.alpha,
        lora_dropout=options.dropout, target_modules=_targets(options), **more,
    )  # fmt: skip


def low_rank_product(
    model: PreTrainedModel, options: MethodOptions, setting: Setting, kind: Callable[..., PeftConfig], trained: str
) -> PeftModel:
    """Adapts the model with LoHa or LoKr, whose updates are products of small matrices."""
    return _with_adapter(
        model, options, kind, (trained,), r=options.rank, alpha=options.alpha, module_dropout=options.dropout,
        target_modules=_targets(options),
    )  # fmt: skip


def adalora(model: PreTrainedModel, options: MethodOptions, setting: Setting) -> PeftModel:
    """Adapts the model with AdaLoRA, which masks the least important ranks until --rank is their mean.

    It starts with half as much rank again, and spends the first tenth and the last third of the steps at the fixed
    budgets, as the paper's schedule (Zhang et al. 2023, eq. 12) does with its t_i and t_f.
    """
    if setting.steps < 4:
        raise LabError(f"--method adalora: needs at least 4 optimizer steps to change ranks, not {setting.steps}")
    rank = _set(options.rank)
    return _with_adapter(
        model, options, peft.AdaLoraConfig, (".lora_A.", ".lora_B.", ".lora_E."), init_r=rank + max(1, rank // 2),
        target_r=rank, lora_alpha=options.alpha, lora_dropout=options.dropout, target_modules=_targets(options),
        total_step=setting.steps, tinit=max(1, setting.steps // 10), tfinal=max(1, setting.steps // 3),
        deltaT=max(1, setting.steps // 50),
    )  # fmt: skip


def vera(model: PreTrainedModel, options: MethodOptions, setting: Setting) -> PeftModel:
    """Adapts the model with VeRA: only the vectors b and d train, A and B are random and shared."""
    return _with_adapter(
        model, options, peft.VeraConfig, (".vera_lambda_",), r=options.rank, vera_dropout=options.dropout,
        target_modules=_targets(options),
    )  # fmt: skip


def oft(model: PreTrainedModel, options: MethodOptions, setting: Setting) -> PeftModel:
    """Adapts the model with OFT: the Cayley maps of what trains rotate blocks of each weight's inputs."""
    block = options.block_size
    adapted = _with_adapter(
        model, options, peft.OFTConfig, (".oft_R.",), r=0, oft_block_size=block, module_dropout=options.dropout,
        target_modules=_targets(options),
    )  # fmt: skip
    for name, module in adapted.named_modules():  # PEFT takes the nearest size that divides, and only warns
        if (used := getattr(module, "oft_block_size", {}).get("default", block)) != block:
            raise LabError(f"--block-size {block}: does not divide the width of {name.rpartition('.')[2]}; try {used}")
    return adapted


def ia3(model: PreTrainedModel, options: MethodOptions, setting: Setting) -> PeftModel:
    """Adapts the model with (IA)³: keys, values and inner activations are scaled by vectors that train."""
    targets = _targets(options)
    # The MLP's second projection is scaled at its input; these are its names in GPT-2, T5, BLOOM, Llama and their kin.
    inner = [name for name in targets if name in ("down_proj", "fc2", "dense_4h_to_h", "c_proj", "wo")]
    return _with_adapter(
        model, options, peft.IA3Config, (".ia3_l.",), target_modules=targets,
        feedforward_modules=inner if isinstance(targets, list) else [],
    )  # fmt: skip


def layers(model: PreTrainedModel, options: MethodOptions, setting: Setting) -> PreTrainedModel:
    """Lets the first and last decoder layers of the base train; embeddings, final norm and head have own switches.

    Below the first layer that trains nothing asks for a gradient, so autograd records nothing there.
    """
    decoder = decoder_layers(model)
    count, total = _set(options.layers), len(decoder)
    if count > total:
        raise LabError(f"--layers {count}: the model has {total} decoder layers")
    chosen: list[torch.nn.Module] = []
    if options.which in ("first", "both"):
        chosen += decoder[:count]
    if options.which in ("last", "both"):
        chosen += decoder[-count:]
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is embeddings.weight and options.train_embeddings != options.train_head:
        raise LabError("this model's embeddings are its head: give --train-embeddings and --train-head, or neither")
    if options.train_embeddings:
        chosen.append(embeddings)
    if options.train_final_norm:
        chosen.append(final_norm(model))
    if options.train_head:
        chosen.append(head)
    return _with_weights(model, options, {id(parameter) for module in chosen for parameter in module.parameters()})


def full(model: PreTrainedModel, options: MethodOptions, setting: Setting) -> PreTrainedModel:
    """Lets every weight train through which text goes."""
    return _with_weights(model, options, set(text_parameters(model)))


def _with_adapter(
    model: PreTrainedModel, options: MethodOptions, kind: Callable[..., PeftConfig], trained: tuple[str, ...],
    **settings: Any,
) -> PeftModel:  # fmt: skip
    """Returns PEFT's model, with the parameters training whose name has one of the parts `trained` in it.

    Raises:
        LabError: PEFT refuses, for instance because no layer has a name in --target-modules, or the head is among them.
    """
    try:
        adapted = get_peft_model(model, kind(task_type="CAUSAL_LM", **in_text(model, settings)))
    except (ValueError, ImportError, TypeError) as error:
        raise LabError(f"--method {options.method}: {reason_of(error)}") from error
    if not isinstance(model.get_output_embeddings(), torch.nn.Linear):
        raise LabError("--target-modules: the head is among them, and the loss takes its weight alone; leave it out")
    train_only(adapted, lambda name: any(part in name for part in trained))
    return adapted


def _with_weights(model: PreTrainedModel, options: MethodOptions, wanted: set[int]) -> PreTrainedModel:
    """Lets the parameters train whose id is in `wanted`, in float32 whatever the base is in, but for --pure-bf16.

    AdamW's small steps would be lost in bfloat16, where the next number is 1/256 to 1/128 of a weight away.
    """
    names = {name for name, parameter in model.named_parameters() if id(parameter) in wanted}
    train_only(model, lambda name: name in names)
    for parameter in model.parameters():
        if parameter.requires_grad and not options.pure_bf16:
            parameter.data = parameter.data.float()
    return model


def _targets(options: MethodOptions) -> str | list[str]:
    return "all-linear" if "all-linear" in (options.target_modules or ()) else list(options.target_modules or ())


def _set(value: int | None) -> int:
    """Returns an option that `resolved` has set."""
    assert value is not None
    return value


TEXT = "تو دستیار فارسی‌زبان هستی و به هر پرسش کوتاه و درست پاسخ می‌دهی."
SOFT = {"virtual_tokens": 20}
FROM_TEXT = {**SOFT, "prompt_init": "text", "prompt_text": TEXT}
# All linear layers, as full fine-tuning is matched only so (Dettmers et al. 2023, section 4); a rank of 16 and twice as
# much alpha are common practice.
LINEAR = {"dropout": 0.0, "target_modules": ("all-linear",)}
LOW_RANK = {"rank": 16, "alpha": 32.0, **LINEAR}
PURE = {"pure_bf16": False}

METHODS: dict[str, Method] = {
    "prompt_tuning": Method(
        prompt_tuning, "soft prompt", FROM_TEXT, (3e-1, 1e-2),
        "virtual tokens' embeddings before each conversation (Lester et al. 2021, section 2)",
    ),
    "prefix_tuning": Method(
        prefix_tuning, "soft prompt", {**FROM_TEXT, "encoder_width": 0}, (2e-1, 1e-2),
        "keys and values before each conversation, in every layer (Li & Liang 2021, eq. 3)",
    ),
    "p_tuning": Method(
        p_tuning, "soft prompt", {**SOFT, "encoder_width": 0}, (2e-2, 1e-3),
        "virtual tokens made by a network that trains with its inputs (Liu et al. 2021, section 3)",
    ),
    "lora": Method(
        low_rank, "update", LOW_RANK, (2e-3, 2e-4),
        "W x + (alpha / r) B A x, with A random and B zero at the start (Hu et al. 2021, eq. 3)",
    ),
    "rslora": Method(
        partial(low_rank, use_rslora=True), "update", LOW_RANK, (1e-3, 1e-4),
        "LoRA scaled by alpha / sqrt(r) (Kalajdzievski 2023, theorem 3.2)",
    ),
    "dora": Method(
        partial(low_rank, use_dora=True), "update", LOW_RANK, (2e-3, 2e-4),
        "m (W + B A) / |W + B A| by columns, with the magnitudes m training too (Liu et al. 2024, eq. 5)",
    ),
    "pissa": Method(
        lambda *given: from_leading_part(low_rank(*given)), "update", LOW_RANK, (1e-3, 1e-4),
        "B A starts as the largest singular part of W, which W then lacks (Meng et al. 2024, eq. 2)", counts_as="lora",
    ),
    "olora": Method(
        partial(low_rank, init_lora_weights="olora"), "update", LOW_RANK, (1e-3, 1e-4),
        "B A starts from a QR decomposition of W, which W then lacks (Büyükakyüz 2024, section 3)", counts_as="lora",
    ),
    "adalora": Method(
        adalora, "update", LOW_RANK, (1e-2, 1e-3),
        "P diag(e) Q, the least important e masked until rank is the mean (Zhang et al. 2023, eq. 3)", RankBudget,
        whole_gradients=True,
    ),
    "vera": Method(
        vera, "update", {"rank": 256, **LINEAR}, (5e-2, 5e-3),
        "b B d A x with shared random A and B; only the vectors b and d train (Kopiczko et al. 2024, eq. 2)",
    ),
    "loha": Method(
        partial(low_rank_product, kind=peft.LoHaConfig, trained=".hada_"), "update", LOW_RANK, (5e-3, 5e-4),
        "the product, entry by entry, of two low-rank updates (Hyeon-Woo et al. 2022, proposition 2)",
    ),
    "lokr": Method(
        partial(low_rank_product, kind=peft.LoKrConfig, trained=".lokr_"), "update", LOW_RANK, (1e-2, 1e-3),
        "the Kronecker product of a small matrix and a low-rank one (Yeh et al. 2024, section 3)",
    ),
    "oft": Method(
        oft, "update", {"block_size": 32, **LINEAR}, (3e-3, 5e-4),
        "W rotated by a block-diagonal orthogonal matrix, the Cayley map of what trains (Qiu et al. 2023, eq. 5)",
    ),
    "ia3": Method(
        ia3, "update", {"target_modules": ("k_proj", "v_proj", "down_proj")}, (1e-1, 5e-3),
        "keys, values and inner activations scaled by vectors that train (Liu et al. 2022, section 3.3)",
    ),
    "qlora": Method(
        low_rank, "update", LOW_RANK, (2e-3, 2e-4),
        "LoRA on a base in 4-bit NF4 (Dettmers et al. 2023, eq. 5)", counts_as="lora", quantized=True,
    ),
    "layers": Method(
        layers, "weights",
        {
            "layers": 2, "which": "both", "train_embeddings": False, "train_final_norm": False, "train_head": False,
            **PURE,
        },
        (1e-3, 2e-5), "the first and last decoder layers of the base",
    ),
    "full": Method(full, "weights", PURE, (1e-3, 1e-5), "every weight of the base", trains_head=True),
}  # fmt: skip
