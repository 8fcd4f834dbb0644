"""Tokens per second and peak memory by fine-tuning method: ours against the loop of PEFT's method comparison.

    uv run python benchmarks/llm_methods.py                       # LoRA, DoRA, prefix and prompt tuning, layers
    uv run python benchmarks/llm_methods.py --methods all --shape gemma2-small

The peer pads batches of 4 that are bucketed by length and computes the loss over the whole vocabulary, as PEFT's
method_comparison does. Both train the same batches of the same 64 sequences with the same base, method, and learning
rate, each in a process of its own. The first pass warms up, the others are timed; non-padding tokens are counted, and
the losses are compared step by step. Two further rows: the peer with batches of 4 as they come, not bucketed, and
`layers` with its frozen front recorded for the backward pass.
"""

import json
import multiprocessing
import random
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import tyro
from accelerate import Accelerator
from llm_training import SHAPES, in_order, now, random_base, result, sequences
from rich.console import Console
from rich.table import Table

from labs_common.options import RunOptions, TrainingOptions
from labs_common.run import Run, write_atomically
from labs_common.training import Loop
from llm_peft_fa.attention import NAME
from llm_peft_fa.config import MethodOptions
from llm_peft_fa.methods import Setting, apply_method, resolved
from llm_peft_fa.model import Adapted, PackedCausalLM, virtual_tokens
from llm_peft_fa.templates import Encoded

BATCH = 4
RATE = 1e-3
ATTENTION = ("q_proj", "v_proj")
# The settings of PEFT's comparison where it has the method; prompts of 50 tokens, rank 32 on q and v.
OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 32, "target_modules": ATTENTION},
    "dora": {"rank": 32, "target_modules": ATTENTION},
    "prefix_tuning": {"virtual_tokens": 50, "prompt_init": "random"},
    "prompt_tuning": {"virtual_tokens": 50, "prompt_init": "vocabulary"},
    "layers": {"layers": 2, "which": "last"},
    "rslora": {"rank": 64, "target_modules": ATTENTION},
    "p_tuning": {"virtual_tokens": 20},
    "pissa": {"rank": 32, "target_modules": ATTENTION},
    "olora": {"rank": 32, "target_modules": ATTENTION},
    "adalora": {"rank": 32, "target_modules": ATTENTION},
    "vera": {"target_modules": ATTENTION},
    "loha": {"rank": 32, "target_modules": ATTENTION},
    "lokr": {"rank": 32, "target_modules": ATTENTION},
    "oft": {"target_modules": ATTENTION},
    "ia3": {},
    "full": {},
}
DEFAULT = ("lora", "dora", "prefix_tuning", "prompt_tuning", "layers")


@dataclass
class Options:
    """Compares two loops method by method and prints ratios."""

    methods: tuple[str, ...] = DEFAULT
    """Which methods; all is every one."""
    shape: str = ""
    """Which shape of llm_training.py; by default llama-small on a CPU and llama-3.2-3b on a GPU."""
    passes: int = 1
    """Timed passes over the 64 sequences."""
    output: Path = Path("benchmarks/results/llm_methods.json")
    """Where the figures go."""


def main() -> None:
    """Runs both loops for every method in processes of their own, prints the table and writes the figures."""
    options = tyro.cli(Options)
    shape = options.shape or ("llama-3.2-3b" if torch.cuda.is_available() else "llama-small")
    methods = tuple(OPTIONS) if options.methods == ("all",) else options.methods
    figures: dict[str, dict[str, Any]] = {}
    for method in methods:
        figures[method] = {}
        for loop in LOOPS:
            if loop == "front recorded" and method != "layers":
                continue
            figures[method][loop] = in_own_process(loop, method, shape, options.passes)
            print(f"{method}, {loop}: {figures[method][loop]['tokens_per_second']:.0f} tokens/s", file=sys.stderr)
    show(shape, figures)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(options.output, json.dumps({shape: figures}, indent=1) + "\n")


