"""Losses and accuracies: of a split while training, and of the exported network on the test pictures."""

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object

from labs_common.progress import tracked
from labs_common.report.classes import Predictions
from vit_transfer.batches import PictureRows
from vit_transfer.data import Tensors

TEST_BATCH = 64


@torch.no_grad()
def mean_scores(
    model: torch.nn.Module, data: PictureRows, batch_size: int, accelerator: Accelerator
) -> dict[str, float]:
    """Mean cross-entropy and accuracy over a split; every process takes its share of the pictures."""
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device="cpu")
    mine = range(accelerator.process_index, len(data.labels), accelerator.num_processes)
    longest = -(-len(data.labels) // accelerator.num_processes)
    for first in range(0, longest, batch_size):
        places = list(mine[first : first + batch_size])
        # Sharded weights are gathered by all processes together: one without pictures left repeats one.
        batch = data.batch(0, places or [0])
        logits = model(batch.inputs.to(accelerator.device)).float()
        if places:
            targets = batch.targets.to(accelerator.device)
            losses = F.cross_entropy(logits, targets, reduction="sum")
            right = (logits.argmax(1) == targets).sum()
            sums += torch.stack([losses, right]).double().cpu()
    everyone = accelerator.reduce(sums.float().to(accelerator.device)) if accelerator.num_processes > 1 else sums
    loss, right = (everyone.double().cpu() / len(data.labels)).tolist()
    return {"loss": loss, "accuracy": right}


@torch.no_grad()
def predicted(model: torch.nn.Module, tensors: Tensors, accelerator: Accelerator, task: str) -> Predictions:
    """Runs the whole network, in float32, on the pictures of a split; the processes share them."""
    model = model.to(accelerator.device).eval()
    mine = range(accelerator.process_index, len(tensors), accelerator.num_processes)
    found: list[tuple[int, list[float]]] = []
    starts = range(0, len(mine), TEST_BATCH)
    for first in tracked(starts, task, len(starts), accelerator.is_main_process):
        places = list(mine[first : first + TEST_BATCH])
        logits = model(tensors.batch(0, places).to(accelerator.device)).float()
        found += zip(places, logits.softmax(1).tolist(), strict=True)
    everyone = gather_object(found) if accelerator.num_processes > 1 else found
    rows = [row for _, row in sorted(everyone)]
    return Predictions(np.array(rows), tensors.pictures.labels)
