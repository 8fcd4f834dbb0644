"""Tokenizers against the libraries that they are of."""

import io
from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepiece

from clip_lab.tokens import LONGEST, Words, clip_bpe, load_words, make_words, trained_sentencepiece
from labs_common.errors import LabError
from labs_common.scenes.captions import captions
from labs_common.scenes.world import random_scene, scene_generator

pytestmark = pytest.mark.quick

SENTENCES = [caption for number in range(80) for caption in captions(
    random_scene(scene_generator(3, number)), scene_generator(4, number))]  # fmt: skip
ODD = ["A dog's  big\tball , isn't it ?", "Übermäßig CAFÉ", "x < 3 & 4 > 2", "日本語 and a word", "a" * 300, ""]


def test_the_trained_tokenizer_is_sentencepieces_own(tmp_path: Path) -> None:
    backend = trained_sentencepiece(SENTENCES, 300)
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=written, model_type="unigram", vocab_size=300,
        hard_vocab_limit=False, character_coverage=1.0, normalization_rule_name="nmt_nfkc_cf", num_threads=1,
        pad_id=0, unk_id=1, bos_id=2, eos_id=3, minloglevel=2,
    )  # fmt: skip
    model = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    for sentence in SENTENCES:
        assert backend(sentence, add_special_tokens=False).input_ids == model.encode(sentence)
    words = Words(backend, 12)
    assert words.numbers("a red circle")[0] == words.start == 2
    assert words.numbers("a red circle")[-1] == words.end == 3
    # What other programs get from the same files begins and ends alike.
    assert backend("a red circle").input_ids == words.numbers("a red circle")
    words.save(tmp_path)
    again = load_words(tmp_path, 12)
    assert [again.numbers(sentence) for sentence in [*SENTENCES[:40], *ODD]] == [
        words.numbers(sentence) for sentence in [*SENTENCES[:40], *ODD]
    ]


@pytest.mark.parametrize("kind", ["sentencepiece", "clip"])
def test_what_is_written_are_words(kind: str) -> None:
    words = make_words(kind, SENTENCES, 300, 0)
    special = words.special
    assert special is not None
    for sentence in SENTENCES[:40]:
        numbers = words.numbers(sentence)
        said = words.sentence(numbers).replace(" ,", ",")  # to CLIP's a comma is a word
        assert said == sentence.lower()
        assert words.sentence([*numbers, special.pad]) == words.sentence(numbers)
        assert numbers[0] == special.start
        assert numbers[-1] == special.end
        assert not {*special.never} & {*numbers[1:]}
    for start in (None, 3):  # GPT-2's begins as it ends: every caption would be read as ended before its first word
        bare = SimpleNamespace(bos_token_id=start, cls_token_id=None, eos_token_id=3, pad_token_id=0)
        assert Words(bare, 12).start is None
        assert Words(bare, 12).special is None, "without a token to start from nothing can be written"


def test_clips_tokenizer_is_open_clips() -> None:
    open_clip = pytest.importorskip("open_clip")
    words, theirs = Words(clip_bpe(), 77), open_clip.get_tokenizer("RN50")
    assert (len(words), words.start, words.end) == (49408, 49406, 49407)
    for sentence in [*SENTENCES[:60], *ODD[:3], *ODD[4:]]:
        numbers = words.numbers(sentence)
        (expected,) = theirs([sentence])
        assert expected[: len(numbers)].tolist() == numbers
        assert not expected[len(numbers) :].any()


def test_long_captions_are_cut_and_still_end() -> None:
    words = make_words("sentencepiece", SENTENCES, 300, 0)
    assert 8 < words.length <= LONGEST
    lengths = [len(words.numbers(sentence)) for sentence in SENTENCES]
    assert sum(length < words.length for length in lengths) > 0.8 * len(lengths)
    short = Words(words.backend, 5)
    rows = short(["a red circle to the left of a blue square", "one"])
    assert rows.shape[1] == 5
    assert (rows == short.end).sum(1).tolist() == [1, 1]
    assert rows[1, -1] == short.pad


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(LabError, match="--tokenizer no-such-tokenizer"):
        make_words("no-such-tokenizer", SENTENCES, 300, 0)
    with pytest.raises(LabError, match="--tokenizer sentencepiece"):
        make_words("sentencepiece", [], 300, 0)


def test_a_saved_tokenizer_without_its_end_is_refused(tmp_path: Path) -> None:
    """The library reads tokenizer.json alone too, and then knows of no special token."""
    make_words("sentencepiece", SENTENCES, 300, 0).save(tmp_path)
    assert load_words(tmp_path, 9).numbers("one")
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(LabError, match=r"tokenizer_config\.json names no token that ends"):
        load_words(tmp_path, 9)
