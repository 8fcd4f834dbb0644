"""Conversations to tokens, with a mark on the tokens that are learnt.

A conversation is rendered by a chat template, the tokenizer's own or the plain one. What the assistant says
is found by construction: the text up to an answer, as inference renders it, and the text up to its end are rendered
too, and the first must be the beginning of the second. If each is also a beginning of the whole, all answers are
learnt in one row; if the template rewrites earlier turns (thinking, another end), each answer is a row of its own,
after what a model will see before it. Nothing is searched for in the text.
"""

import bisect
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from labs_common.errors import LabError, text_of
from llm_peft_fa.config import Thinking
from llm_peft_fa.data import Conversation
from llm_peft_fa.pieces import in_pieces
from llm_peft_fa.spelling import Message

Spans = list[tuple[int, int]]  # of characters
Encoding = Any  # of the package tokenizers
Text = tuple[str, Spans, Spans | None, str]  # what is learnt of it, its blocks if any, and where it is from

# For base models without a chat template:
#
#   <bos>### System:\n…\n\n### User:\n…\n\n### Assistant:\n…<eos>\n\n
PLAIN = """\
{{ bos_token or '' }}{% for message in messages %}### {{ message['role'] | capitalize }}:
{{ message['content'] | trim }}{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}


{% endfor %}{% if add_generation_prompt %}### Assistant:
{% endif %}"""

# Templates write today's date (Llama 3, gpt-oss), and a run would not be the same tomorrow. The date is the one that
# Llama 3's own template falls back on, in the two formats that are in use.
FIXED: dict[str, Any] = {"date_string": "26 Jul 2024"}
TODAY = "{% macro strftime_now(format) %}{{ '2024-07-26' if format == '%Y-%m-%d' else '26 Jul 2024' }}{% endmacro %}"
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# DeepSeek's generation prompt opens the thinking whatever it is told; Qwen's templates close it so where it is off.
OPENED, CLOSED = re.compile(r"<think>\s*\Z"), "<think>\n\n</think>\n\n"
THOUGHT = re.compile(r"<think>\s*(</think>\s*)?\Z")
TWICE = re.compile(r"<think>\s*</think>\s*<think>")  # by a template that takes an answer's thinking apart from it
THINKS = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)
HIDDEN = "\ue000" * len("</think>")  # of the private use area: no template looks for it
# What others, who do not say that thinking is off, get before and after an exported template.
OFF = "{%- if enable_thinking is not defined %}{% set enable_thinking = false %}{% endif -%}"
CLOSE = "{%- if add_generation_prompt %}{{ '\\n</think>\\n\\n' }}{% endif %}"
THINKING = "labs_thinking"  # the key of tokenizer_config.json that takes --thinking to chat and evaluate


@dataclass(frozen=True)
class Encoded:
    """A conversation as tokens; `learnt[i]` says whether the model is taught to predict token i."""

    ids: list[int]
    learnt: list[bool]
    where: str

    def __post_init__(self) -> None:
        assert len(self.ids) == len(self.learnt)


def set_template(tokenizer: PreTrainedTokenizerBase, template: str, thinking: Thinking | None = None) -> None:
    """Gives the tokenizer the chat template that `--template` names (auto, plain, or a file), and `--thinking`.

    Without `thinking` it stays as it was saved with the tokenizer; else it is off.

    Raises:
        LabError: the file cannot be read, or the tokenizer has no end-of-sequence token for the plain one.
    """
    if thinking is not None:
        tokenizer.init_kwargs.pop(THINKING, None)
        if thinking != "off":
            tokenizer.init_kwargs[THINKING] = thinking
            if isinstance(tokenizer.chat_template, str):  # of an export that answers at once
                tokenizer.chat_template = tokenizer.chat_template.removeprefix(OFF).removesuffix(CLOSE)
    if template not in ("auto", "plain"):
        tokenizer.chat_template = text_of(Path(template), f"--template {template} (a file, auto or plain)")
    elif template == "plain" or not tokenizer.chat_template:
        if tokenizer.eos_token is None:
            raise LabError("--template plain: this tokenizer has no end-of-sequence token to end an answer with")
        tokenizer.chat_template = PLAIN


