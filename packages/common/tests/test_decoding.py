"""Beam search against trying everything, on a toy whose words nothing can be guessed of."""

import itertools

import pytest
import torch

from labs_common.decoding import (
    NextWord,
    SpecialTokens,
    Tensors,
    beam_search,
    log_probabilities,
    repeating,
    sampled_places,
    write,
)
from labs_common.options import DecodingOptions

pytestmark = pytest.mark.quick

PAD, START, END, UNK = range(4)
TOKENS = SpecialTokens(START, END, PAD, (PAD, START, UNK))
WORDS, LENGTH = (4, 5, 6), 4
VOCABULARY = 7


class Toy:
    """Its words depend on the picture and on all words before, in no order that a search could profit from."""

    def begin(self, features: torch.Tensor) -> tuple[Tensors, Tensors]:
        return {"picture": features}, {"state": torch.ones(len(features), 1, dtype=torch.long)}

    def step(self, words: torch.Tensor, fixed: Tensors, moving: Tensors) -> NextWord:
        state = (moving["state"] * 31 + words * 17 + fixed["picture"][:, None] * 7) % 9973
        place = torch.arange(VOCABULARY)
        logits = ((state[..., None] * (place + 3) * 7919) % 1009).float() / 250
        return NextWord(logits, {"state": state}, None)


def toy_log_probability(picture: int, caption: tuple[int, ...]) -> float:
    fixed, moving = Toy().begin(torch.tensor([picture]))
    total, before = 0.0, START
    for word in caption:
        logits, moving, _ = Toy().step(torch.tensor([[before]]), fixed, moving)
        total += float(log_probabilities(logits, TOKENS.never)[0, 0, word])
        before = word
    return total


def all_captions() -> list[tuple[int, ...]]:
    """Every caption of at most LENGTH words with the end, and those that are cut off there."""
    ended = [(*words, END) for count in range(LENGTH) for words in itertools.product(WORDS, repeat=count)]
    return ended + list(itertools.product(WORDS, repeat=LENGTH))


@pytest.mark.parametrize("power", [0.0, 0.7, 2.0])
def test_a_wide_beam_finds_what_trying_everything_finds(power: float) -> None:
    pictures = list(range(12))
    options = DecodingOptions(beam=150, length_penalty=power)
    found = beam_search(Toy(), torch.tensor(pictures), TOKENS, LENGTH, options)
    lengths = set()
    for picture, words, total in zip(pictures, found.words, found.log_probabilities, strict=True):
        scored = {caption: toy_log_probability(picture, caption) for caption in all_captions()}
        best = max(scored, key=lambda caption: scored[caption] / len(caption) ** power)
        assert tuple(words) == best
        assert total == pytest.approx(scored[best], abs=1e-4)
        lengths.add(len(best))
    assert len(lengths) > 1 or power == 0.0


def test_longer_captions_with_a_larger_penalty() -> None:
    lengths = [
        sum(
            map(
                len,
                beam_search(Toy(), torch.arange(20), TOKENS, 12, DecodingOptions(beam=6, length_penalty=power)).words,
            )
        )
        for power in (0.0, 1.0, 3.0)
    ]
    assert lengths[0] <= lengths[1] <= lengths[2]
    assert lengths[0] < lengths[2]


def test_repeating() -> None:
    words = torch.tensor([[[START, 4, 5, 4]], [[START, 4, 5, 6]]])
    banned = repeating(words, 2, VOCABULARY, TOKENS)
    assert banned[0, 0, 5]
    assert not banned[0, 0, 4]
    assert not banned[1].any() or banned[1].nonzero()[:, 1].tolist() == [PAD]


def test_places_are_sampled_as_torch_does_and_unsound_shares_do_not_stop_it() -> None:
    """Weights that a loss without a number has damaged are the loop's to report, a step later."""
    shares = torch.rand(200, 9, generator=torch.Generator().manual_seed(1))
    expected = torch.multinomial(shares, 1, generator=torch.Generator().manual_seed(2))[:, 0]
    assert torch.equal(sampled_places(shares, torch.Generator().manual_seed(2)), expected)
    found = sampled_places(torch.full((5, 4, 9), float("nan")))
    assert found.shape == (5, 4)
    assert ((found >= 0) & (found < 9)).all()


@pytest.mark.parametrize("beam", [1, 4])
def test_a_caption_may_be_filled_up_with_its_end(beam: int) -> None:
    """CLIP's vocabulary has one token for both; what is written does not depend on it."""
    same = SpecialTokens(START, END, END, TOKENS.never)
    for search in (beam_search, write) if beam == 1 else (beam_search,):
        one, other = (
            search(Toy(), torch.arange(12), tokens, 6, DecodingOptions(beam=beam)) for tokens in (TOKENS, same)
        )
        assert one == other
        assert len({len(words) for words in one.words}) > 1, "some end before others"
        assert all(END not in words[:-1] for words in one.words)
