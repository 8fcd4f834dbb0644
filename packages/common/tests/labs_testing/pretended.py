"""A GPU that is not there: kernels run on the CPU with real values, but tensors say, and are held to, that they are on it.

```
with pretended_gpu() as gpu:
    x = torch.ones(2, 3, device="cuda")
    x + torch.ones(3)  # RuntimeError: Expected all tensors to be on the same device …
    x.sum().item()     # one host sync, noted under this line in gpu.syncs
```

A storage that was made on "cuda" carries an `Allocation`; its views, gradients and `.data` share it, and it goes when the
storage goes. Two modes of torch do the rest. `Kernels` sees every operator, also those of a backward pass: it carries
the mark on to what comes out, raises what CUDA raises, and counts. `Face` sees every call of Python: it lets
`Tensor.device`, `.to`, `.numpy` and the like tell the same story, and casts as CUDA's autocast does, whose tables are not
those of a CPU.

What it cannot show: speed, and which kernel CUDA would choose (an LSTM is one there and dozens here), so counts are
limits for regressions, not those of a GPU. CPU tensors are autocast too. A copy counts as a sync unless it is
`non_blocking` and the host's memory is pinned: the rule of torch.cuda.set_sync_debug_mode, and stricter for pageable
memory, for which CUDA may wait as well.
"""

import functools
import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from labs_testing.pretended_device import CPU, CUDA, LOCAL, Gpu, Kernels, on_device, pinned, to_cuda
from labs_testing.pretended_torch import TRUE, patch_autocast, patch_devices, patch_python

aten = torch.ops.aten

# CUDA's autocast computes these in float32 (torch's "CUDA Ops that can autocast to float32"); a CPU's does a few of them.
FLOAT32 = """
acos asin binary_cross_entropy_with_logits cdist cosh cosine_embedding_loss cosine_similarity cumprod cumsum
dist erfinv exp expm1 group_norm hinge_embedding_loss huber_loss kl_div l1_loss
layer_norm linalg_matrix_norm linalg_vector_norm log log10 log1p log2
log_softmax logsumexp margin_ranking_loss mse_loss multi_margin_loss multilabel_margin_loss nll_loss norm pdist
poisson_nll_loss pow prod reciprocal renorm rsqrt sinh smooth_l1_loss soft_margin_loss softmax softplus sum tan
triplet_margin_loss __pow__ __rpow__ native_layer_norm cross_entropy_loss
""".split()  # noqa: SIM905
# These in its lower precision, which a CPU's leaves alone; and those of cuDNN in float16, whatever the precision asked for.
LOWER = ["lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"]
CUDNN = ["lstm", "gru", "rnn_tanh", "rnn_relu"]
CASTABLE = (torch.float32, torch.bfloat16, torch.float16)


