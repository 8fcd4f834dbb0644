"""Weights spread over processes, whole only while a layer computes: by PyTorch's FSDP2, or by DeepSpeed's ZeRO-3."""

import copy
import importlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from labs_common.errors import LabError

COMPUTED_IN = {"bf16": torch.bfloat16, "fp16": torch.float16}  # by Accelerate's name of a precision
RUNNING = torch.nn.modules.batchnorm._NormBase  # norms with statistics that are kept in float32


def repeated_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Finds the layers of which a network has several in a row, inner ones first: the units in which it is sharded.

    A model of transformers names their classes itself (`_no_split_modules`), and is not looked into further: experts,
    say, are not computed by all processes. Elsewhere they are the members of a ModuleList, ModuleDict or Sequential
    that consist of parts and have another of their class beside them.
    """
    found: dict[torch.nn.Module, None] = {}  # in order, each once
    _collect(model, found)
    return [layer for layer in found if layer is not model]


def _collect(module: torch.nn.Module, found: dict[torch.nn.Module, None]) -> None:
    names = getattr(module, "_no_split_modules", None) or ()
    own = [part for part in module.modules() if type(part).__name__ in names]
    if own:
        found |= dict.fromkeys(reversed(own))
        return
    for child in module.children():
        _collect(child, found)
    if isinstance(module, (torch.nn.ModuleList, torch.nn.ModuleDict, torch.nn.Sequential)):
        parts = list(module.children())
        kinds = Counter(map(type, parts))
        for part in parts:
            if kinds[type(part)] > 1 and any(part.children()) and any(True for _ in part.parameters()):
                found[part] = None


def check_sharding(accelerator: Accelerator) -> None:
    """Makes sure that the launch shards in a way that there is here.

    Raises:
        LabError: it asks for FSDP's first version, or for its activation checkpointing.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        return
    if not accelerator.is_fsdp2:
        raise LabError("the launch asks for FSDP 1; set fsdp_version: 2, as in launch/fsdp.yaml")
    if accelerator.state.fsdp_plugin.activation_checkpointing:
        raise LabError("fsdp_activation_checkpointing: is not supported; set it to false (llm_peft_fa has "
                       "--gradient-checkpointing)")  # fmt: skip


