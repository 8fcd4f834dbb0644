"""Conversations to tokens, with a mark on the tokens that are learnt.

A conversation is rendered by a chat template, the tokenizer's own or the plain one. What the assistant says
is found by construction: the text up to an answer and the text up to its end are rendered too, and both must
be beginnings of the whole. Nothing is searched for in the text.
"""

import zlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from labs_common.errors import LabError, text_of
from llm_peft_fa.config import OnTooLong
from llm_peft_fa.data import Conversation, Message, Reading

# For base models without a chat template:
#
#   <bos>### System:\n…\n\n### User:\n…\n\n### Assistant:\n…<eos>\n\n
PLAIN = """\
{{ bos_token or '' }}{% for message in messages %}### {{ message['role'] | capitalize }}:
{{ message['content'] | trim }}{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}


{% endfor %}{% if add_generation_prompt %}### Assistant:
{% endif %}"""

# Llama's template writes today's date otherwise, and a run would not be the same tomorrow. The date is the one that
# Llama 3's own template falls back on.
FIXED: dict[str, Any] = {"date_string": "26 Jul 2024"}


@dataclass(frozen=True)
class Encoded:
    """A conversation as tokens; `learnt[i]` says whether the model is taught to predict token i."""

    ids: list[int]
    learnt: list[bool]
    where: str

    def __post_init__(self) -> None:
        assert len(self.ids) == len(self.learnt)


def text_sum(texts: Iterable[Sequence[Encoded]]) -> int:
    """Returns a CRC-32 of all tokens and of which are learnt: another one if data, template or tokenizer are others."""
    crc = 0
    for item in (item for text in texts for item in text):
        crc = zlib.crc32(bytes(item.learnt), zlib.crc32(array("i", item.ids).tobytes(), crc))
    return crc


def set_template(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Gives the tokenizer the chat template that `--template` names: auto, plain, or a file.

    Raises:
        LabError: the file cannot be read, or the tokenizer has no end-of-sequence token for the plain one.
    """
    if template not in ("auto", "plain"):
        tokenizer.chat_template = text_of(Path(template), f"--template {template} (a file, auto or plain)")
    elif template == "plain" or not tokenizer.chat_template:
        if tokenizer.eos_token is None:
            raise LabError("--template plain: this tokenizer has no end-of-sequence token to end an answer with")
        tokenizer.chat_template = PLAIN


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], prompt: bool = False) -> str:
    """Renders the messages as text, with the opening of an answer at the end if `prompt`.

    Raises:
        LabError: the template does not accept such messages.
    """
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt, **FIXED))
    except jinja2.TemplateError as error:
        raise LabError(f"the chat template cannot be used ({error}); try --template plain") from error


def without_system(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[Message]:
    """Puts the system message into the first question where the template has no system role, or drops it silently."""
    if messages[0]["role"] != "system":
        return list(messages)
    try:
        if messages[0]["content"].strip() in render(tokenizer, messages[:2]):
            return list(messages)
    except LabError:
        pass
    system, question, *rest = messages
    return [{"role": "user", "content": f"{system['content'].strip()}\n\n{question['content']}"}, *rest]


def encode(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> Encoded:
    """Tokenizes a whole conversation; answers and the tokens that end them are learnt.

    Raises:
        LabError: the template changes what came before when a turn is added.
    """
    messages = without_system(tokenizer, conversation.messages)
    text = render(tokenizer, messages)
    spans = []
    for place, message in enumerate(messages):
        if message["role"] == "assistant":
            before = render(tokenizer, messages[:place], prompt=True)
            until = render(tokenizer, messages[: place + 1])
            if not (text.startswith(before) and text.startswith(until)):
                raise LabError(
                    f"{conversation.where}: the chat template rewrites earlier turns when one is added, so the "
                    "answers cannot be told from the questions; try --template plain"
                )
            # White space after the token that ends the turn is never generated.
            spans.append((len(before), len(until.rstrip())))
    ids, offsets = _tokens(tokenizer, text)
    learnt, spans_left = [], list(spans)
    for start, end in offsets:
        while spans_left and start >= spans_left[0][1]:
            spans_left.pop(0)
        learnt.append(bool(spans_left) and end > spans_left[0][0])
    return Encoded(ids, learnt, conversation.where)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Tokenizes the messages up to where the assistant's answer begins."""
    return _tokens(tokenizer, render(tokenizer, without_system(tokenizer, messages), prompt=True))[0]


def encode_all(
    tokenizer: PreTrainedTokenizerBase, reading: Reading, max_length: int, on_too_long: OnTooLong
) -> list[Encoded]:
    """Encodes what was read; conversations that are left out are counted in `reading`.

    Raises:
        LabError: one is longer than `max_length` and `on_too_long` is error; or nothing is left.
    """
    kept = []
    for conversation in reading.conversations:
        encoded = encode(tokenizer, conversation)
        length = len(encoded.ids)
        if length > max_length:
            reason = f"too long: {length} tokens, --max-length is {max_length}"
            if on_too_long == "error":
                raise LabError(f"{conversation.where}: {reason}; raise it, or choose --on-too-long truncate or skip")
            if on_too_long == "skip":
                reading.refuse(conversation.where, reason)
                continue
            encoded = Encoded(encoded.ids[:max_length], encoded.learnt[:max_length], encoded.where)
            if not any(encoded.learnt):
                reading.refuse(conversation.where, "answer truncated away: nothing is left to learn")
                continue
        kept.append(encoded)
    if not kept:
        raise LabError(f"{reading.source}: every conversation was left out; first: {reading.examples[0]}")
    return kept


def encode_plain(tokenizer: PreTrainedTokenizerBase, paragraphs: Sequence[str], max_length: int) -> list[Encoded]:
    """Tokenizes paragraphs of which each token is predicted; long ones are cut."""
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    encoded = []
    for number, text in enumerate(paragraphs, 1):
        ids = (start + tokenizer(text, add_special_tokens=False).input_ids)[:max_length]
        if len(ids) > 1:
            encoded.append(Encoded(ids, [True] * len(ids), f"plain text {number}"))
    return encoded


def check_before_training(tokenizer: PreTrainedTokenizerBase, encoded: Sequence[Encoded], stop_ids: set[int]) -> None:
    """Refuses, before a long run, data and templates whose fault would only show after it.

    Raises:
        LabError: a conversation has nothing to learn; no token that ends generation is ever learnt; the
            sequence begins with two BOS tokens.
    """
    for item in encoded:
        if not any(item.learnt[1:]):  # the first token has nothing before it that could predict it
            raise LabError(
                f"{item.where}: the chat template marks nothing in it to learn; try --template plain, or look with "
                "--show-batch"
            )
    if not any(
        token in stop_ids and learnt for item in encoded for token, learnt in zip(item.ids, item.learnt, strict=True)
    ):
        names = ", ".join(sorted(tokenizer.convert_ids_to_tokens(sorted(stop_ids))))
        raise LabError(
            f"the chat template never lets the model learn to stop: no answer ends with {names}, so answers would "
            "never end; use --template plain, or a template that ends answers with that token"
        )
    bos = tokenizer.bos_token_id
    if bos is not None and encoded[0].ids[:2] == [bos, bos]:
        raise LabError(f"the chat template writes {tokenizer.bos_token} twice; take one out of it")


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Returns ids and character ranges, with exactly one BOS when the tokenizer adds one to plain text."""
    out: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = list(out["input_ids"]), list(out["offset_mapping"])
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:1] != [bos] and tokenizer("").input_ids[:1] == [bos]:
        return [bos, *ids], [(0, 0), *offsets]
    return ids, offsets
