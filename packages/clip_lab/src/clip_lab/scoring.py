"""Scores on the validation pictures after an epoch."""

from collections.abc import Sequence

import numpy as np
import torch

from clip_lab.batches import Pairs, Part
from clip_lab.contrast import caption_share, pictures_of
from clip_lab.fitting import Fitting, training_mode
from clip_lab.model import ClipModel, SimVlmModel, places_of_end
from clip_lab.objectives import caption_loss, clip_loss, siglip_loss, suffix_targets
from clip_lab.recall import retrieval_metrics
from clip_lab.tokens import Words
from labs_common.training import training_means

EVALUATED = 64  # pictures at once


def scores(fitting: Fitting) -> dict[str, float]:
    """Training loss since the last evaluation; loss and retrieval on the validation pictures; then in training mode.

    Every process computes all of it through the prepared model, so that it also works where weights are sharded.
    """
    fitting.model.eval()
    data = fitting.pairs["validation"]
    with torch.no_grad():
        found = _writing_scores(fitting, data) if isinstance(fitting.plain, SimVlmModel) else _found(fitting, data)
    training_mode(fitting.model, fitting.plain)
    return training_means(fitting.run, "pictures", ("loss",)) | {f"validation/{k}": v for k, v in found.items()}


def _found(fitting: Fitting, data: Pairs) -> dict[str, float]:
    images, texts, ids, losses = [], [], [], []
    scale = bias = None
    for first in range(0, len(data.words), EVALUATED):
        places = range(first, min(first + EVALUATED, len(data.words)))
        part, of_picture = whole_part(data, fitting.words, places)
        device = fitting.accelerator.device
        more = () if isinstance(fitting.plain, ClipModel) else (of_picture.to(device),)
        found = fitting.model(pictures_of(fitting, part), part.words.to(device), *more)
        images.append(found.image.float())
        texts.append(found.text.float())
        ids.append(of_picture + first)
        scale, bias = found.scale, found.bias
        if found.logits is not None:
            predicted = sum(len(row) - 1 for place in places for row in data.words[place])
            losses.append((float(caption_share(fitting, part, found.logits)), predicted))
    assert scale is not None
    image, text, of = torch.cat(images), torch.cat(texts), torch.cat(ids)
    numbers = torch.from_numpy(data.ids).to(image.device)
    of_numbers = numbers[of.to(image.device)]
    if bias is not None:
        loss = siglip_loss(image, text, scale, bias, numbers, of_numbers)
    else:
        loss = clip_loss(image, text, scale, numbers, of_numbers)
    metrics = retrieval_metrics(text @ image.T, of.numpy())
    result = {"loss": float(loss), "temperature": 1 / float(scale), **metrics, "recall": metrics["mean recall"]}
    if losses:
        head = fitting.config.head
        result["caption loss"] = float(np.average([loss for loss, _ in losses], weights=[n for _, n in losses]))
        result["loss"] = head.contrastive_weight * result["loss"] + head.caption_weight * result["caption loss"]
    del result["mean recall"]
    return result


def _writing_scores(fitting: Fitting, data: Pairs) -> dict[str, float]:
    """Mean loss of all words of the validation captions, given the picture alone."""
    total, count = 0.0, 0
    for first in range(0, len(data.words), EVALUATED):
        places = range(first, min(first + EVALUATED, len(data.words)))
        part, of_picture = whole_part(data, fitting.words, places)
        device = fitting.accelerator.device
        words = part.words.to(device)
        logits = fitting.model(pictures_of(fitting, part), words, part.prefix.to(device), of_picture.to(device))
        targets = suffix_targets(words, part.prefix.to(device), places_of_end(fitting.plain, words))
        predicted = int((targets >= 0).sum())
        total += float(caption_loss(logits.float(), targets)) * predicted
        count += predicted
    return {"loss": total / count}


def whole_part(data: Pairs, words: Words, places: Sequence[int]) -> tuple[Part, torch.Tensor]:
    """Pictures with all of their captions, and each caption's picture among them (captions,)."""
    rows = [row for place in places for row in data.words[place]]
    of_picture = [number for number, place in enumerate(places) for _ in data.words[place]]
    if data.text_rows is None:
        read = words.together(rows)
    else:
        first = sum(len(captions) for captions in data.words[: places[0]])
        read = data.text_rows.rows(0, range(first, first + len(rows))).float()
    ids = torch.from_numpy(data.ids[list(places)])
    prefix = torch.ones(len(rows), dtype=torch.long)
    return Part(data.pictures(list(places)), None, read, ids, prefix, 1.0), torch.tensor(of_picture)
