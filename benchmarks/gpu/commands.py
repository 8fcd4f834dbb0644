"""The six training commands, a few steps each: killed and resumed to the same weights, and watched meanwhile."""

import json
import os
import signal
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from benchmarks.gpu.measuring import Setting, command, separate
from benchmarks.gpu.rows import ROOT, Row
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from labs_common.scenes.files import write_coco, write_flickr8k, write_parquet
from labs_common.training import Loop
from llm_peft_fa import persian
from llm_peft_fa.tiny import _tokenizer
from zsi_contrastive.detector.annotations import scenes_split
from zsi_contrastive.detector.data import category

STEPS, SAVED_EVERY, KILLED_AFTER = 6, 2, 3
SYNC = "called a synchronizing CUDA operation"
COMMON = ("--precision", "bf16", "--track", "none", "--no-report")


@dataclass(frozen=True)
class Command:
    """A training command with random weights and drawn data.

    Attributes:
        make: writes what it needs into a folder, in tiny or real sizes, and returns its options.
        weights: the file that it leaves under the run.
    """

    make: Callable[[Path, bool], Sequence[object]]
    weights: str


def language(folder: Path, tiny: bool) -> Sequence[object]:
    """LoRA on a random Llama: of two small layers, or with the shape of Llama 3.2 1B."""
    base = folder / "base"
    base.mkdir()
    tokenizer = _tokenizer(list(persian.plain_text(500 if tiny else 5000, seed=1)), base)
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    } if tiny else {
        "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    }  # fmt: skip
    sizes |= {"max_position_embeddings": 4096, "pad_token_id": 0, "bos_token_id": 2,
              "eos_token_id": [1, tokenizer.convert_tokens_to_ids("<end_of_turn>")]}  # fmt: skip
    torch.manual_seed(0)
    config = LlamaConfig(**sizes)
    LlamaForCausalLM(config).bfloat16().save_pretrained(base)
    return ("--model", base, "--method", "lora", "--conversations", 60 if tiny else 600, "--test-prompts", 2,
            "--max-new-tokens", 4, "--batch-size", 8 if tiny else 64)  # fmt: skip


def clip(folder: Path, tiny: bool) -> Sequence[object]:
    """CLIP from random weights, on drawn scenes with captions."""
    write_flickr8k(folder / "scenes", range(40 if tiny else 700), side=32 if tiny else 256)
    towers = ("--image", "test_vit", "--image-size", 32, "--text-width", 32, "--text-layers", 1, "--text-heads", 4,
              "--embedding", 32, "--batch-size", 8) if tiny else (
              "--image", "vit_small_patch16_224", "--batch-size", 256)  # fmt: skip
    return ("--data", folder / "scenes", "--queries", 4, "--no-image-pretrained", "--text", "own", *towers)


def captions(folder: Path, tiny: bool) -> Sequence[object]:
    """The LSTM that looks at parts of the picture, behind a frozen random CNN."""
    write_flickr8k(folder / "scenes", range(40 if tiny else 300), side=32 if tiny else 224)
    encoder = (
        ("--encoder", "tiny-cnn", "--width", 32, "--batch-size", 16)
        if tiny
        else ("--encoder", "resnet50", "--batch-size", 128)
    )
    return ("--data", folder / "scenes", "--model", "show_attend_tell", "--no-pretrained", *encoder)


def transfer(folder: Path, tiny: bool) -> Sequence[object]:
    """The last block of a random vision transformer."""
    side, count = (32, 40) if tiny else (64, 1200)
    splits: dict[str, Sequence[int]] = {
        "train": range(count),
        "validation": range(count, count + 12),
        "test": range(count + 12, count + 24),
    }
    write_parquet(folder / "scenes", "texture", splits, side=side)
    network = ("--model", "tiny-vit", "--batch-size", 8) if tiny else (
               "--model", "vit_base_patch16_224", "--batch-size", 256)  # fmt: skip
    return ("--data", folder / "scenes", "--no-pretrained", "--baselines", "no", *network)


def detector(folder: Path, tiny: bool) -> Sequence[object]:
    """The detector of unseen classes, with all its parts."""
    count, side = (12, 48) if tiny else (80, 400)
    splits: dict[str, Sequence[int]] = {"train": range(count), "val": range(1000, 1010)}
    write_coco(folder / "scenes", splits, 0, side, category, scenes_split().classes)
    network = ("--min-side", 48, "--max-side", 64, "--batch-size", 2, "--kept", 5) if tiny else (
               "--backbone", "resnet50", "--no-backbone-pretrained", "--min-side", 400, "--max-side", 667,
               "--batch-size", 8)  # fmt: skip
    return ("--data", folder / "scenes", "--split", "scenes", "--controls", 0, *network)


def pretraining(folder: Path, tiny: bool) -> Sequence[object]:
    """SimCLR on small drawn pictures."""
    side, count = (16, 96) if tiny else (32, 4096)
    splits: dict[str, Sequence[int]] = {
        "train": range(count),
        "validation": range(count, count + 24),
        "test": range(count + 24, count + 48),
    }
    write_parquet(folder / "scenes", "look", splits, 0, side)
    network = ("--side", 16, "--hidden", 16, "--outputs", 12, "--batch-size", 8) if tiny else (
               "--backbone", "resnet18", "--stem", "small", "--batch-size", 512)  # fmt: skip
    return ("--data", folder / "scenes", "--method", "simclr", "--no-probe", "--map", "none", *network)


TRAININGS: dict[str, Command] = {
    "llm_peft_fa.train": Command(language, "adapter/adapter_model.safetensors"),
    "clip_lab.train": Command(clip, "model/model.safetensors"),
    "caption_lab.train": Command(captions, "model/model.safetensors"),
    "vit_transfer.train": Command(transfer, "model/model.safetensors"),
    "zsi_contrastive.train": Command(detector, "model/model.safetensors"),
    "zsi_contrastive.pretrain": Command(pretraining, "model/encoder.safetensors"),
}


def killed_and_resumed(setting: Setting, folder: Path, module: str) -> Iterator[Row]:
    """Compares a run with one that was killed by SIGKILL after a step and resumed; counts waits for the device."""
    steps = KILLED_AFTER + 1 if setting.tiny else STEPS
    made = separate(TRAININGS[module].make, folder, setting.tiny)
    options = (*made, *COMMON, "--max-steps", steps, "--epochs", steps, "--evaluate-every", steps, "--save-every",
               SAVED_EVERY)  # fmt: skip
    whole, killed = folder / "whole", folder / "killed"
    found = separate(watched, module, (*options, "--output", whole))
    lines = [json.loads(line) for line in (whole / "timing.jsonl").read_text().splitlines()]
    seconds = sorted(line["seconds"] for line in lines[1:])
    yield Row(f"{module}: a step", "s", seconds[len(seconds) // 2], note="deterministic kernels; the median")
    if torch.cuda.is_available():
        yield Row(f"{module}: peak memory", "GiB", max(line["peak_memory"] for line in lines) / 2**30)
        waits = "; ".join(f"{count:g} {place}" for place, count in found["waits"].items())
        yield Row(f"{module}: waits for the device in a step", "waits", sum(found["waits"].values()), note=waits)
    else:
        yield Row(f"{module}: waits for the device in a step", "waits", None, note="skipped: needs CUDA")
    try:
        separate(killing, module, (*options, "--output", killed))
    except RuntimeError as error:
        if not str(error).endswith(f"code {-signal.SIGKILL}"):
            raise
    done = max(json.loads(line)["step"] for line in (killed / "metrics.jsonl").read_text().splitlines())
    separate(reproducible, module, ("--resume", killed))
    one, two = (load_file(run / TRAININGS[module].weights) for run in (whole, killed))
    if one.keys() != two.keys():
        raise RuntimeError(f"{module}: the resumed run has other weights: {sorted(one.keys() ^ two.keys())[:3]}")
    apart = max(float((one[name].double() - two[name].double()).abs().max()) for name in one)
    chance = f"; kernels that have no deterministic form: {', '.join(found['chance'])}" if found["chance"] else ""
    yield Row(f"{module}: killed and resumed, weights apart from a whole run's", "", apart,
              note=f"0 is the same; killed after step {done} of {steps}{chance}")  # fmt: skip


def reproducible(module: str, arguments: Sequence[object]) -> None:
    """Runs a command with the kernels that give the same again, where there are such."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS has deterministic kernels with a fixed workspace only
    torch.use_deterministic_algorithms(True, warn_only=True)
    command(module, *arguments)


def killing(module: str, arguments: Sequence[object]) -> None:
    """Runs a command until it is killed in the middle of a step, between two checkpoints."""

    def kill(loop: Loop) -> None:
        if loop.step_number == KILLED_AFTER:
            os.kill(os.getpid(), signal.SIGKILL)

    after_each_step(kill)
    reproducible(module, arguments)


def watched(module: str, arguments: Sequence[object]) -> dict[str, Any]:
    """Runs a command; returns its waits for the device in a step by line, and the kernels that are left to chance."""
    waits: Counter[str] = Counter()
    chance: set[str] = set()
    steps = 0

    def seen(message: Warning | str, *_: Any, **__: Any) -> None:
        if SYNC in str(message):
            waits[own_line()] += 1
        elif "deterministic implementation" in str(message):
            chance.add(str(message).split()[0])

    def switch(loop: Loop) -> None:
        """Warns from the second step on, and not in the evaluation after the last."""
        nonlocal steps
        watching = not loop.evaluation_due and loop.step_number < loop.total
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("warn" if watching else "default")
        steps += watching

    warnings.showwarning = seen
    warnings.simplefilter("always")
    after_each_step(switch)
    reproducible(module, arguments)
    by_line = {place: count / max(1, steps) for place, count in waits.most_common()}
    return {"waits": by_line, "chance": sorted(chance)}


def own_line() -> str:
    """Returns the innermost line of this project that is being run, as file:line."""
    frames = [frame for frame in traceback.extract_stack()[:-1] if frame.filename.startswith(str(ROOT / "packages"))]
    if not frames:
        return "outside the project"
    return f"{'/'.join(Path(frames[-1].filename).parts[-2:])}:{frames[-1].lineno}"


def after_each_step(do: Callable[[Loop], None]) -> None:
    """Lets every training loop of this process call `do` when an optimizer step is done."""
    step = Loop.step

    @wraps(step)
    def stepping(self: Loop, *arguments: Any, **more: Any) -> None:
        before = self.step_number
        step(self, *arguments, **more)
        if self.step_number != before:
            do(self)

    Loop.step = stepping  # type: ignore[method-assign]
