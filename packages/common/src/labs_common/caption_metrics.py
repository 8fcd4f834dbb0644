"""BLEU, ROUGE-L and CIDEr-D of captions, how varied they are, and how much of what they say of a drawn scene is true.

Captions and references are cleaned in one way, whatever words a model knows. METEOR and SPICE are left out: those that
papers give are Java programs, METEOR 1.5 with paraphrase tables, SPICE with Stanford's parser. What Python has
(`nltk.translate.meteor_score`) follows an older definition and gives other numbers (nltk issue 2655).
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sacrebleu.metrics.bleu import BLEU, BLEUScore

from labs_common.data.captions import CaptionedPictures
from labs_common.scenes.captions import Claim, claims_of
from labs_common.scenes.world import Scene

Words = Sequence[str]
SCORER = "ptb-1"  # how captions are cleaned and scored; with the scores, so that those of other rules are known
ORDERS = 4  # n-grams of one to four words, in BLEU and in CIDEr
SIGMA = 6.0  # of CIDEr-D's Gaussian over the difference in length
BETA = 1.2  # ROUGE-L's weight of recall, as coco-caption has it
# Penn Treebank's words as Stanford's tokenizer splits them: the ends of contractions (do n't, man 's), then initials
# (u.s.), words with what is inside of them (t-shirt, 3:30, 1,000), and every other sign for itself.
SPLIT = re.compile(
    r"(?<=\w)(?=n't\b)|(?<=[\w.])(?='(?:s|m|d|ll|re|ve)\b)"
    r"|(?<=\bcan)(?=not\b)|(?<=\b[gw][oa]n)(?=na\b)|(?<=\bgot)(?=ta\b)|(?<=\b[lg][ei]m)(?=me\b)"
)
TOKEN = re.compile(
    r"n't\b|'(?:s|m|d|ll|re|ve)\b|(?:\b[^\W\d_]\.){2,}|\b(?:mr|mrs|ms|dr|jr|sr|st|ft|vs|etc)\.|\w+(?:[-/']\w+|(?<=\d)[.,:]\d+)*|[^\w\s]"
)
# What coco-caption's PTBTokenizer takes out after that, as the signs are before Stanford's renames brackets and quotes.
PUNCTUATION = frozenset("'\"`“”‘.?!,:-;")
NOTHING = "<nothing>"  # the one word of references that have none: no caption says it
# As tables call them, in their order.
METRICS = {
    "bleu-1": "BLEU-1", "bleu-2": "BLEU-2", "bleu-3": "BLEU-3", "bleu-4": "BLEU-4", "length-ratio": "length ratio",
    "rouge-l": "ROUGE-L", "cider": "CIDEr-D", "distinct": "distinct captions", "words used": "words used",
    "length": "words a caption",
}  # fmt: skip


@dataclass(frozen=True)
class Truthfulness:
    """The share of what captions claim that is so.

    Attributes:
        by_kind: for each kind of claim how many are right, and how many there are.
        whole: the share of captions that are right in everything.
    """

    by_kind: dict[str, tuple[int, int]]
    whole: float


@dataclass(frozen=True)
class CaptionScores:
    """The captions of a split, and their scores.

    Attributes:
        captions: one for each picture.
        metrics: of them.
        chance: the metrics of true captions that are of other pictures.
        claims: what is right in them, in sampled captions and in those of other pictures; empty where nobody knows
            what is true.
    """

    captions: list[str]
    metrics: dict[str, float]
    chance: dict[str, float]
    claims: dict[str, Truthfulness]


def caption_words(caption: str) -> list[str]:
    """Splits a caption into words as coco-caption does: in small letters, by Penn Treebank's rules, no punctuation."""
    spaced = SPLIT.sub(" ", caption.lower().replace("’", "'"))
    return [word for word in TOKEN.findall(spaced) if word not in PUNCTUATION]


def references_of(pictures: CaptionedPictures) -> list[list[list[str]]]:
    """Returns the words of every true caption of every picture."""
    found = [[*filter(None, map(caption_words, captions))] for captions in pictures.captions]
    return [captions or [[NOTHING]] for captions in found]


def captions_of_others(pictures: CaptionedPictures) -> list[str]:
    """Returns for each picture a true caption of another one: what somebody would score who did not look."""
    order = np.random.default_rng(0).permutation(len(pictures))
    other = {int(here): int(there) for here, there in zip(order, np.roll(order, 1), strict=True)}
    return [pictures.captions[other[place]][0] for place in range(len(pictures))]


def score_captions(
    captions: Sequence[str],
    pictures: CaptionedPictures,
    truth: Mapping[str, Scene],
    sampled: Sequence[Sequence[str]] = (),
) -> CaptionScores:
    """Scores captions, one for each picture, and judges their claims where `truth` knows what the pictures show.

    Then also those of captions that were `sampled`, some for all pictures.
    """
    others = captions_of_others(pictures)
    claims = {}
    if truth:
        scenes = [truth[name] for name in pictures.names]
        claims["written"] = truthfulness(captions, scenes)
        if sampled:
            every = [caption for each in sampled for caption in each]
            claims["drawn by chance"] = truthfulness(every, scenes * len(sampled))
        claims["of another picture"] = truthfulness(others, scenes)
    references = references_of(pictures)
    metrics, chance = (caption_metrics([*map(caption_words, those)], references) for those in (captions, others))
    return CaptionScores([*captions], metrics, chance, claims)


