"""Looks for things in pictures, and writes what was found as COCO's results."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from faster_coco_eval.core import mask as rle

from labs_common.data.images import decoding_threads
from labs_common.progress import tracked
from zsi_contrastive.detector.config import DetectionOptions
from zsi_contrastive.detector.graph import refined
from zsi_contrastive.detector.model import ZeroShotMaskRCNN, pasted
from zsi_contrastive.detector.pictures import InstancePictures, as_tensor
from zsi_contrastive.detector.regions import Asked, Found
from zsi_contrastive.detector.vectors import ClassVectors

Result = dict[str, Any]
SEEN, UNSEEN = 0, 1  # groups


def asked_for(vectors: ClassVectors, detection: DetectionOptions, masks: bool = True) -> Asked:
    """All classes of a split, seen first, by the rules of `detection`; unseen ones refined if it says so."""
    unseen = vectors.unseen
    if detection.refine != "none":
        unseen = refined(unseen, vectors.seen, detection.refine, detection.neighbours, detection.refine_share)
    groups = torch.tensor([SEEN] * len(vectors.seen) + [UNSEEN] * len(unseen))
    everything = torch.cat([vectors.seen, unseen])
    return Asked(everything, groups, detection.temperature, detection.transfer == "paper", masks)


def random_lists(vectors: ClassVectors, detection: DetectionOptions, seed: int) -> list[Asked]:
    """Lists in which random vectors of the same lengths stand for the unseen classes: what chance gives."""
    lists = []
    for number in range(detection.controls):
        generator = torch.Generator().manual_seed(1000 * seed + number)
        drawn = torch.randn(vectors.unseen.shape, generator=generator)
        drawn = drawn / drawn.norm(dim=1, keepdim=True) * vectors.unseen.norm(dim=1, keepdim=True)
        groups = torch.full((len(drawn),), UNSEEN)
        lists.append(Asked(drawn, groups, detection.temperature, detection.transfer == "paper", masks=False))
    return lists


def found_in(
    model: ZeroShotMaskRCNN,
    pictures: InstancePictures,
    lists: Sequence[Asked],
    categories: Sequence[Sequence[int]],
    detection: DetectionOptions,
    accelerator: Accelerator,
    at_once: int,
    task: str,
) -> list[list[Result]]:
    """COCO's results for each of `lists`, in every process; each process looks at its share of the pictures.

    `categories` are, for each list, the category ids of its rows.
    """
    device = accelerator.device
    model.regions.keep(detection.score_threshold, detection.nms_threshold, detection.kept)
    lists = [
        Asked(asked.vectors.to(device), asked.groups.to(device), asked.temperature, asked.background, asked.masks)
        for asked in lists
    ]
    mine = list(range(len(pictures)))[accelerator.process_index :: accelerator.num_processes]
    starts = range(0, len(mine), at_once)
    results: list[list[list[Result]]] = [[] for _ in lists]
    for first in tracked(starts, task, len(starts), accelerator.is_main_process):
        places = mine[first : first + at_once]
        batch = [as_tensor(image).to(device) for image in decoding_threads().map(pictures.image, places)]
        with accelerator.autocast():
            found = model.detect(batch, lists)
        rows = [pictures.part.images[place] for place in places]
        for number, of_list in enumerate(found):
            results[number] += list(decoding_threads().map(as_results, of_list, rows, [categories[number]] * len(rows)))
    gathered = gather_object([results]) if accelerator.num_processes > 1 else [results]
    order = {row["id"]: place for place, row in enumerate(pictures.part.images)}
    everything = []
    for number in range(len(lists)):
        rows_of_list = [result for part in gathered for of_picture in part[number] for result in of_picture]
        everything.append(sorted(rows_of_list, key=lambda result: order[result["image_id"]]))
    return everything


def as_results(found: Found, row: Mapping[str, Any], categories: Sequence[int]) -> list[Result]:
    """What was found in the picture `row` as COCO's results: boxes as left, top, width and height; masks as RLE."""
    boxes, scores, classes = found.boxes.float().cpu(), found.scores.float().cpu().tolist(), found.classes.tolist()
    sides = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).tolist()
    results: list[Result] = [
        {"image_id": row["id"], "category_id": categories[place], "bbox": [round(value, 2) for value in box],
         "score": round(score, 5)}
        for box, score, place in zip(sides, scores, classes, strict=True)
    ]  # fmt: skip
    if found.masks is not None and len(results):
        small = found._replace(boxes=boxes, masks=found.masks.float().cpu())
        for result, mask in zip(results, pasted(small, row["height"], row["width"]).numpy(), strict=True):
            code = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
            result["segmentation"] = {"size": [int(side) for side in code["size"]], "counts": _text(code["counts"])}
    return results


def of_classes(results: Sequence[Result], wanted: Sequence[int]) -> list[Result]:
    """The results of these category ids."""
    ids = set(wanted)
    return [result for result in results if result["category_id"] in ids]


def together(results: Sequence[Result], seen: Sequence[int], bias: float, kept: int) -> list[Result]:
    """Both kinds of classes in one ranking: `bias` is taken from seen ones' scores, then a picture's best are kept.

    Calibrated stacking, Chao et al., ECCV 2016, eq. 7. `results` hold the best of each kind in every picture,
    so that for any bias nothing is lost.
    """
    ids = set(seen)
    by_picture: dict[int, list[Result]] = {}
    for result in results:
        score = result["score"] - (bias if result["category_id"] in ids else 0.0)
        by_picture.setdefault(result["image_id"], []).append({**result, "score": score})
    return [
        result
        for of_picture in by_picture.values()
        for result in sorted(of_picture, key=lambda result: -result["score"])[:kept]
    ]


def _text(counts: bytes | str) -> str:
    return counts.decode("ascii") if isinstance(counts, bytes) else counts