def shard(
    model: torch.nn.Module,
    device: torch.device,
    precision: str = "no",
    reshard: bool = True,
    offload: OffloadPolicy = OffloadPolicy(),  # noqa: B008 - it holds nothing
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Spreads the parameters of `model` over all processes, which take over the main one's, and tells the optimizer.

    Other processes than the main one may have them on the meta device. One layer at a time is whole on `device`.

    With `precision` bf16 or fp16 layers travel and compute in it; what is outside of layers (scales, heads,
    embeddings) and layers with running statistics are gathered as they are stored. Gradients are summed in float32,
    and no output is cast: a loss stays as it was computed. What trains is kept in float32.

    `reshard` frees a layer after its forward pass; `offload` keeps the parts in the host's memory.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in COMPUTED_IN.values():
            parameter.data = parameter.data.float()
    for layer in repeated_layers(model):
        take_over(layer, device)
        _unit(layer, gathered_dtype(layer, precision), reshard, offload)
    # What remains is used at the beginning and at the end: it stays whole between forward and backward pass.
    take_over(model, device)
    _unit(model, None, None, offload)
    if optimizer is not None:
        _tell(optimizer, model, names)


def gathered_dtype(layer: torch.nn.Module, precision: str) -> torch.dtype | None:
    """Returns the type in which FSDP2 gathers a layer, see `shard`; None is as it is stored."""
    return None if any(isinstance(part, RUNNING) for part in layer.modules()) else COMPUTED_IN.get(precision)


def _tell(optimizer: torch.optim.Optimizer, model: torch.nn.Module, names: dict[int, str]) -> None:
    """Hands the optimizer the parameters of now, of those whose `names` were kept by their ids before."""
    now = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [now[names[id(parameter)]] for parameter in group["params"]]


def zero_stage(accelerator: Accelerator) -> int:
    """Returns the stage of DeepSpeed's ZeRO under which the launch runs: 3 spreads weights; 0 without DeepSpeed."""
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    return int(accelerator.deepspeed_plugin.zero_stage) if deepspeed else 0


def spreads_weights(accelerator: Accelerator) -> bool:
    """Tells whether the launch spreads weights over several processes, by FSDP or ZeRO-3."""
    spreads = zero_stage(accelerator) == 3 or accelerator.distributed_type == DistributedType.FSDP
    return spreads and accelerator.num_processes > 1


def is_sharded(model: torch.nn.Module) -> bool:
    """Tells whether layers of a prepared model are spread, so that all processes have to call each equally often."""
    spread = any(isinstance(part, FSDPModule) for part in model.modules())
    return spread or any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def reads_weights(accelerator: Accelerator) -> bool:
    """Tells whether this process has to read a model: where weights are spread, others take the main one's."""
    return accelerator.is_main_process or not spreads_weights(accelerator)


def place(model: torch.nn.Module, accelerator: Accelerator) -> bool:
    """Puts a model that only answers on this process's device: its layers in parts where the launch shards weights.

    Returns whether they are: then all processes have to call its forward pass equally often, and what is outside of
    layers is whole in each.
    """
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        return True
    device = accelerator.device
    if not spreads_weights(accelerator):
        model.to(device)
        return False
    for layer in repeated_layers(model):
        take_over(layer, device)
        _unit(layer, None, True, OffloadPolicy())
    take_over(model, device)
    others = {parameter for parameter in model.parameters() if not isinstance(parameter, DTensor)}
    fully_shard(model, ignored_params=others, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    return True


@torch.no_grad()
def take_over(module: torch.nn.Module, device: torch.device) -> None:
    """Puts what is not sharded yet on `device`, contiguous, with the main process's values in all processes.

    So a run with FSDP begins as one with DistributedDataParallel does, and only one process has to read the weights.
    """
    made: dict[int, torch.Tensor] = {}  # by the tensor that it replaces: a tied one stays tied
    for part in module.modules():
        for own in (part._parameters, part._buffers):
            for name, tensor in own.items():
                if tensor is None or isinstance(tensor, DTensor) or hasattr(tensor, "ds_id"):
                    continue  # sharded already, by FSDP2 or ZeRO-3
                if id(tensor) not in made:
                    made[id(tensor)] = _from_main(tensor, device)
                own[name] = made[id(tensor)]  # type: ignore[assignment]


def _from_main(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    if tensor.is_meta and dist.get_rank() == 0:  # shapes alone are asked for
        return tensor
    # OLoRA starts from columns of a matrix, and FSDP2 takes contiguous tensors only.
    values = torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.data.to(device)
    values = values.contiguous()
    if dist.get_world_size() > 1 and values.numel():
        dist.broadcast(values.flatten().view(torch.uint8), 0)  # as bytes: not every backend has every dtype
    if not isinstance(tensor, torch.nn.Parameter):
        return values
    if tensor.is_meta:
        return torch.nn.Parameter(values, tensor.requires_grad)
    tensor.data = values
    return tensor


def autocast_forward(model: torch.nn.Module, accelerator: Accelerator) -> None:
    """Lets a model compute in the run's precision, as Accelerate does by itself but under FSDP2 and DeepSpeed."""
    plain, kind, dtype = model.forward, accelerator.device.type, COMPUTED_IN.get(accelerator.mixed_precision)

    @wraps(plain)
    def forward(*arguments: Any, **options: Any) -> Any:
        with torch.autocast(kind, dtype, enabled=dtype is not None):
            return plain(*arguments, **options)

    model.forward = forward


@contextmanager
def kept_weights(model: torch.nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Lets DeepSpeed leave weights in float32 when it prepares a model, which computes under autocast as elsewhere.

    DeepSpeed casts all weights to 16 bits and no data, so that pictures in float32 would not fit them. A model that is
    in 16 bits already, such as a frozen base of an LLM, is left to it.

    Raises:
        LabError: in float16 DeepSpeed scales the losses only of what it casts.
    """
    dtype, plugin = COMPUTED_IN.get(accelerator.mixed_precision), accelerator.state.deepspeed_plugin
    if plugin is None or dtype is None or any(parameter.dtype == dtype for parameter in model.parameters()):
        yield
        return
    if dtype == torch.float16:
        raise LabError("--precision fp16: DeepSpeed has no autocast in float16; take --precision fp32, or "
                       "launch/multi_gpu.yaml or launch/fsdp.yaml")  # fmt: skip
    autocast_forward(model, accelerator)
    configs = plugin.deepspeed_config, plugin.dschf.config
    for config in configs:
        config["bf16"] = {"enabled": False}
    yield
    for config in configs:  # Accelerate reads here which precision the run has
        config["bf16"] = {"enabled": True}


def prepare_sharded(
    accelerator: Accelerator, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Does under FSDP what `accelerator.prepare` does elsewhere, autocast included; see `shard`.

    Accelerate's own shards by the names of classes that the whole model lists, has no autocast, and rounds the loss.
    """
    plugin = accelerator.state.fsdp_plugin
    offload = plugin.cpu_offload or OffloadPolicy()
    shard(model, accelerator.device, accelerator.mixed_precision, plugin.reshard_after_forward, offload, optimizer)
    autocast_forward(model, accelerator)
    prepared: torch.optim.Optimizer = accelerator.prepare_optimizer(optimizer)
    return model, prepared


def partition(accelerator: Accelerator, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Spreads the parameters of `model` as DeepSpeed's ZeRO-3 does, layer by layer, and tells the optimizer.

    All processes take over the main one's, and others than it may have them on the meta device. DeepSpeed itself, given
    a model that is not spread yet, puts the whole of it on each process's device first.
    """
    init = importlib.import_module("deepspeed").zero.Init  # of an extra
    config = accelerator.deepspeed_plugin.dschf.config  # with its batch sizes filled in
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    # The optimizer keeps what trains in float32; see also `kept_weights`.
    cast = [dtype for name, dtype in COMPUTED_IN.items() if config.get(name, {}).get("enabled") is True]
    dtype = cast[0] if cast else torch.float32
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    for layer in (*repeated_layers(model), model):
        take_over(layer, accelerator.device)
        init(module=layer, config_dict_or_path=copy.deepcopy(config), dtype=dtype)
    _tell(optimizer, model, names)


@contextmanager
def whole_outside_layers(model: torch.nn.Module) -> Iterator[None]:
    """Lets all processes use what is outside of layers without the model's forward pass; changes nothing elsewhere."""
    if isinstance(model, FSDPModule):
        model.unshard()
    yield
    reshard(model)


def reshard(model: torch.nn.Module) -> None:
    """Lets every parameter be this process's part again; an evaluation leaves those outside of layers whole."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the whole of a tensor that FSDP2 shards, which all processes ask for together; any other as it is."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_state(model: torch.nn.Module, kept: bool) -> dict[str, torch.Tensor]:
    """Gathers the state of a sharded model in the host's memory, tensor by tensor, called by all processes together.

    Processes that do not say `kept` get nothing. What is tied is one tensor under its names, as in the model.
    """
    reshard(model)
    owners = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    made: dict[int, torch.Tensor] = {}
    state = {}
    for name, tensor in model.state_dict().items():
        owner = id(owners.get(name, tensor))
        if owner not in made:
            one = whole(tensor)
            made[owner] = one.cpu() if kept else torch.empty(0)
        state[name] = made[owner]
    return state if kept else {}


def part_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Returns this process's part of a whole `tensor`, if `like` is sharded and has its shape; else the tensor."""
    if not isinstance(like, DTensor) or like.shape != tensor.shape:
        return tensor
    there = tensor.to(like.device_mesh.device_type)
    # Every process has the whole tensor already: nothing is sent.
    return distribute_tensor(there, like.device_mesh, like.placements, src_data_rank=None)


def _unit(module: torch.nn.Module, dtype: torch.dtype | None, reshard: bool | None, offload: OffloadPolicy) -> None:
    # Norms on a CPU take no float32 beside bfloat16 weights: where the weights are cast the inputs are too.
    policy = MixedPrecisionPolicy(dtype, torch.float32, None, cast_forward_inputs=dtype is not None)
    fully_shard(module, mp_policy=policy, reshard_after_forward=reshard, offload_policy=offload)