def caption_metrics(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> dict[str, float]:
    """Computes all metrics of captions, one for each picture, against that picture's references.

    BLEU and ROUGE-L are in per cent as in the papers, CIDEr-D as coco-caption gives it (1.0 is usually printed as 100).
    The length ratio is words of the captions over those of the nearest references: what BLEU's brevity penalty sees.
    """
    scores = bleu(captions, references)
    found = {f"bleu-{order}": float(score.score) for order, score in enumerate(scores, 1)}
    found["length-ratio"] = scores[0].sys_len / scores[0].ref_len
    found["rouge-l"] = 100 * float(np.mean([rouge_l(c, r) for c, r in zip(captions, references, strict=True)]))
    found["cider"] = float(np.mean(CiderD(references).scores(captions, range(len(captions)))))
    return found | diversity(captions)


def bleu(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[BLEUScore]:
    """Computes BLEU-1 to BLEU-4 in per cent, of the corpus, not smoothed (Papineni et al. 2002)."""
    most = max(map(len, references))
    # sacrebleu takes the first reference of every picture, then the second, …; None where there is none.
    streams: Any = [[" ".join(r[place]) if place < len(r) else None for r in references] for place in range(most)]
    said = [" ".join(caption) for caption in captions]
    return [
        BLEU(tokenize="none", smooth_method="none", max_ngram_order=order, force=True).corpus_score(said, streams)
        for order in range(1, ORDERS + 1)
    ]


def rouge_l(caption: Words, references: Sequence[Words]) -> float:
    """Computes ROUGE-L as coco-caption does: F of the best precision and the best recall (Lin 2004), 0 to 1."""
    if not caption:
        return 0.0
    common = [longest_common(caption, reference) for reference in references]
    precision = max(common) / len(caption)
    recall = max(length / len(reference) for length, reference in zip(common, references, strict=True))
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def longest_common(one: Words, other: Words) -> int:
    """Returns the length of the longest sequence of words that is in both, not necessarily without gaps."""
    row = [0] * (len(other) + 1)
    for word in one:
        before = 0
        for place, there in enumerate(other, 1):
            before, row[place] = row[place], before + 1 if word == there else max(row[place], row[place - 1])
    return row[-1]


class CiderD:
    """CIDEr-D (Vedantam et al. 2015, section 6): likeness of n-grams, the rare ones counting more.

    The pictures whose references this is made of say how rare an n-gram is.
    """

    def __init__(self, references: Sequence[Sequence[Words]]) -> None:
        counted = [[_grams(reference) for reference in of_picture] for of_picture in references]
        self._rarity = Counter(gram for of_picture in counted for gram in set().union(*of_picture))
        self._pictures = math.log(len(references)) if len(references) else 0.0
        self._references = [[self._vector(grams) for grams in of_picture] for of_picture in counted]

    def scores(self, captions: Sequence[Words], pictures: Sequence[int]) -> np.ndarray:
        """Scores each caption against the references of its picture (captions,), from 0 to 10."""
        found = [self._score(caption, self._references[p]) for caption, p in zip(captions, pictures, strict=True)]
        return np.array(found, dtype=np.float64)

    def _vector(self, grams: Counter[tuple[str, ...]]) -> tuple[list[dict[tuple[str, ...], float]], list[float], int]:
        """Returns the weight of each n-gram by order, the vectors' lengths, and the number of bigrams.

        The latter stands for the caption's length, as in coco-caption's code.
        """
        weights: list[dict[tuple[str, ...], float]] = [{} for _ in range(ORDERS)]
        for gram, count in grams.items():
            weights[len(gram) - 1][gram] = count * (self._pictures - math.log(max(1, self._rarity[gram])))
        norms = [math.sqrt(sum(value * value for value in vector.values())) for vector in weights]
        return weights, norms, sum(count for gram, count in grams.items() if len(gram) == 2)

    def _score(
        self, caption: Words, references: Sequence[tuple[list[dict[tuple[str, ...], float]], list[float], int]]
    ) -> float:
        weights, norms, length = self._vector(_grams(caption))
        total = 0.0
        for theirs, their_norms, their_length in references:
            closeness = math.exp(-((length - their_length) ** 2) / (2 * SIGMA**2))
            for own, other, norm, their_norm in zip(weights, theirs, norms, their_norms, strict=True):
                if norm and their_norm:
                    shared = sum(min(value, other[gram]) * other[gram] for gram, value in own.items() if gram in other)
                    total += closeness * shared / (norm * their_norm)
        return 10 * total / ORDERS / len(references)


def _grams(words: Words) -> Counter[tuple[str, ...]]:
    return Counter(
        tuple(words[place : place + order]) for order in range(1, ORDERS + 1) for place in range(len(words) - order + 1)
    )


def diversity(captions: Sequence[Words]) -> dict[str, float]:
    """Returns the share of captions unlike all others, the number of different words, and the mean length."""
    return {
        "distinct": len({tuple(caption) for caption in captions}) / len(captions),
        "words used": float(len({word for caption in captions for word in caption})),
        "length": float(np.mean([len(caption) for caption in captions])),
    }


def truthfulness(captions: Sequence[str], scenes: Sequence[Scene]) -> Truthfulness:
    """Judges each caption against its scene."""
    judged = [claims_of(caption, scene) for caption, scene in zip(captions, scenes, strict=True)]
    by_kind: dict[str, tuple[int, int]] = {}
    for claim in (claim for claims in judged for claim in claims):
        right, there = by_kind.get(claim.kind, (0, 0))
        by_kind[claim.kind] = (right + claim.right, there + 1)
    return Truthfulness(by_kind, sum(all(claim.right for claim in claims) for claims in judged) / len(judged))


def mistakes(caption: str, scene: Scene) -> list[Claim]:
    """Returns the claims of a caption that are not so."""
    return [claim for claim in claims_of(caption, scene) if not claim.right]
