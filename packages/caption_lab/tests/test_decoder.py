import pytest
import torch
from torch.nn import functional

from caption_lab.config import DecoderOptions
from caption_lab.decoder import CAPTIONERS, Sizes
from caption_lab.vocabulary import END, PAD, START

pytestmark = pytest.mark.quick
PLAIN = " --plain"


def made(name: str, dropout: float = 0.0) -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    grid = torch.randn(3, 6, 10)
    kind, plain = CAPTIONERS[name.removesuffix(PLAIN)], name.endswith(PLAIN)
    options = DecoderOptions(width=16, layers=3, heads=4, dropout=dropout, plain=plain)
    decoder = kind.decoder(Sizes(20, 10, 6, 9), options)
    return decoder, grid.mean(1) if kind.one_vector else grid


WORDS_OF_OURS = [name for name, kind in CAPTIONERS.items() if not kind.language]
NAMES = (*WORDS_OF_OURS, "show_attend_tell" + PLAIN)  # what a further captioner has to do as well
WORDS = torch.tensor(
    [[START, 5, 6, 7, 8, 9, 10, 11], [START, 5, 4, 4, 2, PAD, PAD, PAD], [START, 9, 9, 2, PAD, PAD, PAD, PAD]]
)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_at_a_time_is_all_at_once(name: str) -> None:
    model, features = made(name)
    model.eval()
    output = model(features, WORDS)
    fixed, moving = model.begin(features)
    beams = 2  # the same twice
    moving = {key: tensor.expand(-1, beams, *tensor.shape[2:]) for key, tensor in moving.items()}
    for place in range(WORDS.shape[1]):
        logits, moving, attention = model.step(WORDS[:, None, place].expand(-1, beams), fixed, moving)
        there = (WORDS[:, place] != PAD) & (WORDS[:, place] != END)  # nothing is read from <end> on
        for beam in range(beams):
            torch.testing.assert_close(logits[there, beam], output.logits[there, place], atol=1e-5, rtol=1e-4)
        if attention is not None:
            torch.testing.assert_close(attention.sum(-1), torch.ones(3, beams))
            if output.attention is not None:
                torch.testing.assert_close(attention[there, 0], output.attention[there, place], atol=1e-5, rtol=0)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["show_tell", "show_attend_tell"])
