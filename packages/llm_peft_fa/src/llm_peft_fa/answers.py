"""Prompts, and the answers that models give to them: fine-tuned, base and perhaps an instruct model."""

import random
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedTokenizerBase, TextIteratorStreamer

from labs_common.errors import LabError, reason_of
from labs_common.progress import console, tracked
from labs_common.sharding import place, reads_weights
from llm_peft_fa.base import load_model, load_tokenizer, positions, stop_ids
from llm_peft_fa.config import GenerationOptions
from llm_peft_fa.data import Reading, text_lines
from llm_peft_fa.general_text import losses_of_general_text
from llm_peft_fa.metrics import Answer, Prompt, Scores, scores, scores_by_kind
from llm_peft_fa.model import Adapted, arithmetic, base_of, virtual_tokens
from llm_peft_fa.spelling import Message, normalise
from llm_peft_fa.templates import encode_prompt

# An answer that the data would give is hardly ever cut, and one that never ends does not take hours.
SHORTEST_LIMIT, LONGEST_LIMIT = 64, 1024  # tokens
# The instruct models that were made of these bases, by their makers.
INSTRUCT = {
    "google/gemma-2-2b": "google/gemma-2-2b-it",
    "google/gemma-2-9b": "google/gemma-2-9b-it",
    "google/gemma-3-1b-pt": "google/gemma-3-1b-it",
    "google/gemma-3-4b-pt": "google/gemma-3-4b-it",
    "meta-llama/Llama-3.2-1B": "meta-llama/Llama-3.2-1B-Instruct",
    "meta-llama/Llama-3.2-3B": "meta-llama/Llama-3.2-3B-Instruct",
    "meta-llama/Llama-3.1-8B": "meta-llama/Llama-3.1-8B-Instruct",
    "Qwen/Qwen2.5-1.5B": "Qwen/Qwen2.5-1.5B-Instruct",
    "Qwen/Qwen2.5-3B": "Qwen/Qwen2.5-3B-Instruct",
    "Qwen/Qwen2.5-7B": "Qwen/Qwen2.5-7B-Instruct",
}


@dataclass(frozen=True)
class Answered:
    """Answers to the same prompts by side: "before" (the base, if it answered), "instruct" (if asked for), "after"."""

    prompts: list[Prompt]
    said: dict[str, list[Answer]]
    scores: dict[str, Scores]
    """Of all prompts, and the losses of general text; by side."""
    kinds: dict[str, dict[str, Scores]]
    """By side and kind of task."""


def check_instruct(options: GenerationOptions, base: str | None, shown: bool = True) -> None:
    """Makes sure, before hours of work, that --also-instruct can be read; says which model it could be.

    Raises:
        LabError: there is no such model.
    """
    if options.also_instruct is not None:
        load_tokenizer(options.also_instruct)
    elif shown and base in INSTRUCT:
        console.print(f"its maker's instruct model is answered beside it with --also-instruct {INSTRUCT[base]}")


def collected_prompts(reading: Reading, options: GenerationOptions, seed: int) -> list[Prompt]:
    """Reads the user's own prompts, then draws conversations by the seed and takes their last answers off.

    Raises:
        LabError: the file of --prompts cannot be read or is empty.
    """
    own: list[Prompt] = []
    if options.prompts is not None:
        lines = text_lines("--prompts", options.prompts, "a prompt")
        spelt = [normalise(line) if reading.normalised else line for line in lines]
        own = [Prompt([{"role": "user", "content": line}]) for line in spelt]
    count = min(options.test_prompts, len(reading.conversations))
    places = random.Random(f"prompts {seed}").sample(range(len(reading.conversations)), count)
    picked = [reading.conversations[place] for place in places]
    return own + [Prompt(item.messages[:-1], item.messages[-1]["content"], item.verifiable) for item in picked]


def before_and_after(
    tuned: Adapted,
    base: AbstractContextManager[Adapted] | None,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    options: GenerationOptions,
    accelerator: Accelerator,
) -> Answered:
    """Answers all prompts with the fine-tuned model, and with base and instruct model if asked; processes share them.

    The instruct model, with its own tokenizer and template, is loaded beside the other and forgotten afterwards.
    """
    said: dict[str, list[Answer]] = {}
    losses: dict[str, Scores] = {}

    def ask(side: str, model: Adapted, tokenizer: PreTrainedTokenizerBase, task: str) -> None:
        said[side] = answers(model, tokenizer, prompts, options, accelerator, f"answering, {task}")
        losses[side] = losses_of_general_text(model, tokenizer)

    if base is not None:
        with base as model:
            ask("before", model, tokenizer, "base")
    if options.also_instruct is not None:
        instruct = load_model(options.also_instruct, read=reads_weights(accelerator))
        place(instruct, accelerator)
        ask("instruct", instruct, load_tokenizer(options.also_instruct), "instruct")
        del instruct
    ask("after", tuned, tokenizer, "fine-tuned")
    return Answered(
        prompts,
        said,
        {side: scores(prompts, one) | losses[side] for side, one in said.items()},
        {side: scores_by_kind(prompts, one) for side, one in said.items()},
    )


