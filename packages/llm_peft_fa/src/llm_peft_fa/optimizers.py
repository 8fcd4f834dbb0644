"""AdamW with moments in float32, or in 8 bits by bitsandbytes, on the GPU or paged out to the host's memory.

OPTIMIZERS, at the end, is the one table in which an optimizer is registered.
"""

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from labs_common.device import on_gpu
from labs_common.errors import LabError
from llm_peft_fa.config import TrainConfig

BLOCK = 256  # values that share a scale in bitsandbytes (Dettmers et al. 2022, section 2.1)
LEAST, PAGED = 4096, 100_000  # bitsandbytes keeps smaller tensors' moments in float32, and does not page smaller ones
SLICE = 2**24  # values that are widened to float32 at once: 200 MB with gradient and noise


@dataclass(frozen=True)
class Optimizer:
    """An entry of OPTIMIZERS.

    Attributes:
        make: (parameters, learning rate, weight decay) to the optimizer.
        held: bytes that it keeps on the GPU for a tensor of so many values.
        eight_bit: whether its moments are in 8 bits.
    """

    make: Callable[[list[torch.nn.Parameter], float, float], torch.optim.Optimizer]
    held: Callable[[int], int]
    eight_bit: bool = False


def check_optimizer(config: TrainConfig, precision: str, sharded: bool, planned: bool = False) -> None:
    """Makes sure that the optimizer suits the precision (Accelerate's name), the launch and what is installed.

    What is only `planned` may run on another machine.

    Raises:
        LabError: it does not; the line says what to take instead.
    """
    name = config.training.optimizer
    if config.method.pure_bf16 and precision != "bf16":
        raise LabError("--pure-bf16: needs --precision bf16, which GPUs compute in from 2020 on; take lora or layers")
    if config.method.pure_bf16 and not OPTIMIZERS[name].eight_bit:
        raise LabError("--pure-bf16: rounds small steps at random, which --optimizer adamw does not; take adamw_8bit")
    if OPTIMIZERS[name].eight_bit and sharded:
        raise LabError(f"--optimizer {name}: FSDP and DeepSpeed spread the optimizer already; take adamw")
    if OPTIMIZERS[name].eight_bit and not planned and importlib.util.find_spec("bitsandbytes") is None:
        raise LabError(f"--optimizer {name}: needs bitsandbytes; install the extra llm-peft-fa[quantization]")


def optimizer_of(config: TrainConfig, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Makes the optimizer of those parameters that train."""
    options, trained = config.training, [parameter for parameter in parameters if parameter.requires_grad]
    return OPTIMIZERS[options.optimizer].make(trained, options.learning_rate, options.weight_decay)


def rounded(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Rounds float32 to bfloat16 up or down at random, so that the mean stays: small steps are not lost.

    bfloat16 is the upper half of float32's bits; noise below them carries over as often as they are large.
    """
    noise = torch.randint(0, 1 << 16, values.shape, generator=generator, device=values.device, dtype=torch.int32)
    return ((values.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32).bfloat16()


def _adamw(parameters: list[torch.nn.Parameter], rate: float, decay: float) -> torch.optim.Optimizer:
    fused = True if on_gpu() else None  # one kernel, and no copies of what trains
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay, fused=fused)


def _eight_bit(parameters: list[torch.nn.Parameter], rate: float, decay: float, paged: bool) -> torch.optim.Optimizer:
    import bitsandbytes  # of an extra

    class RoundedAdamW8bit(bitsandbytes.optim.AdamW8bit):
        """Steps in float32 also where a weight is kept in bfloat16, which then gets it by `rounded`."""

        def update_step(self, group: Any, p: torch.nn.Parameter, gindex: int, pindex: int) -> None:
            if p.dtype != torch.bfloat16:
                super().update_step(group, p, gindex, pindex)
                return
            assert p.grad is not None
            whole, weights, gradients = self.state[p], p.data.view(-1), p.grad.reshape(-1)
            # By step and parameter: the same in all processes, and in a run that is resumed.
            generator = torch.Generator(p.device).manual_seed(1_000_003 * whole["step"] + pindex)
            for start in range(0, p.numel(), SLICE):
                values = slice(start, start + SLICE)
                blocks = slice(start // BLOCK, (start + SLICE) // BLOCK)
                parts = {"state1": values, "state2": values, "absmax1": blocks, "absmax2": blocks}
                part = torch.nn.Parameter(weights[values].float())
                part.grad = gradients[values].float()
                self.state[part] = {
                    name: kept.view(-1)[parts[name]] if name in parts else kept for name, kept in whole.items()
                }
                super().update_step(group, part, gindex, pindex)
                weights[values] = rounded(part.data, generator)
                del self.state[part]
            whole["step"] += 1

        def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
            super().load_state_dict(state_dict, move_to_device)
            for p, state in self.state.items() if paged else ():  # loaded ones lie on the GPU
                for name in ("state1", "state2"):
                    loaded, state[name] = state[name], self.get_state_buffer(p, dtype=state[name].dtype)
                    state[name].copy_(loaded)

    return RoundedAdamW8bit(parameters, lr=rate, weight_decay=decay, is_paged=paged)


def _held(count: int, paged: bool) -> int:
    if count < LEAST:
        return 8 * count
    return 8 * -(-count // BLOCK) + (0 if paged and count >= PAGED else 2 * count)


OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": Optimizer(_adamw, lambda count: 8 * count),
    "adamw_8bit": Optimizer(partial(_eight_bit, paged=False), lambda count: _held(count, False), True),
    "paged_adamw_8bit": Optimizer(partial(_eight_bit, paged=True), lambda count: _held(count, True), True),
}
