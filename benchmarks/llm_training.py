"""Tokens per second and peak memory of LoRA fine-tuning: ours against a padded loop and TRL.

    uv run python benchmarks/llm_training.py                    # the small shapes on a CPU, the real ones on a GPU
    uv run python benchmarks/llm_training.py --shapes llama-small --passes 3

Each trainer runs in a process of its own on the same data (64 sequences, lognormal lengths, the last 30 % of each
learnt), base (random weights), adapter (LoRA r 16 on q and v) and machine. The first pass over the data warms up; the
others are timed. Non-padding tokens are counted. The losses of ours and of the padded loop are compared step by step.
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import tyro
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, PretrainedConfig, PreTrainedModel

from labs_common.device import peak_memory
from labs_common.options import RunOptions, TrainingOptions
from labs_common.run import Run, write_atomically
from labs_common.saved import load_auto
from labs_common.steps import ShuffledSteps
from labs_common.training import Loop
from llm_peft_fa.attention import NAME
from llm_peft_fa.model import PackedCausalLM
from llm_peft_fa.packing import Packing
from llm_peft_fa.templates import Encoded

BATCH, SEQUENCES = 8, 64
SMALL: dict[str, Any] = {
    "vocab_size": 32_000, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 2048,
}  # fmt: skip
TINY: dict[str, Any] = SMALL | {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                                "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}  # fmt: skip
SHAPES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama-small": lambda: LlamaConfig(**SMALL),
    "gemma2-small": lambda: Gemma2Config(**SMALL, query_pre_attn_scalar=64, sliding_window=256),
    # For a look at whether everything works.
    "llama-tiny": lambda: LlamaConfig(**TINY),
    "gemma2-tiny": lambda: Gemma2Config(**TINY, query_pre_attn_scalar=16, sliding_window=64),
    # The published shapes of Llama 3.2 3B and Gemma 2 2B.
    "llama-3.2-3b": lambda: LlamaConfig(
        vocab_size=128_256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=131_072, tie_word_embeddings=True,
    ),
    "gemma-2-2b": lambda: Gemma2Config(
        vocab_size=256_000, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8,
        num_key_value_heads=4, head_dim=256, query_pre_attn_scalar=256, sliding_window=4096,
    ),
}  # fmt: skip


@dataclass
class Options:
    """Compares trainers side by side and prints ratios."""

    shapes: tuple[str, ...] = ()
    """Which shapes; by default the small ones on a CPU and the real ones on a GPU."""
    trainers: tuple[str, ...] = ()
    """Which trainers; by default all."""
    passes: int = 2
    """Timed passes over the 64 sequences."""
    output: Path = Path("benchmarks/results/llm_training.json")
    """Where the figures go."""
    worker: str | None = None
    """Used by the benchmark itself: run one trainer in this process."""


def main() -> None:
    """Runs every trainer in a process of its own, prints the table and writes the figures."""
    options = tyro.cli(Options)
    shapes = options.shapes or (
        ("llama-3.2-3b", "gemma-2-2b") if torch.cuda.is_available() else ("llama-small", "gemma2-small")
    )
    if options.worker is not None:
        print(json.dumps(TRAINERS[options.worker](shapes[0], options.passes)))
        return
    figures: dict[str, dict[str, Any]] = {}
    for shape in shapes:
        figures[shape] = {}
        for name in options.trainers or TRAINERS:
            command = [sys.executable, __file__, "--worker", name, "--shapes", shape, "--passes", str(options.passes)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                figures[shape][name] = {"failed": done.stderr.strip().splitlines()[-1]}
                print(f"{shape}, {name}: failed ({figures[shape][name]['failed']})", file=sys.stderr)
            else:
                figures[shape][name] = json.loads(done.stdout.splitlines()[-1])
                print(f"{shape}, {name}: {figures[shape][name]['tokens_per_second']:.0f} tokens/s", file=sys.stderr)
        show(shape, figures[shape])
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(options.output, json.dumps(figures, indent=1) + "\n")


def show(shape: str, figures: dict[str, Any]) -> None:
    """Prints one shape's table: absolute figures, and ours as a ratio to each."""
    table = Table("trainer", "tokens/s", "ours is", "peak MiB", "ours needs", title=shape)
    ours = figures["ours"]
    for name, row in figures.items():
        if "failed" in row:
            table.add_row(name, "failed", "", "", "")
            continue
        speed = ours["tokens_per_second"] / row["tokens_per_second"]
        memory = ours["peak_memory"] / row["peak_memory"]
        peak = f"{row['peak_memory'] / 2**20:,.0f}"
        table.add_row(name, f"{row['tokens_per_second']:,.0f}", f"{speed:.2f} x", peak, f"{memory:.2f} x")
    Console().print(table)
    if "losses" in figures.get("padded loop", {}):
        difference = max(abs(a - b) for a, b in zip(ours["losses"], figures["padded loop"]["losses"], strict=True))
        print(f"largest difference of the loss curves, ours to padded loop: {difference:.1e}")


