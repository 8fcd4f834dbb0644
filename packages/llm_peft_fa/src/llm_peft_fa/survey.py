"""Languages, kinds of questions, duplicates and leaks between splits of conversations.

Kinds and languages are told by rules: words at a question's end or beginning, and letters. Near-duplicates are found by
MinHash (Broder 1997) over triples of words, 128 hashes in 16 bands (Leskovec, Rajaraman & Ullman, Mining of Massive
Datasets, section 3.4): of two texts that share 80 % of their triples it finds 95 %, and says so of few that share less.
"""

import re
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from llm_peft_fa.data import Conversation
from llm_peft_fa.spelling import Message, is_arabic

HASHES, BANDS = 128, 16
NEAR = 0.8  # share of triples in common, from which two conversations count as the same
# The first that fits the last sentence of the question. Asking words stand anywhere in Persian, and first in English.
KINDS = {
    "how many, how much": r"چند|چقدر|چه تعداد|چه میزان|how (?:many|much|long|far|old)\b",
    "why": r"چرا|به چه دلیل|علت|why\b",
    "when": r"چه زمان|کِی|چه وقت|چه سال|کدام سال|when\b",
    "where": r"کجا|where\b",
    "who": r"چه کس|کیست|چه شخص|who(?:m|se)?\b",
    "how": r"چگونه|چطور|چه طور|how\b",
    "yes or no": r"^\W*آیا|^(?:is|are|was|were|do|does|did|can|could|will|would|should|has|have)\b",
    "translate": r"ترجمه|translate",
    "summarise": r"خلاصه|summari[sz]e",
    "code": r"```|کد |برنامه‌ای|تابع|\b(?:code|function|python|sql|javascript)\b",
    "what, which": r"چیست|چه |چی |کدام|what\b|which\b",
    "write, list, explain": r"بنویس|بگو|توضیح|فهرست|لیست|شرح|معرفی|نام ببر"
    r"|\b(?:write|list|explain|describe|give|create|generate)\b",
}
PATTERNS = {kind: re.compile(pattern, re.IGNORECASE) for kind, pattern in KINDS.items()}
SENTENCE = re.compile(r"[^.!?؟\n]+[.!?؟]*")
PERSIAN_LETTERS, LATIN = re.compile("[\u0621-\u06d3]"), re.compile("[A-Za-z]")
MULTIPLIERS = np.random.default_rng(0).integers(1, 2**63, (2, HASHES), np.uint64) * np.uint64(2) + np.uint64(1)


def language_of(text: str, row: str = "") -> str:
    """Names the language of most of a text's letters: Persian, Arabic, Latin (script), or other.

    `row` decides between Persian and Arabic if the text hardly shows it.
    """
    persian, latin = len(PERSIAN_LETTERS.findall(text)), len(LATIN.findall(text))
    if 2 * max(persian, latin) <= sum(letter.isalpha() for letter in text):
        return "other"
    return "Latin script" if latin > persian else "Arabic" if is_arabic(text, row) else "Persian"


def kind_of(question: str) -> str:
    """Names the kind of a question, by the rules of `KINDS` on its last sentence."""
    sentences = SENTENCE.findall(question.strip()) or [""]
    return next((kind for kind, pattern in PATTERNS.items() if pattern.search(sentences[-1].strip())), "other")


def signature(messages: Iterable[Message]) -> np.ndarray:
    """Returns the MinHash of a conversation: (128,) of uint32, of which two share as many as of their triples."""
    words = [zlib.crc32(word.encode()) for message in messages for word in message["content"].split()]
    hashes = np.array(words or [0], np.uint64)
    if len(hashes) > 2:
        hashes = hashes[:-2] * np.uint64(0x9E3779B97F4A7C15) + hashes[1:-1] * np.uint64(0xC2B2AE3D27D4EB4F) + hashes[2:]
    hashes ^= hashes >> np.uint64(29)
    mixed = hashes[:, None] * MULTIPLIERS[0] + MULTIPLIERS[1]  # (triples, hashes), modulo 2^64
    return (mixed >> np.uint64(32)).min(0).astype(np.uint32)


def first_alike(signatures: np.ndarray) -> np.ndarray:
    """Finds for each conversation the first that is nearly the same, which may be itself; signatures are (n, 128)."""
    first = np.arange(len(signatures))
    for band in np.split(signatures, BANDS, axis=1):
        keys = np.ascontiguousarray(band).view(f"V{band.shape[1] * 4}").ravel()
        _, begins, group = np.unique(keys, return_index=True, return_inverse=True)
        other = begins[group]
        alike = (signatures == signatures[other]).mean(1) >= NEAR
        first = np.where(alike, np.minimum(first, other), first)
    return first


def repeats(parts: Mapping[str, Sequence[np.ndarray]]) -> list[tuple[str, int]]:
    """Counts conversations of the first part that repeat an earlier one, and those of others that are in the first."""
    first = first_alike(np.stack([one for part in parts.values() for one in part]))
    size = len(next(iter(parts.values())))
    rows = [("near-duplicates of an earlier conversation:", int((first < np.arange(len(first)))[:size].sum()))]
    begin = size
    for name, part in list(parts.items())[1:]:
        leaked = int((first[begin : begin + len(part)] < size).sum())
        rows.append((f"of {len(part):,} to {name}, nearly the same in training:", leaked))
        begin += len(part)
    return rows


def surveyed(conversations: Iterable[Conversation]) -> tuple[Counter[str], Counter[str], list[np.ndarray]]:
    """Counts languages and kinds of last questions, and makes the signatures, in one pass."""
    languages, kinds, signatures = Counter[str](), Counter[str](), []
    for conversation in conversations:
        messages = conversation.messages
        languages[language_of("\n".join(message["content"] for message in messages))] += 1
        kinds[kind_of(messages[-2]["content"])] += 1
        signatures.append(signature(messages))
    return languages, kinds, signatures
