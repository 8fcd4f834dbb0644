"""What a method remembers besides the weights that learn: a teacher, a queue of keys, a centre."""

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F

from labs_common.errors import RunStopped
from labs_common.gathering import gathered
from zsi_contrastive.ssl.losses import moved_centre
from zsi_contrastive.ssl.config import TAUGHT, PretrainConfig
from zsi_contrastive.ssl.model import Learner


def along_cosine(step: int, total: int, start: float, end: float) -> float:
    """The value at optimizer step `step` (from 0) of `total` on half a cosine from start to end."""
    return end + (start - end) * (1 + math.cos(math.pi * step / max(1, total))) / 2


class Memory:
    """A `Stateful` that is saved and resumed with the run. Parts that the method has no use for are None.

    Attributes:
        teacher: a moving average of the learner, without its prediction; no gradient ever reaches it.
        queue: directions of keys of earlier steps (keys, outputs), the oldest from `place` on.
        centre: mean of the teacher's logits (prototypes,).
    """

    def __init__(self, config: PretrainConfig, learner: torch.nn.Module, device: torch.device) -> None:
        own = config.own
        self.teacher: Learner | None = None
        self.queue = self.centre = None
        self.place = 0
        if config.method in TAUGHT:
            assert isinstance(learner, Learner)
            self.teacher = Learner(copy.deepcopy(learner.encoder), copy.deepcopy(learner.projection))
            self.teacher.requires_grad_(False).to(device)
        if config.method == "moco":
            generator = torch.Generator().manual_seed(config.run.seed)
            self.queue = F.normalize(torch.randn(own.queue, own.outputs, generator=generator), dim=1).to(device)
        if config.method == "dino":
            self.centre = torch.zeros(own.outputs, device=device)

    @torch.no_grad()
    def follow(self, learner: torch.nn.Module, momentum: float) -> None:
        """The teacher's parameters after the learner's step: `momentum` of them stays. Statistics are its own."""
        if self.teacher is None:
            return
        assert isinstance(learner, Learner)
        for kept, new in ((self.teacher.encoder, learner.encoder), (self.teacher.projection, learner.projection)):
            for own, fresh in zip(kept.parameters(), new.parameters(), strict=True):
                own.lerp_(fresh, 1 - momentum)

    @torch.no_grad()
    def remember(self, keys: torch.Tensor) -> None:
        """Puts the keys (n, outputs) of all processes into the queue, in the place of the oldest."""
        assert self.queue is not None
        keys = F.normalize(gathered(keys.detach()).to(self.queue), dim=1)[-len(self.queue) :]
        places = (self.place + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue[places] = keys
        self.place = (self.place + len(keys)) % len(self.queue)

    def recentre(self, logits: torch.Tensor) -> None:
        """Moves the centre towards these of the teacher's (views, n, prototypes)."""
        assert self.centre is not None
        self.centre = moved_centre(self.centre, logits.float())

    def audit(self, optimizer: torch.optim.Optimizer) -> int:
        """How many tensors of the teacher have no gradient and are not the optimizer's: all of them.

        Raises:
            RunStopped: one has or is.
        """
        if self.teacher is None:
            return 0
        moved = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for name, parameter in self.teacher.named_parameters():
            if parameter.requires_grad or parameter.grad is not None or id(parameter) in moved:
                raise RunStopped(f"the teacher's {name} was given a gradient")
        return len(list(self.teacher.parameters()))

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        return {
            "teacher": None if self.teacher is None else self.teacher.state_dict(),
            "queue": self.queue, "place": self.place, "centre": self.centre,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        if self.teacher is not None:
            self.teacher.load_state_dict(state["teacher"])
        if self.queue is not None:
            self.queue.copy_(state["queue"])
        if self.centre is not None:
            self.centre = state["centre"].to(self.centre.device)
        self.place = int(state["place"])