def sequences(vocabulary: int, count: int = SEQUENCES) -> list[Encoded]:
    """Random sequences: median length 100, 24 to 512 tokens."""
    draw = random.Random(0)
    made = []
    for number in range(count):
        length = min(512, max(24, int(draw.lognormvariate(4.605, 0.6))))
        ids = [draw.randrange(10, vocabulary) for _ in range(length)]
        made.append(Encoded(ids, [place >= 0.7 * length for place in range(length)], str(number)))
    return made


def random_base(shape: str, attention: str | None) -> PreTrainedModel:
    """The base with random weights, the same for every trainer; what is random next is the same too."""
    torch.manual_seed(0)
    gpu = torch.cuda.is_available()
    more = {} if attention is None else {"attn_implementation": attention}
    with torch.device("cuda" if gpu else "cpu"):
        base = load_auto(AutoModelForCausalLM.from_config, SHAPES[shape](), said=shape, remedy="take another",
                         dtype=torch.bfloat16 if gpu else torch.float32, **more)  # fmt: skip
    torch.manual_seed(1)
    return cast(PreTrainedModel, base)


def adapted(shape: str, attention: str | None) -> PeftModel:
    """The base and its adapter."""
    base = random_base(shape, attention)
    config = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(base, config)


def in_order(data: list[Encoded], batch_size: int, virtual: int = 0, tokens: int = 2048) -> ShuffledSteps:
    """Makes our training data without the shuffle, so that the padded loop can take the same steps."""
    steps = Packing(tokens, virtual=virtual).steps(data, batch_size, seed=0)
    return replace(steps, order=lambda epoch: range(len(data)))


def ours(shape: str, passes: int, batch: int = BATCH, tokens: int = 2048, count: int = SEQUENCES) -> dict[str, Any]:
    """The lab's own loop, as `llm_peft_fa.train` runs it: `batch` of `count` sequences a step, rows of `tokens`."""
    model = PackedCausalLM(adapted(shape, NAME)).train()
    data = sequences(SHAPES[shape]().vocab_size, count)
    options = TrainingOptions(epochs=passes + 1, learning_rate=1e-3, schedule="constant", warmup=0, save_every=10**9)
    accelerator = Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")
    with tempfile.TemporaryDirectory() as folder:
        run = Run.start(options, RunOptions(output=Path(folder) / "run", track="none"), "benchmark", accelerator)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0)
        prepared, optimizer = accelerator.prepare(model, optimizer)
        source = in_order(data, batch, tokens=tokens)
        loop = Loop(run, accelerator, prepared, optimizer, source, options, unit="tokens")
        for row in loop.batches():
            loop.step(prepared(row.to(accelerator.device)) * row.weight, row.tokens)
        # The loop's own clock: like the others', it leaves out the checkpoint at the end.
        seconds = sum(line["seconds"] for line in run.lines("timing.jsonl") if line["step"] > len(source))
        losses = [line["loss"] for line in run.lines("metrics.jsonl")]
    return result(data, passes, seconds, losses)


