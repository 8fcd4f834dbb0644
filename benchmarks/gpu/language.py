"""Fine-tuning language models with the shapes of Llama 3.2 3B and Gemma 2 2B, random weights: LoRA and QLoRA."""

import gc
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from benchmarks import llm_training
from benchmarks.gpu.measuring import Setting, clock, separate
from benchmarks.gpu.rows import Row
from peft import LoraConfig, PeftModel, get_peft_model

from labs_common.device import peak_memory
from labs_common.errors import reason_of
from llm_peft_fa import losses
from llm_peft_fa.attention import NAME
from llm_peft_fa.base import check_quantization, load_model
from llm_peft_fa.model import PackedCausalLM, base_of
from llm_peft_fa.packing import PackedRow, packed_row
from llm_peft_fa.templates import Encoded

SHAPES = {"llama": ("llama-tiny", "llama-3.2-3b"), "gemma": ("gemma2-tiny", "gemma-2-2b")}  # tiny, real
LIMIT = 2048  # tokens of a packed row of TRL
PASSES = 2
GIB = 2**30


def shape_of(name: str, setting: Setting) -> str:
    """Returns the name of the shape in `benchmarks.llm_training`."""
    tiny, real = SHAPES[name]
    return tiny if setting.tiny else real


def against_trl(setting: Setting, folder: Path, name: str) -> Iterator[Row]:
    """Trains the same LoRA on the same tokens, about 8,000 a step, by the lab and by TRL, each in its own process."""
    shape, count = shape_of(name, setting), 16 if setting.tiny else 256
    mine = separate(llm_training.ours, shape, PASSES, count // 4, 4 * LIMIT, count)
    yield Row(f"{shape}, LoRA", "tokens/s", mine["tokens_per_second"])
    yield Row(f"{shape}, LoRA: peak memory", "GiB", mine["peak_memory"] / GIB)
    packed: dict[str, Any] = {"packing": True, "max_length": LIMIT, "per_device_train_batch_size": 4}
    packed |= {"bf16": torch.cuda.is_available(), "gradient_checkpointing": False}
    ways: dict[str, dict[str, Any]] = {"TRL, packing": packed}
    if torch.cuda.is_available():
        ways["TRL as it comes"] = {}
        if importlib.util.find_spec("liger_kernel") is not None:
            ways["TRL, packing, Liger"] = packed | {"use_liger_kernel": True}
    for way, settings in ways.items():
        try:
            its = separate(_trl, shape, count, settings)
        except RuntimeError as error:  # such as no memory left: the other ways are measured all the same
            yield Row(f"{shape}, LoRA", "tokens/s", None, way, note=f"failed: {error}")
            continue
        yield Row(f"{shape}, LoRA", "tokens/s", mine["tokens_per_second"], way, its["tokens_per_second"])
        yield Row(f"{shape}, LoRA: peak memory", "GiB", mine["peak_memory"] / GIB, way, its["peak_memory"] / GIB)


def _trl(shape: str, count: int, settings: dict[str, Any]) -> dict[str, Any]:
    return llm_training.trl(shape, PASSES, count, **settings)


def sweep(setting: Setting, folder: Path, name: str) -> Iterator[Row]:
    """Measures rows of several lengths with several sizes of the loss's chunks; ratios are to the lab's own chunk."""
    shape = shape_of(name, setting)
    lengths = (128, 256) if setting.tiny else (2048, 4096, 8192, 16384)
    model = on_device(llm_training.adapted(shape, NAME))
    head = base_of(model.model).get_output_embeddings().weight
    usual = losses.chunk_positions(len(head), losses.device_memory(head.device))
    chunks = [max(1, usual // part) for part in ((1, 256) if setting.tiny else (1, 8, 64))]
    for length in lengths:
        row = row_of(length, model)
        first = None
        for chunk in chunks:
            model.chunk = chunk
            said = f"{shape}, LoRA, a row of {length}, loss in chunks of {chunk:,} positions"
            rate, memory, trouble = rate_of(model, row, 1 if setting.tiny else 3)
            if rate is None:
                yield Row(said, "tokens/s", None, note=f"failed: {trouble}")
                continue
            beside = f"chunks of {usual:,} positions" if first is not None else ""
            gib = f"peak memory {memory / GIB:.1f} GiB" if memory else ""
            yield Row(said, "tokens/s", rate, beside, first, note=gib)
            first = rate if chunk == usual else first


def quantized(setting: Setting, folder: Path, name: str) -> Iterator[Row]:
    """Compares LoRA on a base in 4 bits with LoRA on the same base in bf16."""
    shape = shape_of(name, setting)
    check_quantization()
    length, steps = (128, 1) if setting.tiny else (4096, 5)
    saved = folder / "base"
    found = {}
    for bits in (16, 4):  # the first one writes the base that the second one reads
        found[bits] = separate(_adapted_rate, shape, saved, bits == 4, length, steps)
    (rate, memory), (its_rate, its_memory) = found[4], found[16]
    beside = f"LoRA on {'bf16' if torch.cuda.is_available() else 'fp32'}"
    yield Row(f"{shape}, QLoRA, a row of {length}", "tokens/s", rate, beside, its_rate)
    if memory and its_memory:
        yield Row(f"{shape}, QLoRA: peak memory", "GiB", memory / GIB, beside, its_memory / GIB)


def _adapted_rate(shape: str, saved: Path, in_4_bits: bool, length: int, steps: int) -> tuple[float, int]:
    if not in_4_bits:
        base = llm_training.random_base(shape, NAME)
        base.save_pretrained(saved)
    else:
        # As `llm_peft_fa.train --method qlora` does it.
        base = load_model(str(saved), "bf16" if torch.cuda.is_available() else "no", quantized=True)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(base, lora)
    assert isinstance(adapted, PeftModel)
    model = on_device(adapted)
    rate, memory, trouble = rate_of(model, row_of(length, model), steps)
    if rate is None:
        raise RuntimeError(trouble)
    return rate, memory


def on_device(adapted: PeftModel) -> PackedCausalLM:
    """Puts a model on the device, ready to train."""
    return PackedCausalLM(adapted.to("cuda" if torch.cuda.is_available() else "cpu")).train()


def row_of(length: int, model: PackedCausalLM) -> PackedRow:
    """Packs conversations into a row of exactly `length` tokens."""
    conversations: list[Encoded] = []
    left = length
    for item in llm_training.sequences(int(model.model.config.vocab_size), length):
        conversations.append(Encoded(item.ids[:left], item.learnt[:left], item.where))
        left -= len(conversations[-1].ids)
        if not left:
            break
    return packed_row(conversations).to(model.model.device)


def rate_of(model: PackedCausalLM, row: PackedRow, steps: int) -> tuple[float | None, int, str]:
    """Trains on a row again and again; returns tokens per second, peak bytes of the GPU, and what went wrong."""
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-5)
    device = row.input_ids.device
    try:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        began = 0.0
        for step in range(steps + 1):
            if step == 1:  # after one that chooses kernels and makes the optimizer's state
                began = clock()
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = model(row) / max(1, len(row.targets))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        seconds = clock() - began
    except torch.OutOfMemoryError as error:
        optimizer.zero_grad()
        return None, 0, reason_of(error)
    return steps * row.tokens / seconds, peak_memory() if device.type == "cuda" else 0, ""