def in_own_process(loop: str, method: str, shape: str, passes: int) -> dict[str, Any]:
    """One loop in a process forked from a server that has imported the libraries and done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["llm_methods", "peft", "transformers"])
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_send_result, args=(send, loop, method, shape, passes))
    process.start()
    send.close()
    try:
        found: dict[str, Any] = receive.recv()
    except EOFError:
        raise SystemExit(f"{method}, {loop}: failed, see above") from None
    process.join()
    return found


def _send_result(send: Any, loop: str, method: str, shape: str, passes: int) -> None:
    send.send(LOOPS[loop](method, shape, passes))


def show(shape: str, figures: dict[str, dict[str, Any]]) -> None:
    """Prints the table: absolute figures, and ours as a ratio."""
    table = Table(
        "method", "loop", "tokens/s", "ours is", "peak MiB", "ours needs", "largest loss difference", title=shape
    )
    for method, loops in figures.items():
        ours = loops["ours"]
        for loop, row in loops.items():
            speed = ours["tokens_per_second"] / row["tokens_per_second"]
            memory = ours["peak_memory"] / row["peak_memory"]
            difference = max(abs(a - b) for a, b in zip(ours["losses"], row["losses"], strict=True))
            same = "" if loop in ("ours", "padded, not bucketed") else f"{difference:.1e}"
            table.add_row(
                method, loop, f"{row['tokens_per_second']:,.0f}", "" if loop == "ours" else f"{speed:.2f} x",
                f"{row['peak_memory'] / 2**20:,.0f}", "" if loop == "ours" else f"{memory:.2f} x",
                same,
            )  # fmt: skip
    Console(width=120).print(table)


def batches(shape: str, bucketed: bool = True) -> list[list[Encoded]]:
    """Batches of 4 sequences in a seeded order; bucketed: of like length."""
    data = sequences(SHAPES[shape]().vocab_size)
    if bucketed:
        data.sort(key=lambda item: len(item.ids))
    cut = [data[at : at + BATCH] for at in range(0, len(data), BATCH)]
    return random.Random(0).sample(cut, len(cut))


def model_of(method: str, shape: str, attention: str | None) -> Adapted:
    """The base with random weights, the same for both loops, under the method."""
    base = random_base(shape, attention)
    options = resolved(MethodOptions(method=method, **OPTIONS[method]))
    return apply_method(base, options, Setting(cast(Any, None), 64)).train()


def ours(method: str, shape: str, passes: int, recorded: bool = False) -> dict[str, Any]:
    """The lab's own loop."""
    adapted = model_of(method, shape, NAME)
    model = PackedCausalLM(adapted).train()
    if recorded:
        embeddings = cast(Any, adapted).get_input_embeddings()
        embeddings.register_forward_hook(lambda module, given, out: out.requires_grad_())
    data = [item for batch in batches(shape) for item in batch]
    options = TrainingOptions(epochs=passes + 1, learning_rate=RATE, schedule="constant", warmup=0, save_every=10**9)
    accelerator = Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")
    with tempfile.TemporaryDirectory() as folder:
        run = Run.start(options, RunOptions(output=Path(folder) / "run", track="none"), "benchmark", accelerator)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0)
        prepared, optimizer = accelerator.prepare(model, optimizer)
        source = in_order(data, BATCH, virtual_tokens(adapted))
        loop = Loop(run, accelerator, prepared, optimizer, source, options, unit="tokens")
        for row in loop.batches():
            loop.step(prepared(row.to(accelerator.device)) * row.weight, row.tokens)
        seconds = sum(line["seconds"] for line in run.lines("timing.jsonl") if line["step"] > len(source))
        losses = [line["loss"] for line in run.lines("metrics.jsonl")]
    return result(data, passes, seconds, losses)


def padded(method: str, shape: str, passes: int, bucketed: bool = True) -> dict[str, Any]:
    """PEFT's style: padded to the longest of the batch, the model's own loss over the whole vocabulary."""
    model = cast(Any, model_of(method, shape, None))
    cut = batches(shape, bucketed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0)
    losses, began = [], now()
    for epoch in range(passes + 1):
        if epoch == 1:
            began = now()
        for batch in cut:
            longest = max(len(item.ids) for item in batch)
            ids, mask = (torch.zeros(len(batch), longest, dtype=torch.long) for _ in range(2))
            labels = torch.full((len(batch), longest), -100)
            for place, item in enumerate(batch):
                length = len(item.ids)
                ids[place, :length], mask[place, :length] = torch.tensor(item.ids), 1
                labels[place, :length] = ids[place, :length].masked_fill(~torch.tensor(item.learnt), -100)
            named = {"input_ids": ids, "attention_mask": mask, "labels": labels}
            cache = {"use_cache": True} if method == "prefix_tuning" else {"use_cache": False}
            # PEFT's comparison computes under autocast too.
            with torch.autocast("cuda", torch.bfloat16, enabled=torch.cuda.is_available()):
                loss = model(**{name: tensor.to(model.device) for name, tensor in named.items()}, **cache).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return result([item for batch in cut for item in batch], passes, now() - began, losses)


LOOPS: dict[str, Any] = {
    "ours": ours,
    "padded, whole vocabulary": padded,
    "padded, not bucketed": partial(padded, bucketed=False),
    "front recorded": partial(ours, recorded=True),
}

if __name__ == "__main__":
    main()
