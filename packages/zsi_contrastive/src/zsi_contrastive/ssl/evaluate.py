"""Measures of features: votes of nearest neighbours, a linear probe, and signs of collapse."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from accelerate import Accelerator

from labs_common.device import widest_float
from labs_common.logistic import fitted_layers
from labs_common.progress import tracked
from labs_common.report.classes import Predictions
from labs_common.steps import shuffled
from zsi_contrastive.ssl.config import MeasureOptions, ViewOptions
from zsi_contrastive.ssl.data import Pixels, Recipe, middle_square, views_of
from zsi_contrastive.ssl.model import features_of

AT_ONCE = 512  # pictures, or rows of the matrix of cosines
RANKED = 2048  # features whose singular values are computed: more would hardly change them
COLLAPSED = 0.1  # a spread below this is next to nothing
RATES, PROBED = (0.1, 1.0, 10.0), 256  # learning rates and batch of the probe by SGD
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)  # the probe's, of the mean loss, on features of deviation 1


@dataclass(frozen=True)
class Features:
    """Pictures' features (n, width), their labels (n,), how many classes there are, and places in their split (n,)."""

    values: torch.Tensor
    labels: torch.Tensor
    classes: int
    places: torch.Tensor


def features_of_splits(
    encoder: torch.nn.Module, pixels: Mapping[str, Pixels], side: int, bank: int, accelerator: Accelerator,
    shown: bool = False,
) -> dict[str, Features]:  # fmt: skip
    """Computes the features of the pictures of each split, of at most `bank` training pictures, at `side` pixels."""
    return {name: features_from(encoder, part, side, accelerator, bank if name == "train" else 0,
                                f"features, {name}" * shown) for name, part in pixels.items()}  # fmt: skip


def scores(features: Mapping[str, Features], options: MeasureOptions) -> dict[str, float]:
    """Measures kNN accuracy on pictures of other splits that have classes, and how far features are from collapse."""
    bank, test = features["train"], features["test"]
    # 200 is usual on CIFAR-10; of few training pictures so many would be of other classes.
    neighbours = options.neighbours or (200 if len(bank.labels) >= 10_000 else 20)
    found: dict[str, float] = {}
    if bank.classes > 1:
        found = {f"{name}/knn": knn_accuracy(bank, features[name], neighbours, options.knn_temperature)
                 for name in features if name != "train"}  # fmt: skip
    return found | {"test/spread": spread(test.values), "test/effective_rank": effective_rank(test.values)}


