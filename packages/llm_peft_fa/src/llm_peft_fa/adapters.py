"""Adapters on disk: PEFT's own format, written whole or not at all."""

import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import PeftConfig, PeftModel
from transformers import PreTrainedTokenizerBase

from labs_common.errors import LabError
from llm_peft_fa.model import load_model
from llm_peft_fa.packed import PackedCausalLM


def save_adapter(
    accelerator: Accelerator, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Writes adapter and tokenizer to `folder`, gathered from all processes; called by all of them."""
    gathered = accelerator.get_state_dict(model)  # DeepSpeed and FSDP: the whole weights, on the main process
    if not accelerator.is_main_process:
        return
    packed = accelerator.unwrap_model(model)
    assert isinstance(packed, PackedCausalLM)
    state = {name.removeprefix("model."): tensor for name, tensor in gathered.items()}
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    packed.model.save_pretrained(str(part), state_dict=state)
    tokenizer.save_pretrained(part)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def adapted_model(folder: Path, model: str) -> PeftModel:
    """The base `model` with the adapter of `folder` on it, for generation.

    Raises:
        LabError: there is no adapter, or it does not fit the base.
    """
    precision = "bf16" if torch.cuda.is_available() else "no"
    try:
        PeftConfig.from_pretrained(str(folder))
        adapted: PeftModel = PeftModel.from_pretrained(load_model(model, precision), str(folder))
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).strip().splitlines()[0][:200]
        raise LabError(f"{folder}: no adapter can be loaded from here ({reason})") from error
    return adapted.eval()


def save_merged(model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes base plus update as one model that `transformers` loads; `model` keeps its merged weights."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    model.merge_and_unload().save_pretrained(part)
    tokenizer.save_pretrained(part)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def latest_run(run: Path | None) -> Path:
    """The run's directory, by default the newest finished one under runs/.

    Raises:
        LabError: it holds no adapter.
    """
    if run is None:
        finished = sorted(Path("runs").glob("*/adapter"), key=lambda folder: folder.stat().st_mtime)
        if not finished:
            raise LabError("no finished run under runs/; train one, or name one with --run")
        return finished[-1].parent
    if not (run / "adapter").is_dir():
        raise LabError(f"--run {run}: has no adapter; name the directory of a finished run")
    return run
