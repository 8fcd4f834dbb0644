"""Perturbations that change a network's predictions: DeepFool, the fast gradient, and universal ones made of the first.

Pictures and perturbations are levels of 0 to 255 at the network's own size; many pictures are kept as bytes. A
perturbed picture is a picture: levels outside 0 to 255 are clipped before the network sees them.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

EVALUATION_BATCH = 64


@dataclass(frozen=True)
class Norm:
    """A measure of a perturbation's size.

    Attributes:
        symbol: for the report.
        projected: moves a perturbation (3, height, width) to the nearest one within the ball of a radius.
        steepest: turns gradients (batch, 3, height, width) into the changes of size 1 that raise the loss most.
        radius: Moosavi-Dezfooli et al. 2017's for a picture of a side; for l2 theirs belongs to 224 pixels, and in
            proportion to the side it keeps the mean change of a level.
    """

    symbol: str
    projected: Callable[[torch.Tensor, float], torch.Tensor]
    steepest: Callable[[torch.Tensor], torch.Tensor]
    radius: Callable[[int], float]


def _directions(gradients: torch.Tensor) -> torch.Tensor:
    return gradients / gradients.flatten(1).norm(dim=1).clamp(min=1e-12)[:, None, None, None]


NORMS: dict[str, Norm] = {
    "linf": Norm(
        "ℓ∞",
        projected=lambda change, radius: change.clamp(-radius, radius),
        steepest=torch.sign,
        radius=lambda side: 10.0,
    ),
    "l2": Norm(
        "ℓ2",
        projected=lambda change, radius: change * (radius / change.norm().clamp(min=radius)),
        steepest=_directions,
        radius=lambda side: 2000.0 * (side / 224),
    ),
}


class OnLevels(torch.nn.Module):
    """A fixed network that takes levels of 0 to 255 (batch, 3, size, size)."""

    def __init__(self, model: torch.nn.Module, normalised: Callable[[torch.Tensor], torch.Tensor], size: int) -> None:
        super().__init__()
        self.model, self.normalised, self.size = model.eval().requires_grad_(False), normalised, size

    def forward(self, levels: torch.Tensor) -> torch.Tensor:
        """Computes logits (batch, classes)."""
        logits: torch.Tensor = self.model(self.normalised(levels.clamp(0, 255)))
        return logits.float()


def deepfool(
    model: torch.nn.Module, pictures: torch.Tensor, classes: int = 10, steps: int = 50, overshoot: float = 0.02
) -> torch.Tensor:
    """Finds the least change, in the sense of l2, that changes the prediction of pictures (batch, 3, height, width).

    Moosavi-Dezfooli et al. 2016, algorithm 2: the nearest face of the linearised decision region, again and again,
    among the `classes` likeliest classes. Returns the changes, (1 + overshoot) times what reaches the boundary; after
    `steps` steps one may fall short. A picture by itself (3, height, width) gets its own change.
    """
    if pictures.dim() == 3:
        return deepfool(model, pictures[None], classes, steps, overshoot)[0]
    with torch.no_grad():
        likeliest = model(pictures).argsort(1, descending=True)[:, :classes]  # (batch, classes)
    change = torch.zeros_like(pictures)
    going = torch.arange(len(pictures), device=pictures.device)  # places of those that are not fooled yet
    for _ in range(steps):
        inputs = (pictures[going] + (1 + overshoot) * change[going]).requires_grad_()
        with torch.enable_grad():
            logits = model(inputs)
            gaps = logits.gather(1, likeliest[going]) - logits.gather(1, likeliest[going, :1])  # (going, classes)
        still = logits.argmax(1) == likeliest[going, 0]
        if not still.any():
            break
        least, step = torch.full_like(gaps[:, 0], math.inf), torch.zeros_like(inputs)
        for other in range(1, gaps.shape[1]):  # one forward pass, and a backward pass for each class
            (gradient,) = torch.autograd.grad(gaps[:, other].sum(), inputs, retain_graph=True)
            length = gradient.flatten(1).norm(dim=1) + 1e-8
            distance = gaps[:, other].detach().abs() / length
            # 1e-4 as in foolbox: on the boundary itself the step would be nothing.
            toward = ((distance + 1e-4) / length)[:, None, None, None] * gradient
            step = torch.where((distance < least)[:, None, None, None], toward, step)
            least = torch.minimum(distance, least)
        going = going[still]
        change[going] += step[still].detach()
    return (1 + overshoot) * change


def projected(change: torch.Tensor, norm: str, radius: float) -> torch.Tensor:
    """Moves a perturbation to the nearest one within `radius` of zero (Moosavi-Dezfooli et al. 2017, eq. 3)."""
    return NORMS[norm].projected(change, radius)


def fast_gradient(
    model: torch.nn.Module, pictures: torch.Tensor, labels: torch.Tensor, norm: str, radius: float
) -> torch.Tensor:
    """Takes one step of `radius` up the loss, for each picture its own (Goodfellow et al. 2015, section 4).

    The sign of the gradient for linf, its direction for l2. Returns (batch, 3, height, width).
    """
    return radius * NORMS[norm].steepest(_gradient(model, pictures, labels))


def universal_fast_gradient(
    model: torch.nn.Module, pictures: torch.Tensor, labels: torch.Tensor, norm: str, radius: float
) -> torch.Tensor:
    """Takes the same step for all pictures: up their summed loss. Returns (3, height, width)."""
    total = torch.zeros_like(pictures[0], dtype=torch.float32)
    for some, known in zip(pictures.split(EVALUATION_BATCH), labels.split(EVALUATION_BATCH), strict=True):
        total += _gradient(model, some, known).sum(0)
    return radius * NORMS[norm].steepest(total[None])[0]


def _gradient(model: torch.nn.Module, pictures: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    pictures = pictures.float().clone().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(pictures), labels, reduction="sum"), pictures)
    return gradient


@torch.no_grad()
def predicted_classes(
    model: torch.nn.Module, pictures: torch.Tensor, change: torch.Tensor | None = None
) -> torch.Tensor:
    """Predicts the class numbers (pictures,) of pictures with `change` added, one for all or each picture's own."""
    found = []
    for first in range(0, len(pictures), EVALUATION_BATCH):
        some = pictures[first : first + EVALUATION_BATCH].float()
        own = change if change is None or change.dim() == 3 else change[first : first + EVALUATION_BATCH]
        found.append(model(some if own is None else some + own).argmax(1))
    return torch.cat(found)


