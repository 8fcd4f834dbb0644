"""Samples into optimizer steps: the order of every epoch, each process's part, and the next step read meanwhile.

```
def batch(places: list[int], epoch: int, step: int) -> list[Batch]:  # places of all processes, batches of this one
    mine, share = own_part(places, rank, processes)
    return [data.batch(epoch % views, mine, share)]

source = ShuffledSteps(len(data), options.batch_size, seed, batch)
```
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from labs_common.device import one_torch_thread

Part = TypeVar("Part")
# Gets the samples of one optimizer step over all processes, its epoch, and its number in the run (from 0); returns this
# process's micro-batches.
Batch = Callable[[list[int], int, int], list[Any]]


class Source(Protocol):
    """Training data, cut into optimizer steps. The same epoch gives the same steps in every process start."""

    def __len__(self) -> int:
        """Optimizer steps in an epoch."""

    def steps(self, epoch: int, start: int) -> Iterator[list[Any]]:
        """Yields, from step `start` of the epoch on, this process's micro-batches of each step."""


def shuffled(seed: int, epoch: int, count: int) -> list[int]:
    """Returns the numbers below `count` in the order of this epoch: a function of seed and epoch alone."""
    return np.random.default_rng([seed, epoch]).permutation(count).tolist()


@dataclass
class ShuffledSteps:
    """A `Source` that shuffles its samples anew for every epoch; each sample comes once in an epoch.

    Attributes:
        samples: how many there are.
        batch_size: samples of a step, over all processes together.
        batch: see `Batch`; it is called in a thread that reads ahead, where torch computes with one thread.
        order: the samples of an epoch in their order, if not by `shuffled`.
        whole: leave out the samples that do not fill a last step.
    """

    samples: int
    batch_size: int
    seed: int
    batch: Batch
    order: Callable[[int], Sequence[int]] | None = None
    whole: bool = False

    def __len__(self) -> int:
        """Optimizer steps in an epoch; the last may be smaller unless only whole ones are taken."""
        return self.samples // self.batch_size if self.whole else -(-self.samples // self.batch_size)

    def steps(self, epoch: int, start: int) -> Iterator[list[Any]]:
        """Yields this process's micro-batches of each step of the epoch, read while the step before is computed."""
        order = shuffled(self.seed, epoch, self.samples) if self.order is None else list(self.order(epoch))

        def read(step: int) -> list[Any]:
            places = order[step * self.batch_size : (step + 1) * self.batch_size]
            return self.batch(places, epoch, epoch * len(self) + step)

        return read_ahead(read, range(start, len(self)))


def own_part(places: Sequence[int], rank: int = 0, processes: int = 1) -> tuple[list[int], float]:
    """Returns the samples of a step that process `rank` has, and what the mean of their losses is multiplied by.

    Such shares average over processes to the mean over all samples of the step. Every process must take part in every
    step: one without a sample of its own gets the first one with a share of 0.
    """
    mine = list(places[rank::processes])
    return (mine, len(mine) * processes / len(places)) if mine else ([places[0]], 0.0)


def read_ahead(read: Callable[[int], Part], steps: range) -> Iterator[Part]:
    """Yields `read` of each step, reading the next one in a thread while the caller computes."""
    with ThreadPoolExecutor(1, "reading", one_torch_thread) as reader:
        coming = deque(reader.submit(read, step) for step in steps[:1])
        for step in steps:
            part = coming.popleft().result()
            if step + 1 < steps.stop:
                coming.append(reader.submit(read, step + 1))
            yield part