@torch.no_grad()
def features_from(
    encoder: torch.nn.Module, pixels: Pixels, side: int, accelerator: Accelerator, most: int = 0, shown: str = ""
) -> Features:
    """Computes features of the pictures (at most `most`, evenly spread), each process a part of them.

    `shown` names a progress bar. The encoder is in evaluation mode meanwhile.
    """
    count = min(most, len(pixels)) if most else len(pixels)
    places = torch.linspace(0, len(pixels) - 1, count).round().long()
    each = -(-count // accelerator.num_processes)
    padded = torch.cat([places, places[:1].expand(each * accelerator.num_processes - count)])  # for an equal part each
    batches = padded[accelerator.process_index * each :][:each].split(AT_ONCE)
    before = encoder.training
    encoder.eval()
    parts = []
    for batch in tracked(batches, shown, len(batches), bool(shown) and accelerator.is_main_process):
        with accelerator.autocast():
            features = features_of(encoder, middle_square(pixels.batch(batch), pixels.aspects[batch], side))
        parts.append(features.float())
    encoder.train(before)
    values: torch.Tensor = accelerator.gather(torch.cat(parts))
    labels = torch.from_numpy(pixels.pictures.labels)[places].to(values.device)
    return Features(values[:count], labels, len(pixels.pictures.classes), places)


def knn_accuracy(bank: Features, asked: Features, neighbours: int, temperature: float) -> float:
    """Returns the share of pictures whose class wins the vote of their neighbours (Wu et al. 2018, section 3.4).

    A neighbour with cosine c has exp(c / temperature) votes.
    """
    right = knn_classes(bank, asked.values, neighbours, temperature) == asked.labels
    return float(right.cpu().double().mean())


def knn_classes(bank: Features, values: torch.Tensor, neighbours: int, temperature: float) -> torch.Tensor:
    """Returns the class (n,) that the neighbours of each feature (n, width) vote for."""
    known = F.normalize(bank.values, dim=1)
    winners = []
    for part in F.normalize(values, dim=1).split(AT_ONCE):
        cosines, places = (part @ known.T).topk(min(neighbours, len(known)), dim=1)
        votes = torch.zeros(len(part), bank.classes, device=part.device)
        votes.scatter_add_(1, bank.labels[places], (cosines / temperature).exp())
        winners.append(votes.argmax(1))
    return torch.cat(winners)


def spread(values: torch.Tensor) -> float:
    """Measures the deviation of features' directions (n, width): 1 if they fill all of the space, 0 if all are equal.

    Chen & He 2021 (SimSiam, section 4.1) watch it for collapse; there it is 1/√width instead of 1.
    """
    directions = F.normalize(values, dim=1)
    return float(directions.std(0).mean()) * math.sqrt(values.shape[1])


def effective_rank(values: torch.Tensor) -> float:
    """Measures how many dimensions features (n, width) use: exp of the entropy of their singular values' shares.

    Roy & Vetterli 2007, of features less their mean.
    """
    centred = (values[:RANKED] - values[:RANKED].mean(0)).to(widest_float(values.device))
    sizes = torch.linalg.svdvals(centred)
    shares = sizes / sizes.sum().clamp(min=1e-300)  # all 0 if the features are equal
    return float(torch.special.entr(shares).sum().exp())


def probe_by_sgd(
    encoder: torch.nn.Module, pixels: Mapping[str, Pixels], side: int, epochs: int, seed: int, accelerator: Accelerator
) -> float:
    """Fits a linear layer as the papers do, and returns its accuracy on the test pictures.

    By SGD under a cosine, on features of crops that are mirrored by chance (SimCLR, appendix B.6; DINO, section 4.1),
    of a frozen encoder in evaluation mode. Layers of three learning rates learn side by side; the best on the
    validation pictures is taken.
    """
    train, device = pixels["train"], accelerator.device
    encoder.eval()
    layers = torch.nn.ModuleList()
    evaluated = {name: features_from(encoder, pixels[name], side, accelerator) for name in ("validation", "test")}
    for _ in RATES:
        layer = torch.nn.Linear(evaluated["test"].values.shape[1], evaluated["test"].classes, device=device)
        torch.nn.init.zeros_(layer.weight)
        layers.append(layer)
    groups = [{"params": layer.parameters(), "lr": rate} for layer, rate in zip(layers, RATES, strict=True)]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    recipe = Recipe(side, (0.08, 1.0), ViewOptions(jitter=0.0, grey=0.0), 0.0, 0.0)
    batches = [part for epoch in range(epochs)
               for part in torch.tensor(shuffled(seed, epoch, len(train))).split(PROBED)]  # fmt: skip
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    for step, places in enumerate(batches):
        own, aspects = slice(0, len(places)), train.aspects[places]
        crops = train.to_crop(places, [recipe], aspects, seed, step, own)
        (pictures,) = views_of(crops, aspects, [recipe], seed, step, own)
        with torch.no_grad(), accelerator.autocast():
            values = features_of(encoder, pictures).float()
        labels = torch.from_numpy(train.pictures.labels[places.numpy()]).to(device)
        optimizer.zero_grad()
        torch.stack([F.cross_entropy(layer(values), labels) for layer in layers]).sum().backward()
        optimizer.step()
        schedule.step()
    right = [{name: float((layer(part.values).argmax(1) == part.labels).double().mean())
              for name, part in evaluated.items()} for layer in layers]  # fmt: skip
    return max(right, key=lambda of_layer: of_layer["validation"])["test"]


def linear_probe(features: Mapping[str, Features]) -> Predictions:
    """Fits a linear layer on standardised features and returns its predictions for the test pictures.

    Of four penalties the best on the validation pictures is taken, of equal ones the largest; with that it is fitted
    on training and validation pictures. Without validation pictures every tenth training picture stands for them.
    """
    train = features["train"]
    if "validation" not in features:
        tenth = torch.arange(len(train.labels)) % 10 == 0
        parts = {"train": ~tenth, "validation": tenth}
        features = dict(features) | {
            name: replace(train, values=train.values[part], labels=train.labels[part]) for name, part in parts.items()
        }
        train = features["train"]
    mean, deviation = train.values.mean(0), train.values.std(0).clamp(min=1e-6)
    known = {name: ((part.values - mean) / deviation, part.labels) for name, part in features.items()}
    values, labels = known["validation"]
    layers = fitted_layers(*known["train"], train.classes, PENALTIES)
    right = [int((layer.logits(values).argmax(1) == labels).sum()) for layer in layers]
    penalty = max(zip(right, PENALTIES, strict=True))[1]
    both = [torch.cat(pair) for pair in zip(known["train"], known["validation"], strict=True)]
    layer = fitted_layers(both[0], both[1], train.classes, [penalty])[0]
    return Predictions(layer.probabilities(known["test"][0]), known["test"][1].cpu().numpy())