def answer_limit(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], options: GenerationOptions) -> int:
    """Returns the longest answer in tokens: --max-new-tokens, or what 99 in 100 of the data's own answers need.

    That is with the token that ends an answer, at least SHORTEST_LIMIT and at most LONGEST_LIMIT; the latter if no
    prompt has an answer.
    """
    if options.max_new_tokens:
        return options.max_new_tokens
    references = [prompt.reference for prompt in prompts if prompt.reference is not None]
    if not references:
        return LONGEST_LIMIT
    lengths = sorted(map(len, tokenizer(references, add_special_tokens=False).input_ids))
    needed = lengths[-(-99 * len(lengths) // 100) - 1] + 1
    return min(max(needed, SHORTEST_LIMIT), LONGEST_LIMIT)


@torch.no_grad()
def answers(
    model: Adapted,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    options: GenerationOptions,
    accelerator: Accelerator,
    task: str = "answering",
) -> list[Answer]:
    """Generates greedy answers, in the order of the prompts, the same in every process.

    Prompts of like length go together, padded on the left. With virtual tokens among the inputs only those of equal
    length do: the padding would stand between a soft prompt and its text, where PEFT counts it as positions. An answer
    ends, truncated, where the model's positions do; a prompt that leaves it no room for one loses its beginning, and a
    line says how many did.
    """
    if not prompts:
        return []
    base = base_of(model)
    stops = stop_ids(base, tokenizer)
    mine = list(range(accelerator.process_index, len(prompts), accelerator.num_processes))
    if together := isinstance(base, FSDPModule):
        mine = mine or [0]
    encoded = {number: encode_prompt(tokenizer, prompts[number].messages) for number in mine}
    limit = answer_limit(tokenizer, prompts, options)
    room = positions(base.config) - virtual_tokens(model)
    kept = max(1, room - min(limit, SHORTEST_LIMIT))  # of a prompt
    cut = {number for number, ids in encoded.items() if len(ids) > kept}
    encoded = {number: ids[-kept:] for number, ids in encoded.items()}
    order = sorted(mine, key=lambda number: (len(encoded[number]), number))
    alike = groupby(order, lambda number: len(encoded[number]) if virtual_tokens(model) else 0)
    size = options.generation_batch
    batches = [
        group[at : at + size] for group in (list(found) for _, found in alike) for at in range(0, len(group), size)
    ]
    if together:  # all processes compute each layer at the same time: who has done its own goes on with them
        most = max(gather_object([len(batches)]))
        batches += batches[:1] * (most - len(batches))
    said: dict[int, Answer] = {}
    for batch in tracked(batches, task, len(batches), shown=accelerator.is_main_process):
        ids = tokenizer.pad({"input_ids": [encoded[number] for number in batch]}, return_tensors="pt").to(base.device)
        with arithmetic(base):
            out = cast(Any, model).generate(
                **ids, max_new_tokens=min(limit, room - ids["input_ids"].shape[1]), do_sample=False,
                eos_token_id=sorted(stops), pad_token_id=tokenizer.pad_token_id,
                synced_gpus=together,
            )  # fmt: skip
        for number, answer in zip(batch, out[:, ids["input_ids"].shape[1] :].tolist(), strict=True):
            # Some tokenizers do not count the token that ends a turn among the special ones.
            until = next((place for place, token in enumerate(answer) if token in stops), len(answer))
            text = str(tokenizer.decode(answer[:until], skip_special_tokens=True)).strip()
            said[number] = Answer(text, truncated=until == len(answer))
    if (lost := len(set(gather_object(list(cut))))) and accelerator.is_main_process:
        console.print(f"{task}: {lost} of {len(prompts)} prompts lost their beginning: the model reads {room:,} tokens")
    everyone = dict(gather_object(list(said.items())))
    return [everyone[number] for number in range(len(prompts))]


def streamed_answer(
    model: Adapted,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    max_new_tokens: int,
    temperature: float = 0.0,
) -> Iterator[str]:
    """Yields the answer to the last message in pieces; at temperature 0 the likeliest token is taken.

    Raises:
        LabError: the chat template does not accept such messages, or the model cannot answer.
    """
    base = base_of(model)
    ids = torch.tensor([encode_prompt(tokenizer, messages)], device=base.device)
    room = positions(base.config) - virtual_tokens(model) - ids.shape[1]
    if room < 1:
        raise LabError(f"the conversation has {ids.shape[1]} tokens, more than the model reads; begin a shorter one")
    streamer = TextIteratorStreamer(cast(Any, tokenizer), skip_prompt=True, skip_special_tokens=True)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}

    failed: list[Exception] = []

    def generate(**options: Any) -> None:
        try:
            with arithmetic(base):  # of this thread alone
                cast(Any, model).generate(**options)
        except Exception as error:  # told where the answer is awaited: an error of a thread ends nothing
            failed.append(error)
            streamer.end()

    thread = threading.Thread(
        target=generate,
        kwargs={
            "input_ids": ids, "attention_mask": torch.ones_like(ids), "streamer": streamer,
            "max_new_tokens": min(max_new_tokens, room), "eos_token_id": sorted(stop_ids(base, tokenizer)),
            "pad_token_id": tokenizer.pad_token_id, **sampling,
        },
        daemon=True,
    )  # fmt: skip
    thread.start()
    yield from streamer
    thread.join()
    if failed:
        raise LabError(f"the model cannot answer ({reason_of(failed[0])}); try --temperature 0 or a shorter "
                       "conversation") from failed[0]  # fmt: skip
