"""Says before any weight is loaded what a training needs of memory and arithmetic, and which settings fit.

Weights, gradients and the optimizer's moments are counted; what a row's forward and backward pass adds is measured on
shapes alone (`labs_common.memory`). It is affine in the row's tokens and in the number of like layers, so short rows
through a few layers are measured and the rest is arithmetic.
"""

import copy
import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from transformers import PretrainedConfig, PreTrainedModel

from labs_common.errors import LabError, reason_of
from labs_common.memory import Cost, step_cost
from labs_common.plan import (
    ALONE,
    CONTEXT,
    Held,
    Machine,
    Sharing,
    before_step,
    between,
    byte_count,
    gigabytes,
    held_by,
    machine_here,
    machine_of,
    sharing_asked,
    sharing_of,
    tensors_of,
)
from labs_common.progress import console
from llm_peft_fa.attention import NAME
from llm_peft_fa.base import DTYPES, base_config, unloaded_model
from llm_peft_fa.config import MethodOptions, TrainConfig
from llm_peft_fa.losses import chunk_positions
from llm_peft_fa.methods import METHODS, Setting, apply_method
from llm_peft_fa.model import Adapted, PackedCausalLM, base_of, virtual_tokens
from llm_peft_fa.optimizers import OPTIMIZERS, check_optimizer
from llm_peft_fa.packing import packed_row, padded_row
from llm_peft_fa.templates import Encoded

ROW = 2048  # tokens in a row where nothing is chosen
ROWS = (512, 1024, 2048, 4096, 8192, 16384)  # that are tried; a GPU is busy with the last
LENGTH = 512  # tokens in a conversation, where the data is not known
# A base whose weights are a smaller share of the memory is not measured before it trains: that would take longer than
# the settings could save.
SMALL = 1 / 100
# Bytes of a weight in NF4: four bits, and for 64 weights a scale of a byte, for 256 scales one of four bytes (Dettmers
# et al. 2023, section 3).
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True)
class Plan:
    """The needs of one process.

    Attributes:
        held: whatever the row.
        chunk: positions whose logits exist at once in the loss.
        short, long: tokens of two rows, and their costs without and with gradient checkpointing.
        extra: bytes that a row needs besides, whatever its length.
    """

    held: Held
    chunk: int
    short: tuple[int, Cost, Cost]
    long: tuple[int, Cost, Cost]
    extra: int = 0

    def activations(self, tokens: int, checkpointing: bool) -> int:
        """Returns the most bytes that a row of `tokens` adds in its forward and backward pass."""
        return self.extra + self._cost(tokens, checkpointing).peak

    def peak(self, tokens: int, checkpointing: bool) -> int:
        """Returns the most bytes that exist at once.

        A row that is shorter than the loss's chunk needs fewer logits than this says: it is measured on longer ones.
        """
        return self.held.total + self.activations(tokens, checkpointing)

    def flops(self, tokens: int, checkpointing: bool) -> int:
        """Returns the multiplications and additions for so many tokens, all learnt."""
        return self._cost(tokens, checkpointing).flops

    def _cost(self, tokens: int, checkpointing: bool) -> Cost:
        (few, *one), (many, *other) = self.short, self.long
        return between((few, one[checkpointing]), (many, other[checkpointing]), tokens)

    def choice(self, rows: Sequence[int], usable: float) -> tuple[int, bool] | None:
        """Chooses row and checkpointing: the longest row without it that fits, else with it; None if nothing fits."""
        for checkpointing in (False, True):
            for tokens in sorted(rows, reverse=True):
                if self.peak(tokens, checkpointing) <= usable:
                    return tokens, checkpointing
        return None


def outline(
    model: str, options: MethodOptions, dtype: torch.dtype = torch.float32, layers: int | None = None
) -> Adapted:
    """Builds the model under a method, without weights: enough to count what would train. `layers` shortens it.

    Values do not matter here, so methods that start from the base's weights start at random.

    Raises:
        LabError: there is no such model, or the method does not fit it.
    """
    method = METHODS[options.method].counts_as or options.method
    options = dataclasses.replace(options, method=method, prompt_init="random" if options.prompt_init else None)
    # Without a start from text no method asks for the tokenizer.
    base = unloaded_model(base_config(model) if layers is None else shortened_config(base_config(model), layers), dtype)
    with torch.device("meta"):
        return apply_method(base, options, Setting(cast(Any, None), steps=100))


