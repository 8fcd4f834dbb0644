"""Runs every benchmark several times and writes the table of ratios: `uv run python -m benchmarks`.

Each is the script beside this file with small sizes, so that all of them take a quarter of an hour on two cores; a
script alone, with its own defaults, measures more. A round runs them all, so that a slow hour of the machine falls on
each. The table stands in docs/performance.md between two marks.
"""

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from labs_common.run import write_atomically

HERE = Path(__file__).parent
BEGIN, END = "<!-- python -m benchmarks -->", "<!-- end -->"
COLUMNS = ("ours against", "ratio", "least to most", "runs", "asked for", "reached")
VERSIONS = ("torch", "transformers", "peft", "trl", "timm", "open_clip_torch", "lightly", "torchvision", "pycocotools")


@dataclass
class Ratio:
    """What one run of a script says: how much ours is of the other, or how many times as fast."""

    what: str
    value: Callable[[Any], float]
    aim: float
    """What was asked for; at least, or at most where less is better."""
    at_most: bool = False


@dataclass
class Benchmark:
    """A script, the sizes that it runs with here, and what is read from its figures."""

    script: str
    arguments: str
    ratios: list[Ratio]


def _speed(rows: Any, other: str) -> float:
    return float(rows["ours"]["tokens_per_second"] / rows[other]["tokens_per_second"])


def _epoch(rows: Any, other: str, mine: str = "ours") -> float:
    return statistics.median(rows[other]["epochs"][1:]) / statistics.median(rows[mine]["epochs"][1:])


def _row(rows: Any, what: str) -> Any:
    return next(row for row in rows if row["what"] == what)


BENCHMARKS = [
    Benchmark("llm_training.py", "--shapes llama-small --passes 1 --trainers ours 'padded loop' "
              "'TRL, packing, set up for the machine'", [
        Ratio("fine-tuning, tokens/s: a padded loop", lambda it: _speed(it["llama-small"], "padded loop"), 1.0),
        Ratio("fine-tuning, tokens/s: TRL, packing, set up for the machine",
              lambda it: _speed(it["llama-small"], "TRL, packing, set up for the machine"), 1.0),
    ]),
    Benchmark("llm_data.py", "--rows 5000", [
        Ratio("preparing conversations, rows/s: TRL, dataset_num_proc=2",
              lambda it: it["TRL"]["seconds"] / it["ours, first"]["seconds"], 2.0),
        Ratio("memory of it beyond the libraries: TRL, dataset_num_proc=2",
              lambda it: it["ours, first"]["beyond"] / it["TRL"]["beyond"], 0.5, True),
    ]),
    Benchmark("llm_methods.py", "--methods lora dora", [
        Ratio("LoRA, tokens/s: a loop that buckets and pads",
              lambda it: _speed(it["llama-small"]["lora"], "padded, whole vocabulary"), 3.5),
        Ratio("DoRA, tokens/s: a loop that buckets and pads",
              lambda it: _speed(it["llama-small"]["dora"], "padded, whole vocabulary"), 3.5),
    ]),
    Benchmark("vit_transfer.py", "--models vit_small_patch16_224 --pictures 64 --epochs 3", [
        Ratio("one block of a ViT-S/16, epochs from the second: a plain loop",
              lambda it: _epoch(it["vit_small_patch16_224"], "plain loop"), 5.0),
        Ratio("one block of a ViT-S/16, epochs from the second: Hugging Face Trainer",
              lambda it: _epoch(it["vit_small_patch16_224"], "Hugging Face Trainer"), 5.0),
    ]),
    Benchmark("captioning.py", "--models show_tell:resnet50 --pictures 32 --epochs 2 --described 32", [
        Ratio("captioning with ResNet-50, epochs from the second: by caption",
              lambda it: _epoch(it["show_tell:resnet50"], "by caption"), 8.0),
        Ratio("beam search of 5, captions/s: one at a time",
              lambda it: it["show_tell:resnet50"]["beam"]["ours"] / it["show_tell:resnet50"]["beam"]["usual"], 3.0),
    ]),
    Benchmark("clip.py", "--parts step loss probe --steps 3 --rows 8192 --features 20000", [
        Ratio("a step of CLIP: open_clip", lambda it: it["step"]["theirs"] / it["step"]["ours"], 1.0),
        Ratio("memory of the loss: open_clip",
              lambda it: it["loss ours"]["bytes"] / it["loss naive"]["bytes"], 1.0, True),
        Ratio("linear probe: scikit-learn", lambda it: it["probe"]["scikit"] / it["probe"]["ours"], 1.0),
    ]),
    Benchmark("pretraining.py", "--parts rate --rounds 1 --steps 4", [
        Ratio("SimCLR, pictures/s: a loop of lightly's parts", lambda it: it["ratio"], 1.0),
    ]),
    Benchmark("zsi.py", "--parts step scoring --steps 3 --pictures 2000", [
        Ratio("time of a detector's step: torchvision's Mask R-CNN",
              lambda it: _row(it, "training step, all parts")["ratio"], 1.1, True),
        Ratio("AP of many detections: pycocotools", lambda it: _row(it, "scoring")["ratio"], 5.0),
    ]),
]  # fmt: skip


