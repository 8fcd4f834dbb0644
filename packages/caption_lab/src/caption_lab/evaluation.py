"""What a finished captioner says about pictures, and how good it is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from caption_lab.config import DecodingOptions
from caption_lab.export import Captioner, features_of
from caption_lab.writing import captions_of, references_of, scored
from labs_common.data import CaptionedPictures
from labs_common.data.described import PictureTensors
from labs_common.scenes import Scene
from labs_common.scenes.judging import Claim, claims_of

DRAWN = DecodingOptions(beam=1, top_p=0.9)
DRAWN_EACH = 3


@dataclass(frozen=True)
class Evaluation:
    """The captions of a split, and their scores.

    Attributes:
        captions: one for each picture.
        metrics: of them.
        chance: the metrics of true captions that are of other pictures.
        claims: what is right in them and in captions drawn by chance, by kind; empty where nobody knows what is true.
    """

    captions: list[str]
    metrics: dict[str, float]
    chance: dict[str, float]
    claims: dict[str, "Truthfulness"]


@dataclass(frozen=True)
class Truthfulness:
    """How much of what captions claim is so.

    Attributes:
        by_kind: of each kind of claim how many are right, and how many there are.
        whole: the share of captions that are right in everything.
    """

    by_kind: dict[str, tuple[int, int]]
    whole: float


def evaluated(
    captioner: Captioner,
    pictures: CaptionedPictures,
    truth: Mapping[str, Scene],
    options: DecodingOptions,
    accelerator: Accelerator,
    batch_size: int = 64,
    seed: int = 0,
    kept: dict[int, torch.Tensor] | None = None,
) -> Evaluation:
    """Runs the whole captioner on the pictures; the processes share them. Drawing begins with `seed`.

    Several calls for the same pictures that get the same `kept` run the encoder once.
    """
    tensors = PictureTensors(pictures, captioner.transform)
    model = captioner.model.to(accelerator.device)
    reused = bool(truth) or kept is not None  # drawn pictures are written about several times
    kept = {} if kept is None else kept

    def features(places: Sequence[int]) -> torch.Tensor:
        missing = [place for place in places if place not in kept]
        if missing:
            found = features_of(captioner, tensors.batch(missing).to(accelerator.device))
            if not reused:
                return found
            kept.update(zip(missing, found, strict=True))
        return torch.stack([kept[place] for place in places])

    def written(by: DecodingOptions, task: str, number: int = 0) -> list[str]:
        set_seed(seed + number, device_specific=True)
        return captions_of(
            model.decoder, features, len(pictures), captioner.vocabulary, by, accelerator, batch_size, task
        )

    references = references_of(pictures, captioner.vocabulary)
    captions = written(options, "writing captions")
    claims = {}
    if truth:
        scenes = [truth[name] for name in pictures.names]
        claims["written"] = truthfulness(captions, scenes)
        drawn = [written(DRAWN, f"drawing captions, {n + 1} of {DRAWN_EACH}", n) for n in range(DRAWN_EACH)]
        claims["drawn by chance"] = truthfulness([c for each in drawn for c in each], scenes * len(drawn))
        claims["of another picture"] = truthfulness(of_others(pictures, captioner), scenes)
    return Evaluation(
        captions, scored(captions, references), scored(of_others(pictures, captioner), references), claims
    )


def of_others(pictures: CaptionedPictures, captioner: Captioner) -> list[str]:
    """For each picture a true caption of another one: what somebody would score who did not look."""
    order = np.random.default_rng(0).permutation(len(pictures))
    other = {int(here): int(there) for here, there in zip(order, np.roll(order, 1), strict=True)}
    cleaning = captioner.vocabulary.cleaning
    return [" ".join(cleaning.words(pictures.captions[other[place]][0])) for place in range(len(pictures))]


def truthfulness(captions: Sequence[str], scenes: Sequence[Scene]) -> Truthfulness:
    """Judges each caption against its scene."""
    judged = [claims_of(caption, scene) for caption, scene in zip(captions, scenes, strict=True)]
    by_kind: dict[str, tuple[int, int]] = {}
    for claim in (claim for claims in judged for claim in claims):
        right, there = by_kind.get(claim.kind, (0, 0))
        by_kind[claim.kind] = (right + claim.right, there + 1)
    return Truthfulness(by_kind, sum(all(claim.right for claim in claims) for claims in judged) / len(judged))


def mistakes(caption: str, scene: Scene) -> list[Claim]:
    """The claims of a caption that are not so."""
    return [claim for claim in claims_of(caption, scene) if not claim.right]
