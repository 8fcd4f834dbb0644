"""The device of `pretended`: what is on it, and the operators that run there, checked and counted."""

import functools
import sys
import sysconfig
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
aten = torch.ops.aten


# Operators after which the host waits, because it must know a value or a size.
SYNCING = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten._unique.default,
    aten._unique2.default, aten.unique_dim.default, aten.unique_consecutive.default,
    aten.unique_dim_consecutive.default, aten.equal.default, aten.is_nonzero.default, aten.bincount.default,
    aten._linalg_check_errors.default, aten.linalg_eig.default, aten._linalg_eigh.default, aten._linalg_svd.default,
}  # fmt: skip
INDEXING = {
    aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_put.default, aten.index_put_.default,
    aten._index_put_impl_.default, aten._unsafe_index_put.default,
}  # fmt: skip
# Operators by which a CPU's one_hot looks for numbers that are too large, as CUDA's does not.
CHECKING = {aten.aminmax.default, aten._local_scalar_dense.default}
COPYING = {aten.copy_.default, aten._foreach_copy_.default}
# Operators that launch nothing: beside views, those that only reserve memory.
FREE = {
    aten.empty.memory_format, aten.empty_strided.default, aten.empty_like.default, aten.new_empty.default,
    aten.new_empty_strided.default, aten._unsafe_view.default, aten._reshape_alias.default, aten.lift_fresh.default,
}  # fmt: skip
# Operators whose precision is that in which a network computes.
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten.convolution.default}
# Beside pointwise and _foreach operators, those that take a number as a tensor of the CPU without dimensions.
NUMBERS = {aten.masked_fill.Tensor, aten.masked_fill_.Tensor, aten.index_fill.int_Tensor, aten.index_fill_.int_Tensor,
           aten.fill.Tensor, aten.fill_.Tensor, aten._fused_adamw_.default, aten._fused_adam_.default}  # fmt: skip