def shortened_config(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """Returns the configuration of the same model with its first `layers` decoder layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    text.num_hidden_layers = layers
    if kinds:
        text.layer_types = kinds[:layers]
    return config


def held_with(model: Adapted, precision: str, optimizer: str) -> Held:
    """Counts what is held whatever the row, with the moments of this optimizer (see `labs_common.plan.held_by`)."""
    kept = OPTIMIZERS[optimizer].held
    moments = sum(kept(parameter.numel()) for parameter in model.parameters() if parameter.requires_grad)
    return dataclasses.replace(held_by(model, precision), optimizer=moments)


def plan_of(config: TrainConfig, machine: Machine, length: int = LENGTH, sharing: Sharing = ALONE) -> Plan:
    """Measures what the training needs on a machine, for conversations of `length` tokens.

    Raises:
        LabError: there is no such model, or the method does not fit it.
    """
    options, dtype = config.method, DTYPES[machine.precision]
    check_optimizer(config, machine.precision, sharing.fsdp or sharing.stage > 0, planned=True)
    whole = outline(config.model.model, options, dtype)
    held, extra = held_with(whole, machine.precision, config.training.optimizer), 0
    if METHODS[options.method].quantized:
        sizes = [layer.weight.numel() for layer in _quantized(base_of(whole))]
        held = dataclasses.replace(held, weights=held.weights - round(sum(sizes) * (dtype.itemsize - NF4)))
        extra = max(sizes) * dtype.itemsize  # of the layer that is being computed, in 16 bits
    chunk = chunk_positions(
        base_of(whole).get_output_embeddings().weight.shape[0], machine.total if machine.gpu else None
    )

    def row(count: int) -> tuple[int, Cost, Cost]:
        plain, again = (_cost(config, machine, sharing, chunk, count, length, on) for on in (False, True))
        return count * length, plain, again

    count = -(-ROW // length)
    return Plan(held.shared(sharing), chunk, row(count), row(2 * count), extra)


def _cost(
    config: TrainConfig, machine: Machine, sharing: Sharing, chunk: int, count: int, length: int, checkpointing: bool
) -> Cost:
    """Measures a row of `count` conversations in all layers, from two models with some of them."""
    model, options, dtype = config.model.model, config.method, DTYPES[machine.precision]
    kernel = "shapes" if machine.fused and config.model.attention != "blocks" else "blocks"
    text = base_config(model).get_text_config()
    depth, kinds = text.num_hidden_layers, getattr(text, "layer_types", None) or ["all"]
    period = next(size for size in range(1, len(kinds) + 1) if kinds[size:] == kinds[: len(kinds) - size])
    few = 2 * (options.layers or 0) + period  # layers that train are at the ends, like ones between
    found = []
    for layers in (few, few + period) if few + period < depth else (depth,):
        adapted: Any = outline(model, options, dtype, layers)
        if checkpointing:
            base: Any = base_of(adapted)
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for name, numbers in getattr(adapted, "prompt_tokens", {}).items():  # of PEFT, neither parameter nor buffer
            adapted.prompt_tokens[name] = torch.zeros_like(numbers, device="cpu")
        packed = PackedCausalLM(adapted, kernel, chunk).train()
        virtual = virtual_tokens(adapted)
        before_step(packed, machine.precision, sharing, accumulating=True)
        tokens = max(2, length - virtual)
        items = [Encoded([1] * tokens, [True] * tokens, "")] * count
        padded = config.model.packing == "never" or base_of(adapted).config._attn_implementation != NAME
        cost = _row_cost(packed, items, virtual, dtype, padded)
        found.append((layers, cost))
    return found[0][1] if len(found) == 1 else between(found[0], found[1], depth)


def _row_cost(packed: PackedCausalLM, items: list[Encoded], virtual: int, dtype: torch.dtype, padded: bool) -> Cost:
    row = (padded_row if padded else packed_row)(items, virtual=virtual)
    try:
        return step_cost(packed, partial(packed, row), dtype)
    except LabError:  # its attention cannot be packed
        if padded:
            raise
        return _row_cost(packed, items, virtual, dtype, True)


def _quantized(base: PreTrainedModel) -> list[torch.nn.Linear]:
    """Lists the layers that are held in 4 bits: the linear ones of the base, without the head and the adapters."""
    layers = [layer for layer in base.modules() if isinstance(layer, torch.nn.Linear)]
    return [layer for layer in layers if layer is not base.get_output_embeddings() and not layer.weight.requires_grad]


def fitted(config: TrainConfig, accelerator: Accelerator, lengths: Sequence[int]) -> TrainConfig:
    """Chooses on a GPU the row and gradient checkpointing, if they are not given; on a CPU the row is `ROW`.

    `lengths` are the tokens of the training conversations. All processes choose the same: what fits the least of them.
    """
    asked, checkpointing = config.data.tokens_per_batch, config.model.gradient_checkpointing
    tokens = asked or ROW
    if accelerator.device.type == "cuda" and config.model.fit_memory and config.run.resume is None:
        here = machine_here(accelerator.mixed_precision)
        if here.total - here.free > 2 * CONTEXT:
            console.print(f"other programs hold {gigabytes(here.total - here.free)} of this GPU's memory, which is "
                          "counted on")  # fmt: skip
        # By all of the memory, not by what is free now: the same command on the same GPU then adds up the same sums.
        total = int(accelerator.gather(torch.tensor(float(here.total), device=accelerator.device)).min())
        choice: list[Any] = [None]
        if accelerator.is_main_process:
            here = dataclasses.replace(here, total=total, free=total - CONTEXT)
            try:
                choice = [_choice(config, accelerator, here, lengths)]
            except LabError as error:  # the others wait for an answer
                choice = [str(error)]
        found = broadcast_object_list(choice)[0]
        if isinstance(found, str):
            raise LabError(found)
        tokens, needed = found
        checkpointing = checkpointing or needed
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, gradient_checkpointing=checkpointing),
        data=dataclasses.replace(config.data, tokens_per_batch=tokens),
    )  # fmt: skip


def _choice(
    config: TrainConfig, accelerator: Accelerator, machine: Machine, lengths: Sequence[int]
) -> tuple[int, bool]:
    asked, usable = config.data.tokens_per_batch, machine.usable
    whole = outline(config.model.model, config.method, DTYPES[machine.precision])
    if byte_count(tensors_of(whole)) < SMALL * usable:
        return asked or ROW, False
    mean, longest = max(2, sum(lengths) // len(lengths)), max(lengths)
    step = -(-config.training.batch_size * mean // accelerator.num_processes)
    try:
        plan = plan_of(config, machine, min(mean, ROW), sharing_of(accelerator))
    except LabError:
        raise
    except Exception as error:  # a model that computes with values, or on a GPU only, cannot be measured on shapes
        console.print(f"what fits could not be found out ({reason_of(error)}): nothing is chosen")
        return asked or ROW, False
    # A conversation longer than the row fills a row alone.
    sizes = {max(row, longest): row for row in ([asked] if asked else useful_rows(step))}
    found = plan.choice([*sizes], usable)
    if found is None:
        found = min(sizes), True
        console.print(
            f"a row of {found[0]:,} tokens may need {gigabytes(plan.peak(*found))}, and {gigabytes(usable)} can be "
            "counted on: see --plan"
        )
    tokens, needed = sizes[found[0]], found[1]
    said = "with" if needed or config.model.gradient_checkpointing else "without"
    console.print(f"rows of up to {tokens:,} tokens, {said} gradient checkpointing (--no-fit-memory chooses nothing)")
    return tokens, needed


def useful_rows(step: int) -> list[int]:
    """Lists the rows that are worth a try for a step of so many tokens: no longer than it needs."""
    return [row for row in ROWS if row < 2 * step] or [ROWS[0]]


def print_plan(config: TrainConfig) -> None:
    """Prints what the training would need and what fits the machine, and the settings that it would choose.

    Raises:
        LabError: there is no such model, or the method does not fit it.
    """
    machine, options, sharing = machine_of(config.plan, config.training), config.training, sharing_asked(config.plan)
    if os.environ.get("RANK", "0") != "0":
        return
    asked = config.data.tokens_per_batch
    length = min(LENGTH, asked or LENGTH)
    plan = plan_of(config, machine, length, sharing)
    usable, held = machine.usable, plan.held
    step = -(-options.batch_size * length // sharing.gpus)
    print(
        f"{config.model.model} with {config.method.method}: {held.parameters:,} parameters, {held.trained:,} train; "
        f"{machine}"
    )
    print(*held.lines(sharing), sep="\n")
    print(f"loss: logits of {plan.chunk:,} positions at once")
    print("tokens in a row: activations and peak; the same with --gradient-checkpointing")
    rows = sorted({*ROWS, *([asked] if asked else [])})
    for tokens in rows:
        cells = []
        for on in (False, True):
            peak = plan.peak(tokens, on)
            said = "fits" if peak <= usable else "too much"
            cells.append(f"{gigabytes(plan.activations(tokens, on)):>8} {gigabytes(peak):>8} {said:<8}")
        print(f"{tokens:>7,}:  {'   '.join(cells)}".rstrip())
    if not machine.gpu:
        found: tuple[int, bool] | None = (asked or ROW, config.model.gradient_checkpointing)
    else:
        found = plan.choice([asked] if asked else useful_rows(step), usable)
    if found is None:
        less = "--method qlora"
        if held.trained == held.parameters and not options.optimizer.startswith("paged"):
            less = "--optimizer paged_adamw_8bit --pure-bf16" if machine.precision == "bf16" else "--method layers"
        print(f"nothing fits: take {less}, a smaller model, or several GPUs with launch/fsdp.yaml")
        return
    tokens, on = found[0], found[1] or config.model.gradient_checkpointing
    print(
        f"a step of {options.batch_size} conversations, {length} tokens each and all learnt: "
        f"{plan.flops(step, on) / 1e12:,.3g} TFLOP in {-(-step // tokens)} rows on each GPU"
    )
    print(f"chosen: --tokens-per-batch {tokens} {'--gradient-checkpointing' if on else '--no-gradient-checkpointing'}")
