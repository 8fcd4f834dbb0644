"""A step of each method: views in, loss out.

`LOSSES[method](step)` runs the prepared network once, as DistributedDataParallel wants it.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from accelerate import Accelerator

from zsi_contrastive.ssl.losses import (
    byol_loss,
    debiased_loss,
    dino_loss,
    hard_negative_loss,
    koleo_loss,
    moco_loss,
    nt_xent_loss,
    sharpened,
    sinkhorn_knopp,
)
from zsi_contrastive.ssl.config import MethodOptions
from zsi_contrastive.ssl.teacher import Memory

GLOBAL_VIEWS = 2


class Step(NamedTuple):
    """What a step has to work with.

    Attributes:
        network: the prepared network.
        views: of this process's pictures, each (own, 3, side, side).
    """

    network: torch.nn.Module
    memory: Memory
    own: MethodOptions
    accelerator: Accelerator
    views: list[torch.Tensor]

    def learnt(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The learner's output for every view, and its encoder's features for full ones, in float32."""
        found, features = self.network(self.views)
        return [out.float() for out in found], [part.float() for part in features]

    @torch.no_grad()
    def taught(self) -> list[torch.Tensor]:
        """The teacher's output for the first two views, in float32."""
        assert self.memory.teacher is not None
        with self.accelerator.autocast():
            found, _ = self.memory.teacher(self.views[:GLOBAL_VIEWS])
        return [out.float() for out in found]


def simclr(step: Step) -> torch.Tensor:
    """Both views against all others of the batch, by one of three losses."""
    (first, second), _ = step.learnt()
    own = step.own
    if own.loss == "debiased":
        return debiased_loss(first, second, own.temperature, own.prior)
    if own.loss == "hard-negative":
        return hard_negative_loss(first, second, own.temperature, own.prior, own.hardness)
    return nt_xent_loss(first, second, own.temperature)


def moco(step: Step) -> torch.Tensor:
    """Each view as a query, the teacher's other view as its key, among the queue; both ways."""
    (queries, _), keys = step.learnt(), step.taught()
    assert step.memory.queue is not None
    losses = [
        moco_loss(query, key, step.memory.queue, step.own.temperature)
        for query, key in zip(queries, reversed(keys), strict=True)
    ]
    step.memory.remember(torch.cat(keys))
    return torch.stack(losses).mean()


def byol(step: Step) -> torch.Tensor:
    """Each view predicts the teacher's other view; both ways."""
    (predicted, _), targets = step.learnt(), step.taught()
    losses = [byol_loss(one, other) for one, other in zip(predicted, reversed(targets), strict=True)]
    return torch.stack(losses).mean()


def dino(step: Step) -> torch.Tensor:
    """Every view of the learner takes over the teacher's distributions of the other views."""
    own, memory = step.own, step.memory
    (found, features), logits = step.learnt(), torch.stack(step.taught())
    assert memory.centre is not None
    if own.centring == "mean":
        targets = sharpened(logits, memory.centre, own.teacher_temperature)
    else:
        targets = torch.stack([sinkhorn_knopp(of_view, own.teacher_temperature) for of_view in logits])
    memory.recentre(logits)
    loss = dino_loss(torch.stack(found), targets, own.temperature)
    if own.koleo:
        spread = [koleo_loss(of_view) for of_view in features]
        loss = loss + own.koleo * torch.stack(spread).mean()
    return loss


def patches(step: Step) -> torch.Tensor:
    """The sum of the modules' own losses, or the one of all."""
    (pictures,) = step.views
    losses, _ = step.network(pictures)
    return torch.sum(losses)


LOSSES: dict[str, Callable[[Step], torch.Tensor]] = {
    "simclr": simclr, "moco": moco, "byol": byol, "dino": dino, "gim": patches, "cpc": patches,
}  # fmt: skip
