"""Prompts, the answers that a model gives to them, and scores of those answers."""

import random
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, cast

import sacrebleu
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedTokenizerBase, TextIteratorStreamer

from labs_common.errors import LabError, reason_of
from labs_common.progress import tracked
from llm_peft_fa.base import stop_ids
from llm_peft_fa.config import GenerationOptions
from llm_peft_fa.data import Message, Reading, normalise, text_lines
from llm_peft_fa.model import Adapted, arithmetic, base_of, virtual_tokens
from llm_peft_fa.templates import encode_prompt

Scores = dict[str, float]


@dataclass(frozen=True)
class Prompt:
    """Messages that end with a question, and the answer that the data gives, if it does."""

    messages: list[Message]
    reference: str | None = None
    verifiable: bool = False


@dataclass(frozen=True)
class BeforeAndAfter:
    """Answers of the base model and of the fine-tuned one to the same prompts, and their scores."""

    prompts: list[Prompt]
    before: list[str] | None
    after: list[str]
    scores: dict[str, Scores]
    """"before" (if the base answered) and "after"."""


def collected_prompts(reading: Reading, options: GenerationOptions, seed: int) -> list[Prompt]:
    """Reads the user's own prompts, then draws conversations by the seed and takes their last answers off.

    Raises:
        LabError: the file of --prompts cannot be read or is empty.
    """
    own: list[Prompt] = []
    if options.prompts is not None:
        lines = text_lines("--prompts", options.prompts, "a prompt")
        own = [Prompt([{"role": "user", "content": line}]) for line in lines]
    count = min(options.test_prompts, len(reading.conversations))
    picked = random.Random(f"prompts {seed}").sample(reading.conversations, count)
    return own + [Prompt(item.messages[:-1], item.messages[-1]["content"], item.verifiable) for item in picked]


def before_and_after(
    tuned: Adapted,
    base: AbstractContextManager[Adapted] | None,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    options: GenerationOptions,
    accelerator: Accelerator,
) -> BeforeAndAfter:
    """Answers all prompts with the fine-tuned model, and with the base if there is one; processes share the work."""
    after = answers(tuned, tokenizer, prompts, options, accelerator, "answering, fine-tuned")
    if base is None:
        return BeforeAndAfter(prompts, None, after, {"after": scores(prompts, after)})
    with base as model:
        before = answers(model, tokenizer, prompts, options, accelerator, "answering, base")
    return BeforeAndAfter(prompts, before, after, {"before": scores(prompts, before), "after": scores(prompts, after)})


@torch.no_grad()
def answers(
    model: Adapted,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    options: GenerationOptions,
    accelerator: Accelerator,
    task: str = "answering",
) -> list[str]:
    """Generates greedy answers, in the order of the prompts, the same in every process.

    Prompts of like length go together, padded on the left. With virtual tokens among the inputs only those of equal
    length do: the padding would stand between a soft prompt and its text, where PEFT counts it as positions.
    """
    if not prompts:
        return []
    base = base_of(model)
    stops = stop_ids(base, tokenizer)
    mine = list(range(accelerator.process_index, len(prompts), accelerator.num_processes))
    if together := isinstance(base, FSDPModule):
        mine = mine or [0]
    encoded = {number: encode_prompt(tokenizer, prompts[number].messages) for number in mine}
    order = sorted(mine, key=lambda number: (len(encoded[number]), number))
    alike = groupby(order, lambda number: len(encoded[number]) if virtual_tokens(model) else 0)
    size = options.generation_batch
    batches = [
        group[at : at + size] for group in (list(found) for _, found in alike) for at in range(0, len(group), size)
    ]
    if together:  # all processes compute each layer at the same time: who has done its own goes on with them
        most = max(gather_object([len(batches)]))
        batches += batches[:1] * (most - len(batches))
    said: dict[int, str] = {}
    for batch in tracked(batches, task, len(batches), shown=accelerator.is_main_process):
        ids = tokenizer.pad({"input_ids": [encoded[number] for number in batch]}, return_tensors="pt").to(base.device)
        with arithmetic(base):
            out = cast(Any, model).generate(
                **ids, max_new_tokens=options.max_new_tokens, do_sample=False,
                eos_token_id=sorted(stops), pad_token_id=tokenizer.pad_token_id,
                synced_gpus=together,
            )  # fmt: skip
        for number, answer in zip(batch, out[:, ids["input_ids"].shape[1] :].tolist(), strict=True):
            # Some tokenizers do not count the token that ends a turn among the special ones.
            until = next((place for place, token in enumerate(answer) if token in stops), len(answer))
            said[number] = str(tokenizer.decode(answer[:until], skip_special_tokens=True)).strip()
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
            "max_new_tokens": max_new_tokens, "eos_token_id": sorted(stop_ids(base, tokenizer)),
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


def scores(prompts: Sequence[Prompt], said: Sequence[str]) -> Scores:
    """Computes exact match, chrF, distinct-1 and -2, and mean length; a score that no prompt allows is left out.

    Exact match is over verifiable prompts, chrF (Popović 2015, sacrebleu's) over all that have a reference,
    distinct-n (Li et al. 2016, section 5: different n-grams over all n-grams) and words over all answers.
    """
    found: Scores = {}
    checked = [
        same(answer, prompt.reference)
        for prompt, answer in zip(prompts, said, strict=True)
        if prompt.verifiable and prompt.reference is not None
    ]
    if checked:
        found["exact match"] = sum(checked) / len(checked)
    pairs = [(answer, prompt.reference) for prompt, answer in zip(prompts, said, strict=True) if prompt.reference]
    if pairs:
        found["chrF"] = sacrebleu.corpus_chrf([pair[0] for pair in pairs], [[pair[1] for pair in pairs]]).score
    words = [answer.split() for answer in said]
    for n in (1, 2):
        grams = [tuple(answer[at : at + n]) for answer in words for at in range(len(answer) - n + 1)]
        if grams:
            found[f"distinct-{n}"] = len(set(grams)) / len(grams)
    if words:
        found["words per answer"] = sum(map(len, words)) / len(words)
    return found


def same(answer: str, reference: str) -> bool:
    """Tells whether two texts are equal but for spelling variants, spacing, and a full stop at the end."""
    one, other = (" ".join(normalise(text).split()).rstrip(" .") for text in (answer, reference))
    return one == other
