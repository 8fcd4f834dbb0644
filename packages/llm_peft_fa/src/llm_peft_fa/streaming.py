"""An answer piece by piece, as it is generated."""

import threading
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase, TextIteratorStreamer

from llm_peft_fa.data import Message
from llm_peft_fa.methods import Adapted
from llm_peft_fa.model import stop_ids
from llm_peft_fa.packed import base_of
from llm_peft_fa.templates import encode_prompt


def streamed_answer(
    model: Adapted,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    max_new_tokens: int,
    temperature: float = 0.0,
) -> Iterator[str]:
    """Yields the answer to the last message as text is certain; at temperature 0 the likeliest token is taken.

    Raises:
        LabError: the chat template does not accept such messages.
    """
    base = base_of(model)
    ids = torch.tensor([encode_prompt(tokenizer, messages)], device=base.device)
    streamer = TextIteratorStreamer(cast(Any, tokenizer), skip_prompt=True, skip_special_tokens=True)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    thread = threading.Thread(
        target=cast(Any, model).generate,
        kwargs={
            "input_ids": ids, "attention_mask": torch.ones_like(ids), "streamer": streamer,
            "max_new_tokens": max_new_tokens, "eos_token_id": sorted(stop_ids(base, tokenizer)),
            "pad_token_id": tokenizer.pad_token_id, **sampling,
        },
        daemon=True,
    )  # fmt: skip
    thread.start()
    yield from streamer
    thread.join()