def fooling_rate(before: torch.Tensor, after: torch.Tensor) -> float:
    """Returns the share of pictures whose prediction changed, right or wrong (Moosavi-Dezfooli et al. 2017, eq. 1)."""
    return float((before != after).float().mean())


def universal_perturbation(
    model: torch.nn.Module,
    pictures: torch.Tensor,
    norm: str,
    radius: float,
    wanted: float = 0.8,
    passes: int = 10,
    seed: int = 0,
    each: Callable[[Sequence[int]], Iterable[int]] = iter,
    batch: int = 0,
) -> torch.Tensor:
    """Finds one perturbation (3, height, width) that changes most predictions of `pictures` (count, 3, height, width).

    Moosavi-Dezfooli et al. 2017, algorithm 1: for every picture that is not fooled yet, DeepFool's least change is
    added and the sum is projected on the ball of `radius`; until the fooling rate on these pictures is `wanted`, or
    after `passes` passes the best of all. `batch` pictures are looked at and changed at once, 1 is the paper's way; by
    default `batch_of` says how many. `each` goes over the order of a pass, for a progress bar.
    """
    before = predicted_classes(model, pictures)
    change = torch.zeros_like(pictures[0], dtype=torch.float32)
    best, best_rate = change, -1.0
    for number in range(passes):
        order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed + number)).tolist()
        coming = iter(each(order))
        while places := list(itertools.islice(coming, batch or batch_of(len(pictures)))):
            perturbed = pictures[places] + change
            perturbed = perturbed[predicted_classes(model, perturbed) == before[places]]
            if len(perturbed):
                change = projected(change + deepfool(model, perturbed).sum(0), norm, radius)
        rate = fooling_rate(before, predicted_classes(model, pictures, change))
        if rate > best_rate:
            best, best_rate = change, rate
        if rate >= wanted:
            break
    return best


def batch_of(pictures: int) -> int:
    """Returns how many pictures a universal perturbation grows by at once: an eighth, so that a pass has steps enough.

    One at a time makes 10,000 pictures long: a GPU has next to nothing to do, and a CPU half of what it can.
    """
    return max(1, min(EVALUATION_BATCH, pictures // 8))
