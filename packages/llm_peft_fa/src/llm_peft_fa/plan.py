"""Says before any weight is loaded what a training needs of memory and arithmetic, and which settings fit.

Weights, gradients and the optimizer's moments are counted; what a row's forward and backward pass adds is measured on
shapes alone (`labs_common.memory`). It is affine in the row's tokens and in the number of like layers, so short rows
through a few layers are measured and the rest is arithmetic.
"""

import copy
import dataclasses
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list
from transformers import PretrainedConfig, PreTrainedModel

from labs_common.device import mixed_precision
from labs_common.errors import LabError, reason_of
from labs_common.memory import Cost, step_cost
from labs_common.progress import console
from labs_common.sharding import repeated_layers
from llm_peft_fa.base import DTYPES, base_config, unloaded_model
from llm_peft_fa.config import MethodOptions, TrainConfig
from llm_peft_fa.losses import chunk_positions
from llm_peft_fa.methods import METHODS, Setting, apply_method
from llm_peft_fa.model import Adapted, PackedCausalLM, base_of, virtual_tokens
from llm_peft_fa.packing import packed_row
from llm_peft_fa.templates import Encoded

ROW = 2048  # tokens in a row where nothing is chosen
ROWS = (512, 1024, 2048, 4096, 8192, 16384)  # that are tried; a GPU is busy with the last
LENGTH = 512  # tokens in a conversation, where the data is not known
# A base whose weights are a smaller share of the memory is not measured before it trains: that would take longer than
# the settings could save.
SMALL = 1 / 100
# The share of free memory that is counted on, since blocks of freed memory do not always fit what comes next.
USABLE = 0.9
CONTEXT = 600_000_000  # bytes that CUDA and its libraries take on a GPU for themselves
# Bytes of a weight in NF4: four bits, and for 64 weights a scale of a byte, for 256 scales one of four bytes (Dettmers
# et al. 2023, section 3).
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True)
class Machine:
    """The memory that a training may use.

    Attributes:
        gpu: whether it is a GPU's.
        total, free: bytes.
        precision: Accelerate's name.
        fused: whether kernels attend without scores in memory; older GPUs use blocks.
    """

    gpu: bool
    total: int
    free: int
    precision: str
    fused: bool


@dataclass(frozen=True)
class Plan:
    """The needs of one process.

    Attributes:
        parameters, trained: how many.
        weights, gradients, optimizer: bytes.
        chunk: positions whose logits exist at once in the loss.
        short, long: tokens of two rows, and their costs without and with gradient checkpointing.
        extra: bytes that a row needs besides, whatever its length.
        outside: bytes of weights that belong to no layer, and of their gradients: what FSDP keeps whole.
        layer: bytes of the largest layer's weights; FSDP has two whole at a time.
    """

    parameters: int
    trained: int
    weights: int
    gradients: int
    optimizer: int
    chunk: int
    short: tuple[int, Cost, Cost]
    long: tuple[int, Cost, Cost]
    extra: int = 0
    outside: int = 0
    layer: int = 0

    @property
    def fixed(self) -> int:
        """The bytes that do not depend on the row."""
        return self.weights + self.gradients + self.optimizer

    def activations(self, tokens: int, checkpointing: bool) -> int:
        """Returns the most bytes that a row of `tokens` adds in its forward and backward pass."""
        return self.extra + self._cost(tokens, checkpointing).peak

    def peak(self, tokens: int, checkpointing: bool) -> int:
        """Returns the most bytes that exist at once.

        A row that is shorter than the loss's chunk needs fewer logits than this says: it is measured on longer ones.
        """
        return self.fixed + self.activations(tokens, checkpointing)

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


def between(one: tuple[int, Cost], other: tuple[int, Cost], at: int) -> Cost:
    """Returns the cost at a place on the line through two (place, cost).

    Forward and backward each have one moment at which most exists, at every length and depth; together they have two.
    """
    share = (at - one[0]) / (other[0] - one[0])
    pairs = zip(dataclasses.astuple(one[1]), dataclasses.astuple(other[1]), strict=True)
    return Cost(*(round(first + (last - first) * share) for first, last in pairs))


def machine_here(precision: str) -> Machine:
    """Asks the GPU that this process would use, or the operating system."""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return Machine(True, total, free, precision, precision != "no" and torch.cuda.get_device_capability()[0] >= 8)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine(False, total, total, precision, False)


def machine_of(config: TrainConfig) -> Machine:
    """Describes the machine that `--plan` is for: the one that is here, or a GPU with --gpu-memory."""
    asked, bytes_ = config.training.precision, int(config.gpu_memory * 1e9)
    if not bytes_:
        return machine_here(mixed_precision(asked))
    precision = "bf16" if asked == "auto" else mixed_precision(asked)
    return Machine(True, bytes_, bytes_ - CONTEXT, precision, precision == "bf16")


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


