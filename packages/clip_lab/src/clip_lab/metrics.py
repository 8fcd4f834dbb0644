"""Recall and median rank of captions and pictures, by chance too, and how sure they are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from labs_common.caption_metrics import CaptionScores
from labs_common.data.captions import CaptionedPictures

AMONG = (1, 5, 10)  # the k of recall@k, as in the papers
RESAMPLES = 1000  # of the bootstrap: its ends move by about a tenth of the interval's width from draw to draw


@dataclass(frozen=True)
class Queries:
    """Sentences of one kind that are searched among pictures whose contents are known.

    Attributes:
        count: how many of them are true of some picture.
        first: share of them whose first picture is right.
        among: share of them with a right one among the first five.
        chance: share of all pictures that are right, on average: `first` of a random order.
        examples: sentences with the places of their first pictures, and whether each is right.
    """

    count: int
    first: float
    among: float
    chance: float
    examples: list[tuple[str, list[int], list[bool]]] = field(default_factory=list)


@dataclass(frozen=True)
class Evaluation:
    """The measurements of a model on test pictures.

    Attributes:
        metrics: recall and rank, with `chance` those of a random order.
        similarity: of captions and pictures (captions, pictures), with `of_picture` each caption's picture.
        ranked: how many pictures the metrics are of.
        perplexity: of the captions, where the model writes.
        captions: that it wrote, with their scores.
        queries: by kind, where it is known what pictures show.
    """

    metrics: dict[str, float]
    chance: dict[str, float]
    similarity: torch.Tensor
    of_picture: np.ndarray
    ranked: int
    perplexity: float | None = None
    captions: CaptionScores | None = None
    queries: dict[str, Queries] = field(default_factory=dict)


def captions_of(pictures: CaptionedPictures, count: int | None = None) -> tuple[list[str], np.ndarray]:
    """Returns all captions of the first `count` pictures, and each one's picture (captions,)."""
    captions = pictures.captions[:count]
    return [caption for of in captions for caption in of], np.repeat(np.arange(len(captions)), list(map(len, captions)))


def retrieval_metrics(similarity: torch.Tensor, of_picture: Sequence[int] | np.ndarray) -> dict[str, float]:
    """Computes recall at 1, 5 and 10 (shares), and the median rank, in both directions.

    The usual protocol with several captions per picture: a caption has found its picture if that is among the first k;
    a picture has found its captions if any of them is. Things of the same score share their places, so that a model
    that tells nothing apart is not rewarded. `similarity` is (captions, pictures), `of_picture` the picture of each
    caption (captions,).

    Returns:
        `text_to_image/recall@1` and so on, `.../median rank` (1 is best), and `mean recall` over both ways and all k.
    """
    found: dict[str, float] = {}
    for way, ranks in ranks_of(similarity, of_picture).items():
        found |= {f"{way}/recall@{among}": float((ranks <= among).mean()) for among in AMONG}
        found[f"{way}/median rank"] = float(np.median(ranks))
    return found | {"mean recall": _mean_recall(found)}


def ranks_of(similarity: torch.Tensor, of_picture: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
    """Ranks each caption's picture (captions,) and, for each picture, the best of its captions (pictures,); by way."""
    own = torch.as_tensor(np.asarray(of_picture), device=similarity.device)
    rows = torch.arange(len(own), device=similarity.device)
    # A picture's rank is that of the best of its captions, among all captions.
    best = torch.full((similarity.shape[1],), -torch.inf, device=similarity.device, dtype=similarity.dtype)
    best.scatter_reduce_(0, own, similarity[rows, own], "amax")
    return {
        "text_to_image": _ranks(similarity, similarity[rows, own][:, None]).double().cpu().numpy(),
        "image_to_text": _ranks(similarity.T, best[:, None]).double().cpu().numpy(),
    }


def metric_intervals(
    similarity: torch.Tensor, of_picture: Sequence[int] | np.ndarray, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Computes 95 % intervals of `retrieval_metrics` by the bootstrap over pictures (Efron 1979, percentiles).

    Pictures are drawn with putting back, each with all of its captions, as captions of one picture are not independent;
    what is searched stays as it is.
    """
    of_picture, pictures = np.asarray(of_picture), similarity.shape[1]
    drawn = np.random.default_rng(seed).multinomial(pictures, np.full(pictures, 1 / pictures), RESAMPLES)
    found: dict[str, tuple[float, float]] = {}

    def ends(values: np.ndarray) -> tuple[float, float]:
        low, high = np.percentile(values, (2.5, 97.5))
        return float(low), float(high)

    for way, ranks in ranks_of(similarity, of_picture).items():
        of = of_picture if way == "text_to_image" else np.arange(pictures)
        asked = drawn @ np.bincount(of, minlength=pictures)
        for among in AMONG:
            right = drawn @ np.bincount(of, ranks <= among, pictures)
            found[f"{way}/recall@{among}"] = ends(right / asked)
        order = np.argsort(ranks)
        sums = (np.cumsum(weights[of[order]]) for weights in drawn)
        middle = [np.searchsorted(before, before[-1] / 2) for before in sums]
        found[f"{way}/median rank"] = ends(ranks[order][middle])
    return found


def chance_metrics(captions: int, pictures: int) -> dict[str, float]:
    """Computes the same metrics of a random order, where every picture has captions / pictures of them."""
    found = {}
    own = captions / pictures
    for way, count, right in (("text_to_image", pictures, 1.0), ("image_to_text", captions, own)):
        for among in AMONG:
            # No right one among the first k, drawn without putting back.
            missed = float(np.prod([max(0.0, 1 - right / (count - place)) for place in range(min(among, count))]))
            found[f"{way}/recall@{among}"] = 1 - missed
        found[f"{way}/median rank"] = (count + 1) / 2 if right == 1 else float(count * (1 - 0.5 ** (1 / right)))
    return found | {"mean recall": _mean_recall(found)}


def _mean_recall(found: Mapping[str, float]) -> float:
    recalls = [value for name, value in found.items() if "recall" in name]
    return sum(recalls) / len(recalls)


def _ranks(similarity: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Ranks each row's own score: 1 + how many score higher; of those that score the same, half."""
    higher = (~(similarity <= own)).sum(1)  # so that what is no number is the last, and not the first
    same = (similarity == own).sum(1) - 1
    return 1 + higher + same.clamp(min=0) / 2