@dataclass
class Options:
    """Runs every benchmark several times and writes the table of ratios into docs/performance.md."""

    runs: int = 3
    """How often each is run; the table has median, least and most."""
    only: tuple[str, ...] = ()
    """Scripts to run, such as zsi.py; by default all. What others gave before stays in the table."""
    output: Path = Path("benchmarks/results/all.json")
    """Where the ratios go, and where those of other scripts are."""


def main() -> None:
    """Runs the rounds, prints the table and writes it."""
    options = tyro.cli(Options)
    wanted = [benchmark for benchmark in BENCHMARKS if not options.only or benchmark.script in options.only]
    there = json.loads(options.output.read_text(encoding="utf-8")) if options.output.exists() else {}
    before = there.get("ratios", {}) if there.get("machine") == machine() else {}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[float]] = {}
    for round_number in range(1, options.runs + 1):
        for benchmark in wanted:
            print(f"round {round_number} of {options.runs}: {benchmark.script}", file=sys.stderr, flush=True)
            figures = figures_of(benchmark)
            for ratio in benchmark.ratios:
                found.setdefault(ratio.what, []).append(ratio.value(figures))
        # After each round: what is stopped keeps the rounds that are done.
        write_atomically(options.output, json.dumps({"machine": machine(), "ratios": before | found}, indent=1))
        write_table(rows_of(before | found))
    table = Table(*COLUMNS)
    for row in rows_of(before | found):
        table.add_row(*row)
    Console(width=140).print(table)


def figures_of(benchmark: Benchmark) -> Any:
    """What the script wrote."""
    output = HERE / "results" / f"small-{Path(benchmark.script).stem}.json"
    command = [sys.executable, str(HERE / benchmark.script), *shlex.split(benchmark.arguments), "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{benchmark.script}: failed\n{done.stderr[-2000:]}")
    return json.loads(output.read_text(encoding="utf-8"))


def rows_of(found: dict[str, list[float]]) -> list[tuple[str, ...]]:
    """A row for each ratio: what, median, spread, runs, aim, whether it was reached."""
    rows: list[tuple[str, ...]] = []
    for ratio in (ratio for benchmark in BENCHMARKS for ratio in benchmark.ratios):
        if not (values := found.get(ratio.what, [])):
            rows.append((ratio.what, "not measured", "", "0", "", ""))
            continue
        middle = statistics.median(values)
        reached = middle <= ratio.aim if ratio.at_most else middle >= ratio.aim
        bound = "at most" if ratio.at_most else "at least"
        spread = f"{min(values):.2f} to {max(values):.2f}"
        rows.append((ratio.what, f"{middle:.2f}", spread, str(len(values)), f"{bound} {ratio.aim:g}",
                     "yes" if reached else "**no**"))  # fmt: skip
    return rows


def machine() -> dict[str, str]:
    """What was measured on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
    return {"device": device, "python": platform.python_version(), **{name: version(name) for name in VERSIONS}}


def write_table(rows: list[tuple[str, ...]]) -> None:
    """Puts the table between its marks in docs/performance.md."""
    file = HERE.parent / "docs" / "performance.md"
    text = file.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    said = ", ".join(f"{name} {value}" for name, value in machine().items())
    lines = [
        f"{said}. The ratio is the median of the runs.", "",
        f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]  # fmt: skip
    write_atomically(file, before + BEGIN + "\n" + "\n".join(lines) + "\n" + END + after)


if __name__ == "__main__":
    main()
