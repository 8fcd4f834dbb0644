"""Logistic regression on frozen features: scikit-learn on a CPU, many penalties in one batched solve on a GPU.

The objective is that of CLIP's linear probe (Radford et al. 2021, appendix A.3): the mean cross-entropy plus
`penalty / 2` times the squared weights, biases free. scikit-learn is a dependency of the labs that call this.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

COARSE = tuple(10.0**power for power in range(-6, 7, 2))  # the penalties that the search begins with, as CLIP's does
FINEST = 1 / 8  # of a power of ten: the search ends there
MOST_ITERATIONS, GRADIENT = 1000, 1e-4  # CLIP's limit of iterations, scikit-learn's tolerance
MEMORY = 10  # pairs of steps that L-BFGS knows the curvature by, as in scipy
HALVINGS = 20  # of a step's length before it is given up: a millionth
MOST_IDLE = 5  # steps in a row that lead no lower before a penalty counts as solved


@dataclass(frozen=True)
class Layer:
    """A fully connected layer: `weight` (classes, width) and `bias` (classes,)."""

    weight: torch.Tensor
    bias: torch.Tensor

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Maps features (pictures, width) to (pictures, classes)."""
        return features @ self.weight.T.to(features) + self.bias.to(features)

    def probabilities(self, features: torch.Tensor) -> np.ndarray:
        """Returns the probability of each class (pictures, classes)."""
        return self.logits(features).cpu().double().softmax(1).numpy()


def fitted_layers(
    features: torch.Tensor, labels: torch.Tensor, classes: int, penalties: Sequence[float]
) -> list[Layer]:
    """Returns the best layer for each penalty, of features (pictures, width) and labels (pictures,).

    On a GPU all come from one solve. A class without a picture is never predicted.
    """
    if features.device.type == "cpu":
        return [_by_scikit_learn(features, labels, classes, penalty) for penalty in penalties]
    return solved(features, labels, classes, penalties)


def _by_scikit_learn(features: torch.Tensor, labels: torch.Tensor, classes: int, penalty: float) -> Layer:
    from sklearn.linear_model import LogisticRegression  # an extra, and takes seconds

    # Its C weighs the summed loss against half the squared weights. For two classes it has one row, the difference of
    # ours, whose square is twice that of both.
    rows = 2 if len(labels.unique()) == 2 else 1
    model = LogisticRegression(C=rows / (penalty * len(labels)), max_iter=MOST_ITERATIONS, tol=GRADIENT)
    model.fit(features.float().numpy(), labels.numpy())
    weight, bias = torch.zeros(classes, features.shape[1]), torch.full((classes,), -1e4)
    there = torch.from_numpy(model.classes_.astype(np.int64))
    found, offsets = torch.from_numpy(model.coef_).float(), torch.from_numpy(model.intercept_).float()
    if len(there) == 2:  # it gives one row for two classes
        found, offsets = torch.cat([-found, found]) / 2, torch.cat([-offsets, offsets]) / 2
    weight[there], bias[there] = found, offsets
    return Layer(weight, bias)


