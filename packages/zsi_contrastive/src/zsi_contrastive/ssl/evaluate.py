"""How good features are: neighbours that vote, and whether they have collapsed."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator

from labs_common.progress import tracked
from zsi_contrastive.ssl.data import Levels
from zsi_contrastive.ssl.model import features_of
from zsi_contrastive.ssl.views import plain

AT_ONCE = 512
VOTE_TEMPERATURE = 0.1
RANKED = 2048  # features whose singular values are looked at
COLLAPSED = 0.1  # a spread below this is next to nothing


@dataclass(frozen=True)
class Features:
    """Pictures' features (n, width), their labels (n,), how many classes there are, and places in their split (n,)."""

    values: torch.Tensor
    labels: torch.Tensor
    classes: int
    places: torch.Tensor


@torch.no_grad()
def features_from(
    encoder: torch.nn.Module, levels: Levels, side: int, accelerator: Accelerator, most: int = 0, shown: str = ""
) -> Features:
    """Features of the pictures (at most `most`, evenly spread), each process computing its part.

    `shown` names a progress bar. The encoder is in evaluation mode meanwhile.
    """
    count = min(most, len(levels)) if most else len(levels)
    places = torch.linspace(0, len(levels) - 1, count).round().long()
    each = -(-count // accelerator.num_processes)
    padded = torch.cat([places, places[:1].expand(each * accelerator.num_processes - count)])
    mine = padded[accelerator.process_index * each : (accelerator.process_index + 1) * each]
    before = encoder.training
    encoder.eval()
    parts = []
    batches = mine.split(AT_ONCE)
    for batch in tracked(batches, shown, len(batches), bool(shown) and accelerator.is_main_process):
        with accelerator.autocast():
            found = features_of(encoder, plain(levels.batch(batch), levels.aspects[batch], side))
        parts.append(found.float())
    encoder.train(before)
    values: torch.Tensor = accelerator.gather(torch.cat(parts))
    labels = torch.from_numpy(levels.pictures.labels)[places].to(values.device)
    return Features(values[:count], labels, len(levels.pictures.classes), places)


def knn_accuracy(bank: Features, asked: Features, neighbours: int) -> float:
    """Share of pictures whose class most of the nearest of the bank have (Wu et al. 2018, section 3.4).

    Cosines c, each vote weighs exp(c / 0.1).
    """
    right = knn_classes(bank, asked.values, neighbours) == asked.labels
    return float(right.double().mean())


def usual_neighbours(bank: int) -> int:
    """How many of `bank` training pictures vote: 200 of CIFAR-10's as everywhere, a tenth as many of few pictures."""
    return 200 if bank >= 10_000 else 20


def knn_classes(bank: Features, values: torch.Tensor, neighbours: int) -> torch.Tensor:
    """The class (n,) that the neighbours of each feature (n, width) vote for."""
    known = F.normalize(bank.values, dim=1)
    found = []
    for part in F.normalize(values, dim=1).split(AT_ONCE):
        cosines, places = (part @ known.T).topk(min(neighbours, len(known)), dim=1)
        votes = torch.zeros(len(part), bank.classes, device=part.device)
        votes.scatter_add_(1, bank.labels[places], (cosines / VOTE_TEMPERATURE).exp())
        found.append(votes.argmax(1))
    return torch.cat(found)


def spread(values: torch.Tensor) -> float:
    """Deviation of the features' directions (n, width): 1 where they fill all of the space, 0 where all are equal.

    Chen & He 2021 (SimSiam, section 4.1) watch it for collapse; there it is 1/√width instead of 1.
    """
    directions = F.normalize(values, dim=1)
    return float(directions.std(0).mean()) * math.sqrt(values.shape[1])


def effective_rank(values: torch.Tensor) -> float:
    """How many dimensions features (n, width) use: exp of the entropy of their singular values' shares.

    Roy & Vetterli 2007, of features less their mean.
    """
    centred = (values[:RANKED] - values[:RANKED].mean(0)).double()
    sizes = torch.linalg.svdvals(centred)
    shares = sizes / sizes.sum().clamp(min=1e-300)
    return float(torch.special.entr(shares).sum().exp())
