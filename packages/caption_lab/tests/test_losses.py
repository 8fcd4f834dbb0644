from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from caption_lab.config import DecoderOptions, TrainConfig, VocabularyOptions
from caption_lab.data import Batch
from caption_lab.decoder import Output, ShowTell, Sizes
from caption_lab.losses import (
    Learner,
    SelfCritic,
    attention_penalty,
    masked,
    next_word_loss,
    policy_loss,
    self_critical,
    with_own_guesses,
)
from caption_lab.vocabulary import END, PAD, START, UNK, build_vocabulary
from labs_common.caption_metrics import CiderD

pytestmark = pytest.mark.quick

TARGETS = torch.tensor([[5, 6, END, PAD], [7, END, PAD, PAD]])


def test_padding_is_not_learnt() -> None:
    logits = torch.randn(2, 4, 9)
    by_hand = -torch.stack([
        logits[row, place].log_softmax(0)[TARGETS[row, place]]
        for row, place in (TARGETS != PAD).nonzero().tolist()
    ]).mean()  # fmt: skip
    assert next_word_loss(logits, TARGETS) == pytest.approx(float(by_hand), abs=1e-6)
    changed = logits.clone()
    changed[TARGETS == PAD] = 100.0
    assert next_word_loss(changed, TARGETS) == pytest.approx(float(by_hand), abs=1e-6)


def test_label_smoothing_is_a_mixture_with_all_words() -> None:
    logits = torch.randn(2, 4, 9)
    there = TARGETS != PAD
    spread = -logits.log_softmax(-1)[there].mean()
    expected = 0.9 * next_word_loss(logits, TARGETS) + 0.1 * spread
    torch.testing.assert_close(next_word_loss(logits, TARGETS, 0.1), expected)


def test_penalty_and_its_gradient() -> None:
    attention = torch.rand(2, 4, 5, dtype=torch.float64).softmax(-1).requires_grad_()
    expected = 0.0
    for row in range(2):
        for place in range(5):
            looked = sum(float(attention[row, t, place]) for t in range(4) if TARGETS[row, t] != PAD)
            expected += (1 - looked) ** 2
    assert float(attention_penalty(attention, TARGETS)) == pytest.approx(expected / 10)
    assert torch.autograd.gradcheck(lambda a: attention_penalty(a, TARGETS), (attention,))
    attention_penalty(attention, TARGETS).backward()
    assert attention.grad is not None
    assert not attention.grad[TARGETS == PAD].any(), "what is read after the end looks nowhere"
    everywhere = torch.full((1, 5, 5), 0.2)
    assert float(attention_penalty(everywhere, torch.full((1, 5), 7))) == pytest.approx(0, abs=1e-12)


def test_masked_words() -> None:
    torch.manual_seed(0)
    words = torch.tensor([[START] + [5] * 200 + [PAD] * 50])
    found = masked(words, 0.3, 99)
    assert found[0, 0] == START
    assert set(found[0, 201:].tolist()) == {PAD}
    assert 35 < int((found == 99).sum()) < 85
    assert torch.equal(masked(words, 0.0, 99), words)


def test_own_guesses_replace_words_but_not_the_ends() -> None:
    torch.manual_seed(0)
    words = torch.tensor([[START, 5, 6, 7, END, PAD]]).expand(50, -1)
    logits = torch.full((50, 6, 9), -50.0)
    logits[..., 8] = 50.0
    logits[..., END] = 90.0  # not a guess: the true caption goes on
    found = with_own_guesses(words, Output(logits, None), 0.5)
    assert torch.equal(found[:, 0], words[:, 0])
    assert set(found[:, 5].tolist()) == {PAD}
    assert set(found[:, 1:5].flatten().tolist()) == {5, 6, 7, 8, END}
    assert torch.equal(with_own_guesses(words, Output(logits, None), 0.0), words)


