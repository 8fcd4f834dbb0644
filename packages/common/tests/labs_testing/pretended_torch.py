"""What `pretended` puts in the place of torch's functions that speak of devices, autocast and files, until a block ends."""

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo  # which optimizers import, and which looks through torch.cuda: before that is patched
import torch.utils.checkpoint

from labs_testing.pretended_device import CPU, CUDA, Allocation, Gpu, Kernels, on_device, to_cuda

MEMORY = 80 * 2**30  # bytes
TRUE = {name: getattr(torch, name) for name in ("is_autocast_enabled", "get_autocast_dtype", "set_autocast_enabled")}


class Generator(torch.Generator):
    """A random generator that may be of the device."""

    def __new__(cls, device: Any = CPU) -> "Generator":
        return super().__new__(cls, CPU)

    def __init__(self, device: Any = CPU) -> None:
        self._there = to_cuda(device)

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CUDA if self._there else CPU


class Stream:
    """The one stream of the device."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def is_capturing(self) -> bool:
        return False

    def wait_stream(self, other: Any) -> None:
        pass

    wait_event = record_event = wait_stream


def patch_devices(patch: pytest.MonkeyPatch, gpu: Gpu, bf16: bool) -> None:
    """torch.cuda and torch.accelerator speak of one device; its random numbers are the CPU's."""
    name, capability = ("Pretended H100", (9, 0)) if bf16 else ("Pretended T4", (7, 5))
    properties = SimpleNamespace(name=name, major=capability[0], minor=capability[1], total_memory=MEMORY,
                                 multi_processor_count=132)  # fmt: skip

    def synchronize(*device: Any) -> None:
        gpu.note(gpu.syncs)

    def reset(*device: Any) -> None:
        gpu.peak = gpu.allocated

    class Event(Stream):
        """An event that has come as soon as it is recorded."""

        record = Stream.wait_stream

        def query(self) -> bool:
            return True

        def elapsed_time(self, other: Any) -> float:
            return 0.0

        def synchronize(self) -> None:
            synchronize()

    Stream.synchronize = Event.synchronize  # type: ignore[attr-defined]
    nothing = lambda *args, **kwargs: None  # noqa: E731
    memory: dict[str, Any] = {
        "memory_allocated": lambda *device: gpu.allocated, "max_memory_allocated": lambda *device: gpu.peak,
        "memory_reserved": lambda *device: gpu.allocated, "max_memory_reserved": lambda *device: gpu.peak,
        "reset_peak_memory_stats": reset, "empty_cache": nothing, "synchronize": synchronize,
        "is_available": lambda: True, "device_count": lambda: 1, "current_stream": lambda *device: Stream(),
    }  # fmt: skip
    cuda: dict[str, Any] = {
        **memory, "is_initialized": lambda: True, "_lazy_init": nothing, "init": nothing, "ipc_collect": nothing,
        "is_bf16_supported": lambda including_emulation=True: bf16 or including_emulation,
        "current_device": lambda: 0, "set_device": nothing, "default_stream": lambda *device: Stream(),
        "is_current_stream_capturing": lambda: False, "Stream": Stream, "Event": Event,
        "get_device_name": lambda *device: name, "get_device_capability": lambda *device: capability,
        "get_device_properties": lambda *device: properties,
        "mem_get_info": lambda *device: (MEMORY - gpu.allocated, MEMORY),
        "get_rng_state": lambda *device: torch.get_rng_state(), "get_rng_state_all": lambda: [torch.get_rng_state()],
        "set_rng_state": lambda state, *device: torch.set_rng_state(state),
        "manual_seed": nothing, "manual_seed_all": nothing,
    }  # fmt: skip
    for name_, value in cuda.items():
        patch.setattr(torch.cuda, name_, value)
    accelerator = {
        **memory,
        "current_device_index": lambda: 0,
        "current_accelerator": lambda check_available=False: CUDA,
    }
    for name_, value in accelerator.items():
        if hasattr(torch.accelerator, name_):
            patch.setattr(torch.accelerator, name_, value)
    for name_ in ("_exchange_device", "_maybe_exchange_device"):
        patch.setattr(torch.cuda, name_, lambda device: 0)
    patch.setattr(torch.nn.RNNBase, "flatten_parameters", nothing)  # cuDNN's own layout of the same weights
    patch.setattr(torch, "Generator", Generator)
    fork_rng = torch.random.fork_rng
    patch.setattr(torch.random, "fork_rng", lambda devices=None, *more, **named: fork_rng([], *more, **named))


