"""Runs this lab's commands."""

from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from labs_testing import commands as lab_commands
from labs_testing.commands import Done
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from llm_peft_fa.model import Adapted
from llm_peft_fa.saved import computed_prompt, save_tuned

LIBRARIES = ["llm_peft_fa.train"]
LAUNCH = Path(__file__).parents[1] / "launch"
SMALL = (
    "--conversations", "60", "--batch-size", "8", "--epochs", "2", "--test-prompts", "6", "--max-new-tokens", "6",
    "--rank", "4", "--track", "none", "--tokens-per-batch", "300",
)  # fmt: skip


def here(name: str, *arguments: object, code: int = 0, typed: str = "") -> Done:
    """Runs one of the lab's commands in this process."""
    return lab_commands.here(f"llm_peft_fa.{name}", *arguments, code=code, typed=typed)


def forked(*arguments: object, **more: str) -> BaseProcess:
    """Starts `llm_peft_fa.train` in a process of its own."""
    return lab_commands.forked("llm_peft_fa.train", LIBRARIES, *arguments, **more)


def save(
    tuned: Adapted, tokenizer: PreTrainedTokenizerBase, run: Path, initial: dict[str, torch.Tensor] | None = None
) -> None:
    """Writes the result as a training does."""
    weights = {f"model.{name}": tensor for name, tensor in tuned.state_dict().items()}
    save_tuned(tuned, weights, tokenizer, run, initial, computed_prompt(tuned))


def without_rank(options: tuple[str, ...]) -> list[str]:
    place = options.index("--rank")
    return [*options[:place], *options[place + 2 :]]


def trained(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")
