"""Measures models on pictures and captions: after an epoch, on the test, and any by `python -m clip_lab.evaluate`."""

from clip_lab import commands

if __name__ == "__main__":  # before the imports below: --help and a wrong option answer at once
    commands.evaluate()

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from clip_lab.config import FINISHED, TRAIN, EvaluateConfig, TrainConfig
from clip_lab.data import COLOURS, SHAPES, Pairs, Part, drawn_scenes, read_data
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
from clip_lab.metrics import Evaluation, Queries, captions_of, chance_metrics, metric_intervals, retrieval_metrics
from clip_lab.model import places_of_end, tower_rows, training_mode
from clip_lab.released import ReleasedModel
from clip_lab.report import finish_evaluation
from clip_lab.saved import Loaded, load_any
from clip_lab.tokens import Words
from labs_common.caption_metrics import score_captions
from labs_common.cli import config_from_yaml
from labs_common.data.captions import CaptionedPictures, Captions, PictureTensors, read_undivided
from labs_common.decoding import written_captions
from labs_common.device import inference_accelerator
from labs_common.errors import LabError
from labs_common.fitting import Fitting
from labs_common.options import DecodingOptions, RunOptions
from labs_common.progress import tracked
from labs_common.run import Run, check_run_options, newest_run, training_means
from labs_common.scenes.captions import RELATIONS, relations
from labs_common.scenes.world import Scene

BATCH = 64  # pictures through a tower at once
CAPTIONS = 256  # captions through a text tower or decoder at once
RANKED = 100  # most pictures that SimVLM ranks: each caption is read with each of them
FIRST = 5  # pictures of a search that are looked at
EACH = 5  # captions of a picture that count: COCO has more of some, and all published figures are of five


def evaluate(config: EvaluateConfig) -> None:
    """Measures retrieval on pictures with captions, prints it beside chance, and writes results and a report.

    Raises:
        LabError: the model cannot be had or reads no text, or there are no such pictures.
    """
    options = RunOptions(output=config.output, track="none")
    check_run_options(options)
    checkpoint = config.checkpoint or str(newest_run(FINISHED, TRAIN))
    loaded = load_any(checkpoint)
    data = chosen_pictures(config, Path(checkpoint))
    pictures = data.splits[config.split]
    pictures = replace(pictures, captions=tuple(of[:EACH] for of in pictures.captions))
    accelerator = inference_accelerator()
    found = evaluate_model(loaded, pictures, data.truth, accelerator.device)
    intervals = metric_intervals(found.similarity, found.of_picture, config.seed)
    run = Run.start(config, options, "evaluate", accelerator)
    finish_evaluation(run, config, checkpoint, Captions({config.split: pictures}, data.truth), found, intervals)


def chosen_pictures(config: EvaluateConfig, checkpoint: Path) -> Captions:
    """Reads the pictures of --data, or those that the run itself had.

    Raises:
        LabError: they cannot be read, or nothing says which.
    """
    options, seed = config.data, config.seed
    if options.data is None:
        file = checkpoint / "config.yaml"
        if not file.is_file():
            raise LabError(f"--checkpoint {checkpoint}: knows no pictures; name some with captions in --data")
        trained = config_from_yaml(TrainConfig, file)
        options, seed = trained.data, trained.run.seed
        options = replace(options, on_bad_data=config.data.on_bad_data, limit=config.data.limit or options.limit)
    if config.split == "all":
        return read_undivided(options, seed, drawn_scenes)
    return read_data(options, seed, shown=True)


def evaluate_model(
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
    said = written(loaded, rows, pictures)
    scored = score_captions(said, pictures, truth if known else {}) if said else None
    metrics, chance = retrieval_metrics(similarity, of_picture), chance_metrics(len(captions), count)
    return Evaluation(metrics, chance, similarity, of_picture, count, expected, scored, queries)


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


def written(
    loaded: Loaded, rows: torch.Tensor, pictures: CaptionedPictures, options: DecodingOptions | None = None
) -> list[str]:
    """Writes a caption for each picture, of which there are rows of the image tower (pictures, width); by beam search.

    A released model sees the pictures themselves. None are written where the model does not write, or its tokenizer has
    no token to start from.
    """
    model: Any = loaded.model
    words, writer, read = loaded.words, model, lambda places: rows[list(places)]
    if isinstance(model, ReleasedModel):
        writer, read = model.writer, PictureTensors(pictures, loaded.transform).batch
    elif not model.writes:
        return []
    if writer is None or words.special is None:
        return []
    # SimVLM's places see the start of the caption too.
    begin = partial(writer.begin, start=words.special.start) if model.continues else writer.begin
    device = next(model.parameters()).device
    return written_captions(
        SimpleNamespace(begin=begin, step=writer.step), lambda places: read(places).to(device), len(rows),
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