def _keeps_thinking(tokenizer: PreTrainedTokenizerBase) -> bool:
    return bool(tokenizer.init_kwargs.get(THINKING) == "keep")


def stands_alone(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the template so that its generation prompt is the trained one without `enable_thinking=False` too."""
    template = str(tokenizer.get_chat_template())
    if _keeps_thinking(tokenizer) or template.startswith(OFF):
        return template
    asked = prepared(tokenizer, [{"role": "user", "content": "?"}])
    opened = OPENED.search(_rendered(tokenizer, asked, prompt=True)[0])
    if not opened and "enable_thinking" not in template:
        return template
    return OFF + template.rstrip("\n") + (CLOSE if opened else "")


def _rendered(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], prompt: bool = False
) -> tuple[str, Spans | None]:
    """Renders the messages, with the opening of an answer at the end if `prompt`.

    Returns the text and what of it is in `{% generation %}` blocks; None if the template has none, and of prompts.

    Raises:
        LabError: the template does not accept such messages.
    """
    template = tokenizer.get_chat_template()
    marked = not prompt and GENERATION.search(template) is not None
    options = FIXED if _keeps_thinking(tokenizer) else FIXED | {"enable_thinking": False}
    if "strftime_now" in template:
        template = TODAY + template
    try:
        texts, blocks = cast(Any, render_jinja_template)(  # it is annotated as if it gave one text
            [list(messages)], chat_template=template, add_generation_prompt=prompt,
            return_assistant_tokens_mask=marked, **{**tokenizer.special_tokens_map, **options},
        )  # fmt: skip
    except jinja2.TemplateError as error:
        raise LabError(f"the chat template cannot be used ({error}); try --template plain") from error
    return texts[0], blocks[0] if marked else None


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    """Renders the messages as text.

    Raises:
        LabError: the template does not accept such messages.
    """
    return _rendered(tokenizer, prepared(tokenizer, messages))[0]


@lru_cache(maxsize=4)
def takes(tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[bool, bool, bool]:
    """Tells whether the template wants texts in parts, as of models that see, and whether it has a system turn.

    Also whether it opens and closes thinking before an answer that thinks, and wants that apart (Qwen3.8).
    `template` is the tokenizer's own: another one is asked anew.
    """
    mark = "a text that no template has"

    def text(parts: bool, **said: str) -> str:
        turns = [{"role": role, "content": content} for role, content in said.items()]
        try:
            return _rendered(tokenizer, _in_parts(turns) if parts else turns)[0]
        except LabError:
            return ""

    parts = mark not in text(False, user=mark) and mark in text(True, user=mark)
    twice = TWICE.search(text(parts, user="?", assistant="<think>\n?\n</think>\n\n?"))
    return parts, mark in text(parts, system=mark, user="?"), twice is not None


def _in_parts(messages: Sequence[Message]) -> list[dict[str, Any]]:
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]


def prepared(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Puts messages as the template takes them.

    A system message goes before the first question where the template refuses or drops it.
    """
    parts, system, apart = takes(tokenizer, tokenizer.get_chat_template())
    messages = list(messages)
    if apart and _keeps_thinking(tokenizer):
        for place, message in enumerate(messages):
            if message["role"] == "assistant" and (found := THINKS.fullmatch(message["content"])):
                thought, said = (part.strip() for part in found.groups())
                messages[place] = message | {"content": said, "reasoning_content": thought}
    if messages[0]["role"] == "system" and not system:
        said, question, *rest = messages
        messages = [{"role": "user", "content": f"{said['content'].strip()}\n\n{question['content']}"}, *rest]
    return _in_parts(messages) if parts else messages


def _prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]]) -> str:
    """Renders prepared messages up to where the answer to them begins, the same in training and inference."""
    text = _rendered(tokenizer, messages, prompt=True)[0]
    return text if _keeps_thinking(tokenizer) else OPENED.sub(CLOSED, text)


