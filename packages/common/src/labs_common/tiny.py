"""Small networks that labs start from offline: made by a short training, the same on every machine."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch

from labs_common.progress import tracked

WARMUP = 80  # steps: the networks are made in some hundreds


@contextmanager
def reproducible(seed: int = 0) -> Iterator[None]:
    """Takes everything random inside from `seed`, and sums in the order that two threads give.

    Sums in another order would give another network on a machine with other cores.
    """
    threads = torch.get_num_threads()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        torch.set_num_threads(2)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def train_tiny(
    parameters: Iterable[torch.nn.Parameter],
    loss_of: Callable[[torch.Tensor], torch.Tensor],
    samples: int,
    steps: int,
    batch: int,
    learning_rate: float,
    task: str,
) -> None:
    """Trains `parameters` by AdamW (decay 0.05) with warm-up and cosine; call it inside of `reproducible`.

    `loss_of` gives the loss of the samples with these numbers (batch,); each epoch takes them in another order. `task`
    is shown while it goes on.
    """
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.05, fused=True)
    order = torch.cat([torch.randperm(samples) for _ in range(-(-steps * batch // samples))])
    for step in tracked(range(steps), task, steps):
        rise, fall = min(1.0, (step + 1) / WARMUP), 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = learning_rate * rise * fall
        loss_of(order[step * batch : (step + 1) * batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