def patch_autocast(patch: pytest.MonkeyPatch) -> None:
    """Autocast of "cuda" is the CPU's, with CUDA's tables in `Face`; autocast of "cpu" does nothing to the device."""
    init = torch.autocast.__init__

    def of_device(self: Any, device_type: str, dtype: Any = None, enabled: bool = True, **more: Any) -> None:
        if device_type == "cpu":
            enabled, dtype = TRUE["is_autocast_enabled"]("cpu"), TRUE["get_autocast_dtype"]("cpu")
        # The default of CUDA is float16, that of a CPU bfloat16.
        dtype = dtype or (torch.float16 if device_type == "cuda" else None)
        init(self, "cpu" if device_type == "cuda" else device_type, dtype=dtype, enabled=enabled, **more)

    patch.setattr(torch.autocast, "__init__", of_device)
    for name in ("is_autocast_enabled", "get_autocast_dtype"):

        def asked(device: str = "cuda", true: Any = TRUE[name]) -> Any:
            return true("cpu" if device == "cuda" else device)

        patch.setattr(torch, name, asked)


def overrides(value: Any) -> bool:
    """Whether torch's functions are to ask the value itself, as those that are traced want it."""
    if type(value) is torch.Tensor or type(value) is torch.nn.Parameter:  # nearly always
        return False
    return getattr(type(value), "__torch_function__", None) is not None


def patch_python(patch: pytest.MonkeyPatch, kernels: Kernels) -> None:
    """Functions of torch that are written in Python are looked into, and files of tensors name the device."""
    # They would be called with the modes off, and find tensors on the CPU in their own code.
    overridden = {
        "has_torch_function": lambda tensors: any(map(overrides, tensors)),
        "has_torch_function_unary": overrides,
        "has_torch_function_variadic": lambda *tensors: any(map(overrides, tensors)),
    }
    for module in ("_tensor", "functional", "autograd", "nn.functional", "nn.init", "overrides"):
        found = importlib.import_module(f"torch.{module}")
        for name, function in overridden.items():
            if hasattr(found, name):
                patch.setattr(found, name, function)
    copied = torch.Tensor.__deepcopy__

    def deepcopy(self: torch.Tensor, memo: Any) -> torch.Tensor:
        result = copied(self, memo)  # copies the storage without an operator
        with torch._C.DisableTorchFunction():
            if on_device(self):
                kernels.mark(result)
        return result

    patch.setattr(torch.Tensor, "__deepcopy__", deepcopy)

    def metadata(x: torch.Tensor) -> dict[str, Any]:
        """What a checkpoint of activations compares; it asks once while `Face` is off, and once while it is on."""
        with torch._C.DisableTorchFunction():
            return {"shape": x.shape, "dtype": x.dtype, "device": CUDA if on_device(x) else x.device}

    grouped = torch._C._group_tensors_by_device_and_dtype

    def grouped_there(lists: Any, *more: Any) -> Any:
        """The groups of optimizers and of clipping, by the device that they would be on."""
        groups = {}
        with torch._C.DisableTorchFunction():
            for (device, dtype), group in grouped(lists, *more).items():
                groups[CUDA if on_device(group[0][0][0]) else device, dtype] = group
        return groups

    patch.setattr(torch._C, "_group_tensors_by_device_and_dtype", grouped_there)
    patch.setitem(torch.utils.checkpoint._allowed_determinism_checks_to_fns, "default", metadata)

    def restored(storage: Any, location: str) -> Any:
        if location.startswith("cuda"):
            storage.allocation = Allocation(kernels.gpu, storage.nbytes())
            return storage
        return None

    patch.setattr(torch.serialization, "_package_registry", list(torch.serialization._package_registry))
    # Before torch's own, which come from 10 on.
    torch.serialization.register_package(
        0, lambda storage: "cuda:0" if hasattr(storage, "allocation") else None, restored
    )
