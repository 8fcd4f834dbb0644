"""FSDP2 on CPUs: Accelerate shards on GPUs only, and nothing else would show what sharded weights do to a lab."""

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from labs_common.sharding import shard

FORCED = "LABS_FORCE_FSDP"  # in the environment of a process that tests start


def fsdp_variables(file: Path) -> dict[str, str]:
    """What `accelerate launch --config_file FILE` puts into the environment about FSDP, and the note to force it."""
    launch, _, _ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(file), "train.py"])
    )
    said = prepare_multi_gpu_env(launch)
    return {name: value for name, value in said.items() if "FSDP" in name} | {FORCED: "1"}


def force_fsdp() -> None:
    """Lets every Accelerator of this process shard as it would on GPUs; the processes talk by gloo."""
    plain = Accelerator.__init__

    @wraps(plain)
    def sharding(self: Accelerator, *arguments: Any, **options: Any) -> None:
        plain(self, *arguments, **options)
        plugin = FullyShardedDataParallelPlugin()
        for state in (PartialState, AcceleratorState):  # the latter takes over what the former says
            state._shared_state["distributed_type"] = DistributedType.FSDP
        self.state.fsdp_plugin = plugin
        assert self.is_fsdp2

    Accelerator.__init__ = sharding  # type: ignore[method-assign]


def force_deepspeed() -> None:
    """Lets Accelerate find the other processes of a launch with DeepSpeed, which it looks for on GPUs only.

    DeepSpeed's own kernel for processes on one machine is left out: compiling it takes a minute.
    """
    importlib.import_module("deepspeed").ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if os.environ["WORLD_SIZE"] != "1":
        PartialState._prepare_backend = lambda self, *_: ("gloo", DistributedType.MULTI_CPU)


@contextmanager
def fake_group(processes: int = 8) -> Iterator[None]:
    """This process is the first of several of which the others do not exist: collectives do nothing."""
    dist.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def assert_in_layers(model: torch.nn.Module, most: float = 0.4, precision: str = "bf16") -> None:
    """Sharded over eight, the model has several units, none with more than `most` of its parameters."""
    total = sum(parameter.numel() for parameter in model.parameters())
    count = sum(1 for _ in model.parameters())
    with fake_group():
        shard(model, torch.device("cpu"), precision)
        shares = {}
        for name, module in model.named_modules():
            if isinstance(module, FSDPModule) and (group := module._get_fsdp_state()._fsdp_param_group):
                shares[name] = sum(parameter._orig_size.numel() for parameter in group.fsdp_params) / total
                group._init_mp_dtypes()  # else done in the first forward pass: refuses a mix of types that train
        assert sum(shares.values()) == pytest.approx(1)
        assert len(shares) > 2
        assert max(shares.values()) <= most, shares
        assert sum(1 for _ in model.parameters()) == count
        for parameter in model.parameters():
            assert isinstance(parameter, DTensor)
            assert parameter.to_local().numel() <= -(-parameter.shape[0] // 8) * parameter.shape[1:].numel()
