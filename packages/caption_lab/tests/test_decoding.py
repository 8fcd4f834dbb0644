"""The search with each of the captioners; `labs_common` tests the search itself."""

import itertools
from dataclasses import replace

import pytest
import torch

from caption_lab.config import DecoderOptions
from caption_lab.decoder import CAPTIONERS, ShowTell, Sizes
from caption_lab.vocabulary import END, PAD, START, TOKENS, UNK
from labs_common.decoding import beam_search, log_probabilities, write
from labs_common.options import DecodingOptions

pytestmark = pytest.mark.quick


def decoders() -> dict[str, tuple[torch.nn.Module, torch.Tensor]]:
    torch.manual_seed(1)
    grid = torch.randn(9, 6, 10)
    options = DecoderOptions(width=16, layers=2, heads=4, dropout=0.3)
    return {
        name: (kind.decoder(Sizes(30, 10, 6, 12), options).eval(), 3 * grid[:, 0] if kind.one_vector else grid)
        for name, kind in CAPTIONERS.items()
        if not kind.language
    }


@pytest.fixture(params=[name for name, kind in CAPTIONERS.items() if not kind.language])
def decoder(request: pytest.FixtureRequest) -> tuple[torch.nn.Module, torch.Tensor]:
    found, features = decoders()[request.param]
    with torch.no_grad():  # untrained, all words are about equally probable: make them differ, and captions end
        found.to_words.weight *= 6
        found.to_words.bias[END] += 2.0
    return found, features


def test_width_one_is_greedy(decoder: tuple) -> None:
    model, features = decoder
    greedy = write(model, features, TOKENS, 12, DecodingOptions(beam=1))
    beam = beam_search(model, features, TOKENS, 12, DecodingOptions(beam=1))
    assert beam.words == greedy.words
    assert beam.log_probabilities == pytest.approx(greedy.log_probabilities, abs=1e-4)


@pytest.mark.parametrize("beam", [1, 4])
def test_a_batch_says_what_one_by_one_says(decoder: tuple, beam: int) -> None:
    model, features = decoder
    options = DecodingOptions(beam=beam)
    together = write(model, features, TOKENS, 12, options, attention=True)
    for place in range(len(features)):
        alone = write(model, features[place : place + 1], TOKENS, 12, options, attention=True)
        assert alone.words[0] == together.words[place]
        assert alone.log_probabilities[0] == pytest.approx(together.log_probabilities[place], abs=1e-4)
        if together.attention:
            torch.testing.assert_close(alone.attention[0], together.attention[place], atol=1e-5, rtol=0)


def test_attention_belongs_to_the_words_that_were_kept(decoder: tuple) -> None:
    """The maps of a beam are those of its own words: showing the caption again gives the same ones."""
    model, features = decoder
    found = beam_search(model, features, TOKENS, 12, DecodingOptions(beam=4), attention=True)
    if not found.attention:
        assert isinstance(model, ShowTell)
        return
    for place, (words, attention) in enumerate(zip(found.words, found.attention, strict=True)):
        assert len(attention) == len(words)
        torch.testing.assert_close(attention.sum(1), torch.ones(len(words)))
        fixed, moving = model.begin(features[place : place + 1])
        for before, seen in zip([START, *words[:-1]], attention, strict=True):
            _, moving, again = model.step(torch.tensor([[before]]), fixed, moving)
            torch.testing.assert_close(again[0, 0], seen, atol=1e-5, rtol=0)


def test_a_wider_beam_is_never_less_probable_on_average(decoder: tuple) -> None:
    model, features = decoder
    by_width = [
        sum(beam_search(model, features, TOKENS, 12, DecodingOptions(beam=beam, length_penalty=0.0)).log_probabilities)
        for beam in (1, 3, 30)
    ]
    assert by_width[0] <= by_width[1] + 1e-4
    assert by_width[0] <= by_width[2] + 1e-4


def test_what_is_never_written_and_never_repeated(decoder: tuple) -> None:
    model, features = decoder
    with torch.no_grad():
        model.to_words.bias[END] -= 50.0  # go on to the end
        model.to_words.bias[[PAD, START, UNK]] += 50.0
    for options in (DecodingOptions(beam=1), DecodingOptions(beam=3), DecodingOptions(beam=1, top_p=0.9)):
        free = write(model, features, TOKENS, 12, options)
        assert not {PAD, START, UNK} & {word for words in free.words for word in words}
        for words in write(model, features, TOKENS, 12, replace(options, no_repeat=2)).words:
            pairs = list(itertools.pairwise(words))
            assert len(pairs) == len(set(pairs))
        for words in write(model, features, TOKENS, 12, replace(options, no_repeat=1)).words:
            assert len(words) == len(set(words))


def test_drawing_from_the_nucleus() -> None:
    model, features = decoders()["show_tell"]
    features = features[:1].expand(400, -1)

    def drawn(top_p: float, temperature: float = 1.0) -> set[int]:
        options = DecodingOptions(top_p=top_p, temperature=temperature)
        found = write(model, features, TOKENS, 1, options, torch.Generator().manual_seed(0))
        return {words[0] for words in found.words}

    fixed, moving = model.begin(features[:1])
    shares = log_probabilities(model.step(torch.tensor([[START]]), fixed, moving).logits, TOKENS.never)[0, 0].exp()
    ordered = shares.sort(descending=True)
    for top_p in (0.05, 0.3, 0.6):
        count = int((ordered.values.cumsum(0) < top_p).sum()) + 1
        assert drawn(top_p) <= set(ordered.indices[:count].tolist())
    assert drawn(0.05) == {int(shares.argmax())} or len(drawn(0.05)) > 1
    assert len(drawn(1.0)) > len(drawn(0.3))
    assert len(drawn(1.0, 0.05)) < len(drawn(1.0))


def test_the_same_seed_draws_the_same(decoder: tuple) -> None:
    model, features = decoder
    options = DecodingOptions(top_p=0.9)
    one, two = (write(model, features, TOKENS, 12, options, torch.Generator().manual_seed(3)).words for _ in range(2))
    assert one == two
