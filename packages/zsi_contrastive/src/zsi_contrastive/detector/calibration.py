"""Chooses on validation pictures: the bias of seen classes, and the scores from which a word is said to be there."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from zsi_contrastive.detector.annotations import Instances, Split
from zsi_contrastive.detector.options import DetectionOptions

CALIBRATION = "calibration.json"  # beside the weights, once the run was tested
SCORES_BY = ("transfer", "temperature", "refine", "neighbours", "refine_share")  # options of detection


@dataclass(frozen=True)
class Calibration:
    """The choice, and the rules that it holds for.

    Attributes:
        seen_bias: what is taken from seen scores so that most objects get their name; None where nothing could choose.
        thresholds: scores from which a word is there, for `seen` classes and for `unseen` ones and any other word.
        rules: the options of detection that scores depend on.
        pictures: the names of the validation pictures.
    """

    seen_bias: float | None
    thresholds: dict[str, float]
    rules: dict[str, Any]
    pictures: Sequence[str] = ()


def rules_of(detection: DetectionOptions) -> dict[str, Any]:
    """Returns the options that scores depend on: by others, what was calibrated says nothing."""
    return {name: getattr(detection, name) for name in SCORES_BY}


def holding(chosen: Calibration | None, detection: DetectionOptions) -> Calibration | None:
    """Returns what was chosen if scores are made by the same rules, else None."""
    return chosen if chosen is not None and chosen.rules == rules_of(detection) else None


def calibrated(
    part: Instances, results: Sequence[dict[str, Any]], split: Split, sweep: Sequence[dict[str, float]], rules: Any
) -> Calibration:
    """Chooses on the validation pictures `part`, from what was found there and the `sweep` of biases."""
    named = {line["bias"]: line["named harmonic mean"] for line in sweep}
    bias = max(named, key=lambda value: named[value])
    thresholds = {}
    for kind, names in (("seen", split.seen), ("unseen", split.unseen)):
        scores, there = words_there(part, results, part.ids(names))
        if there.any() and not there.all():
            thresholds[kind] = best_threshold(scores[there], scores[~there])
    pictures = [row["file_name"] for row in part.images]
    return Calibration(bias if named[bias] > 0 else None, thresholds, rules, pictures)


def words_there(
    part: Instances, results: Sequence[dict[str, Any]], categories: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the best score of each class in each picture (pictures, classes), 0 without any, and whether it is there.

    The classes that a picture does not show are its distractors.
    """
    row_of = {row["id"]: place for place, row in enumerate(part.images)}
    column_of = {number: place for place, number in enumerate(categories)}
    scores = np.zeros((len(row_of), len(column_of)))
    there = np.zeros(scores.shape, bool)
    for result in results:
        if (column := column_of.get(result["category_id"])) is not None:
            row = row_of[result["image_id"]]
            scores[row, column] = max(scores[row, column], result["score"])
    for known in part.annotations:  # a crowd is there as well
        if (column := column_of.get(known["category_id"])) is not None:
            there[row_of[known["image_id"]], column] = True
    return scores, there


def best_threshold(there: np.ndarray, absent: np.ndarray) -> float:
    """Finds the score that tells words that are there from absent ones: the mean of both kinds' accuracy is largest."""
    values = np.unique(np.concatenate([there, absent]))
    values = values[values > 0]  # what was not found at all is not there
    if not values.size:
        return 1.0
    found = 1 - np.searchsorted(np.sort(there), values) / there.size
    refused = np.searchsorted(np.sort(absent), values) / absent.size
    return float(values[int((found + refused).argmax())])


def presence(
    part: Instances, results: Sequence[dict[str, Any]], split: Split, calibration: Calibration
) -> dict[str, dict[str, float]]:
    """Measures thresholds: of words that pictures show, the share that is found; of the others, the share refused."""
    rows = {}
    for kind, names in (("seen", split.seen), ("unseen", split.unseen)):
        if (threshold := calibration.thresholds.get(kind)) is not None:
            scores, there = words_there(part, results, part.ids(names))
            said = scores >= threshold
            shares = {"found": said[there], "refused": ~said[~there]}
            means = {name: float(one.mean()) if one.size else float("nan") for name, one in shares.items()}
            rows[kind] = {"threshold": threshold, **means}
    return rows
