"""Measures models on pictures and captions: on the validation pictures after an epoch, on the test at the end."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from clip_lab.config import TrainConfig
from clip_lab.data import COLOURS, SHAPES, Pairs, Part
from clip_lab.losses import (
    OBJECTIVES,
    PADDED,
    Embeddings,
    caption_loss,
    caption_share,
    clip_loss,
    pictures_of,
    siglip_loss,
    suffix_targets,
)
from clip_lab.model import places_of_end, tower_rows, training_mode
from clip_lab.saved import Loaded
from clip_lab.tokens import Words
from labs_common.caption_metrics import CaptionScores, score_captions
from labs_common.data.captions import CaptionedPictures, PictureTensors
from labs_common.decoding import written_captions
from labs_common.fitting import Fitting
from labs_common.options import DecodingOptions
from labs_common.progress import tracked
from labs_common.run import training_means
from labs_common.scenes.captions import RELATIONS, relations
from labs_common.scenes.world import Scene

BATCH = 64  # pictures through a tower at once
CAPTIONS = 256  # captions through a text tower or decoder at once
RANKED = 100  # most pictures that SimVLM ranks: each caption is read with each of them
AMONG = (1, 5, 10)  # the k of recall@k, as in the papers
FIRST = 5  # pictures of a search that are looked at


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


def evaluate(
    loaded: Loaded, pictures: CaptionedPictures, truth: Mapping[str, Scene], device: torch.device
) -> Evaluation:
    """Measures retrieval, perplexity and captions where the model writes, and searches of which the answers are known.

    SimVLM compares by how probable captions are, which takes a pass for every pair: only the first hundred pictures
    take part.
    """
    loaded.model.to(device)
    rows = picture_rows_of(loaded, pictures)
    count = len(pictures) if loaded.model.embeds else min(len(pictures), RANKED)
    captions, of_picture = captions_of(pictures, count)
    queries, known = {}, all(name in truth for name in pictures.names)
    if loaded.model.embeds:
        image = embeddings_of(loaded, rows)
        similarity = embed_sentences(loaded, captions) @ image.T
        if known:
            queries = search_scenes(loaded, image, [truth[name] for name in pictures.names])
    else:
        similarity = likelihood_matrix(loaded, rows[:count], captions)
    expected = perplexity(loaded, rows, pictures) if loaded.model.writes else None
    said = written(loaded, rows)
    scored = score_captions(said, pictures, truth if known else {}) if said else None
    metrics, chance = retrieval_metrics(similarity, of_picture), chance_metrics(len(captions), count)
    return Evaluation(metrics, chance, similarity, of_picture, count, expected, scored, queries)


def captions_of(pictures: CaptionedPictures, count: int | None = None) -> tuple[list[str], np.ndarray]:
    """Returns all captions of the first `count` pictures, and each one's picture (captions,)."""
    captions = pictures.captions[:count]
    return [caption for of in captions for caption in of], np.repeat(np.arange(len(captions)), list(map(len, captions)))


