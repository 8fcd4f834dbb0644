"""Metrics of captions against coco-caption's own code and nltk's."""

import math
import shutil
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sacrebleu", reason="the labs that write captions have sacrebleu")

from labs_common.caption_metrics import (
    CiderD,
    bleu,
    caption_metrics,
    caption_words,
    captions_of_others,
    diversity,
    longest_common,
    references_of,
    rouge_l,
    score_captions,
)

pytestmark = pytest.mark.quick

WORDS = ["a", "the", "dog", "cat", "runs", "sits", "on", "red", "grass", "two", "and", "white", "near", "big", "ball"]


@pytest.fixture(scope="module")
def corpus() -> tuple[list[list[str]], list[list[list[str]]]]:
    """Captions that share something with their references, of one to fourteen words."""
    generator = np.random.default_rng(0)
    references, captions = [], []
    for _ in range(40):
        base = generator.choice(WORDS, generator.integers(4, 14)).tolist()
        those = []
        for _ in range(5):
            kept = [word for word in base if generator.random() < 0.8] or base
            those.append(kept + generator.choice(WORDS, generator.integers(0, 4)).tolist())
        references.append(those)
        captions.append([w for w in base if generator.random() < 0.9] + generator.choice(WORDS, 2).tolist())
    captions[0] = ["dog"]
    return captions, references


def as_dicts(captions: list[list[str]], references: list[list[list[str]]]) -> tuple[dict, dict]:
    gts = {place: [" ".join(words) for words in those] for place, those in enumerate(references)}
    return gts, {place: [" ".join(words)] for place, words in enumerate(captions)}


def test_bleu_is_that_of_coco_caption_and_nltk(corpus: tuple) -> None:
    captions, references = corpus
    ours = [found.score for found in bleu(captions, references)]
    peer = pytest.importorskip("pycocoevalcap.bleu.bleu", reason="an independent BLEU")
    theirs, _ = peer.Bleu(4).compute_score(*as_dicts(captions, references), verbose=0)
    assert ours == pytest.approx([100 * value for value in theirs], rel=1e-6)
    nltk = pytest.importorskip("nltk.translate.bleu_score", reason="another independent BLEU")
    captions, references = captions[1:], references[1:]  # nltk counts n-grams of captions that are too short for one
    ours = [found.score for found in bleu(captions, references)]
    for order in range(1, 5):
        weights = tuple(1 / order for _ in range(order))
        assert ours[order - 1] == pytest.approx(100 * nltk.corpus_bleu(references, captions, weights), rel=1e-6)


def test_length_ratio_is_what_the_brevity_penalty_sees() -> None:
    references = [[["a", "red", "dog", "runs"], ["one", "dog"]], [["two", "cats", "sit", "there", "now"]]]
    captions = [["a", "red", "dog"], ["two", "cats", "sit"]]  # 3 words are as near to 4 as to 2: the shorter counts
    found = caption_metrics(captions, references)
    assert found["length-ratio"] == pytest.approx(6 / 7)
    assert found["bleu-1"] == pytest.approx(100 * math.exp(1 - 7 / 6)), "all words are right: the penalty alone is left"


def test_rouge_l_and_cider_are_those_of_coco_caption(corpus: tuple) -> None:
    captions, references = corpus
    gts, res = as_dicts(captions, references)
    rouge = pytest.importorskip("pycocoevalcap.rouge.rouge", reason="an independent ROUGE-L").Rouge()
    _, each = rouge.compute_score(gts, res)
    assert [rouge_l(c, r) for c, r in zip(captions, references, strict=True)] == pytest.approx(each.tolist())
    cider = pytest.importorskip("pycocoevalcap.cider.cider", reason="an independent CIDEr-D").Cider()
    mean, each = cider.compute_score(gts, res)
    ours = CiderD(references).scores(captions, range(len(captions)))
    assert ours.tolist() == pytest.approx(each.tolist(), abs=1e-9)
    assert caption_metrics(captions, references)["cider"] == pytest.approx(mean)


