"""Perturbations against foolbox, and against their definitions."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from vit_transfer.perturbations import (
    OnLevels,
    deepfool,
    fast_gradient,
    fooling_rate,
    predicted_classes,
    projected,
    universal_fast_gradient,
    universal_perturbation,
)


class Curved(nn.Module):
    """Six classes with curved borders, on levels."""

    def __init__(self, classes: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 64, classes))

    def forward(self, normal: torch.Tensor) -> torch.Tensor:
        return self.body(normal)


@pytest.fixture
def model() -> OnLevels:
    return OnLevels(Curved(), lambda levels: (levels - 127.5) / 40, 8)


@pytest.fixture
def pictures() -> torch.Tensor:
    """Far from 0 and 255, so that clipping has nothing to do."""
    return 127.5 + 25 * torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(1)).clamp(-2, 2)


def test_deepfool_is_foolboxs(model: OnLevels, pictures: torch.Tensor) -> None:
    foolbox = pytest.importorskip("foolbox", reason="an independent DeepFool")
    peer = foolbox.PyTorchModel(model, bounds=(0, 255), device="cpu")
    attack = foolbox.attacks.L2DeepFoolAttack(steps=50, candidates=6, overshoot=0.02)
    predicted = predicted_classes(model, pictures)
    expected, _, fooled = attack(peer, pictures, predicted, epsilons=None)
    own = deepfool(model, pictures, classes=6)
    torch.testing.assert_close(own, expected - pictures, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(deepfool(model, pictures[3], classes=6), own[3], atol=1e-4, rtol=1e-4)
    assert fooled.all()
    assert fooling_rate(predicted, predicted_classes(model, pictures, own)) == 1.0
    # Nearly the shortest: half of it does not do.
    assert fooling_rate(predicted, predicted_classes(model, pictures, own / 2)) == 0.0


def test_fast_gradients_and_the_fooling_rate_are_foolboxs(model: OnLevels, pictures: torch.Tensor) -> None:
    foolbox = pytest.importorskip("foolbox", reason="independent fast gradients")
    peer = foolbox.PyTorchModel(model, bounds=(0, 255), device="cpu")
    predicted = predicted_classes(model, pictures)
    for norm, attack in (("linf", foolbox.attacks.FGSM()), ("l2", foolbox.attacks.L2FastGradientAttack())):
        radius = 4.0 if norm == "linf" else 60.0
        expected, _, fooled = attack(peer, pictures, predicted, epsilons=radius)
        own = fast_gradient(model, pictures, predicted, norm, radius)
        torch.testing.assert_close(own, expected - pictures, atol=1e-3, rtol=1e-4)
        rate = fooling_rate(predicted, predicted_classes(model, pictures, own))
        assert 0 < rate < 1
        assert rate == pytest.approx(float(fooled.float().mean()))
        assert rate == pytest.approx(1 - foolbox.accuracy(peer, pictures + own, predicted))


def test_deepfool_reaches_the_border_of_a_linear_model_in_one_step() -> None:
    """For two classes f = w.x + b the least change is -f w / |w|^2 (Moosavi-Dezfooli et al. 2016, eq. 3)."""
    w = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    class Linear(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            f = (x * w).sum((1, 2, 3)) + 0.7
            return torch.stack([f, torch.zeros_like(f)], 1)

    picture = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    f = float((picture * w).sum() + 0.7)
    expected = -f * w / w.square().sum()
    torch.testing.assert_close(deepfool(Linear(), picture) / 1.02, expected, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_universal_perturbation_stays_in_its_ball_and_fools(
    norm: str, model: OnLevels, pictures: torch.Tensor
) -> None:
    radius = 30.0 if norm == "linf" else 250.0
    visited: list[int] = []

    def each(order: list[int]) -> list[int]:
        visited.extend(order)
        return order

    change = universal_perturbation(model, pictures, norm, radius, wanted=0.75, passes=4, seed=0, each=each)
    size = change.abs().max() if norm == "linf" else change.norm()
    assert size <= radius * (1 + 1e-5)
    before = predicted_classes(model, pictures)
    rate = fooling_rate(before, predicted_classes(model, pictures, change))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(3, 8, 8, generator=generator)
    noise = noise.sign() * radius if norm == "linf" else noise * radius / noise.norm()
    assert rate > fooling_rate(before, predicted_classes(model, pictures, noise)) + 0.1, (
        "more than noise of the same size"
    )
    assert sorted(visited[:40]) == list(range(40))
    again = universal_perturbation(model, pictures, norm, radius, wanted=0.75, passes=4, seed=0)
    assert torch.equal(change, again)
    one = universal_fast_gradient(model, pictures, before, norm, radius)
    assert (one.abs().max() if norm == "linf" else one.norm()) == pytest.approx(radius, rel=1e-5)


@pytest.mark.parametrize(("norm", "radius"), [("linf", 12.0), ("l2", 100.0)])
def test_a_universal_perturbation_fools_as_arts_does(
    norm: str, radius: float, model: OnLevels, pictures: torch.Tensor
) -> None:
    """The same network, pictures, DeepFool inside, radius and passes; three orders of the pictures."""
    attacks = pytest.importorskip("art.attacks.evasion", reason="an independent universal perturbation")
    estimators = pytest.importorskip("art.estimators.classification", reason="wraps the network for it")
    peer = estimators.PyTorchClassifier(
        model, nn.CrossEntropyLoss(), (3, 8, 8), 6, clip_values=(0, 255), device_type="cpu"
    )
    inside = {"max_iter": 50, "epsilon": 0.02, "nb_grads": 6, "verbose": False}
    measure = np.inf if norm == "linf" else 2
    theirs = attacks.UniversalPerturbation(peer, "deepfool", inside, delta=1e-6, max_iter=4, eps=radius, norm=measure,
                                           verbose=False)  # fmt: skip
    before = predicted_classes(model, pictures)
    rates = []
    for seed in range(3):
        random.seed(seed)  # of its order
        theirs.generate(pictures.numpy())
        own = universal_perturbation(model, pictures, norm, radius, wanted=1.0, passes=4, seed=10 * seed)
        both = own, torch.from_numpy(theirs.noise)[0]
        rates.append([fooling_rate(before, predicted_classes(model, pictures, change)) for change in both])
        sizes = [float(torch.linalg.vector_norm(change, measure)) for change in both]
        assert 0.9 * radius < min(sizes) <= max(sizes) < 1.0001 * radius
    mine, peers = np.mean(rates, 0)
    assert mine >= peers - 0.02
    assert peers > 0.3


def test_projection_is_the_nearest_point() -> None:
    change = torch.tensor([3.0, -4.0, 0.5]).reshape(3, 1, 1)
    assert projected(change, "linf", 1.0).flatten().tolist() == [1.0, -1.0, 0.5]
    short = projected(change, "l2", 2.0)
    assert float(short.norm()) == pytest.approx(2.0)
    assert torch.allclose(short / short.norm(), change / change.norm())
    assert torch.equal(projected(change, "l2", 50.0), change)


def test_what_is_seen_is_a_picture(model: OnLevels) -> None:
    black = torch.zeros(1, 3, 8, 8)
    assert torch.equal(model(black), model(black - 40)), "levels below 0 are 0"
