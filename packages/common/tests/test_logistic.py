"""The probe's layer against scikit-learn, and the search for its penalty."""

import numpy as np
import pytest
import torch

from labs_common.logistic import COARSE, best_penalty, fitted_by_sgd, fitted_layers, solved

pytest.importorskip("sklearn", reason="the labs that probe have scikit-learn")


def task(count: int = 300, width: int = 12, classes: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (count,), generator=generator)
    return centres[labels] + 1.5 * torch.randn(count, width, generator=generator), labels


def objective(layer, features, labels, penalty):
    loss = torch.nn.functional.cross_entropy(layer.logits(features).double(), labels)
    return float(loss + penalty / 2 * layer.weight.double().pow(2).sum())


def test_the_batched_solve_is_scikit_learns_for_every_penalty() -> None:
    features, labels = task()
    penalties = (1e-4, 1e-2, 1.0)
    ours, theirs = solved(features, labels, 4, penalties), fitted_layers(features, labels, 4, penalties)
    for penalty, one, other in zip(penalties, ours, theirs, strict=True):
        found, expected = (objective(layer, features, labels, penalty) for layer in (one, other))
        assert found == pytest.approx(expected, abs=1e-5)
        # Both stop a little before the minimum.
        np.testing.assert_allclose(one.probabilities(features), other.probabilities(features), atol=2e-2)
    assert float(ours[0].weight.norm()) > 2 * float(ours[2].weight.norm())


def test_two_classes_and_classes_without_a_picture() -> None:
    features, labels = task(classes=2)
    one, other = solved(features, labels, 2, (0.01,))[0], fitted_layers(features, labels, 2, (0.01,))[0]
    np.testing.assert_allclose(one.probabilities(features), other.probabilities(features), atol=2e-2)
    layer = fitted_layers(features, labels * 2, 3, (0.01,))[0]
    assert layer.probabilities(features).shape == (300, 3)
    assert layer.probabilities(features)[:, 1].max() < 1e-6


def test_the_penalty_is_found_where_it_is_best() -> None:
    train, validation = task(60, 40, seed=1), task(400, 40, seed=2)
    penalty, tried = best_penalty(train, validation, 4)
    assert tried[penalty] == max(tried.values())
    powers = np.diff(sorted(np.log10(list(tried))))
    assert powers.min() == pytest.approx(1 / 8)
    assert len(tried) == 7 + 2 * 4
    assert tried[penalty] >= tried[min(tried)]


def test_in_batches_it_comes_close_and_is_the_same_each_time() -> None:
    features, labels = task()
    layers = [fitted_by_sgd(features * 5 + 3, labels, 4, 1e-4, 30, 64, 0.1, seed=seed) for seed in (0, 0, 1)]
    best = fitted_layers(features, labels, 4, (1e-3,))[0]
    right = [float((layer.logits(features * 5 + 3).argmax(1) == labels).double().mean()) for layer in layers]
    assert right[0] > float((best.logits(features).argmax(1) == labels).double().mean()) - 0.05
    assert torch.equal(layers[0].weight, layers[1].weight)
    assert not torch.equal(layers[0].weight, layers[2].weight)


def test_it_ends_when_single_precision_tells_no_lower_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a penalty of a million the slope never falls below the tolerance: rounding alone is above it."""
    passes: list[int] = []
    softmax = torch.Tensor.log_softmax

    def counted(logits, dim):
        passes.append(1)
        return softmax(logits, dim)

    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (5_000,), generator=generator)
    features = torch.randn(10, 64, generator=generator)[labels] * 0.12 + torch.randn(5_000, 64, generator=generator)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "log_softmax", counted)
        found = solved(features, labels, 10, COARSE)
    assert len(passes) < 400
    for penalty, ours, theirs in zip(COARSE, found, fitted_layers(features, labels, 10, COARSE), strict=True):
        mine, expected = (objective(layer, features, labels, penalty) for layer in (ours, theirs))
        assert mine <= expected + 1e-5
