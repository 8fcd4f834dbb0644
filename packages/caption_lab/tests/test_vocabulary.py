import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from caption_lab.config import VocabularyOptions
from caption_lab.vocabulary import (
    END,
    PAD,
    START,
    UNK,
    Cleaning,
    build_vocabulary,
    covering_length,
    load_vocabulary,
    padded,
)
from labs_common.errors import LabError

pytestmark = pytest.mark.quick

CAPTIONS = ["A dog runs .", "A dog jumps .", "Two dogs + a man's 3 T-shirts", "a cat"]


def options(**more: object) -> VocabularyOptions:
    return VocabularyOptions(**{"min_count": 1, **more})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cleaning", "words"),
    [
        (Cleaning(), "two dogs a mans 3 t shirts"),
        (Cleaning(lowercase=False), "Two dogs a mans 3 T shirts"),
        (Cleaning(digits=False), "two dogs a mans t shirts"),
        (Cleaning(symbols=True), "two dogs + a mans 3 t shirts"),
        (Cleaning(punctuation=True), "two dogs a man ' s 3 t - shirts"),
    ],
)
def test_cleaning(cleaning: Cleaning, words: str) -> None:
    assert cleaning.words(CAPTIONS[2]) == words.split()


def test_cleaning_leaves_other_scripts_alone() -> None:
    assert Cleaning().words("«سگ» می‌دود، تند!") == ["سگ", "می‌دود", "تند"]


def test_words_by_frequency_after_the_special_ones() -> None:
    vocabulary = build_vocabulary(CAPTIONS, options())
    assert vocabulary.words[:6] == ("<pad>", "<start>", "<end>", "<unk>", "a", "dog")
    assert build_vocabulary(CAPTIONS, options(min_count=2)).words[4:] == ("a", "dog")
    assert build_vocabulary(CAPTIONS, options(vocabulary_size=1)).words[4:] == ("a",)
    with pytest.raises(LabError, match="--min-count 9"):
        build_vocabulary(CAPTIONS, options(min_count=9))


def test_encode_and_decode() -> None:
    vocabulary = build_vocabulary(CAPTIONS, options(max_length=3))
    numbers = vocabulary.encode("A dog eats.")
    assert numbers == [START, vocabulary.words.index("a"), vocabulary.words.index("dog"), UNK, END]
    assert vocabulary.decode(numbers) == "a dog <unk>"
    assert vocabulary.decode([*vocabulary.encode("a cat"), PAD, PAD, 5]) == "a cat"
    # What is longer is cut, and ends all the same.
    assert vocabulary.decode(vocabulary.encode("a dog a cat a dog")) == "a dog a"
    assert vocabulary.encode("a dog a cat")[-1] == END
    assert vocabulary.encode("!!!") == [START, END]
    # A caption cannot smuggle a special token in.
    assert vocabulary.encode("<end> a")[1:-1] == [UNK, vocabulary.words.index("a")]


def test_the_tokenizer_file_says_the_same(tmp_path: Path) -> None:
    vocabulary = build_vocabulary(CAPTIONS, options())
    vocabulary.save(tmp_path)
    assert load_vocabulary(tmp_path) == vocabulary
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    length = vocabulary.length + 2
    for caption in [*CAPTIONS, "a zebra", "", "a dog " * 50]:
        found, numbers = tokenizer.encode(caption), vocabulary.encode(caption)
        assert found.ids == [*numbers, *[PAD] * (length - len(numbers))]
        assert found.attention_mask == [1] * len(numbers) + [0] * (length - len(numbers))
    assert tokenizer.token_to_id("<pad>") == PAD
    fast = pytest.importorskip("transformers", reason="reads tokenizer.json too").PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json")
    )
    captions = ["a dog", "a dog jumps"]
    whole = fast(captions, padding="max_length", max_length=length, return_tensors="pt")
    numbers, there = padded([vocabulary.encode(caption) for caption in captions])
    assert whole["input_ids"].shape == (2, length)
    for batch in (fast(captions, padding=True, return_tensors="pt"), whole):
        assert torch.equal(batch["input_ids"][:, : numbers.shape[1]], numbers)
        assert torch.equal(batch["attention_mask"][:, : numbers.shape[1]].bool(), there)
    assert not whole["attention_mask"][:, numbers.shape[1] :].any()


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    for content in ("{", "[" * 100_000, json.dumps({"words": ["a"], "cleaning": {}, "length": 3})):
        (tmp_path / "vocabulary.json").write_text(content)
        with pytest.raises(LabError, match=r"vocabulary\.json"):
            load_vocabulary(tmp_path)
    words = ["<pad>", "<start>", "<end>", "<unk>", "a"]
    for wrong in ({"length": float("inf")}, {"length": -1}, {"length": 10**400}, {"words": [*words, None]}):
        (tmp_path / "vocabulary.json").write_text(json.dumps({"words": words, "cleaning": {}, "length": 3} | wrong))
        with pytest.raises(LabError, match=r"vocabulary\.json"):
            load_vocabulary(tmp_path)


def test_length_and_padding() -> None:
    assert covering_length([1] * 99 + [50]) == 1
    assert covering_length([1] * 98 + [50] * 2) == 50
    numbers, there = padded([[1, 5, 2], [1, 2]])
    assert numbers.tolist() == [[1, 5, 2], [1, 2, 0]]
    assert there.tolist() == [[True, True, True], [True, True, False]]
