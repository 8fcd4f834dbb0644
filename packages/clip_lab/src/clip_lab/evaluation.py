"""What a trained model can do with pictures and captions that it has not seen."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from clip_lab.data import COLOURS, SHAPES
from clip_lab.encoder import Encoder, frozen, of_ours
from clip_lab.model import SimVlmModel, rows_of
from clip_lab.recall import chance_metrics, retrieval_metrics
from clip_lab.stored import Loaded
from clip_lab.writing import likelihood_matrix, perplexity, writes
from labs_common.data import CaptionedPictures
from labs_common.data.described import PictureTensors
from labs_common.progress import tracked
from labs_common.scenes import Scene
from labs_common.scenes.captions import RELATIONS, relations

BATCH, RANKED, FIRST = 64, 100, 5


@dataclass(frozen=True)
class Queries:
    """Sentences of one kind that are searched among pictures of which it is known what they show.

    Attributes:
        count: how many of them are true of some picture.
        first: share of them whose first picture is right.
        among: share of them with a right one among the first five.
        chance: share of all pictures that are right, on average: what `first` would be by chance.
        examples: sentences with the places of their first pictures, and whether each is right.
    """

    count: int
    first: float
    among: float
    chance: float
    examples: list[tuple[str, list[int], list[bool]]] = field(default_factory=list)


@dataclass(frozen=True)
class Evaluation:
    """Of test pictures.

    Attributes:
        metrics: recall and rank, with `chance` those of a random order.
        similarity: of captions and pictures (captions, pictures), with `of_picture` each caption's picture.
        ranked: how many pictures the metrics are of.
        perplexity: of the captions, where the model writes.
        queries: by kind, where it is known what pictures show.
    """

    metrics: dict[str, float]
    chance: dict[str, float]
    similarity: torch.Tensor
    of_picture: np.ndarray
    ranked: int
    perplexity: float | None = None
    queries: dict[str, Queries] = field(default_factory=dict)


def evaluated(
    loaded: Loaded,
    pictures: CaptionedPictures,
    truth: Mapping[str, Scene],
    device: torch.device,
) -> Evaluation:
    """Retrieval among test pictures, perplexity where the model writes, searches of which the answers are known.

    SimVLM compares by how probable captions are, which takes a pass for every pair: only the first hundred pictures
    take part.
    """
    encoder = frozen(of_ours(loaded, "the model"), device)
    model = loaded.model
    tensors = PictureTensors(pictures, loaded.transform)
    rows = picture_rows_of(loaded, tensors)
    by_likelihood = isinstance(model, SimVlmModel)
    count = min(len(pictures), RANKED) if by_likelihood else len(pictures)
    captions = [caption for of in pictures.captions[:count] for caption in of]
    of_picture = np.repeat(np.arange(count), [len(of) for of in pictures.captions[:count]])
    image = None
    if isinstance(model, SimVlmModel):
        similarity = likelihood_matrix(loaded, rows[:count], captions)
    else:
        with torch.no_grad():
            image = torch.cat([model.embedded(part.to(device)).float().cpu() for part in rows.split(BATCH)])
        similarity = encoder.read(captions) @ image[:count].T
    found = None
    if writes(loaded):
        every = [caption for of in pictures.captions for caption in of]
        places = np.repeat(np.arange(len(pictures)), [len(of) for of in pictures.captions]).tolist()
        found = perplexity(loaded, rows, every, places)
    queries = {}
    if image is not None and all(name in truth for name in pictures.names):
        queries = searched(encoder, image, [truth[name] for name in pictures.names])
    return Evaluation(
        retrieval_metrics(similarity, of_picture), chance_metrics(len(captions), count), similarity, of_picture, count,
        found, queries,
    )  # fmt: skip


@torch.no_grad()
def picture_rows_of(loaded: Loaded, tensors: PictureTensors) -> torch.Tensor:
    """What the image tower makes of pictures (pictures, width), on the CPU."""
    device = next(loaded.model.parameters()).device
    parts = []
    count = len(tensors.pictures)
    for first in tracked(range(0, count, BATCH), "looking at pictures", -(-count // BATCH)):
        batch = tensors.batch(range(first, min(first + BATCH, count))).to(device)
        parts.append(rows_of(loaded.model, batch).float().cpu())
    return torch.cat(parts)


def searched(encoder: Encoder, image: torch.Tensor, scenes: Sequence[Scene]) -> dict[str, Queries]:
    """Every sentence of two kinds that is true of some scene, searched among the embeddings of their pictures."""
    return {
        kind: _answered(encoder, image, list(sentences))
        for kind, sentences in (
            ("one thing", _things(scenes)),
            ("two things and their relation", _related(scenes)),
            ("the same, said in another way", _related(scenes, short=True)),
        )
    }


def _answered(encoder: Encoder, image: torch.Tensor, asked: Sequence[tuple[str, np.ndarray]]) -> Queries:
    asked = [(sentence, right) for sentence, right in asked if right.any()]
    if not asked:
        return Queries(0, 0.0, 0.0, 0.0)
    scores = encoder.read([sentence for sentence, _ in asked]) @ image.T
    top = scores.topk(min(FIRST, image.shape[0]), 1).indices.numpy()
    hits = [right[places] for (_, right), places in zip(asked, top, strict=True)]
    chosen = np.linspace(0, len(asked) - 1, min(4, len(asked))).round().astype(int)
    return Queries(
        len(asked),
        float(np.mean([hit[0] for hit in hits])),
        float(np.mean([hit.any() for hit in hits])),
        float(np.mean([right.mean() for _, right in asked])),
        [(asked[place][0], top[place].tolist(), hits[place].tolist()) for place in chosen],
    )


def _things(scenes: Sequence[Scene]) -> Iterator[tuple[str, np.ndarray]]:
    for colour, shape in itertools.product(COLOURS, SHAPES):
        right = [any((thing.colour, thing.shape) == (colour, shape) for thing in scene.things) for scene in scenes]
        yield f"a {colour} {shape} in the picture", np.array(right)


def _related(scenes: Sequence[Scene], short: bool = False) -> Iterator[tuple[str, np.ndarray]]:
    known = [
        {(one.colour, one.shape, relation, other.colour, other.shape) for one, relation, other in relations(scene)}
        for scene in scenes
    ]
    looks = list(itertools.product(COLOURS, SHAPES))
    for one, relation, other in itertools.product(looks, RELATIONS, looks):
        if one != other:
            said = relation.removeprefix("to the ") if short else relation
            sentence = f"a {' '.join(one)} {said} a {' '.join(other)}"
            yield sentence, np.array([(*one, relation, *other) in there for there in known])
