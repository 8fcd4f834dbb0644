"""Says before any weight is loaded what a training needs of a GPU's memory, alone or beside others.

Weights, gradients and the optimizer's moments are counted; what a batch adds is measured on shapes alone
(`labs_common.memory`). It is affine in the batch, so two batches are measured and the rest is arithmetic.
"""

import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedType, parse_flag_from_env

from labs_common.device import constant, mixed_precision
from labs_common.errors import LabError, reason_of, text_of
from labs_common.frozen.cache import HELD_SHARE
from labs_common.memory import Cost, step_cost
from labs_common.options import PlanOptions, TrainingOptions
from labs_common.sharding import COMPUTED_IN, gathered_dtype, repeated_layers, zero_stage

# The share of free memory that is counted on, since blocks of freed memory do not always fit what comes next.
USABLE = 0.9
CONTEXT = 600_000_000  # bytes that CUDA and its libraries take on a GPU for themselves
# DeepSpeed's defaults, in values: its bucket of gradients, which is there whole, and the weights that stay gathered.
BUCKET, LIVE = 500_000_000, 1_000_000_000
FAR, MOST = 64, 2**30  # times the batch: the largest that is measured, usually; the largest number that is tried


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

    @property
    def usable(self) -> float:
        """The bytes that are counted on."""
        return USABLE * self.free

    def __str__(self) -> str:
        of = "a GPU" if self.gpu else "this CPU"
        precision = "fp32" if self.precision == "no" else self.precision
        return f"{of} with {gigabytes(self.total)}, {gigabytes(self.usable)} counted on; precision {precision}"


@dataclass(frozen=True)
class Sharing:
    """The GPUs of a launch. Each has a copy of the model, or its part of what they spread.

    Attributes:
        stage: of ZeRO: from 1 on the optimizer is spread, from 2 on gradients, with 3 weights; 0 spreads nothing.
        fsdp: whether FSDP2 spreads all three.
    """

    gpus: int = 1
    stage: int = 0
    fsdp: bool = False

    @property
    def spreads(self) -> bool:
        """Whether gradients leave while others are computed."""
        return (self.gpus > 1 and self.fsdp) or self.stage > 1

    def __str__(self) -> str:
        kind = "FSDP" if self.fsdp else f"ZeRO-{self.stage}" if self.stage else "a whole model on each"
        return f"{self.gpus} GPUs, {kind}" if self.gpus > 1 else f"one GPU, {kind}"


ALONE = Sharing()


def sharing_of(accelerator: Accelerator) -> Sharing:
    """Returns that of a launch under way."""
    fsdp = accelerator.distributed_type == DistributedType.FSDP
    return Sharing(accelerator.num_processes, zero_stage(accelerator), fsdp)