# A file of these is the project's; of the rest, what is in no library is (a test).
PROJECT = ("labs_common", "caption_lab", "clip_lab", "llm_peft_fa", "vit_transfer", "zsi_contrastive")
LIBRARIES = (*(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")), "<")


@dataclass
class Gpu:
    """What happened on the device; lines are those of the project that caused it."""

    operators: Counter[str] = field(default_factory=Counter)
    """Kernels by their operator: neither views, nor reserved memory, nor transfers."""
    syncs: Counter[str] = field(default_factory=Counter)
    """By line: the host waited for the device."""
    copies: Counter[str] = field(default_factory=Counter)
    """By line: transfers between host and device, in either direction."""
    products: Counter[str] = field(default_factory=Counter)
    """Matrix products and convolutions by their precision."""
    allocated: int = 0
    """Bytes alive, as CUDA's allocator rounds them."""
    peak: int = 0
    lock: Any = field(default_factory=threading.RLock, repr=False)

    def totals(self) -> dict[str, int]:
        """The three counts."""
        return {name: getattr(self, name).total() for name in ("operators", "syncs", "copies")}

    def note(self, counter: Counter[str], name: str | None = None) -> None:
        with self.lock:
            counter[name or project_line()] += 1

    def note_copy(self, waits: bool) -> None:
        with self.lock:
            line = project_line()
            self.copies[line] += 1
            if waits:
                self.syncs[line] += 1


class Allocation:
    """Memory of the device, as long as the storage that carries it is alive."""

    def __init__(self, gpu: Gpu, size: int) -> None:
        self.gpu, self.size = gpu, -(-size // 512) * 512
        with gpu.lock:
            gpu.allocated += self.size
            gpu.peak = max(gpu.peak, gpu.allocated)

    def __del__(self) -> None:
        with self.gpu.lock:
            self.gpu.allocated -= self.size


class Local(threading.local):
    """What a thread is about."""

    call: tuple[Any, Any] = ((), {})  # the arguments of the function of torch under way
    target: bool | None = None  # whether it was told to make its result on the device
    last: bool = False  # whether its last operator was one of the device
    quiet: bool = False  # under way is one_hot


LOCAL = Local()


def on_device(tensor: torch.Tensor) -> bool:
    """Whether the tensor is on the pretended device; called where `Face` does not see it."""
    return has_storage(tensor) and hasattr(tensor.untyped_storage(), "allocation")


def tensors_in(arguments: Any, named: Any = None) -> Iterator[torch.Tensor]:
    """The tensors among arguments, and in lists of them."""
    for value in (*arguments, *(named or {}).values()):
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)


def has_storage(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and tensor.device.type == "cpu"


def to_cuda(device: Any) -> bool | None:
    """Whether a device is CUDA; None if it is neither that nor the CPU, such as meta."""
    kind = "cuda" if isinstance(device, int) else torch.device(device).type
    return {"cuda": True, "cpu": False}.get(kind)


@functools.cache
def short_name(file: str) -> str | None:
    """A file's name from its package on, if it is the project's."""
    parts = Path(file).parts
    for place in range(len(parts) - 1):
        if parts[place] in PROJECT and parts[place + 1] != "src" and parts[place + 1] != "tests":
            return "/".join(parts[place:])
    return None if Path(file).stem.startswith("pretended") or file.startswith(LIBRARIES) else "/".join(parts[-2:])


def project_line() -> str:
    """The nearest line of the project."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        name = short_name(frame.f_code.co_filename)
        if name is not None:
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


class Kernels(TorchDispatchMode):
    """Sees operators, below autograd and autocast."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self.gpu = gpu

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # nothing is compiled under it; a wrapper would cost time for each operator
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():
            tensors = list(tensors_in(args, kwargs))
            here = [on_device(tensor) for tensor in tensors]
            if any(here):
                self.check(func, args, tensors, here)
                self.count(func, args, kwargs, here)
            out = func(*args, **kwargs)
            if func in COPYING:
                return out
            there = self.place(kwargs, tensors, here)
            if there:
                for tensor in tensors_in((out,)):
                    self.mark(tensor)
                if not tensors and func not in FREE:
                    self.gpu.note(self.gpu.operators, func._schema.name)
            LOCAL.last = there
            return out

    def place(self, kwargs: Any, tensors: list[torch.Tensor], here: list[bool]) -> bool:
        """Whether the result is on the device.

        C++ hands on the true device, which is always the CPU: only what Python asked for counts.
        """
        if LOCAL.target is not None and "device" in kwargs:
            return LOCAL.target
        if tensors:
            return any(here)
        if torch._C._current_graph_task_id() != -1:  # a constant of a backward pass
            return LOCAL.last
        return any(map(on_device, tensors_in(*LOCAL.call)))

    def mark(self, tensor: torch.Tensor) -> None:
        if has_storage(tensor):
            storage: Any = tensor.untyped_storage()
            if not hasattr(storage, "allocation"):
                storage.allocation = Allocation(self.gpu, storage.nbytes())

    def check(self, func: Any, args: Any, tensors: list[torch.Tensor], here: list[bool]) -> None:
        """Raises what CUDA raises where tensors of two devices meet."""
        if all(here) or func in COPYING or (LOCAL.target is not None and func is aten._to_copy.default):
            return
        if func in INDEXING:
            if not on_device(args[0]):
                raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
            strangers = list(tensors_in(args[2:]))
        else:
            strangers = tensors
        numbers = (torch.Tag.pointwise in func.tags or func in NUMBERS or func in INDEXING
                   or func._schema.name.startswith("aten::_foreach"))  # fmt: skip
        written = func._schema.is_mutable and not on_device(tensors[0])
        for tensor in strangers:
            if not on_device(tensor) and not (tensor.dim() == 0 and numbers and not written):
                raise RuntimeError(
                    "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
                    f"({func}: {[(tuple(one.shape), 'cuda:0' if on else 'cpu') for one, on in zip(tensors, here, strict=True)]})"
                )

    def count(self, func: Any, args: Any, kwargs: Any, here: list[bool]) -> None:
        gpu = self.gpu
        if func is aten.copy_.default and here[0] != here[1]:
            waits = not (len(args) > 2 and args[2]) and not kwargs.get("non_blocking", False)
            gpu.note_copy(waits or not pinned(args[0] if here[1] else args[1]))
            return
        if LOCAL.target is not None and func is aten._to_copy.default:  # `moved` has counted it
            return
        if func.is_view or func in FREE or (LOCAL.quiet and func in CHECKING):
            return
        gpu.note(gpu.operators, func._schema.name)
        if func in PRODUCTS:
            gpu.note(gpu.products, str(args[0].dtype))
        counted = func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None
        if func in SYNCING or counted or func._schema.name == "torchvision::nms":
            gpu.note(gpu.syncs)
        elif func in INDEXING:
            self.count_indices(func, args)

    def count_indices(self, func: Any, args: Any) -> None:
        """A mask must be counted before it can be an index, unless one number goes to all its places."""
        fills = len(args) > 2 and args[2].numel() == 1 and not (len(args) > 3 and args[3])
        for index in args[1]:
            if index is not None and not on_device(index):
                self.gpu.note_copy(waits=True)
            elif index is not None and index.dtype in (torch.bool, torch.uint8) and not fills:
                self.gpu.note(self.gpu.syncs)


def pinned(tensor: torch.Tensor) -> bool:
    return hasattr(tensor.untyped_storage(), "pinned")