def padded_loop(shape: str, passes: int) -> dict[str, Any]:
    """What a notebook does: batches padded to their longest, the model's own loss over the whole vocabulary."""
    model = adapted(shape, None).train()
    data = sequences(SHAPES[shape]().vocab_size)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0)
    losses = []
    began = time.perf_counter()
    for epoch in range(passes + 1):
        if epoch == 1:
            began = now()
        for at in range(0, len(data), BATCH):
            batch = data[at : at + BATCH]
            longest = max(len(item.ids) for item in batch)
            ids = torch.zeros(len(batch), longest, dtype=torch.long)
            labels = torch.full((len(batch), longest), -100)
            mask = torch.zeros(len(batch), longest, dtype=torch.long)
            for place, item in enumerate(batch):
                length = len(item.ids)
                ids[place, :length] = torch.tensor(item.ids)
                mask[place, :length] = 1
                labels[place, :length] = ids[place, :length].masked_fill(~torch.tensor(item.learnt), -100)
            named = {"input_ids": ids, "attention_mask": mask, "labels": labels}
            loss = model(**{name: tensor.to(model.device) for name, tensor in named.items()}, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return result(data, passes, now() - began, losses)


def trl(shape: str, passes: int, count: int = SEQUENCES, **settings: Any) -> dict[str, Any]:
    """TRL's SFTTrainer on the same tokens, with these settings over its own defaults.

    On a CPU it asks for `use_cpu`; it then computes in bfloat16 and recomputes activations, as it does on a GPU.
    """
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):
        began = 0.0
        ended = 0.0

        def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.began == 0 and state.global_step > 0:
                self.began = now()

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.ended = now()

    data = sequences(SHAPES[shape]().vocab_size, count)
    rows = [{"input_ids": item.ids, "assistant_masks": [int(flag) for flag in item.learnt]} for item in data]
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder, num_train_epochs=passes + 1, learning_rate=1e-3, report_to="none", save_strategy="no",
            logging_strategy="no", disable_tqdm=True, use_cpu=not torch.cuda.is_available(), **settings,
        )  # fmt: skip
        trainer = SFTTrainer(
            adapted(shape, None), args=config, train_dataset=Dataset.from_list(rows),
            processing_class=any_tokenizer(PreTrainedTokenizerFast), callbacks=[clock],
        )  # fmt: skip
        trainer.train()
    return result(data, passes, clock.ended - clock.began, None)


def any_tokenizer(kind: Any) -> Any:
    """SFTTrainer wants a tokenizer for its pad token, though the data are tokens already."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    return kind(
        tokenizer_object=Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1}, "<pad>")), pad_token="<pad>", eos_token="<eos>"
    )


def now() -> float:
    """Seconds, after the GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def result(data: list[Encoded], passes: int, seconds: float, losses: list[float] | None) -> dict[str, Any]:
    """One row of the results."""
    tokens = passes * sum(len(item.ids) for item in data)
    found = {"tokens_per_second": tokens / seconds, "seconds": seconds, "peak_memory": peak_memory()}
    return found if losses is None else found | {"losses": losses}


def trl_tuned(shape: str, passes: int) -> dict[str, Any]:
    """TRL set up for the machine: packing; on a CPU float32 without recomputation, on a GPU Liger's kernels."""
    if torch.cuda.is_available():
        return trl(shape, passes, packing=True, max_length=2048, gradient_checkpointing=False, use_liger_kernel=True)
    return trl(
        shape, passes, packing=True, max_length=2048, per_device_train_batch_size=1, bf16=False,
        gradient_checkpointing=False,
    )  # fmt: skip


TRAINERS: dict[str, Callable[[str, int], dict[str, Any]]] = {
    "ours": ours,
    "padded loop": padded_loop,
    "TRL as it comes": trl,
    "TRL, packing": lambda shape, passes: trl(shape, passes, packing=True),
    "TRL, packing, set up for the machine": trl_tuned,
    "TRL, padded, float32 on a CPU": lambda shape, passes: trl(
        shape, passes, bf16=torch.cuda.is_available(), gradient_checkpointing=False
    ),
}

if __name__ == "__main__":
    main()
