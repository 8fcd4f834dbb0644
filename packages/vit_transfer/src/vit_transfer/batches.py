"""What the trained part reads: rows of the frozen front's output, cached or computed, in batches."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from accelerate import Accelerator

from labs_common.cache import path_name
from labs_common.features import CachedRows, ComputedRows, Rows, cached_rows
from labs_common.freezing import state_hash
from labs_common.training import read_ahead
from vit_transfer.config import CacheOptions
from vit_transfer.data import Tensors
from vit_transfer.model import Transfer

FRONT_BATCH = 64


class Batch(NamedTuple):
    """A process's part of an optimizer step.

    Attributes:
        inputs: rows (pictures, width), or pictures where the network is not cut.
        targets: class numbers (pictures,).
        view: the version of the pictures.
        places: of the pictures in their split.
        share: what the mean loss is multiplied by, so that the step's loss is the mean over all processes' pictures.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    view: int
    places: Sequence[int]
    share: float


@dataclass(frozen=True)
class PictureRows:
    """A split: what the trained part reads, and the labels."""

    rows: Rows
    labels: torch.Tensor

    def batch(self, view: int, places: Sequence[int], share: float = 1.0) -> Batch:
        """The pictures at these places."""
        return Batch(self.rows.rows(view, places), self.labels[list(places)], view, places, share)


@dataclass
class PictureSteps:
    """Training data for `labs_common.training.Loop`: shuffled every epoch by the seed, each picture once."""

    data: PictureRows
    batch_size: int
    views: int
    seed: int
    rank: int = 0
    processes: int = 1

    def __len__(self) -> int:
        """Optimizer steps in an epoch; the last may be smaller."""
        return -(-len(self.data.labels) // self.batch_size)

    def steps(self, epoch: int, start: int) -> Iterator[list[Batch]]:
        """Yields this process's part of each step of the epoch, read while the step before is computed."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.data.labels)).tolist()

        def read(step: int) -> Batch:
            return self.batch(epoch % self.views, order[step * self.batch_size : (step + 1) * self.batch_size])

        return ([batch] for batch in read_ahead(read, range(start, len(self))))

    def batch(self, view: int, places: list[int]) -> Batch:
        """This process's part of one step, of which `places` are all pictures."""
        mine = places[self.rank :: self.processes]
        if not mine:  # every process takes part in every step
            return self.data.batch(view, places[:1], 0.0)
        return self.data.batch(view, mine, len(mine) * self.processes / len(places))


def rows_of(
    name: str, tensors: Tensors, model: Transfer, options: CacheOptions, views: int, accelerator: Accelerator
) -> PictureRows:
    """The rows of a split called `name`, with whatever its cache lacks computed now; the model is on its device.

    Raises:
        LabError: the cache's disk is full or broken.
    """
    cut = model.cut
    if cut is None:
        return PictureRows(ComputedRows(tensors.batch, "fp32"), tensors.labels)

    def compute(view: int, places: Sequence[int]) -> torch.Tensor:
        parts = []
        for first in range(0, len(places), FRONT_BATCH):
            images = tensors.batch(view, places[first : first + FRONT_BATCH]).to(accelerator.device)
            with torch.no_grad(), accelerator.autocast():
                parts.append(cut.front(images))
        return torch.cat(parts)

    precision = options.boundary_precision
    if not options.cache:
        return PictureRows(ComputedRows(compute, precision), tensors.labels)
    recipe = {"front": front_recipe(model, accelerator), "tensors": tensors.recipe(views)}
    rows = cached_rows(f"{path_name(model.name)}-{name}", recipe, len(tensors), views, cut.width, precision, compute,
                       accelerator.is_main_process)  # fmt: skip
    return PictureRows(rows, tensors.labels)


def front_recipe(model: Transfer, accelerator: Accelerator) -> dict[str, Any]:
    """All that the front's output depends on besides the pictures: its code, its weights, the arithmetic."""
    cut = model.cut
    assert cut is not None
    modules = [f"{name}: {type(layer).__name__}({layer.extra_repr()})" for name, layer in cut.front.named_modules()]
    code = hashlib.sha256("\n".join([cut.front.graph_module.code, *modules]).encode()).hexdigest()
    return {
        "model": model.name,
        "code": code,
        "weights": state_hash(cut.front),
        "precision": accelerator.mixed_precision,
        "torch": torch.__version__.split("+")[0],
        "timm": timm.__version__,
    }


def disk_bytes(splits: Sequence[PictureRows]) -> int:
    """Bytes of the caches."""
    return sum(split.rows.bytes_on_disk for split in splits if isinstance(split.rows, CachedRows))