def test_as_many_references_as_there_are(corpus: tuple) -> None:
    captions, references = corpus
    captions, references = captions[1:], references[1:]
    fewer = [those[: 1 + place % 5] for place, those in enumerate(references)]
    nltk = pytest.importorskip("nltk.translate.bleu_score", reason="an independent BLEU")
    assert bleu(captions, fewer)[3].score == pytest.approx(100 * nltk.corpus_bleu(fewer, captions), rel=1e-6)


def test_perfect_and_empty_captions() -> None:
    references = [[["a", "red", "dog", "runs", "fast"]], [["two", "cats", "sit", "on", "grass"]]]
    perfect = caption_metrics([those[0] for those in references], references)
    assert perfect["bleu-4"] == pytest.approx(100)
    assert perfect["rouge-l"] == pytest.approx(100)
    assert perfect["cider"] == pytest.approx(10)
    nothing = caption_metrics([[], []], references)
    assert nothing["bleu-1"] == nothing["rouge-l"] == nothing["cider"] == 0
    # Saying it twice is not better: the length is punished and counts are clipped.
    twice = CiderD(references).scores([references[0][0] * 2], [0])
    assert twice[0] < 5


def test_longest_common_sequence() -> None:
    assert longest_common(list("abcbdab"), list("bdcaba")) == 4
    assert longest_common([], list("a")) == 0


def test_diversity() -> None:
    found = diversity([["a", "dog"], ["a", "dog"], ["a", "cat", "sits"]])
    assert found == {"distinct": 2 / 3, "words used": 4, "length": pytest.approx(7 / 3)}


SENTENCES = {
    "A man's dog doesn't run .": "a man 's dog does n't run",
    "Two girls, one in red; the other (in blue) isn't.": "two girls one in red the other ( in blue ) is n't",
    "A t-shirt with a black-and-white 'X' !": "a t-shirt with a black-and-white x",
    "They can't , cannot and won't jump - it's 3:30 p.m.": "they ca n't can not and wo n't jump it 's 3:30 p.m.",
    "A ; B : C , D . E ? F ! G -- H ... I": "a b c d e f g h i",
    'He says "hi" & pays $5 at U.S. shops': "he says hi & pays $ 5 at u.s. shops",
    "He\u2019s at the boys' party .": "he 's at the boys party",
    "Mr. Smith's gonna wanna see 1,000 cats vs. 3/4 of a 3.5 ft. dog": "mr. smith 's gon na wan na see 1,000 cats vs. 3/4 of a 3.5 ft. dog",
    "": "",
}


def test_captions_are_split_as_penn_treebank_does() -> None:
    for sentence, words in SENTENCES.items():
        assert caption_words(sentence) == words.split(), sentence


def test_captions_are_split_as_coco_caption_splits_them() -> None:
    peer = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer", reason="coco-caption's own tokenizer")
    if shutil.which("java") is None:
        pytest.skip("no Java on this machine")
    said = [sentence for sentence in SENTENCES if sentence]
    found = peer.PTBTokenizer().tokenize({place: [{"caption": one}] for place, one in enumerate(said)})
    brackets = {"-lrb-": "(", "-rrb-": ")"}
    for place, sentence in enumerate(said):
        theirs = [brackets.get(word, word) for word in found[place][0].split()]
        assert caption_words(sentence) == theirs, sentence


class Pictures:
    """Of the pictures only the captions are read."""

    captions = (("A dog runs .", "A dog, running!"), ("...",), ("Two cats sit on the grass.", "Cats"))
    names = ("a", "b", "c")

    def __len__(self) -> int:
        return 3


def test_marks_and_capitals_do_not_count() -> None:
    pictures: Any = Pictures()
    assert references_of(pictures)[0] == [["a", "dog", "runs"], ["a", "dog", "running"]]
    assert len(references_of(pictures)[1]) == 1, "a picture always has a reference"
    plain = score_captions(["a dog runs", "two", "two cats sit on the grass"], pictures, {})
    marked = score_captions(["A dog runs .", "two , ", "Two cats sit on the grass !"], pictures, {})
    assert plain.metrics == marked.metrics
    assert plain.metrics["cider"] > plain.chance["cider"]
    others = captions_of_others(pictures)
    assert sorted(others) == sorted(captions[0] for captions in Pictures.captions)
    assert all(other not in own for other, own in zip(others, Pictures.captions, strict=True))
