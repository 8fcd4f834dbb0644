"""Rows to tokens: seconds and memory of the first and the second start, ours against TRL's own preparation.

    uv run python benchmarks/llm_data.py                          # 20,000 rows
    uv run python benchmarks/llm_data.py --rows 500000 --no-trl   # a quarter of an hour, and 6 GB of disk

Each runs in a process of its own with two workers on the same generated file: conversations of one to three exchanges
in words drawn from 20,000 by Zipf's law, with the half-spaces and Arabic letters that real Persian has; 300 tokens on
average by a byte-level BPE of 16,000 pieces that is trained on them. Ours reads, normalises, tokenizes and opens the
table, as `llm_peft_fa.train` does before it loads weights, up to the first step's rows; "second" starts again. TRL's is
what SFTTrainer does with the rows in its constructor, with dataset_num_proc=2, assistant_only_loss and the same longest
row; it does not normalise, and gets the rows with Persian letters. Both must find as many tokens and as many that are
learnt.

Memory is looked at ten times a second from outside, for both from when libraries are imported to when the rows are
ready. "Largest process" is the peak of its resident set, with libraries and pages of mapped files, and what of it is
beyond the libraries; a forked worker counts what it shares with its parent. "All processes" is what they have written
and not given back (anonymous and shared memory, a page that several share counted once) beyond the libraries': pages
of mapped files, which the system may drop, are not in it. On a machine that does other work too, compare seconds of the
CPUs.
"""

import contextlib
import importlib
import itertools
import json
import os
import random
import re
import resource
import select
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import tyro
from rich.console import Console
from rich.table import Table

from labs_common.run import write_atomically
from llm_peft_fa.base import load_tokenizer
from llm_peft_fa.config import DataOptions
from llm_peft_fa.data import splits
from llm_peft_fa.packing import Packing
from llm_peft_fa.table import encode_all, text_sum