def plan_of(config: TrainConfig, machine: Machine, length: int = LENGTH) -> Plan:
    """Measures what the training needs on a machine, for conversations of `length` tokens.

    Raises:
        LabError: there is no such model, or the method does not fit it.
    """
    options, dtype = config.method, DTYPES[machine.precision]
    whole = outline(config.model.model, options, dtype)
    trained = [parameter for parameter in whole.parameters() if parameter.requires_grad]
    learnt = _bytes(trained)
    weights, extra = _bytes(_tensors(whole)), 0
    layers = [_bytes(_tensors(layer)) for layer in repeated_layers(whole)]
    inside = {id(part) for layer in repeated_layers(whole) for part in layer.parameters()}
    outside = weights - sum(layers) + _bytes(one for one in trained if id(one) not in inside)
    if METHODS[options.method].quantized:
        sizes = [layer.weight.numel() for layer in _quantized(base_of(whole))]
        weights -= round(sum(sizes) * (dtype.itemsize - NF4))
        extra = max(sizes) * dtype.itemsize  # of the layer that is being computed, in 16 bits
    chunk = chunk_positions(
        base_of(whole).get_output_embeddings().weight.shape[0], machine.total if machine.gpu else None
    )
    kernel = "shapes" if machine.fused and config.model.attention != "blocks" else "blocks"

    def row(count: int) -> tuple[int, Cost, Cost]:
        plain, again = (_cost(config, dtype, kernel, chunk, count, length, on) for on in (False, True))
        return count * length, plain, again

    count = -(-ROW // length)
    short, long = row(count), row(2 * count)
    return Plan(
        sum(parameter.numel() for parameter in whole.parameters()), sum(parameter.numel() for parameter in trained),
        weights, learnt, 2 * learnt, chunk, short, long, extra, outside, max(layers, default=0),
    )  # fmt: skip


def _cost(
    config: TrainConfig, dtype: torch.dtype, kernel: str, chunk: int, count: int, length: int, checkpointing: bool
) -> Cost:
    """Measures a row of `count` conversations in all layers, from two models with some of them."""
    model, options = config.model.model, config.method
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
        tokens = max(2, length - virtual)
        row = packed_row([Encoded([1] * tokens, [True] * tokens, "")] * count, virtual=virtual)
        found.append((layers, step_cost(packed, partial(packed, row), dtype)))
    return found[0][1] if len(found) == 1 else between(found[0], found[1], depth)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _tensors(model: torch.nn.Module) -> Iterable[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _quantized(base: PreTrainedModel) -> list[torch.nn.Linear]:
    """Lists the layers that are held in 4 bits: the linear ones of the base, without the head and the adapters."""
    layers = [layer for layer in base.modules() if isinstance(layer, torch.nn.Linear)]
    return [layer for layer in layers if layer is not base.get_output_embeddings() and not layer.weight.requires_grad]


def shared(plan: Plan, accelerator: Accelerator) -> Plan:
    """Returns the plan of one of several processes: shards of what they share, and DDP's buckets of gradients."""
    kind, count = accelerator.distributed_type, accelerator.num_processes
    if count == 1:
        return plan
    stage = accelerator.deepspeed_plugin.zero_stage if kind == DistributedType.DEEPSPEED else 0
    if kind == DistributedType.FSDP or stage == 3:
        whole = plan.outside + 2 * plan.layer
        parts = [plan.weights // count + whole, plan.gradients // count, plan.optimizer // count]
    elif stage:
        parts = [plan.weights, plan.gradients // (count if stage == 2 else 1), plan.optimizer // count]
    else:
        parts = [plan.weights, 2 * plan.gradients, plan.optimizer]
    return dataclasses.replace(plan, weights=parts[0], gradients=parts[1], optimizer=parts[2])


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
            choice = [_choice(config, accelerator, here, lengths)]
        tokens, needed = broadcast_object_list(choice)[0]
        checkpointing = checkpointing or needed
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, gradient_checkpointing=checkpointing),
        data=dataclasses.replace(config.data, tokens_per_batch=tokens),
    )  # fmt: skip


def _choice(
    config: TrainConfig, accelerator: Accelerator, machine: Machine, lengths: Sequence[int]
) -> tuple[int, bool]:
    asked, usable = config.data.tokens_per_batch, USABLE * machine.free
    whole = outline(config.model.model, config.method, DTYPES[machine.precision])
    if _bytes(_tensors(whole)) < SMALL * usable:
        return asked or ROW, False
    mean, longest = max(2, sum(lengths) // len(lengths)), max(lengths)
    step = -(-config.training.batch_size * mean // accelerator.num_processes)
    try:
        plan = shared(plan_of(config, machine, min(mean, ROW)), accelerator)
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
    machine, options = machine_of(config), config.training
    asked = config.data.tokens_per_batch
    length = min(LENGTH, asked or LENGTH)
    plan = plan_of(config, machine, length)
    usable = machine.free * USABLE
    step = options.batch_size * length
    print(
        f"{config.model.model} with {config.method.method}: {plan.parameters:,} parameters, {plan.trained:,} train; "
        f"{'a GPU' if machine.gpu else 'this CPU'} with {gigabytes(machine.total)}, {gigabytes(usable)} counted on"
    )
    print(
        f"weights {gigabytes(plan.weights)}, gradients {gigabytes(plan.gradients)}, "
        f"optimizer {gigabytes(plan.optimizer)}; precision {'fp32' if machine.precision == 'no' else machine.precision}"
    )
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
        print("nothing fits: take --method qlora, a smaller model, or several GPUs with launch/fsdp.yaml")
        return
    tokens, on = found[0], found[1] or config.model.gradient_checkpointing
    print(
        f"a step of {options.batch_size} conversations, {length} tokens each and all learnt: "
        f"{plan.flops(step, on) / 1e12:,.3g} TFLOP in {-(-step // tokens)} rows"
    )
    print(f"chosen: --tokens-per-batch {tokens} {'--gradient-checkpointing' if on else '--no-gradient-checkpointing'}")


def gigabytes(count: float) -> str:
    """Writes bytes in GB (10^9)."""
    return f"{count / 1e9:.3g} GB" if count < 1e9 else f"{count / 1e9:.1f} GB"