def test_the_state_of_an_lstm_is_not_rounded_under_autocast(name: str, precision: torch.dtype) -> None:
    """Over forty words: a state of 8 bits would forget what a word adds."""
    model, features = made(name)
    words = torch.randint(4, 20, (3, 40), generator=torch.Generator().manual_seed(0))
    whole = model(features, words).logits
    with torch.autocast("cpu", precision):
        output = model(features, words)
        _, moving = model.begin(features)
        _, moving, _ = model.step(words[:, :1], {**model.begin(features)[0]}, moving)
    assert moving["hidden"].dtype == moving["cell"].dtype == torch.float32
    torch.testing.assert_close(output.logits.float(), whole, atol=0.02, rtol=0.02)
    output.logits.float().square().mean().backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_what_comes_later_and_padding_change_nothing(name: str) -> None:
    model, features = made(name)
    model.eval()
    whole = model(features, WORDS).logits
    torch.testing.assert_close(model(features, WORDS[:, :4]).logits, whole[:, :4], atol=1e-5, rtol=1e-4)
    changed = WORDS.clone()
    changed[0, 5:] = 3
    torch.testing.assert_close(model(features, changed).logits[0, :5], whole[0, :5], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("group", [2, 16])
@pytest.mark.parametrize("name", NAMES)
def test_captions_of_any_length_in_any_order_are_read_as_each_alone(
    name: str, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is over is not computed; values and gradients are those of captions without padding beside them."""
    monkeypatch.setattr("caption_lab.vocabulary.GROUP", group)
    model, features = made(name)
    words, of = WORDS[[1, 0, 2, 1, 0]], torch.tensor([2, 0, 2, 1, 0])
    lengths = [next((n for n, word in enumerate(row) if word == END), len(row)) for row in words.tolist()]
    output = model(features, words, of)
    alone = [
        model(features[place : place + 1], row[None, :length])
        for place, row, length in zip(of.tolist(), words, lengths, strict=True)
    ]
    for number, (length, one) in enumerate(zip(lengths, alone, strict=True)):
        torch.testing.assert_close(output.logits[number, :length], one.logits[0], atol=1e-5, rtol=1e-4)
        if one.attention is not None:
            torch.testing.assert_close(output.attention[number, :length], one.attention[0], atol=1e-5, rtol=1e-4)
            assert not output.attention[number, length:].any()
    whole, each = (
        torch.autograd.grad(sum(part.square().sum() for part in parts), list(model.parameters()), allow_unused=True)
        for parts in ([output.logits[n, :length] for n, length in enumerate(lengths)], [one.logits for one in alone])
    )
    for found, true in zip(whole, each, strict=True):
        torch.testing.assert_close(found, true, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(("marked", "calls"), [(False, [2, 1]), (True, [3])])
def test_where_weights_are_spread_all_is_read_at_once(
    marked: bool, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes gather a layer together: a number of calls that follows from the captions would have them wait."""
    monkeypatch.setattr("caption_lab.vocabulary.GROUP", 2)
    model, features = made("transformer")
    if marked:
        next(model.layers.parameters()).ds_id = 0  # as DeepSpeed's ZeRO-3 does
    seen: list[int] = []
    model.layers.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    model(features, WORDS)
    assert seen == calls


@pytest.mark.parametrize("name", NAMES)
def test_the_picture_matters_and_everything_learns(name: str) -> None:
    model, features = made(name)
    assert not torch.allclose(model(features, WORDS).logits[0, 0], model(features.flip(0), WORDS).logits[0, 0])
    model(features, WORDS).logits.square().mean().backward()
    still = [key for key, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert not still


def test_dropout_is_only_for_training() -> None:
    for name in NAMES:
        model, features = made(name, dropout=0.5)
        assert not torch.equal(model(features, WORDS).logits, model(features, WORDS).logits)
        model.eval()
        assert torch.equal(model(features, WORDS).logits, model(features, WORDS).logits)


def test_soft_attention_is_the_papers() -> None:
    """Xu et al. 2015, section 3.1.2 and 4.2, written out for one picture and one word."""
    model, features = made("show_attend_tell")
    model.eval()
    a = model.scaled(features[0])
    hidden, cell = model.first_hidden(a.mean(0)), model.first_cell(a.mean(0))
    energies = torch.stack([model.energy(torch.tanh(model.of_place(a_i) + model.of_state(hidden)))[0] for a_i in a])
    alpha = energies.softmax(0)
    z = torch.sigmoid(model.gate(hidden)) * sum(weight * a_i for weight, a_i in zip(alpha, a, strict=True))
    word = model.embedding.weight[START]
    hidden, _ = model.cell(torch.cat([word, z])[None], (hidden[None], cell[None]))
    logits = model.to_words(word + model.from_state(hidden[0]) + model.from_context(z))
    output = model(features, WORDS[:, :1])
    torch.testing.assert_close(output.attention[0, 0], alpha)
    torch.testing.assert_close(output.logits[0, 0], logits)


def test_plain_attention_is_the_exercises() -> None:
    """p = softmax(W h + b) over the places, an LSTM that reads concat(x, z): written out from the weights by name."""
    model, features = made("show_attend_tell --plain")
    w = dict(model.named_parameters())
    a = functional.layer_norm(features, (10,), w["scaled.weight"], w["scaled.bias"])
    hidden, cell = model.first_hidden(a.mean(1)), model.first_cell(a.mean(1))
    output = model(features, WORDS[:, :3])
    for place in range(3):
        p = (hidden @ w["of_state.weight"].T + w["of_state.bias"]).softmax(-1)
        z = torch.einsum("np,npf->nf", p, a)
        x = w["embedding.weight"][WORDS[:, place]]
        gates = torch.cat([x, z], 1) @ w["cell.weight_ih"].T + hidden @ w["cell.weight_hh"].T
        i, f, g, o = (gates + w["cell.bias_ih"] + w["cell.bias_hh"]).chunk(4, 1)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        hidden = o.sigmoid() * cell.tanh()
        torch.testing.assert_close(output.attention[:, place], p)
        torch.testing.assert_close(output.logits[:, place],
                                   model.to_words(x + model.from_state(hidden) + model.from_context(z)))  # fmt: skip
    assert not {"gate.weight", "energy.weight", "of_place.weight"} & set(w)