LETTERS = "ابپتثجچحخدذرزژسشصضطظعغفقکگلمنوهیكي"
WORDS, VOCABULARY, LONGEST = 20_000, 16_000, 4096
TEMPLATE = """\
{% for message in messages %}<|{{ message['role'] }}|>
{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}
{% else %}{{ message['content'] }}<|end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""


@dataclass
class Options:
    """Prepares the same rows with ours and with TRL, and prints ratios."""

    rows: int = 20_000
    """Conversations to prepare."""
    trl: bool = True
    """Measure TRL too."""
    output: Path = Path("benchmarks/results/llm_data.json")
    """Where the figures go."""
    worker: str | None = None
    """Used by the benchmark itself: measure this one, in --folder."""
    folder: Path = Path()
    """Used by the benchmark itself."""


def main() -> None:
    """Makes the rows, measures each in a process of its own, prints the table and writes the figures."""
    options = tyro.cli(Options)
    if options.worker is not None:
        print(json.dumps(measured(options.worker, options.folder)))
        return
    figures: dict[str, Any] = {"rows": options.rows}
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder), options.rows)
        if options.trl:
            text = (Path(folder) / "rows.jsonl").read_text(encoding="utf-8")
            Path(folder, "spelt.jsonl").write_text(text.replace("ي", "ی").replace("ك", "ک"), encoding="utf-8")
        write_tokenizer(Path(folder))
        for name in ("ours, first", "ours, second", *["TRL"] * options.trl):
            command = [sys.executable, __file__, "--worker", name, "--folder", folder]
            caches = {
                "XDG_CACHE_HOME": f"{folder}/cache",
                "HF_HOME": f"{folder}/hf",
                "HF_HUB_OFFLINE": "1",
                "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
            }
            figures[name] = watched(name, command, os.environ | caches)
        figures["bytes on disk"] = sum(
            file.stat().st_size for file in Path(folder, "cache").rglob("*") if file.is_file()
        )
    if options.trl:
        same = [[figures[name][what] for what in ("tokens", "learnt")] for name in ("ours, first", "TRL")]
        if same[0] != same[1]:
            raise SystemExit(f"other tokens: {same[0]}, and TRL {same[1]}")
    columns = ("", "seconds", "of CPUs", "rows/s", "MiB: largest process", "beyond libraries", "all processes beyond")
    table = Table(*columns, title=f"{options.rows:,} rows")
    for name in [name for name in figures if isinstance(figures[name], dict)]:
        row = figures[name]
        sizes = [f"{row[what] / 2**20:,.0f}" for what in ("peak", "beyond", "all")]
        speed = f"{options.rows / row['seconds']:,.0f}"
        table.add_row(name, f"{row['seconds']:.1f}", f"{row['cpu']:.1f}", speed, *sizes)
    Console().print(table)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(options.output, json.dumps(figures, indent=1) + "\n")


def write_rows(folder: Path, count: int) -> None:
    """Writes rows.jsonl: role and content, one to three exchanges, lognormal lengths."""
    draw = np.random.default_rng(0)
    letters = random.Random(0)
    words = []
    for _ in range(WORDS):
        word = "".join(letters.choices(LETTERS, k=letters.choice((2, 3, 4, 4, 5, 5, 6, 7))))
        words.append(f"{word}\u200c{letters.choice(('ها', 'های', 'تر'))}" if letters.random() < 0.08 else word)
    chances = 1 / np.arange(1, WORDS + 1)
    ends = np.cumsum(chances / chances.sum())
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(count):
            messages = []
            for turn in range(2 * int(draw.choice((1, 1, 1, 2, 3)))):
                length = max(3, int(draw.lognormal(4.09, 0.7) * (0.5 if turn % 2 == 0 else 1)))
                picked = np.searchsorted(ends, draw.random(length))
                text = " ".join(words[min(place, WORDS - 1)] for place in picked.tolist())
                messages.append({"role": ("user", "assistant")[turn % 2], "content": text + "."})
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def write_tokenizer(folder: Path) -> None:
    """Trains a byte-level BPE on some of the rows."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # the workers do without
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    with (folder / "rows.jsonl").open(encoding="utf-8") as file:
        some = [json.loads(line) for line in itertools.islice(file, 3000)]
    texts = [message["content"] for row in some for message in row["messages"]]
    tokenizer.train_from_iterator(texts, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")
    made.chat_template = TEMPLATE
    made.save_pretrained(folder / "tokenizer")


def watched(name: str, command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Runs a worker, and adds to what it says the most memory of it and of the processes that it starts."""
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()  # its libraries are there
        before = most = memory(process.pid)
        process.stdin.write("\n")
        process.stdin.flush()
        while not select.select([process.stdout], [], [], 0.1)[0]:
            most = np.maximum(most, memory(process.pid))
        most = np.maximum(most, memory(process.pid))
        said = process.communicate("\n")[0]
    if process.returncode:
        raise SystemExit(f"{name}: failed")
    beyond, written = (most - before).tolist()
    return json.loads(said.splitlines()[-1]) | {"peak": int(most[0]), "beyond": beyond, "all": written}


def memory(process: int) -> np.ndarray:
    """Returns in bytes the largest resident set that a process of the tree has had, and what all have written."""
    largest = written = 0
    for one in [process, *(child.pid for child in psutil.Process(process).children(recursive=True))]:
        with contextlib.suppress(OSError):  # it has just ended
            status, sizes = (Path(f"/proc/{one}/{name}").read_text() for name in ("status", "smaps_rollup"))
            largest = max(largest, *map(int, re.findall(r"VmHWM:\s+(\d+)", status)))
            written += sum(map(int, re.findall(r"Pss_(?:Anon|Shmem):\s+(\d+)", sizes)))
    return np.array([largest, written]) * 1024


def measured(name: str, folder: Path) -> dict[str, Any]:
    """Prepares the rows in this process; libraries are imported before the clock starts."""
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    prepare = ours
    if name == "TRL":
        importlib.import_module("trl.trainer.sft_trainer")  # ours does without
        prepare = theirs
    seen()
    began, worked = time.perf_counter(), cpu()
    found = prepare(folder, tokenizer)
    found |= {"seconds": time.perf_counter() - began, "cpu": cpu() - worked}
    seen()
    rows = found.pop("rows")
    if name == "TRL":
        tokens = learnt = 0
        for batch in rows.iter(1000):
            tokens += sum(map(len, batch["input_ids"]))
            learnt += sum(label != -100 for labels in batch["labels"] for label in labels)
    else:
        tokens, learnt = (sum(int(getattr(part, what).sum()) for part in rows) for what in ("lengths", "learnt"))
    return found | {"tokens": tokens, "learnt": learnt}


def seen() -> None:
    """Waits until the process that watches has looked at the memory."""
    print(flush=True)
    input()


def cpu() -> float:
    """Seconds that this process and those it has waited for have computed."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def ours(folder: Path, tokenizer: Any) -> dict[str, Any]:
    """What a training does before it loads weights."""
    readings = splits(DataOptions(data=str(folder / "rows.jsonl")), seed=0)
    texts = {name: encode_all(tokenizer, reading, LONGEST, "truncate") for name, reading in readings.items()}
    text_sum(texts.values())
    next(Packing(2048).steps(texts["training"], 32, seed=0).steps(0, 0))  # the order of an epoch
    return {"rows": [*texts.values()]}


def theirs(folder: Path, tokenizer: Any) -> dict[str, Any]:
    """TRL's trainer up to where it would begin to train, on a model of no size."""
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    small = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=LONGEST,
    )  # fmt: skip
    config = SFTConfig(
        output_dir=str(folder / "trl"), dataset_num_proc=2, assistant_only_loss=True, max_length=LONGEST,
        report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    rows = Dataset.from_json(str(folder / "spelt.jsonl"))
    data: Any = SFTTrainer(
        LlamaForCausalLM(small), args=config, train_dataset=rows, processing_class=tokenizer
    ).train_dataset
    return {"rows": data}


if __name__ == "__main__":
    main()
