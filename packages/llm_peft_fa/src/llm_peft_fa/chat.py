"""Talks to a result: `python -m llm_peft_fa.chat --checkpoint runs/NAME`."""

from llm_peft_fa import commands

if __name__ == "__main__":  # before the imports below: --help and a wrong option answer at once
    commands.chat()

import io
import sys

import torch

from labs_common.progress import console
from llm_peft_fa.answers import streamed_answer
from llm_peft_fa.base import load_tokenizer
from llm_peft_fa.config import ChatConfig
from llm_peft_fa.saved import subject_of
from llm_peft_fa.spelling import Message, normalise


def chat(config: ChatConfig) -> None:
    """Reads questions line by line and streams the answers, until /quit or the end of the input."""
    subject = subject_of(config.subject)
    tokenizer, model = load_tokenizer(subject.tokenizer), subject.load()
    torch.manual_seed(config.seed)
    spelt = normalise if subject.trained and subject.trained.data.normalise else str  # as in training
    console.print(f"{subject.name}: /reset forgets the conversation, /quit leaves")
    opening: list[Message] = [{"role": "system", "content": spelt(config.system)}] if config.system else []
    messages = list(opening)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # bytes that are not UTF-8, which no tokenizer reads
    while (question := _read()) not in (None, "/quit"):
        if question == "/reset":
            messages = list(opening)
            console.print("forgotten")
        elif question:
            messages.append({"role": "user", "content": spelt(question)})
            said = ""
            for piece in streamed_answer(model, tokenizer, messages, config.max_new_tokens, config.temperature):
                print(piece, end="", flush=True)
                said += piece
            print()
            messages.append({"role": "assistant", "content": said.strip()})


def _read() -> str | None:
    if sys.stdin is None:  # it was closed
        return None
    try:
        return input("> ").strip()
    except EOFError:
        return None