class Face(TorchFunctionMode):
    """Sees what Python calls: torch's functions, methods of tensors, and their properties."""

    def __init__(self, gpu: Gpu, kernels: Kernels) -> None:
        super().__init__()
        self.gpu, self.kernels = gpu, kernels
        tensor = torch.Tensor
        self.answers: dict[Any, Callable[..., Any]] = {
            tensor.device.__get__: lambda x: CUDA if on_device(x) else x.device,
            tensor.is_cuda.__get__: lambda x: on_device(x) or x.is_cuda,
            tensor.is_cpu.__get__: lambda x: not on_device(x) and x.is_cpu,
            tensor.get_device: lambda x: 0 if on_device(x) else x.get_device(),
            tensor.to: self.to,
            tensor.cpu: lambda x, **more: self.moved(x, False, **more),
            tensor.cuda: lambda x, device=None, **more: self.moved(x, True, **more),
            tensor.numpy: self.numpy,
            tensor.tolist: self.tolist,
            tensor.pin_memory: self.pin_memory,
            tensor.is_pinned: lambda x, *device: pinned(x),
            torch.tensor: functools.partial(self.from_host, torch.tensor),
            torch.as_tensor: functools.partial(self.from_host, torch.as_tensor),
            torch.asarray: functools.partial(self.from_host, torch.asarray),
            tensor.new_tensor: self.new_tensor,
            torch._C._nn.one_hot: self.one_hot,
            tensor.__getitem__: functools.partial(self.at, tensor.__getitem__),
            tensor.__setitem__: functools.partial(self.at, tensor.__setitem__),
        }
        places = (torch, torch.Tensor, torch._C._nn, torch._C._special, torch._C._linalg)
        for names, dtype in ((FLOAT32, torch.float32), (LOWER, None), (CUDNN, torch.float16)):
            for place, name in itertools.product(places, names):
                if function := getattr(place, name, None):
                    self.answers[function] = functools.partial(self.cast, function, dtype)
        self.answers[torch._C._nn.binary_cross_entropy] = self.binary_cross_entropy
        if "torchvision" in sys.modules:
            self.answers[torch.ops.torchvision.roi_align] = self.roi_align

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        answer = self.answers.get(func)
        return self.call(func, args, kwargs) if answer is None else answer(*args, **kwargs)

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Calls a function of torch, and sees to it that what it makes is where it was told to be."""
        target, pin = None, False
        if kwargs:
            if kwargs.get("device") is not None and (target := to_cuda(kwargs["device"])) is not None:
                kwargs = kwargs | {"device": CPU}
            if kwargs.get("pin_memory"):
                kwargs, pin = kwargs | {"pin_memory": False}, True
            if kwargs.get("generator") is not None:
                self.check_generator(kwargs["generator"], target, args)
        before = LOCAL.call, LOCAL.target
        LOCAL.call, LOCAL.target = (args, kwargs), target
        try:
            out = func(*args, **kwargs)
        finally:
            LOCAL.call, LOCAL.target = before
        if pin:
            out.untyped_storage().pinned = True
        return out

    def check_generator(self, generator: torch.Generator, target: bool | None, args: Any) -> None:
        there = target if target is not None else any(on_device(x) for x in args if isinstance(x, torch.Tensor))
        if (generator.device.type == "cuda") != there:
            wanted, found = ("cuda", "cpu") if there else ("cpu", "cuda")
            raise RuntimeError(f"Expected a '{wanted}' device type for generator but found '{found}'")

    def to(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        other = kwargs.get("other", args[0] if args else None)
        copy = kwargs.pop("copy", False)
        if isinstance(other, torch.Tensor):
            device, dtype = CUDA if on_device(other) else other.device, other.dtype
            non_blocking, memory_format = kwargs.get("non_blocking", False), kwargs.get("memory_format")
        else:
            device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        target = None if device is None else to_cuda(device)
        more = {} if memory_format is None else {"memory_format": memory_format}
        if (device is not None and target is None) or x.device.type != "cpu":  # meta
            return x.to(device, dtype or x.dtype, copy=copy, **more)
        if target is None or target == on_device(x):
            return self.call(torch.Tensor.to, (x, dtype or x.dtype), {"copy": copy, **more})
        return self.moved(x, target, non_blocking, dtype=dtype, **more)

    def moved(self, x: torch.Tensor, target: bool, non_blocking: bool = False, **more: Any) -> torch.Tensor:
        """A copy on the other device, unless it is there."""
        if target == on_device(x):
            return x
        result = Moved.apply(x, target, more)
        host = result if on_device(x) else x
        if on_device(x) and non_blocking:  # torch makes the memory that it copies into then pinned
            host.untyped_storage().pinned = True
        self.gpu.note_copy(waits=not (non_blocking and pinned(host)))
        return result

    def numpy(self, x: torch.Tensor, **more: Any) -> Any:
        if on_device(x):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to "
                            "host memory first.")  # fmt: skip
        return x.numpy(**more)

    def tolist(self, x: torch.Tensor) -> Any:
        if on_device(x):
            self.gpu.note_copy(waits=True)
        return x.tolist()

    def pin_memory(self, x: torch.Tensor, *device: Any) -> torch.Tensor:
        if on_device(x):
            raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
        if not pinned(x):
            x = x.clone()
            x.untyped_storage().pinned = True
        return x

    def from_host(self, function: Any, /, data: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Makes a tensor of numbers: on the CPU, from where it is sent."""
        device = kwargs.pop("device", None)
        if isinstance(data, torch.Tensor):
            there = on_device(data)
            data = self.call(function, (data, *args), kwargs)
            assert on_device(data) == there
        else:
            data = function(data, *args, **kwargs)
        target = None if device is None else to_cuda(device)
        if target is None:
            return data if device is None else data.to(device)
        needs_gradient = data.requires_grad
        return self.moved(data.detach(), target).requires_grad_(needs_gradient)

    def new_tensor(self, x: torch.Tensor, data: Any, **kwargs: Any) -> torch.Tensor:
        kwargs.setdefault("device", CUDA if on_device(x) else CPU)
        return self.from_host(torch.tensor, data, **({"dtype": x.dtype} | kwargs))

    def at(self, function: Any, x: torch.Tensor, index: Any, *value: Any) -> Any:
        """Reads or writes places; torch sends lists of numbers among them to the tensor's device."""
        if on_device(x):
            parts = [self.from_host(torch.tensor, part, device=CUDA) if isinstance(part, (list, np.ndarray)) else part
                     for part in (index if isinstance(index, tuple) else (index,))]  # fmt: skip
            index = tuple(parts) if isinstance(index, tuple) else parts[0]
        return self.call(function, (x, index, *value), {})

    def one_hot(self, x: torch.Tensor, num_classes: int = -1) -> torch.Tensor:
        """Leaves out what only a CPU checks; without `num_classes` CUDA looks for the largest number, too."""
        before, LOCAL.quiet = LOCAL.quiet, num_classes >= 0
        try:
            return self.call(torch._C._nn.one_hot, (x, num_classes), {})
        finally:
            LOCAL.quiet = before

    def cast(self, function: Any, dtype: torch.dtype | None, /, *args: Any, **kwargs: Any) -> Any:
        """Calls the function as CUDA's autocast does."""
        if not TRUE["is_autocast_enabled"]("cpu") or (dtype is torch.float32 and kwargs.get("dtype") is not None):
            return self.call(function, args, kwargs)
        wanted = dtype or TRUE["get_autocast_dtype"]("cpu")

        def one(x: torch.Tensor) -> torch.Tensor:
            return x.to(wanted) if x.dtype in CASTABLE and on_device(x) else x

        TRUE["set_autocast_enabled"]("cpu", False)  # a CPU's has other ideas of what is inside
        try:
            return self.call(function, *tree_map_only(torch.Tensor, one, (args, kwargs)))
        finally:
            TRUE["set_autocast_enabled"]("cpu", True)

    def binary_cross_entropy(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if TRUE["is_autocast_enabled"]("cpu") and on_device(args[0]):
            raise RuntimeError("torch.nn.functional.binary_cross_entropy and torch.nn.BCELoss are unsafe to autocast.")
        return self.call(torch._C._nn.binary_cross_entropy, args, kwargs)

    def roi_align(self, features: torch.Tensor, *args: Any) -> torch.Tensor:
        """Pools in float32 under autocast, as torchvision does on CUDA."""
        if not TRUE["is_autocast_enabled"]("cpu"):
            return self.call(torch.ops.torchvision.roi_align, (features, *args), {})
        wide: torch.Tensor = self.cast(torch.ops.torchvision.roi_align, torch.float32, features, *args)
        return wide.to(features.dtype)


class Moved(torch.autograd.Function):
    """A copy on the other device, whose gradient comes back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, target: bool, more: dict[str, Any]) -> torch.Tensor:
        ctx.target, ctx.dtype = target, x.dtype
        before, LOCAL.target = LOCAL.target, target
        try:
            return aten._to_copy.default(x, device=CPU, **more)
        finally:
            LOCAL.target = before

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return gradients[0].to(CPU if ctx.target else CUDA, ctx.dtype), None, None


@contextmanager
def pretended_gpu(bf16: bool = True) -> Iterator[Gpu]:
    """Lets torch have one GPU until the block ends; `bf16` says whether that computes in it (an H100 does, a T4 does not).

    Only for a process in which no Accelerator was made before: it keeps the device that it found.
    """
    gpu = Gpu()
    kernels = Kernels(gpu)
    face = Face(gpu, kernels)
    with pytest.MonkeyPatch.context() as patch:
        patch_devices(patch, gpu, bf16)
        patch_autocast(patch)
        patch_python(patch, kernels)
        run = threading.Thread.run

        def run_under_modes(self: threading.Thread) -> None:  # a thread has no modes of its own
            with face, kernels:
                run(self)

        patch.setattr(threading.Thread, "run", run_under_modes)
        with face, kernels:
            yield gpu
