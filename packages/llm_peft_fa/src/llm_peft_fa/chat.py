"""Talks to a result: `python -m llm_peft_fa.chat --run runs/NAME`."""

from typing import TYPE_CHECKING, Any, cast

from labs_common.cli import run_command
from llm_peft_fa.config import ChatConfig

if TYPE_CHECKING:  # the real imports wait until the command line has been read: --help is fast
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llm_peft_fa.data import Message


def main() -> None:
    """The command."""
    run_command(chat, ChatConfig, "python -m llm_peft_fa.chat")


def chat(config: ChatConfig) -> None:
    """Reads questions line by line and streams the answers, until /quit or the end of the input."""
    import torch

    from labs_common.cli import config_from_yaml
    from labs_common.progress import console
    from llm_peft_fa.adapters import adapted_model, latest_run
    from llm_peft_fa.config import TrainConfig
    from llm_peft_fa.model import load_model, load_tokenizer

    model: PreTrainedModel | PeftModel
    if config.model is not None:
        named = config.model
        tokenizer, model = load_tokenizer(named), load_model(named, "bf16" if torch.cuda.is_available() else "no")
    else:
        folder = latest_run(config.run)
        named = str(folder)
        base = config_from_yaml(TrainConfig, folder / "config.yaml").model.model
        tokenizer, model = load_tokenizer(str(folder / "adapter")), adapted_model(folder / "adapter", base)
    cast(torch.nn.Module, model).to("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(config.seed)
    console.print(f"{named}: /reset forgets the conversation, /quit leaves")
    opening: list[Message] = [{"role": "system", "content": config.system}] if config.system else []
    messages = list(opening)
    while (question := _read()) not in (None, "/quit"):
        if question == "/reset":
            messages = list(opening)
            console.print("forgotten")
        elif question:
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": streamed_answer(model, tokenizer, messages, config)})


def streamed_answer(
    model: "PreTrainedModel | PeftModel",
    tokenizer: "PreTrainedTokenizerBase",
    messages: "list[Message]",
    config: ChatConfig,
) -> str:
    """Prints the answer to the last message as it is generated, and returns it."""
    import threading

    import torch
    from transformers import TextIteratorStreamer

    from llm_peft_fa.model import stop_ids
    from llm_peft_fa.packed import base_of
    from llm_peft_fa.templates import encode_prompt

    base = base_of(model)
    ids = torch.tensor([encode_prompt(tokenizer, messages)], device=base.device)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    sampling = {"do_sample": True, "temperature": config.temperature} if config.temperature else {"do_sample": False}
    thread = threading.Thread(
        target=cast(Any, model).generate,
        kwargs={
            "input_ids": ids, "attention_mask": torch.ones_like(ids), "streamer": streamer,
            "max_new_tokens": config.max_new_tokens, "eos_token_id": sorted(stop_ids(base, tokenizer)),
            "pad_token_id": tokenizer.pad_token_id, **sampling,
        },
        daemon=True,
    )  # fmt: skip
    thread.start()
    said = ""
    for piece in streamer:
        print(piece, end="", flush=True)
        said += piece
    thread.join()
    print()
    return said.strip()


def _read() -> str | None:
    try:
        return input("> ").strip()
    except EOFError:
        return None


if __name__ == "__main__":
    main()
