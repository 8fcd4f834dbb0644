"""The device that trains: its arithmetic, copies to and from it that nobody waits for, and its memory.

Everything here does nothing, or the plain thing, where there is no GPU.
"""

import contextlib
import functools
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env
from torch.distributed.tensor import DTensor

from labs_common.errors import LabError, reason_of
from labs_common.options import Precision

CPU = torch.device("cpu")


def mixed_precision(precision: Precision) -> str:
    """Returns Accelerate's name for `--precision`.

    auto is bf16 on a GPU that computes in it, fp16 on older ones, which only emulate bf16, and none elsewhere.
    """
    if precision == "auto":
        if not on_gpu():
            return "no"
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "no" if precision == "fp32" else precision


def inference_accelerator() -> Accelerator:
    """Makes an Accelerator for a command that only computes answers: in the precision that the device is fast in.

    Raises:
        LabError: the variables of a launch say something that Accelerate does not know.
    """
    try:
        accelerator = Accelerator(mixed_precision=mixed_precision("auto"))
    except (ValueError, RuntimeError) as error:
        raise LabError(f"the process cannot be set up ({reason_of(error)}); unset the variables ACCELERATE_* that say "
                       "so") from error  # fmt: skip
    begin_fast_arithmetic(accelerator.device)
    return accelerator


def on_gpu() -> bool:
    """Says whether this process trains on a GPU: there is one, and the launch does not ask for the CPU."""
    return torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")


def begin_fast_arithmetic(device: torch.device) -> None:
    """Lets a GPU multiply float32 matrices in TF32: ten bits of mantissa, several times as fast.

    That is what `--precision fp32` means on a GPU, for convolutions it is torch's default; losses over pairs stay exact
    (`exact_float32`).
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")


def expect_fixed_shapes(device: torch.device) -> None:
    """Lets cuDNN try its convolutions and keep the fastest for each shape: pays where all batches have one shape."""
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True


@contextlib.contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Makes what is inside compute in the precision of its tensors: no autocast, and no TF32 on a GPU.

    The logits of a contrastive loss are cosines times up to 100: in bf16 they would be off by a half, in TF32 by 0.05.
    """
    before = torch.get_float32_matmul_precision()
    with torch.autocast(device.type, enabled=False):
        if device.type == "cuda":
            torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            if device.type == "cuda":
                torch.set_float32_matmul_precision(before)


def widest_float(device: torch.device) -> torch.dtype:
    """Returns float64, which Apple's GPUs do not have: there it is float32."""
    return torch.float32 if device.type == "mps" else torch.float64


def pinned(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Returns a tensor on the CPU in memory that a GPU `device` can read by itself; other tensors as they are.

    The threads that read ahead call it, so that the copy costs the training nothing.
    """
    return tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Brings a tensor to the device that trains; no one waits for the copy to a GPU if the tensor is `pinned`.

    What is pinned must not be written again: the copy may still be under way.
    """
    return tensor.to(device, non_blocking=device.type == "cuda")


def each_tensor(change: Callable[..., torch.Tensor], batch: Any, device: torch.device) -> Any:
    """Does `pinned` or `to_device` to each tensor of a batch that is a named tuple; what else it has stays."""
    fields = batch._asdict().items()
    tensors = {name: change(value, device) for name, value in fields if isinstance(value, torch.Tensor)}
    return batch._replace(**tensors)


_SETTING = threading.Lock()


def one_torch_thread() -> None:
    """Lets torch compute with one thread in the thread that calls this, which works beside the computing one.

    Else an operator there starts threads of its own. OpenMP then has more than there are cores, so that all of them
    sleep after each operator where they would wait: packing rows made a step on a CPU take 1.4 times as long.
    """
    with _SETTING:
        threads = torch.get_num_threads()  # asking also gives this thread the number of all, which would be later
        torch.set_num_threads(1)
        with ThreadPoolExecutor(1) as other:  # it is also the number that coming threads begin with
            other.submit(torch.set_num_threads, threads).result()


@functools.cache
def constant(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Returns a float32 tensor (values,) that is copied to the device once and not in every step; only to be read."""
    with torch.inference_mode(False):  # else a first call from an evaluation would make one that cannot train
        return torch.tensor(values, dtype=torch.float32, device=device)


class Later:
    """A tensor on its way to the CPU: reading it waits for what a GPU had to do before, not for what came after."""

    def __init__(self, tensor: torch.Tensor) -> None:
        # Without waiting torch copies from a GPU to pinned memory. Elsewhere it would not be safe to read it.
        self._values = tensor.to("cpu", non_blocking=tensor.device.type == "cuda")
        self._there: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            self._there = torch.cuda.Event()
            self._there.record(torch.cuda.current_stream(tensor.device))

    def read(self) -> torch.Tensor:
        """Returns the tensor on the CPU."""
        if self._there is not None:
            self._there.synchronize()
            self._there = None
        return self._values


def free_bytes(device: torch.device) -> int:
    """Returns how many bytes of a GPU's memory nobody holds; 0 elsewhere."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def peak_memory() -> int:
    """Returns the most bytes that the GPU's allocator held since `reset_peak_memory`.

    On a CPU it is the largest resident set of this process since it began.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # getrusage there also counts what the program that started this one held
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_memory() -> None:
    """Lets the peak of a GPU's memory begin anew: a training's own is without its evaluations."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Counts the bytes that the optimizer keeps in this process (AdamW: two moments for each trained value)."""
    kept = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    own = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in kept]
    return sum(tensor.numel() * tensor.element_size() for tensor in own)