def sharing_asked(options: PlanOptions) -> Sharing:
    """Returns that of --plan-launch and --gpus, or of the launch in which this process is.

    Raises:
        LabError: the configuration cannot be read, or says something else than a plan can be made of.
    """
    if options.plan_launch is None:  # as `accelerate launch` and torchrun tell their processes
        stage = int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "0"))
        fsdp = parse_flag_from_env("ACCELERATE_USE_FSDP")
        return Sharing(options.gpus or int(os.environ.get("WORLD_SIZE", "1")), stage, fsdp)
    named = f"--plan-launch {options.plan_launch}"
    text = text_of(options.plan_launch, named)
    try:
        said = yaml.safe_load(text)
        deepspeed, fsdp = (said.get(part) or {} for part in ("deepspeed_config", "fsdp_config"))
        kind, stage = said["distributed_type"], int(deepspeed["zero_stage"]) if "zero_stage" in deepspeed else 0
        asked = Sharing(options.gpus or int(said["num_processes"]), stage, kind == "FSDP")
        if asked.gpus < 1:
            raise ValueError("num_processes must be at least 1")
        offload = fsdp.get("fsdp_offload_params")
        devices = {deepspeed.get(f"offload_{part}_device") or "none" for part in ("optimizer", "param")}
    except (yaml.YAMLError, LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise LabError(f"{named}: is no configuration of Accelerate ({reason_of(error)})") from error
    if kind == "DEEPSPEED" and "zero_stage" not in deepspeed:
        raise LabError(f"{named}: does not say zero_stage itself; name a configuration that does")
    if devices != {"none"} or offload:
        raise LabError(f"{named}: keeps a part in the host's memory, for which there is no plan")
    return asked


@dataclass(frozen=True)
class Held:
    """The needs of a process whatever the batch.

    Attributes:
        parameters, trained: how many, of the whole model.
        weights, gradients, optimizer: bytes.
        outside: bytes of weights that belong to no layer: FSDP2 keeps them whole during a step.
        layer: bytes of the largest layer as it is gathered: the largest unit, of which FSDP2 has two at a time.
        itemsize: bytes of a trained weight as DeepSpeed holds it, see `labs_common.sharding.kept_weights`.
        buffers: bytes that a launch of several needs besides.
        rows: bytes of data that stay on the GPU.
    """

    parameters: int
    trained: int
    weights: int
    gradients: int
    optimizer: int
    outside: int = 0
    layer: int = 0
    itemsize: int = 4
    buffers: int = 0
    rows: int = 0

    @property
    def total(self) -> int:
        """All of it in bytes."""
        return self.weights + self.gradients + self.optimizer + self.buffers + self.rows

    def shared(self, sharing: Sharing) -> "Held":
        """Returns the needs of one of several GPUs (Rajbhandari et al. 2020 for ZeRO's stages)."""
        gpus, stage = sharing.gpus, 3 if sharing.fsdp else sharing.stage
        if gpus == 1 and not sharing.stage:
            return self
        weights, gradients, optimizer = self.weights, self.gradients, self.optimizer
        if sharing.fsdp:
            buffers = self.outside + 2 * self.layer
        elif stage:
            # What trains is in DeepSpeed's type, and so are its gradients. Its optimizer has all in float32: moments,
            # weights, and in its step gradients. Those are reduced in one bucket; gathered weights stay up to a limit.
            weights += self.trained * self.itemsize - gradients
            optimizer = self.trained * 4 * (optimizer // max(1, gradients) + 2)
            gradients = self.trained * self.itemsize
            each = weights / self.parameters
            buffers = self.itemsize * BUCKET + (round(min(weights, LIVE * each)) if stage == 3 and gpus > 1 else 0)
        else:
            buffers = gradients  # DistributedDataParallel's buckets
        return dataclasses.replace(
            self,
            weights=weights // (gpus if stage == 3 else 1),
            gradients=gradients // (gpus if stage >= 2 else 1),
            optimizer=optimizer // (gpus if stage >= 1 else 1),
            buffers=buffers,
        )

    def lines(self, sharing: Sharing) -> list[str]:
        """Describes them."""
        parts = {"weights": self.weights, "gradients": self.gradients, "optimizer": self.optimizer}
        said = ", ".join(f"{name} {gigabytes(size)}" for name, size in parts.items())
        if self.rows:
            said += f", data that stays there {gigabytes(self.rows)}"
        if not self.buffers:
            return [said]
        more = f"; the largest gathered layer {gigabytes(self.layer)}" if sharing.fsdp else ""
        return [f"{sharing}; on each: {said}, buffers {gigabytes(self.buffers)}{more}"]


def held_by(model: torch.nn.Module, precision: str, moments: int = 2) -> Held:
    """Counts what a training of `model` (on the meta device, frozen as it will be) holds.

    `precision` is Accelerate's name; `moments` are those that the optimizer keeps of each trained value.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights, gradients = byte_count(tensors_of(model)), byte_count(trained)
    inside: set[int] = set()
    largest = stored = 0
    for layer in repeated_layers(model):  # inner ones first
        own = [parameter for parameter in layer.parameters() if id(parameter) not in inside]
        inside |= set(map(id, own))
        stored += byte_count(own)
        dtype = gathered_dtype(layer, precision)
        largest = max(largest, sum(one.numel() * (dtype or one.dtype).itemsize for one in own))
    cast = COMPUTED_IN.get(precision)
    itemsize = 2 if any(parameter.dtype == cast for parameter in model.parameters()) else 4
    return Held(
        sum(parameter.numel() for parameter in model.parameters()), sum(parameter.numel() for parameter in trained),
        weights, gradients, moments * gradients, weights - stored, largest, itemsize,
    )  # fmt: skip


def before_step(model: torch.nn.Module, precision: str, sharing: Sharing, accumulating: bool) -> None:
    """Lets a model on the meta device have what it has when a backward pass begins.

    Where micro-batches are `accumulating` that is all gradients. Gradients that are spread leave whenever a layer is
    done, which is measured as if they were there; but FSDP2 keeps those outside of layers whole to the end. Under it
    layers are gathered in another type.
    """
    fsdp = sharing.fsdp and sharing.gpus > 1
    there = set(model.parameters()) if not fsdp and (sharing.spreads or accumulating) else set()
    for layer in repeated_layers(model) if fsdp else ():
        dtype = gathered_dtype(layer, precision)
        for parameter in layer.parameters():
            parameter.data = parameter.data.to(dtype or parameter.dtype)
            there.add(parameter)
    for parameter in model.parameters():
        kept = parameter.requires_grad and parameter in there
        parameter.grad = torch.empty_like(parameter) if kept else None


def byte_count(tensors: Iterable[torch.Tensor]) -> int:
    """Adds up bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def tensors_of(model: torch.nn.Module) -> Iterable[torch.Tensor]:
    """Yields parameters and buffers."""
    yield from model.parameters()
    yield from model.buffers()


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


def machine_of(options: PlanOptions, training: TrainingOptions) -> Machine:
    """Describes the machine that `--plan` is for: the one that is here, or a GPU with --gpu-memory."""
    asked, memory = training.precision, int(options.gpu_memory * 1e9)
    if not memory:
        return machine_here(mixed_precision(asked))
    precision = "bf16" if asked == "auto" else mixed_precision(asked)
    return Machine(True, memory, memory - CONTEXT, precision, precision == "bf16")


def gigabytes(count: float) -> str:
    """Writes bytes in GB (10^9)."""
    return f"{count / 1e9:.3g} GB" if count < 1e9 else f"{count / 1e9:.1f} GB"


def print_plan(
    title: str,
    unit: str,
    config: Any,
    model: torch.nn.Module,
    loss: Callable[[int], torch.Tensor],
    rows: Sequence[int] = (),
    at_once: int = 0,
    moments: int = 2,
    far: int = FAR,
) -> None:
    """Prints what a step needs and what fits the machine.

    Args:
        title: names what trains.
        unit: names what a batch has many of.
        config: of the command, with `plan` and `training`.
        model: on the meta device, in training mode, frozen as it will be.
        loss: computes the loss of so many on shapes.
        rows: bytes of each split that a GPU keeps where they fit, see `labs_common.frozen.cache`.
        at_once: how many go through the network at once if not a process's whole part of a batch.
        moments: that the optimizer keeps of each trained value.
        far: times the batch, the largest that is measured.

    Raises:
        LabError: the options contradict each other, or the network cannot be measured on shapes.
    """
    machine, sharing = machine_of(config.plan, config.training), sharing_asked(config.plan)
    if os.environ.get("RANK", "0") != "0":
        return
    held = held_by(model, machine.precision, moments).shared(sharing)
    kept = sum(size for size in rows if size <= HELD_SHARE * machine.free) if machine.gpu else 0
    held = dataclasses.replace(held, rows=kept)
    part = -(-config.training.batch_size // sharing.gpus)
    count = min(at_once or part, part)
    dtype = COMPUTED_IN.get(machine.precision, torch.float32)

    def cost(of: int) -> Cost:
        before_step(model, machine.precision, sharing, accumulating=False)
        try:
            return step_cost(model, lambda: loss(of), dtype)
        finally:
            constant.cache_clear()  # they are shapes now

    try:
        one, other = (count, cost(count)), (2 * count, cost(2 * count))
    except LabError:
        raise
    except Exception as error:  # a network that computes with values cannot be measured on shapes
        raise LabError(f"--plan: the step cannot be measured on shapes ({reason_of(error)})") from error
    # A step that is not accumulated has no gradients before its backward pass, whose peak counts those that come.
    fixed = held.total - (0 if sharing.spreads else held.gradients)
    print(f"{title}: {held.parameters:,} parameters, {held.trained:,} train; {machine}")
    print(*held.lines(sharing), sep="\n")
    peak = fixed + one[1].peak
    said = "fits" if peak <= machine.usable else "too much"
    print(
        f"{count:,} {unit} at once: activations {gigabytes(one[1].peak)}, peak {gigabytes(peak)}: {said}; "
        f"{one[1].flops / 1e12:,.3g} TFLOP"
    )

    def largest(far: tuple[int, Cost]) -> int:
        most = count
        while most < MOST and fixed + between(one, far, 2 * most).peak <= machine.usable:
            most *= 2
        while most and fixed + between(one, far, most).peak > machine.usable:
            most //= 2
        return most

    # What a batch adds may be less than how exactly peaks are measured: a larger one then says more.
    if (most := min(largest(other), far * count)) > other[0]:
        other = most, cost(most)
    most = largest(other)
    print(f"fits: {most:,} {unit} at once on each GPU" if most else "nothing fits: several GPUs, or a smaller network")