class Plain(torch.nn.Module):
    """A captioner of which the encoder hands its rows on."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.decoder = ShowTell(Sizes(words, 4, 1, 0), DecoderOptions(width=24))
        self.encoder = torch.nn.Module()
        self.encoder.back = lambda rows: rows


def test_policy_gradient_is_minus_advantage_times_log_probability() -> None:
    logits = torch.randn(2, 4, 9, requires_grad=True)
    advantages = torch.tensor([2.0, -1.0])
    policy_loss(logits, TARGETS, advantages).backward()
    allowed = torch.tensor([n not in (PAD, START, UNK) for n in range(9)])
    reference = logits.detach().clone().requires_grad_()
    total = torch.tensor(0.0)
    for row in range(2):
        places = (TARGETS[row] != PAD).nonzero()[:, 0].tolist()
        logs = [
            reference[row, t, TARGETS[row, t]] - reference[row, t][allowed].logsumexp(0)
            for t in places
        ]  # fmt: skip
        total = total - advantages[row] * sum(logs)
    (total / int((TARGETS != PAD).sum())).backward()  # a word of a short caption counts as one of a long one
    torch.testing.assert_close(logits.grad, reference.grad)


@pytest.mark.parametrize("parts", [[[0, 1, 2], [3]], [[0, 1, 2, 3], []]])
def test_processes_together_have_the_loss_of_one(parts: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    words = torch.tensor(
        [[START, 5, 6, 7, END], [START, 8, END, PAD, PAD], [START, END, PAD, PAD, PAD], [START, 5, 5, 5, 5]]
    )
    logits, advantages = torch.randn(4, 4, 9), torch.tensor([2.0, -1.0, 0.5, -3.0])

    def loss(places: list[int], share: float) -> torch.Tensor:
        sampled: Any = SimpleNamespace(sample=lambda *of: (words[places], advantages[places], 1.0))
        model: Any = lambda *of: Output(logits[places], None)  # noqa: E731
        batch = Batch(torch.zeros(len(places)), torch.arange(len(places)), words, places, 1.0, share)
        return self_critical(Learner(TrainConfig(), model, model, None, sampled), batch, 0.0)[0]  # type: ignore[arg-type]

    whole = loss([0, 1, 2, 3], 1.0)
    counts = [sum(int((words[place, 1:] != PAD).sum()) for place in part) for part in parts]
    monkeypatch.setattr("caption_lab.losses.reduce", lambda counted: torch.tensor(sum(counts) / 2))
    found = [loss(part or [0], len(part) / 2) for part in parts]  # a process without a part repeats a caption
    torch.testing.assert_close(sum(found) / 2, whole)


def test_an_unfinished_caption_is_worth_less() -> None:
    references = [["a man riding a wave on a surfboard", "a man is riding a wave"], ["two dogs run", "dogs that run"]]
    vocabulary = build_vocabulary([one for its in references for one in its], VocabularyOptions(min_count=1))
    critic, whole = SelfCritic(references, vocabulary), vocabulary.encode(references[0][0])[1:]
    assert whole[-1] == END
    cut, half, full = critic.rewards([whole[:-1], whole[:-2], whole], [0, 0, 0])
    assert half < full
    assert cut < full, "the same words, but it was cut off before its end"


@pytest.mark.alone
def test_self_critical_training_raises_the_reward() -> None:
    captions = [["a red dog runs here"], ["two blue cats sit there"], ["one green bird sings now"]]
    vocabulary = build_vocabulary([c for those in captions for c in those], VocabularyOptions(min_count=1))
    torch.manual_seed(0)
    np.random.seed(0)
    critic, model = SelfCritic(captions, vocabulary), Plain(len(vocabulary))
    rows, pictures = torch.eye(4)[:3].repeat(40, 1), [0, 1, 2] * 40
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    rewards = []
    for _ in range(60):
        words, advantages, reward = critic.sample(model, rows, pictures)
        rewards.append(reward)
        loss = policy_loss(model.decoder(rows, words[:, :-1]).logits, words[:, 1:], advantages)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert np.mean(rewards[-5:]) > 2 * np.mean(rewards[:5])
    # The reward is the metric itself.
    said = [[vocabulary.words[number] for number in row if number != PAD] for row in words[:, 1:].tolist()]
    expected = CiderD([[[*c.split(), "<end>"] for c in those] for those in captions]).scores(said, pictures)
    assert rewards[-1] == pytest.approx(float(expected.mean()))
