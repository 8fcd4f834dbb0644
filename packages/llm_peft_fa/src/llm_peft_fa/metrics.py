"""Scores of answers: right, near the reference, in which language, repeated, refused, cut off; by kind of task."""

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import sacrebleu

from llm_peft_fa.equality import same
from llm_peft_fa.persian import task_of
from llm_peft_fa.spelling import Message
from llm_peft_fa.survey import kind_of, language_of

Scores = dict[str, float]

REFUSAL = re.compile(
    r"متأسف|متاسف|عذرخواهی|معذرت|(?:نمی[\u200c ]?توان(?:م|یم)|قادر نیستم).{0,40}(?:کمک|پاسخ|جواب|انجام|ارائه)"
    r"|به عنوان یک (?:مدل|هوش)|\bI(?:['’]m| am) (?:sorry|unable|not able)|\bI can(?:['’]t|not)\b|\bas an AI\b",
    re.IGNORECASE,
)
REFUSED_WITHIN = 120  # characters: later in an answer such words are mostly part of it


@dataclass(frozen=True)
class Prompt:
    """Messages that end with a question, and the answer that the data gives, if it does."""

    messages: list[Message]
    reference: str | None = None
    verifiable: bool = False


@dataclass(frozen=True)
class Answer:
    """The text that a model gave, and whether it was cut at the longest answer allowed before it had ended."""

    text: str
    truncated: bool = False


def scores(prompts: Sequence[Prompt], said: Sequence[Answer]) -> Scores:
    """Computes the scores of answers; one that no prompt allows is left out.

    Exact match is over verifiable prompts, by `same`. chrF (Popović 2015, sacrebleu's, 0 to 100) is over all that have
    a reference, and where some answers were cut off also over those and over the others apart. distinct-n are the
    different n-grams over all n-grams (Li et al. 2016, section 5). Repetition is the mean over answers of the share of
    4-grams that stood in the answer before (seq-rep-4, Welleck et al. 2020). The languages are shares of the answers
    in letters to prompts in Persian.
    """
    found: Scores = {}
    pairs = [(answer, prompt) for prompt, answer in zip(prompts, said, strict=True) if prompt.reference is not None]
    checked = [same(answer.text, str(prompt.reference)) for answer, prompt in pairs if prompt.verifiable]
    if checked:
        found["exact match"] = statistics.fmean(checked)
    cut = [pair for pair in pairs if pair[0].truncated]
    parts = {"chrF": pairs}
    if cut:
        parts |= {"chrF, ended": [pair for pair in pairs if not pair[0].truncated], "chrF, truncated": cut}
    for name, part in parts.items():
        if part:
            found[name] = corpus_chrf([(answer.text, str(prompt.reference)) for answer, prompt in part])
    words = [answer.text.split() for answer in said]
    for n in (1, 2):
        if grams := [gram for answer in words for gram in _grams(answer, n)]:
            found[f"distinct-{n}"] = len(set(grams)) / len(grams)
    if said:
        found["truncated"] = statistics.fmean(answer.truncated for answer in said)
        found["repetition"] = statistics.fmean(map(repetition, words))
        found["refusals"] = statistics.fmean(map(refuses, (answer.text for answer in said)))
        found["words per answer"] = statistics.fmean(map(len, words))
    if pairs:
        found["words per reference"] = statistics.fmean(len(str(prompt.reference).split()) for _, prompt in pairs)
    persian = [
        found_in for prompt, answer in zip(prompts, said, strict=True)
        if language(asked := prompt.messages[-1]["content"]) == "Persian"
        and (found_in := language(answer.text, asked)) != "none"
    ]  # fmt: skip
    if persian:
        found |= {f"in {name}": persian.count(name) / len(persian) for name in ("Persian", "English", "other")}
    return found


def scores_by_kind(prompts: Sequence[Prompt], said: Sequence[Answer]) -> dict[str, Scores]:
    """Computes the scores of each kind of task apart, and the number of its prompts; the most frequent first."""
    kinds = [task_or_kind(prompt.messages[-1]["content"]) for prompt in prompts]
    found = {}
    for kind in sorted(set(kinds), key=lambda kind: (-kinds.count(kind), kind)):
        places = [place for place, name in enumerate(kinds) if name == kind]
        part = scores([prompts[place] for place in places], [said[place] for place in places])
        found[kind] = {"prompts": float(len(places))} | part
    return found


def corpus_chrf(pairs: Sequence[tuple[str, str]]) -> float:
    """Computes chrF over answers and their references (0 to 100)."""
    return float(sacrebleu.corpus_chrf([said for said, _ in pairs], [[reference for _, reference in pairs]]).score)


@cache  # a comparison asks for the same answers again and again
def answer_chrf(said: str, reference: str) -> float:
    """Computes the chrF of one answer, from 0 to 1."""
    return float(sacrebleu.sentence_chrf(said, [reference]).score) / 100


def language(text: str, row: str = "") -> str:
    """Names the language of a text by its letters and commonest words: Persian, English or other; "none" without any.

    `row` is what was asked, for `language_of`. Latin letters are English unless one in fifty has a mark, as in most
    languages of Europe.
    """
    if not any(map(str.isalpha, text)):
        return "none"
    found = language_of(text, row)
    if found == "Latin script":
        marked = sum("z" < letter < "\u0250" for letter in text if letter.isalpha())
        return "English" if 50 * marked <= len(text) else "other"
    return found if found == "Persian" else "other"


def repetition(words: Sequence[str]) -> float:
    """Computes the share of the 4-grams of words that stood before in the same answer; 0 for fewer than five words."""
    grams = _grams(words, 4)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def refuses(answer: str) -> bool:
    """Tells whether an answer begins by declining, by common phrases in Persian and English."""
    return bool(REFUSAL.search(answer[:REFUSED_WITHIN]))


def task_or_kind(question: str) -> str:
    """Names the task of a generated question, or by the survey's rules the kind of another."""
    return task_of(question) or kind_of(question)


def _grams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[at : at + n]) for at in range(len(words) - n + 1)]
