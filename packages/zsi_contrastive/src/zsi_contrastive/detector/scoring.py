"""Scores of COCO's results: recall and average precision, by class and over seen and unseen classes."""

import contextlib
import gc
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as rle

from labs_common.errors import LabError
from zsi_contrastive.detector.annotations import Instances

LOW = (0.4, 0.5, 0.6)  # of the zero-shot literature
USUAL = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))
THRESHOLDS = tuple(sorted({*LOW, *USUAL}))
KINDS = {"box": "bbox", "mask": "segm"}
Result = dict[str, Any]


@dataclass(frozen=True)
class ClassScores:
    """Scores of each class.

    Attributes:
        categories: their ids.
        precision: average precision (thresholds, classes); not a number where a class has no object.
        recall: of the best 100 of a picture (thresholds, classes).
    """

    categories: tuple[int, ...]
    precision: np.ndarray
    recall: np.ndarray

    def means(self, wanted: Sequence[int]) -> dict[str, float]:
        """Means over the wanted categories that have objects: `ap@0.5`, `recall@0.5`, …, and `ap` over 0.5 to 0.95."""
        places = [self.categories.index(number) for number in wanted]
        found = {}
        for threshold in LOW:
            row = THRESHOLDS.index(threshold)
            found[f"ap@{threshold}"] = _mean(self.precision[row, places])
            found[f"recall@{threshold}"] = _mean(self.recall[row, places])
        rows = [THRESHOLDS.index(threshold) for threshold in USUAL]
        found["ap"] = _mean(self.precision[np.ix_(rows, places)])
        return found

    def of_class(self, number: int) -> dict[str, float]:
        """One category's `means`."""
        return self.means([number])


def scored(truth: Instances, results: Sequence[Mapping[str, Any]], categories: Sequence[int], kind: str) -> ClassScores:
    """Scores by faster-coco-eval; `kind` is box or mask.

    Raises:
        LabError: a result is of a picture that the annotations do not have, or has no mask.
    """
    pictures = {row["id"] for row in truth.images}
    wanted = set(categories)
    rows = [row for row in results if row["category_id"] in wanted]
    for row in rows:
        if row["image_id"] not in pictures:
            raise LabError(f"results: one is of the picture {row['image_id']}, which {truth.source} does not have")
        if kind == "mask" and "segmentation" not in row:
            raise LabError("results: have no segmentation; score their boxes alone")
    known = {row["category_id"] for row in truth.annotations if not row["iscrowd"]}
    shape = (len(THRESHOLDS), len(categories))
    if not rows:
        nothing = np.where([number in known for number in categories], 0.0, np.nan)
        return ClassScores(tuple(categories), np.broadcast_to(nothing, shape), np.broadcast_to(nothing, shape))
    with _no_collection():
        gold, found = COCO(), COCO()
        gold.dataset = {**truth.plain(), "annotations": [dict(row) for row in truth.annotations]}
        found.dataset = {**truth.plain(), "annotations": _detections(rows, kind)}
        gold.createIndex()
        found.createIndex()
        evaluation = _evaluated(gold, found, kind, sorted(categories))
    order = [sorted(categories).index(number) for number in categories]
    precision = np.asarray(evaluation.eval["precision"])[:, :, order, 0, 0]  # (thresholds, recalls, classes)
    recall = np.asarray(evaluation.eval["recall"])[:, order, 0, 0]
    without = precision[0, 0] < 0
    means = precision.mean(1)
    means[:, without] = np.nan
    return ClassScores(tuple(categories), means, np.where(without, np.nan, recall))


def _detections(rows: Sequence[Mapping[str, Any]], kind: str) -> list[Result]:
    """The results with what COCO's evaluation needs besides; areas are those of what is compared."""
    if kind == "mask":
        return [
            {"image_id": row["image_id"], "category_id": row["category_id"], "score": row["score"], "id": number,
             "segmentation": row["segmentation"], "area": float(rle.area(row["segmentation"])), "iscrowd": 0,
             "bbox": row.get("bbox", [])}
            for number, row in enumerate(rows, 1)
        ]  # fmt: skip
    return [
        {"image_id": row["image_id"], "category_id": row["category_id"], "score": row["score"], "id": number,
         "bbox": row["bbox"], "area": row["bbox"][2] * row["bbox"][3], "iscrowd": 0}
        for number, row in enumerate(rows, 1)
    ]  # fmt: skip


def _evaluated(gold: COCO, found: COCO, kind: str, categories: list[int]) -> COCOeval_faster:
    evaluation = COCOeval_faster(gold, found, KINDS[kind], print_function=_silent)
    evaluation.params.iouThrs = np.array(THRESHOLDS)
    evaluation.params.maxDets = [100]
    evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
    evaluation.params.catIds = categories
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Python's cyclic garbage collector waits: half a million new dictionaries would call it over and over."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def harmonic_mean(seen: float, unseen: float) -> float:
    """2ab / (a + b), which is small where one of both is."""
    return 2 * seen * unseen / (seen + unseen) if seen + unseen > 0 else 0.0


def read_results(path: Path) -> list[Result]:
    """COCO's result JSON; results that have masks alone get the boxes around them.

    Raises:
        LabError: it cannot be read, or is something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LabError(f"--results {path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise LabError(f"--results {path}: is not JSON ({error})") from error
    if not isinstance(content, list):
        raise LabError(f"--results {path}: is not a list, as COCO's results are")
    for place, row in enumerate(content):
        if not isinstance(row, dict) or not {"image_id", "category_id", "score"} <= row.keys():
            raise LabError(f"--results {path}: [{place}] lacks image_id, category_id or score")
        outline = row.get("segmentation")
        if outline is not None and not (isinstance(outline, dict) and isinstance(outline.get("counts"), str)):
            raise LabError(f"--results {path}: [{place}] has a segmentation that is not compressed run lengths")
        if "bbox" not in row and outline is None:
            raise LabError(f"--results {path}: [{place}] has neither a bbox nor a segmentation")
        if "bbox" not in row:
            row["bbox"] = [float(value) for value in rle.toBbox(outline)]
    return content


def _mean(values: np.ndarray) -> float:
    there = values[~np.isnan(values)]
    return float(there.mean()) if there.size else float("nan")


def _silent(*_: object) -> None:
    return None
