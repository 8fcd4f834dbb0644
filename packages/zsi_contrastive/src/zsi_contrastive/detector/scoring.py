"""Scores of COCO's results: recall and average precision, by class and over seen and unseen classes."""

import contextlib
import gc
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as rle

from labs_common.data.images import MOST_PIXELS
from labs_common.errors import LabError, json_of
from zsi_contrastive.detector.annotations import Instances
from zsi_contrastive.detector.table import box_fault, is_number, is_run_lengths

LOW = (0.4, 0.5, 0.6)  # IoU, of the zero-shot literature
USUAL = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))  # COCO's
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
        """Averages over wanted categories that have objects: `ap@0.5`, `recall@0.5`, …, and `ap` over 0.5 to 0.95."""
        places = [self.categories.index(number) for number in wanted]
        found = {}
        for threshold in LOW:
            row = THRESHOLDS.index(threshold)
            found[f"ap@{threshold}"] = _mean(self.precision[row, places])
            found[f"recall@{threshold}"] = _mean(self.recall[row, places])
        rows = [THRESHOLDS.index(threshold) for threshold in USUAL]
        found["ap"] = _mean(self.precision[np.ix_(rows, places)])
        return found


def scored(truth: Instances, results: Sequence[Mapping[str, Any]], categories: Sequence[int], kind: str) -> ClassScores:
    """Scores results of these `categories` with faster-coco-eval; `kind` is box or mask.

    Raises:
        LabError: a result is of a picture that the annotations do not have, or has no mask.
    """
    pictures = {row["id"] for row in truth.images}
    wanted = set(categories)
    rows = [row for row in results if row["category_id"] in wanted]
    for row in rows:
        if row["image_id"] not in pictures:
            some = f"is not among the {len(pictures)} of {truth.file_pictures} test pictures taken from {truth.source}"
            lacks = (
                f"{some}; score all of them with --all-pictures"
                if truth.file_pictures > len(pictures)
                else f"{truth.source} does not have"
            )
            raise LabError(f"results: one is of the picture {row['image_id']}, which {lacks}")
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
    # One area and one number of detections: (thresholds, recalls, classes) and (thresholds, classes).
    precision = np.asarray(evaluation.eval["precision"])[:, :, order, 0, 0]
    recall = np.asarray(evaluation.eval["recall"])[:, order, 0, 0]
    without = precision[0, 0] < 0  # -1 is COCO's way to say that a class has no object
    means = precision.mean(1)
    means[:, without] = np.nan
    return ClassScores(tuple(categories), means, np.where(without, np.nan, recall))


def _detections(rows: Sequence[Mapping[str, Any]], kind: str) -> list[Result]:
    """Adds what COCO's evaluation needs besides; areas are those of what is compared."""
    found = []
    for number, row in enumerate(rows, 1):
        same = {key: row[key] for key in ("image_id", "category_id", "score")} | {"id": number, "iscrowd": 0}
        if kind == "mask":
            outline = row["segmentation"]
            own = {"segmentation": outline, "area": float(rle.area(outline)), "bbox": row.get("bbox", [])}
        else:
            own = {"bbox": row["bbox"], "area": row["bbox"][2] * row["bbox"][3]}
        found.append(same | own)
    return found


def _evaluated(gold: COCO, found: COCO, kind: str, categories: list[int]) -> COCOeval_faster:
    evaluation = COCOeval_faster(gold, found, KINDS[kind], print_function=lambda *_: None)
    evaluation.params.iouThrs = np.array(THRESHOLDS)
    evaluation.params.maxDets = [100]  # of a picture; one number and one area, where COCO has three and four
    evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
    evaluation.params.catIds = categories
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Lets Python's cyclic garbage collector wait: half a million new dictionaries would call it over and over."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def harmonic_mean(seen: float, unseen: float) -> float:
    """Computes 2ab / (a + b), which is small where one of both is."""
    return 2 * seen * unseen / (seen + unseen) if seen + unseen > 0 else 0.0


def of_classes(results: Sequence[Result], wanted: Sequence[int]) -> list[Result]:
    """Takes the results of these category ids."""
    ids = set(wanted)
    return [result for result in results if result["category_id"] in ids]


def together(results: Sequence[Result], seen: Sequence[int], bias: float, kept: int) -> list[Result]:
    """Ranks both kinds of classes together: `bias` is taken from seen ones' scores, then a picture's best are kept.

    Calibrated stacking, Chao et al., ECCV 2016, eq. 7. `results` hold the best of each kind in every picture,
    so that for any bias nothing is lost.
    """
    ids = set(seen)
    by_picture: dict[int, list[Result]] = defaultdict(list)
    for result in results:
        score = result["score"] - (bias if result["category_id"] in ids else 0.0)
        by_picture[result["image_id"]].append({**result, "score": score})
    ranked = [sorted(of_picture, key=lambda result: -result["score"])[:kept] for of_picture in by_picture.values()]
    return [result for of_picture in ranked for result in of_picture]


def iou(one: Sequence[float], other: Sequence[float]) -> float:
    """Computes the intersection over union of two boxes (left, top, width, height)."""
    across = min(one[0] + one[2], other[0] + other[2]) - max(one[0], other[0])
    down = min(one[1] + one[3], other[1] + other[3]) - max(one[1], other[1])
    if across <= 0 or down <= 0:
        return 0.0
    shared = across * down
    return shared / (one[2] * one[3] + other[2] * other[3] - shared)


def read_results(path: Path) -> tuple[list[Result], tuple[str, ...]]:
    """Reads COCO's result JSON, and says what of it can be scored: keys of `KINDS`.

    Results that have masks alone get the boxes around them, which say where they are but are not scored.

    Raises:
        LabError: it cannot be read, or is something else.
    """
    content = json_of(path, f"--results {path}")
    if not isinstance(content, list):
        raise LabError(f"--results {path}: is not a list, as COCO's results are")
    around = False
    for place, row in enumerate(content):
        if not isinstance(row, dict) or not {"image_id", "category_id", "score"} <= row.keys():
            raise LabError(f"--results {path}: [{place}] lacks image_id, category_id or score")
        numbers = (row["image_id"], row["category_id"])
        if not all(isinstance(number, int) and is_number(number) for number in numbers) or not is_number(row["score"]):
            raise LabError(f"--results {path}: [{place}]: ids must be whole numbers, and the score a number")
        outline = row.get("segmentation")
        if outline is not None and not _is_compressed(outline):
            raise LabError(f"--results {path}: [{place}] has a segmentation that is not compressed run lengths")
        if "bbox" in row and box_fault(row["bbox"]) == "box that is not four numbers":
            raise LabError(f"--results {path}: [{place}] has a box that is not four numbers")
        if "bbox" not in row and outline is None:
            raise LabError(f"--results {path}: [{place}] has neither a bbox nor a segmentation")
        if "bbox" not in row:
            row["bbox"] = [float(value) for value in rle.toBbox(outline)]
            around = True
    masks = all("segmentation" in row for row in content)
    return content, (("mask",) if masks and around else ("box", "mask") if masks else ("box",))


def _is_compressed(outline: Any) -> bool:
    if not isinstance(outline, dict) or not isinstance(outline.get("counts"), str):
        return False
    match outline.get("size"):
        case [int(height), int(width)] if 0 < height * width <= MOST_PIXELS:
            return is_run_lengths(outline, height, width)
    return False


def _mean(values: np.ndarray) -> float:
    there = values[~np.isnan(values)]
    return float(there.mean()) if there.size else float("nan")
