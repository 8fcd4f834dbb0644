"""How well pictures and captions find each other: recall and median rank, both ways, as the papers count."""

from collections.abc import Sequence

import numpy as np
import torch

AMONG = (1, 5, 10)


def retrieval_metrics(similarity: torch.Tensor, of_picture: Sequence[int] | np.ndarray) -> dict[str, float]:
    """Recall at 1, 5 and 10 (shares), and median rank, by way.

    The usual protocol with several captions per picture: a caption has found its picture if that is among the first k;
    a picture has found its captions if any of them is. Things of the same score share their places, so that a model
    that tells nothing apart is not rewarded.

    Args:
        similarity: (captions, pictures).
        of_picture: the picture of each caption (captions,).

    Returns:
        `text_to_image/recall@1` and so on, `.../median rank` (1 is best), and `mean recall` over both ways and all k.
    """
    own = torch.as_tensor(np.asarray(of_picture), device=similarity.device)
    rows = torch.arange(len(own), device=similarity.device)
    by_caption = _ranks(similarity, similarity[rows, own][:, None])
    # A picture's rank is that of the best of its captions, among all captions.
    best = torch.full((similarity.shape[1],), -torch.inf, device=similarity.device, dtype=similarity.dtype)
    best.scatter_reduce_(0, own, similarity[rows, own], "amax")
    by_picture = _ranks(similarity.T, best[:, None])
    found: dict[str, float] = {}
    for way, ranks in (("text_to_image", by_caption), ("image_to_text", by_picture)):
        found |= {f"{way}/recall@{among}": float((ranks <= among).double().mean()) for among in AMONG}
        found[f"{way}/median rank"] = float(ranks.double().quantile(0.5))
    recalls = [value for name, value in found.items() if "recall" in name]
    return found | {"mean recall": sum(recalls) / len(recalls)}


def chance_metrics(captions: int, pictures: int) -> dict[str, float]:
    """What a random order would give, where every picture has captions / pictures of them."""
    found = {}
    own = captions / pictures
    for way, count, right in (("text_to_image", pictures, 1.0), ("image_to_text", captions, own)):
        for among in AMONG:
            # No right one among the first k, drawn without putting back.
            missed = float(np.prod([max(0.0, 1 - right / (count - place)) for place in range(min(among, count))]))
            found[f"{way}/recall@{among}"] = 1 - missed
        found[f"{way}/median rank"] = (count + 1) / 2 if right == 1 else float(count * (1 - 0.5 ** (1 / right)))
    recalls = [value for name, value in found.items() if "recall" in name]
    return found | {"mean recall": sum(recalls) / len(recalls)}


def _ranks(similarity: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """1 + how many score higher; of those that score the same, half."""
    higher = (similarity > own).sum(1)
    same = (similarity == own).sum(1) - 1
    return 1 + higher + same.clamp(min=0) / 2
