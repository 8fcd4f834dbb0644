"""Tokens from space to space are those of the whole text."""

import logging
import random
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from llm_peft_fa.pieces import PATTERNS, _known, in_pieces

pytestmark = pytest.mark.quick
WORDS = ("سلام", "می‌روم", "کتاب‌ها", "۱۲۳۴", "1234567", "don't", "x", "ﷺ", "é", "e\u0301", "🙂👍🏽", "...", "«تهران»،", "a\tb",
         "\u00a0", "\u2003", "\x1c", "\x85", "\u2028", "\n", "\n\n", "\r\n", "<|user|>\n", "<|end|>", "I'LL", "foo_bar", "½")  # fmt: skip
GAPS = (" ", " ", " ", " ", "  ", "   ", "\n", " \n ", "\t ", " \t", "", "\u200c")


def texts() -> list[str]:
    draw = random.Random(0)
    made = ["", " ", "  ", "a", " a", "a ", " a b ", "x  y", "\n x", "x \n", "<|end|> a", "a <|end|>", "a <|end|> "]
    return made + [
        "".join(draw.choice(WORDS) + draw.choice(GAPS) for _ in range(draw.randint(1, 30))) for _ in range(150)
    ]


def byte_level(pattern: str | None) -> Any:
    """A byte-level BPE whose pieces go over as many characters as the expression lets them."""
    tokenizer = Tokenizer(models.BPE())
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    tokenizer.pre_tokenizer = last
    if pattern is not None:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), last])
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|end|>", "<|user|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts(), trainer)
    return tokenizer


@pytest.mark.parametrize("pattern", [None, *PATTERNS])
@pytest.mark.parametrize("trims", [None, True, False])
def test_ids_and_places_are_those_of_the_whole_text(pattern: str | None, trims: bool | None) -> None:
    made = byte_level(pattern)
    if trims is not None:  # GPT-2's own trims, and says other places of a text's first token
        made.post_processor = processors.ByteLevel(add_prefix_space=True, trim_offsets=trims)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
    whole = tokenizer(texts(), add_special_tokens=False).encodings
    assert whole is not None
    for _ in range(2):  # the second time all is known
        found = in_pieces(tokenizer, texts())
        assert found is not None
        for text, one, other in zip(texts(), found, whole, strict=True):
            assert one.ids == other.ids, repr(text)
            assert one.offsets == list(other.offsets), repr(text)
            assert len(one) == len(other)


def test_what_may_go_over_a_space_is_not_cut() -> None:
    merging, prefixed, other, dropping, normalised, sequence = (byte_level(None) for _ in range(6))
    merging.pre_tokenizer = pre_tokenizers.Metaspace()
    prefixed.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    other.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\w+ \w+"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    dropping.model.dropout = 0.1
    normalised.normalizer = normalizers.NFKC()
    sequence.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    plain = PreTrainedTokenizerFast(tokenizer_object=byte_level(None))
    assert in_pieces(plain, ["a b"])
    for tokenizer in (merging, prefixed, other, dropping, normalised, sequence):
        assert in_pieces(PreTrainedTokenizerFast(tokenizer_object=tokenizer), ["a b"]) is None
    plain.add_tokens([AddedToken("  ", normalized=False)])  # as some have for indentation: still right
    found, whole = in_pieces(plain, texts()), plain(texts(), add_special_tokens=False)["input_ids"]
    assert found is not None
    assert [one.ids for one in found] == whole, "what was known of the smaller vocabulary is forgotten"
    for token in (AddedToken("<x>", rstrip=True), AddedToken("c d"), AddedToken(" foo", single_word=True)):
        plain.add_tokens([token])
        assert in_pieces(plain, ["a b"]) is None
        plain = PreTrainedTokenizerFast(tokenizer_object=byte_level(None))


def test_what_is_remembered_is_bounded_in_tokens(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(None), model_max_length=20)
    monkeypatch.setattr("llm_peft_fa.pieces.REMEMBERED", 100)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    known = _known(tokenizer, len(tokenizer))
    assert known is not None
    for call in range(20):
        texts = [f"a {'xz' * call}{n} {'qj' * 500}{n} b" for n in range(3)]
        found = in_pieces(tokenizer, texts)
        assert found is not None
        assert [one.ids for one in found] == tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        sizes = [len(ids) for ids, _ in known.values()]
        assert known.tokens == sum(sizes) <= 100 + 3 * 32
        assert 0 < max(sizes) <= 32, "long ones are not kept"
    assert not caplog.records, "transformers does not warn of pieces that are long together"
