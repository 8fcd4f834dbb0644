"""Measures a step's memory and arithmetic without doing it: shapes alone, no weights, no GPU.

```
with torch.device("meta"):
    model = ...
cost = step_cost(model, lambda: model(batch), torch.bfloat16)
```
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class Cost:
    """A forward and backward pass.

    Attributes:
        forward, backward: the most bytes that existed at once in each, besides weights, gradients and the batch.
        flops: multiplications and additions of matrix products and attention, each counted.
    """

    forward: int
    backward: int
    flops: int

    @property
    def peak(self) -> int:
        """The most bytes that existed at once."""
        return max(self.forward, self.backward)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operators make under it, as long as each lives, and their arithmetic.

    Attributes:
        now, peak: bytes at this moment, and the most so far, to half a percent. Until `collect` the first has dead ones
            in it.
        flops: of the operators so far. PyTorch's own counter would keep what checkpointing throws away.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.flops = 0
        self._living: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        for made in tree_leaves(out):
            if isinstance(made, torch.Tensor):
                self.note(made)
        return out

    def note(self, tensor: torch.Tensor) -> None:
        """Counts a tensor's storage, unless it is counted already."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._living or self._living[storage._cdata][0].expired():
            self._forget(storage._cdata)
            self._living[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
            self.now += storage.nbytes()
            # Perhaps by dead ones, which all have to be looked at: not for each little step up.
            if self.now > 1.005 * self.peak:
                self.collect()
                self.peak = max(self.peak, self.now)

    def collect(self) -> None:
        """Takes off what has died."""
        for key in [key for key, (storage, _) in self._living.items() if storage.expired()]:
            self._forget(key)

    def _forget(self, key: int) -> None:
        self.now -= self._living.pop(key, (None, 0))[1]


def step_cost(model: torch.nn.Module, loss: Callable[[], torch.Tensor], precision: torch.dtype) -> Cost:
    """Measures forward and backward of `loss` under autocast to `precision`.

    `model` was made on the meta device; its tensors are put into a mode in which operators compute shapes only, as are
    those that `loss` makes. It can only be measured again afterwards. The kernels are a CPU's, whose outputs are
    those of a GPU in shape; float32 is no autocast. Gradients that parameters have are there already; others count when
    they come.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live:
        _fake(model)
        live.collect()
        before = live.peak = live.now
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            value = loss()
        forward = live.peak
        live.collect()
        live.peak = live.now
        value.backward()
        return Cost(forward - before, live.peak - before, live.flops)


def _fake(model: torch.nn.Module) -> None:
    """Replaces parameters and buffers by fake ones; `Module.to` cannot, and tied ones stay tied."""
    made: dict[int, torch.Tensor] = {}
    old: dict[int, torch.Tensor] = {}  # kept, so that no id is given twice
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    new = torch.empty(tensor.shape, dtype=tensor.dtype)
                    if isinstance(tensor, torch.nn.Parameter):
                        new = torch.nn.Parameter(new, tensor.requires_grad)
                        new.grad = None if tensor.grad is None else torch.empty_like(new)
                    old[id(tensor)], made[id(tensor)] = tensor, new
                tensors[name] = made[id(tensor)]  # type: ignore[assignment]