def _answered(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], prompt: str
) -> tuple[str, Spans | None]:
    """Renders prepared messages that end with an answer; the text begins with `prompt` if the template allows it."""
    text, blocks = _rendered(tokenizer, messages)
    before = THOUGHT.sub("", prompt)
    if text.startswith(prompt) or before == prompt:
        return text, blocks
    # The prompt has a block of thinking which the template leaves out of answers, with all that stands before its end.
    keep = _keeps_thinking(tokenizer)
    if keep and isinstance(messages[-1]["content"], str):
        *earlier, last = messages
        text, blocks = _rendered(tokenizer, [*earlier, last | {"content": last["content"].replace("</think>", HIDDEN)}])
        text = text.replace(HIDDEN, "</think>")
    answer = text[len(before) :]
    if text.startswith(prompt) or not text.startswith(before) or (not keep and "</think>" in answer):
        return text, blocks
    thought = re.match(r"\s*<think>\s*", answer) if keep else None
    whole = prompt + answer[thought.end() :] if thought else before + CLOSED + answer
    longer = len(whole) - len(text)
    return whole, blocks and [(start, end + longer) for start, end in blocks if end > len(before)]


def encode(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> list[Encoded]:
    """Tokenizes a conversation into one row, or a row for each answer; answers and the tokens that end them are learnt.

    Where the template has `{% generation %}` blocks, only what is in them.

    Raises:
        LabError: what the template makes of an answer does not continue the prompt, or lacks a part of the answer.
    """
    (rows,) = encode_batch(tokenizer, [conversation])
    return rows


def encode_batch(tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation]) -> list[list[Encoded]]:
    """Tokenizes several conversations at once, which is faster; see `encode`."""
    texts = [_texts(tokenizer, conversation) for conversation in conversations]
    flat = [text for rows in texts for text in rows]
    tokens = iter(_tokens(tokenizer, [text for text, *_ in flat]))
    return [[_encoded(tokenizer, row, *next(tokens)) for row in rows] for rows in texts]