@torch.no_grad()
def picture_rows_of(loaded: Loaded, pictures: CaptionedPictures) -> torch.Tensor:
    """Runs the image tower on pictures: the rows that the rest of the model reads (pictures, width), on the CPU."""
    device = next(loaded.model.parameters()).device
    tensors, count = PictureTensors(pictures, loaded.transform), len(pictures)
    parts = []
    for first in tracked(range(0, count, BATCH), "running the image tower", -(-count // BATCH)):
        batch = tensors.batch(range(first, min(first + BATCH, count))).to(device)
        parts.append(tower_rows(loaded.model, batch).float().cpu())
    return torch.cat(parts)


@torch.no_grad()
def embeddings_of(loaded: Loaded, rows: torch.Tensor) -> torch.Tensor:
    """Turns rows of the image tower into embeddings of length 1 (pictures, width), on the CPU."""
    model: Any = loaded.model
    assert model.embeds
    device = next(model.parameters()).device
    return torch.cat([model.embedded(part.to(device)).float().cpu() for part in rows.split(BATCH)])


@torch.no_grad()
def embed_sentences(loaded: Loaded, sentences: Sequence[str]) -> torch.Tensor:
    """Embeds sentences with length 1 (sentences, width), on the CPU."""
    model: Any = loaded.model
    assert model.embeds
    device = next(model.parameters()).device
    parts = [sentences[first : first + CAPTIONS] for first in range(0, len(sentences), CAPTIONS)]
    return torch.cat([model.embed_texts(loaded.words(part).to(device)).float().cpu() for part in parts])


def retrieval_metrics(similarity: torch.Tensor, of_picture: Sequence[int] | np.ndarray) -> dict[str, float]:
    """Computes recall at 1, 5 and 10 (shares), and the median rank, in both directions.

    The usual protocol with several captions per picture: a caption has found its picture if that is among the first k;
    a picture has found its captions if any of them is. Things of the same score share their places, so that a model
    that tells nothing apart is not rewarded. `similarity` is (captions, pictures), `of_picture` the picture of each
    caption (captions,).

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
        ranks = ranks.cpu()  # where there are 64 bits
        found |= {f"{way}/recall@{among}": float((ranks <= among).double().mean()) for among in AMONG}
        found[f"{way}/median rank"] = float(ranks.double().quantile(0.5))
    return found | {"mean recall": _mean_recall(found)}


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
    higher = (similarity > own).sum(1)
    same = (similarity == own).sum(1) - 1
    return 1 + higher + same.clamp(min=0) / 2


@torch.no_grad()
def log_likelihoods(
    loaded: Loaded, rows: torch.Tensor, words: torch.Tensor, of_picture: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the log-probability of each caption with its picture, and its number of words, the end among them.

    The model writes; `rows` (pictures, width) are of its image tower, `words` (captions, length) captions as numbers,
    and `of_picture` (captions,) says which row is each one's picture. Both results are (captions,).
    """
    model: Any = loaded.model
    assert model.writes
    device = next(model.parameters()).device
    sums, counts = [], []
    for part, at in zip(words.split(CAPTIONS), of_picture.split(CAPTIONS), strict=True):
        part = part.to(device)
        logits = model.next_words(rows[at].to(device), part).float()
        start = torch.ones(len(part), dtype=torch.long, device=device)
        targets = suffix_targets(part, start, places_of_end(model, part))
        loss = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=PADDED, reduction="none")
        sums.append(-loss.sum(1).cpu())
        counts.append((targets != PADDED).sum(1).cpu())
    return torch.cat(sums), torch.cat(counts)


def perplexity(loaded: Loaded, rows: torch.Tensor, pictures: CaptionedPictures) -> float:
    """Computes exp of the mean loss over all words of all captions, with their pictures' rows of the image tower."""
    captions, of_picture = captions_of(pictures)
    sums, counts = log_likelihoods(loaded, rows, loaded.words(captions), torch.as_tensor(of_picture))
    return float((-sums.sum() / counts.sum()).exp())


def written(loaded: Loaded, rows: torch.Tensor, options: DecodingOptions | None = None) -> list[str]:
    """Writes a caption for each picture, of which there are rows of the image tower (pictures, width); by beam search.

    None are written where the model does not write, or its tokenizer has no token to start from.
    """
    model: Any = loaded.model
    words = loaded.words
    if not model.writes or words.special is None:
        return []
    # SimVLM's places see the start of the caption too.
    begin = partial(model.begin, start=words.special.start) if model.continues else model.begin
    device = next(model.parameters()).device
    return written_captions(
        SimpleNamespace(begin=begin, step=model.step), lambda places: rows[list(places)].to(device), len(rows),
        words.special, words.length - 1, words.sentence, options or DecodingOptions(), task="writing captions",
    )  # fmt: skip


def likelihood_matrix(loaded: Loaded, rows: torch.Tensor, captions: Sequence[str]) -> torch.Tensor:
    """Computes how much more probable each caption is with each picture than with any (captions, pictures).

    log p(caption | picture) less log of its mean over the pictures: else short and common captions would fit all.
    """
    pictures = torch.arange(len(rows))
    per = max(1, CAPTIONS // len(rows))
    starts = range(0, len(captions), per)
    scores = []
    for first in tracked(starts, "reading captions with every picture", len(starts)):
        words = loaded.words(captions[first : first + per])
        every = words.repeat_interleave(len(rows), 0)  # (captions × pictures, length)
        sums, _ = log_likelihoods(loaded, rows, every, pictures.repeat(len(words)))
        scores.append(sums.view(len(words), len(rows)))
    found = torch.cat(scores)
    return found - (found.logsumexp(1, keepdim=True) - torch.log(torch.tensor(float(len(rows)))))


def search_scenes(loaded: Loaded, image: torch.Tensor, scenes: Sequence[Scene]) -> dict[str, Queries]:
    """Searches every sentence of three kinds that is true of some scene among the embeddings of their pictures."""
    return {
        "one thing": _answers(loaded, image, _things(scenes)),
        "two things and their relation": _answers(loaded, image, _related(scenes)),
        "the same, said in another way": _answers(loaded, image, _related(scenes, short=True)),
    }


def _answers(loaded: Loaded, image: torch.Tensor, sentences: Iterator[tuple[str, np.ndarray]]) -> Queries:
    asked = [(sentence, right) for sentence, right in sentences if right.any()]
    if not asked:
        return Queries(0, 0.0, 0.0, 0.0)
    scores = embed_sentences(loaded, [sentence for sentence, _ in asked]) @ image.T
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


def scores(fitting: Fitting, config: TrainConfig, data: Pairs, words: Words) -> dict[str, float]:
    """Measures loss and retrieval on the validation pictures, and the mean training loss since the last evaluation.

    Every process computes all of it through the prepared model, so that it also works where weights are sharded.
    The model is in training mode afterwards.
    """
    fitting.model.eval()
    with torch.no_grad():
        if OBJECTIVES[config.objective].model.embeds:
            found = _retrieval_scores(fitting, config, data, words)
        else:
            found = _writing_scores(fitting, data, words)
    training_mode(fitting.model, fitting.plain)
    return training_means(fitting.run, "pictures", ("loss",)) | {f"validation/{k}": v for k, v in found.items()}


def _retrieval_scores(fitting: Fitting, config: TrainConfig, data: Pairs, words: Words) -> dict[str, float]:
    images, texts, ids, losses = [], [], [], []
    scale = bias = None
    for first, part, of_picture in _whole_parts(data, words):
        of_picture = of_picture.to(fitting.accelerator.device)
        more = (of_picture,) if OBJECTIVES[config.objective].model.writes else ()
        found = fitting.model(pictures_of(fitting, part), part.words.to(of_picture.device), *more)
        images.append(found.image.float())
        texts.append(found.text.float())
        ids.append(of_picture + first)
        scale, bias = found.scale, found.bias
        if found.logits is not None:
            predicted = sum(len(row) - 1 for captions in data.words[first : first + BATCH] for row in captions)
            losses.append((float(caption_share(fitting, part, found.logits)), predicted))
    assert scale is not None
    image, text, of = torch.cat(images), torch.cat(texts), torch.cat(ids)
    numbers = torch.from_numpy(data.ids).to(image.device)
    every = Embeddings(image, text, numbers, numbers[of])
    loss = clip_loss(every, scale) if bias is None else siglip_loss(every, scale, bias)
    metrics = retrieval_metrics(text @ image.T, of.cpu().numpy())
    metrics["recall"] = metrics.pop("mean recall")
    result = {"loss": float(loss), "temperature": 1 / float(scale), **metrics}
    if losses:
        head = config.head
        result["caption loss"] = float(np.average([loss for loss, _ in losses], weights=[n for _, n in losses]))
        result["loss"] = head.contrastive_weight * result["loss"] + head.caption_weight * result["caption loss"]
    return result


def _writing_scores(fitting: Fitting, data: Pairs, tokenizer: Words) -> dict[str, float]:
    """Computes the mean loss of all words of the validation captions, given the picture alone."""
    total, count, device = 0.0, 0, fitting.accelerator.device
    for _, part, of_picture in _whole_parts(data, tokenizer):
        words, prefix = part.words.to(device), part.prefix.to(device)
        logits = fitting.model(pictures_of(fitting, part), words, prefix, of_picture.to(device))
        targets = suffix_targets(words, prefix, places_of_end(fitting.plain, words))
        predicted = int((targets != PADDED).sum())
        total += float(caption_loss(logits.float(), targets)) * predicted
        count += predicted
    return {"loss": total / count}


def _whole_parts(data: Pairs, words: Words) -> Iterator[tuple[int, Part, torch.Tensor]]:
    """Yields pictures with all of their captions: the first one's place, and each caption's picture in the part."""
    for first in range(0, len(data.words), BATCH):
        places = range(first, min(first + BATCH, len(data.words)))
        chosen = [(place, caption) for place in places for caption in range(len(data.words[place]))]
        ids, prefix = torch.from_numpy(data.ids[list(places)]), torch.ones(len(chosen), dtype=torch.long)
        part = Part(data.pictures(places), None, data.captions(chosen, words), ids, prefix, 1.0)
        yield first, part, torch.tensor([place - first for place, _ in chosen])
