"""What autograd keeps for the backward pass: the same on every device, unlike the peak of a process."""

from collections.abc import Callable

import torch


def held_bytes(loss: Callable[[], torch.Tensor]) -> int:
    """The most bytes that autograd keeps at the same time, from the computation of a scalar `loss` to its gradient."""
    held: dict[int, int] = {}
    most = 0

    class Kept:
        def __init__(self, tensor: torch.Tensor) -> None:
            nonlocal most
            self.tensor = tensor
            held[id(self)] = tensor.numel() * tensor.element_size()
            most = max(most, sum(held.values()))

        def __del__(self) -> None:
            held.pop(id(self), None)

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        loss().backward()
    return most
