"""The launch configurations that shard weights, with one process: what they cost, and that they compute the same."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from benchmarks.gpu.commands import COMMON, TRAININGS
from benchmarks.gpu.measuring import Setting, Skipped, command, separate
from benchmarks.gpu.rows import ROOT, Row

STEPS = 6


def launched(setting: Setting, folder: Path, module: str, kind: str) -> Iterator[Row]:
    """Runs a command by `accelerate launch` with one process, and plainly, on the same data."""
    gpu = torch.cuda.is_available()
    if kind == "fsdp" and not gpu:
        raise Skipped("needs CUDA: Accelerate shards by FSDP on GPUs only")
    if kind != "fsdp" and importlib.util.find_spec("deepspeed") is None:
        raise Skipped("needs deepspeed, which is not installed")
    precision = "bf16" if gpu else "fp32"
    made = separate(TRAININGS[module].make, folder, setting.tiny)
    options = (*made, *COMMON, "--precision", precision, "--max-steps", STEPS, "--epochs", STEPS, "--evaluate-every",
               STEPS)  # fmt: skip
    separate(command, module, *options, "--output", folder / "plain")
    launch(one_process(ROOT / "packages" / module.partition(".")[0] / "launch" / f"{kind}.yaml", folder, gpu),
           module, (*options, "--output", folder / kind))  # fmt: skip
    if kind != "fsdp" and not list((folder / kind).glob("checkpoints/*/sharded")):
        raise RuntimeError("DeepSpeed took no part: the run has no checkpoint of it")
    its, plain = (figures(folder / run) for run in (kind, "plain"))
    what = f"{module}, {kind}, one process"
    yield Row(f"{what}: a step", "s", its["seconds"], "without it", plain["seconds"])
    if gpu:
        yield Row(f"{what}: peak memory", "GiB", its["memory"], "without it", plain["memory"])
    apart = max(abs(one - two) for one, two in zip(its["losses"], plain["losses"], strict=True))
    yield Row(f"{what}: losses apart from those without it", "", apart, note=f"{STEPS} steps, {precision}")


def one_process(file: Path, folder: Path, gpu: bool) -> Path:
    """Writes the configuration for one process."""
    values = yaml.safe_load(file.read_text(encoding="utf-8")) | {"num_processes": 1}
    values |= {} if gpu else {"use_cpu": True, "mixed_precision": "no"}
    local = folder / file.name
    local.write_text(yaml.safe_dump(values), encoding="utf-8")
    return local


def launch(file: Path, module: str, arguments: Sequence[object]) -> None:
    """Starts a command as a user does.

    Raises:
        RuntimeError: it did not end well; what it said is in the log.
    """
    start = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file), "-m", module]
    more = {} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run([*start, *map(str, arguments)], env=os.environ | more, check=False)
    if done.returncode:
        raise RuntimeError(f"accelerate launch with {file.name} ended with code {done.returncode}; see the log")


def figures(run: Path) -> dict[str, Any]:
    """Reads a run's losses, the median time of a step, and its peak of memory in GiB."""
    timing = [json.loads(line) for line in (run / "timing.jsonl").read_text().splitlines()]
    seconds = sorted(line["seconds"] for line in timing[1:])
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "losses": [line["loss"] for line in metrics if "loss" in line],
        "seconds": seconds[len(seconds) // 2],
        "memory": max(line["peak_memory"] for line in timing) / 2**30,
    }