def solved(features: torch.Tensor, labels: torch.Tensor, classes: int, penalties: Sequence[float]) -> list[Layer]:
    """Solves for all penalties at once by L-BFGS (Nocedal & Wright 2006, algorithm 7.4), on the features' device.

    Each penalty has its own curvature pairs and step length; one matrix product serves all of them.
    """
    x = torch.cat([features.float(), torch.ones(len(features), 1, device=features.device)], 1)  # (pictures, width + 1)
    target = F.one_hot(labels, classes).to(x)
    lam = torch.tensor(list(penalties), device=x.device)
    free = torch.ones(x.shape[1], 1, device=x.device)
    free[-1] = 0.0  # biases are not penalised
    count, width = x.shape
    # Weights are sought in units in which curvatures are alike, from a millionth to a million of penalty.
    unit = (lam[:, None, None] * free + x.pow(2).mean(0)[:, None] / 4).rsqrt()  # (penalties, width + 1, 1)

    def value_and_gradient(v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns them for weights in their units (penalties, width + 1, classes)."""
        w = v * unit
        logits = (x @ w.transpose(0, 1).reshape(width, -1)).view(count, len(lam), classes)  # one product for all
        logs = logits.log_softmax(2)
        fit = -(logs * target[:, None]).sum((0, 2)) / count
        residual = (logs.exp() - target[:, None]) / count
        slope = (x.T @ residual.view(count, -1)).view(width, len(lam), classes).transpose(0, 1)
        kept = w * free
        return fit + lam / 2 * kept.pow(2).sum((1, 2)), (slope + lam[:, None, None] * kept) * unit

    w = _minimised(value_and_gradient, torch.zeros(len(lam), width, classes, device=x.device), unit) * unit
    return [Layer(one[:-1].T.contiguous(), one[-1].clone()) for one in w]


def _minimised(
    value_and_gradient: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]], w: torch.Tensor, unit: torch.Tensor
) -> torch.Tensor:
    """Finds the minimum of each of several functions, numbered by the first dimension of `w`.

    A function is done when its gradient by `w * unit` is within the tolerance.
    """
    value, gradient = value_and_gradient(w)
    pairs: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []  # steps, changes of the gradient, 1 / s·y
    stuck = torch.zeros_like(value, dtype=torch.bool)  # where 32 bits tell no lower value apart
    idle = torch.zeros_like(value)  # steps in a row that led no lower
    for _ in range(MOST_ITERATIONS):
        open_ = ((gradient / unit).abs().amax((1, 2)) > GRADIENT) & ~stuck
        if not bool(open_.any()):
            break
        direction = -_by_inverse_curvature(gradient, pairs)
        slope = (direction * gradient).sum((1, 2))
        uphill = slope >= 0
        direction = torch.where(uphill[:, None, None], -gradient, direction)
        slope = torch.where(uphill, -gradient.pow(2).sum((1, 2)), slope)
        length = torch.ones_like(value) * open_
        for _ in range(HALVINGS):  # until each step leads low enough (Armijo's condition)
            new = w + length[:, None, None] * direction
            new_value, new_gradient = value_and_gradient(new)
            short = open_ & (new_value > value + 1e-4 * length * slope)
            if not bool(short.any()):
                break
            length = torch.where(short, length / 2, length)
        idle = torch.where(new_value < value, 0.0, idle + 1)
        stuck |= short | (idle >= MOST_IDLE)
        new, new_value, new_gradient = (
            torch.where(short.view(-1, *[1] * (old.dim() - 1)), old, other)
            for old, other in ((w, new), (value, new_value), (gradient, new_gradient))
        )
        step, change = new - w, new_gradient - gradient
        product = (step * change).sum((1, 2))
        sound = product > 1e-12  # where it is not, the pair counts for nothing
        pairs.append((step, change, torch.where(sound, 1 / product.clamp(min=1e-12), 0.0)))
        pairs = pairs[-MEMORY:]
        w, value, gradient = new, new_value, new_gradient
    return w


def _by_inverse_curvature(
    gradient: torch.Tensor, pairs: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
) -> torch.Tensor:
    """Multiplies the gradient by the inverse curvature: the two loops of L-BFGS."""
    q = gradient
    shares = []
    for step, change, rho in reversed(pairs):
        share = rho * (step * q).sum((1, 2))
        q = q - share[:, None, None] * change
        shares.append(share)
    if pairs:
        step, change, rho = pairs[-1]
        gamma = (step * change).sum((1, 2)) / change.pow(2).sum((1, 2)).clamp(min=1e-20)
        q = q * torch.where(rho > 0, gamma, 1.0)[:, None, None]
    for (step, change, rho), share in zip(pairs, reversed(shares), strict=True):
        q = q + step * (share - rho * (change * q).sum((1, 2)))[:, None, None]
    return q


def best_penalty(
    train: tuple[torch.Tensor, torch.Tensor],
    validation: tuple[torch.Tensor, torch.Tensor],
    classes: int,
    shown: Callable[[str], None] = lambda _: None,
) -> tuple[float, dict[float, float]]:
    """Finds the penalty with the best validation accuracy; also returns the accuracy of each that was tried.

    As the paper searches: powers of a hundred first, then both neighbours of the best at half the distance, until an
    eighth of a power of ten (Radford et al. 2021, appendix A.3). Of equal ones the largest is taken.
    """
    found: dict[float, float] = {}
    wanted = list(COARSE)
    distance = 2.0
    while True:
        layers = fitted_layers(*train, classes, wanted)
        for penalty, layer in zip(wanted, layers, strict=True):
            right = layer.logits(validation[0]).argmax(1) == validation[1]
            found[penalty] = float(right.cpu().double().mean())
        best = max(found, key=lambda penalty: (found[penalty], penalty))
        shown(f"penalty {best:.3g}: validation accuracy {found[best]:.4f}")
        distance /= 2
        if distance < FINEST:
            return best, dict(sorted(found.items()))
        wanted = [best * 10**-distance, best * 10**distance]


def fitted_by_sgd(
    features: torch.Tensor,
    labels: torch.Tensor,
    classes: int,
    penalty: float,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
) -> Layer:
    """Fits a layer by gradient descent in batches (momentum 0.9, cosine), on features of mean 0 and deviation 1."""
    mean, deviation = features.mean(0), features.std(0).clamp(min=1e-6)
    x = (features - mean) / deviation
    generator = torch.Generator().manual_seed(seed)
    layer = torch.nn.Linear(x.shape[1], classes).to(x.device)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    groups = [{"params": [layer.weight], "weight_decay": penalty}, {"params": [layer.bias], "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=learning_rate, momentum=0.9)
    steps = epochs * -(-len(x) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for places in torch.randperm(len(x), generator=generator).to(x.device).split(batch_size):
            loss = F.cross_entropy(layer(x[places]), labels[places])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    weight = layer.weight.detach() / deviation  # of the features as they were given
    return Layer(weight, layer.bias.detach() - weight @ mean)
