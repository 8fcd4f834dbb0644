"""Profiler traces of the training commands, and the share of their steps in which the device has nothing to do."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks.gpu.commands import COMMON, TRAININGS, after_each_step
from benchmarks.gpu.measuring import Setting, clock, command, separate
from benchmarks.gpu.rows import Row
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from labs_common.training import Loop

WARM = 3  # steps before those that are traced: kernels are chosen, the allocator has its memory


def traced(setting: Setting, folder: Path, module: str) -> Iterator[Row]:
    """Traces some steps of a command, keeps the trace for Perfetto, and measures its gaps."""
    steps = 1 if setting.tiny else 10
    warm = 1 if setting.tiny else WARM
    last = warm + steps + 1
    options = (*separate(TRAININGS[module].make, folder, setting.tiny), *COMMON, "--max-steps", last, "--epochs", last,
               "--evaluate-every", last, "--output", folder / "run")  # fmt: skip
    trace = setting.work.parent / "traces" / f"{module}.json.gz"
    trace.parent.mkdir(exist_ok=True)
    found = separate(profiled, module, options, warm, steps, trace)
    where = "the GPU" if found["gpu"] else "torch, on a CPU,"
    note = f"{steps} steps; {trace.parent.name}/{trace.name}"
    yield Row(f"{module}: share of a step in which {where} is idle", "", found["idle"], note=note)
    what = "kernels and copies" if found["gpu"] else "operators"
    yield Row(f"{module}: {what} in a step", "", found["operations"] / steps)
    yield Row(f"{module}: a step, being traced", "s", found["seconds"] / steps)


def profiled(module: str, arguments: Sequence[object], warm: int, steps: int, trace: Path) -> dict[str, Any]:
    """Runs a command and traces `steps` of its steps after the first `warm`; returns their time and what was idle."""
    gpu = torch.cuda.is_available()
    profiler = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])])
    found: dict[str, Any] = {"gpu": gpu}

    def switch(loop: Loop) -> None:
        if loop.step_number == warm:
            profiler.start()
            found["seconds"] = -clock()
        elif loop.step_number == warm + steps:
            found["seconds"] += clock()
            profiler.stop()

    after_each_step(switch)
    command(module, *arguments)
    kind = DeviceType.CUDA if gpu else DeviceType.CPU
    spans = [(event.time_range.start, event.time_range.end) for event in profiler.events() or () if
             event.device_type == kind and not getattr(event, "is_user_annotation", False)]  # fmt: skip
    found |= {"operations": len(spans), "idle": max(0.0, 1 - busy(spans) * 1e-6 / found["seconds"])}
    profiler.export_chrome_trace(str(trace))
    return found


def busy(spans: Sequence[tuple[float, float]]) -> float:
    """Adds up the time in which at least one of the spans (start, end) goes on."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total
