"""FSDP2 on CPUs: Accelerate shards on GPUs only, and nothing else would show what sharded weights do to a lab."""

from functools import wraps
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env

FORCED = "LABS_FORCE_FSDP"  # in the environment of a process that tests start


def fsdp_variables(file: Path) -> dict[str, str]:
    """What `accelerate launch --config_file FILE` puts into the environment about FSDP, and the note to force it."""
    launch, _, _ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(file), "train.py"])
    )
    said = prepare_multi_gpu_env(launch)
    return {name: value for name, value in said.items() if name.startswith("FSDP_")} | {FORCED: "1"}


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
