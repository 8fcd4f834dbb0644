import numpy as np
import pytest
import torch

from caption_lab.config import DecoderOptions, VocabularyOptions
from caption_lab.decoder import Output, ShowTell, Sizes
from caption_lab.losses import (
    SelfCritic,
    attention_penalty,
    masked,
    next_word_loss,
    policy_loss,
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
        total = total - advantages[row] * sum(logs) / len(logs)
    (total / 2).backward()
    torch.testing.assert_close(logits.grad, reference.grad)


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
    expected = CiderD([[c.split() for c in those] for those in captions]).scores(
        [vocabulary.decode(row).split() for row in words[:, 1:].tolist()], pictures
    )
    assert rewards[-1] == pytest.approx(float(expected.mean()))