def _texts(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> list[Text]:
    """Renders a conversation as one row, or a row for each answer."""
    messages = prepared(tokenizer, conversation.messages)
    rows: list[tuple[str, Spans, Spans | None]] = []
    for place, message in enumerate(conversation.messages, len(messages) - len(conversation.messages)):
        if message["role"] == "assistant":
            prompt = _prompt(tokenizer, messages[:place])
            text, blocks = _answered(tokenizer, messages[: place + 1], prompt)
            # White space after the token that ends the turn is never generated.
            start, end = len(prompt), len(text.rstrip())
            shown = text.startswith(prompt) and _holds(text[start:end], message["content"])
            if not shown or TWICE.search(text):
                raise LabError(f"{conversation.where}: {_reason(tokenizer, message['content'])}")
            rows.append((text, [(start, end)], blocks))
    whole, _, blocks = rows[-1]
    if all(whole.startswith(text) for text, _, _ in rows):
        return [(whole, [span for _, (span,), _ in rows], blocks, conversation.where)]
    return [
        (text, spans, blocks, f"{conversation.where}, answer {number}")
        for number, (text, spans, blocks) in enumerate(rows, 1)
    ]


def _holds(text: str, answer: str) -> bool:
    """Tells whether an answer is in the text, white space and where its thinking opens aside."""
    if answer.strip() in text:  # as nearly always; what follows says the same of it, and takes ten times as long
        return True
    return "".join(answer.split()).removeprefix("<think>") in "".join(text.split())


def _reason(tokenizer: PreTrainedTokenizerBase, answer: str) -> str:
    """Says why an answer cannot be learnt with this template."""
    if "think>" in answer and not _keeps_thinking(tokenizer):
        return "an answer thinks (<think>…</think>), and --thinking is off; take --thinking keep, or leave it out"
    if "think>" in answer:
        return (
            "an answer thinks (<think>…</think>), and the chat template closes the thinking before it begins; take "
            "--template with a file that leaves it open, or --thinking off and answers without it"
        )
    return (
        "the chat template does not put the whole answer behind its own generation prompt, so what is learnt would not "
        "be what is asked for later; try --template plain"
    )


def _encoded(tokenizer: PreTrainedTokenizerBase, row: Text, ids: list[int], encoding: Encoding) -> Encoded:
    """Marks the tokens of a row that are learnt: those of its spans, of several blocks only what is in one of them too.

    Where a token would be of prompt and answer, two take its place: inference begins after the prompt alone.
    """
    text, spans, blocks, where = row
    # A few tokens are looked at, by bisection: to make a list of all of their ranges takes half as long as to tokenize.
    ranges: Callable[[int], Any] = encoding.token_to_chars
    count = len(encoding)

    def after(place: int) -> int:  # the first token that ends after this character
        return bisect.bisect_right(range(count), place, key=lambda token: ranges(token)[1])

    def begins(place: int) -> int:  # the first token that begins there or later
        return bisect.bisect_left(range(count), place, key=lambda token: ranges(token)[0])

    def cuts_a_token(start: int) -> bool:
        token, other = after(start), begins(start)
        return token < count and ranges(token)[0] < start and (other == count or ranges(other)[0] != start)

    if blocks is None:
        learnable = spans
    else:
        pairs = ((max(a, c), min(b, d)) for a, b in spans for c, d in blocks)
        learnable = [(start, end) for start, end in pairs if start < end]
    learnt = [False] * len(ids)
    if cuts := [start for start, _ in spans if cuts_a_token(start)]:
        ids, offsets = [], list[tuple[int, int]]()
        for start, end in itertools.pairwise([0, *cuts, len(text)]):
            ((more, part),) = _tokens(tokenizer, [text[start:end]], whole=start == 0)
            put = [(start, start)] * (len(more) - len(part))  # the BOS
            ids, offsets = ids + more, offsets + put + [(a + start, b + start) for a, b in part.offsets]
        learnt = [any(first < end and last > start for start, end in learnable) for first, last in offsets]
    else:
        put_before = len(ids) - count
        for start, end in learnable:
            for token in range(after(start), begins(end)):
                learnt[put_before + token] = True
    return Encoded(ids, learnt, where)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Tokenizes the messages up to where the assistant's answer begins."""
    ((ids, _),) = _tokens(tokenizer, [_prompt(tokenizer, prepared(tokenizer, messages))])
    return ids


def encode_plain(tokenizer: PreTrainedTokenizerBase, paragraphs: Sequence[str], max_length: int) -> list[Encoded]:
    """Tokenizes paragraphs of which each token is predicted; long ones are cut."""
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    encoded = []
    for number, text in enumerate(paragraphs, 1):
        ids = (start + tokenizer(text, add_special_tokens=False).input_ids)[:max_length]
        if len(ids) > 1:
            encoded.append(Encoded(ids, [True] * len(ids), f"plain text {number}"))
    return encoded


def _tokens(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], whole: bool = True
) -> list[tuple[list[int], Encoding]]:
    """Returns each text's ids, and their encoding, which knows the characters of each.

    Of `whole` texts the ids begin with exactly one BOS if the tokenizer adds one to plain text; the encoding lacks it.
    """
    found = [(pieces.ids, pieces) for pieces in in_pieces(tokenizer, texts) or []]
    if not found:
        out: Any = tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False
        )
        found = list(zip(out["input_ids"], out.encodings, strict=True))
    bos = tokenizer.bos_token_id
    if whole and bos is not None and tokenizer("").input_ids[:1] == [bos]:
        return [(ids if ids[:1] == [bos] else [bos, *ids], encoding) for ids, encoding in found]
    return found
