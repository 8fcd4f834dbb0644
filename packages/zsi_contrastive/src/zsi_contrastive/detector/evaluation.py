"""Measures a detector: unseen classes alone (ZSI), both kinds together (GZSI), what chance gives, what a bias does."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from accelerate import Accelerator

from zsi_contrastive.detector.config import DetectionOptions
from zsi_contrastive.detector.finding import Result, asked_for, found_in, of_classes, random_lists, together
from zsi_contrastive.detector.model import ZeroShotMaskRCNN
from zsi_contrastive.detector.pictures import InstancePictures
from zsi_contrastive.detector.scoring import ClassScores, harmonic_mean, scored
from zsi_contrastive.detector.splits import Split
from zsi_contrastive.detector.vectors import ClassVectors

BIASES = (0.0, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5)
AT_ONCE = 8
Scores = dict[str, float]


@dataclass(frozen=True)
class Evaluation:
    """What was measured on the test pictures.

    Attributes:
        results: COCO's results, the best of seen and of unseen classes in every picture.
        zsi: scores of the unseen classes alone, by box and mask.
        gzsi: scores by box and mask, each for `seen`, `unseen` and their `harmonic mean`, with `bias`.
        classes: of every class its scores by box and mask in GZSI, and those in ZSI for unseen ones.
        others: box scores of the unseen classes alone under other rules: random vectors, vectors as they were, …
        sweep: for each bias the scores of seen and unseen boxes, by `validation` and `test`.
        bias: what seen scores are lowered by.
    """

    results: list[Result]
    zsi: dict[str, Scores]
    gzsi: dict[str, dict[str, Scores]]
    classes: list[dict[str, Any]]
    others: dict[str, Scores]
    sweep: dict[str, list[Scores]] = field(default_factory=dict)
    bias: float = 0.0

    def plain(self) -> dict[str, Any]:
        """As JSON values, without the results; what could not be computed is null."""
        said = {"zsi": self.zsi, "gzsi": self.gzsi, "other rules": self.others, "bias": self.bias,
                "sweep": self.sweep, "classes": self.classes}  # fmt: skip
        plain: dict[str, Any] = without_nan(said)
        return plain


def evaluated(
    model: ZeroShotMaskRCNN,
    split: Split,
    vectors: ClassVectors,
    pictures: dict[str, InstancePictures],
    detection: DetectionOptions,
    accelerator: Accelerator,
    seed: int = 0,
    at_once: int = AT_ONCE,
) -> Evaluation:
    """Looks for all classes in the test pictures, and in those of validation to see what a bias does."""
    model.to(accelerator.device).eval()
    test = pictures["test"]
    both = test.part.ids(split.classes)
    unseen = test.part.ids(split.unseen)
    lists, kinds = [asked_for(vectors, detection)], [both]
    for asked in random_lists(vectors, detection, seed):
        lists.append(asked)
        kinds.append(unseen)
    rules = other_rules(detection)
    for options in rules.values():
        lists.append(asked_for(vectors, options, masks=False))
        kinds.append(both)
    found = found_in(model, test, lists, kinds, detection, accelerator, at_once, "testing")
    drawn = [scored(test.part, rows, unseen, "box").means(unseen) for rows in found[1 : 1 + detection.controls]]
    others = {}
    if drawn:
        others[f"random vectors (mean of {len(drawn)})"] = {
            name: sum(one[name] for one in drawn) / len(drawn) for name in drawn[0]
        }
    for name, rows in zip(rules, found[1 + detection.controls :], strict=True):
        others[name] = scored(test.part, of_classes(rows, unseen), unseen, "box").means(unseen)
    sweep = {"test": swept(test, found[0], split, detection.kept)}
    if len(pictures["validation"]):
        part = pictures["validation"]
        asked = asked_for(vectors, detection, masks=False)
        (there,) = found_in(model, part, [asked], [both], detection, accelerator, at_once, "validating")
        sweep["validation"] = swept(part, there, split, detection.kept)
    measured = scores_of(test, found[0], split, detection.seen_bias, detection.kept, model.parts.mask_head)
    return replace(measured, others=others, sweep=sweep)


def other_rules(detection: DetectionOptions) -> dict[str, DetectionOptions]:
    """By what they change: the paper's transfer if another is used, and vectors as they were if they are refined."""
    rules = {}
    if detection.transfer != "paper" or detection.temperature != 1:
        rules["the paper's transfer"] = replace(detection, transfer="paper", temperature=1.0)
    if detection.refine != "none":
        rules["without refinement"] = replace(detection, refine="none")
    return rules


def scores_of(
    pictures: InstancePictures, results: Sequence[Result], split: Split, bias: float, kept: int, masks: bool
) -> Evaluation:
    """Scores of COCO's results, those of a file as well as our own."""
    part = pictures.part
    seen, unseen = part.ids(split.seen), part.ids(split.unseen)
    alone = of_classes(results, unseen)
    ranked = together(of_classes(results, [*seen, *unseen]), seen, bias, kept)
    kinds = ("box", "mask") if masks else ("box",)
    zsi: dict[str, Scores] = {}
    gzsi: dict[str, dict[str, Scores]] = {}
    by_class: dict[str, tuple[ClassScores, ClassScores]] = {}
    for kind in kinds:
        one, two = scored(part, alone, unseen, kind), scored(part, ranked, [*seen, *unseen], kind)
        zsi[kind] = one.means(unseen)
        gzsi[kind] = {"seen": two.means(seen), "unseen": two.means(unseen)}
        gzsi[kind]["harmonic mean"] = {
            name: harmonic_mean(value, gzsi[kind]["unseen"][name]) for name, value in gzsi[kind]["seen"].items()
        }
        by_class[kind] = one, two
    objects: dict[int, int] = {}
    for row in part.annotations:
        objects[row["category_id"]] = objects.get(row["category_id"], 0) + (not row["iscrowd"])
    classes = []
    for name, number in zip(split.classes, [*seen, *unseen], strict=True):
        line: dict[str, Any] = {"class": name, "seen": number in seen, "objects": objects.get(number, 0)}
        for kind, (one, two) in by_class.items():
            line[f"{kind} gzsi"] = two.of_class(number)
            if number in unseen:
                line[f"{kind} zsi"] = one.of_class(number)
        classes.append(line)
    return Evaluation(list(results), zsi, gzsi, classes, {}, {}, bias)


@dataclass(frozen=True)
class Named:
    """What is said of an object: its class, and the best detection on it of either kind, as name and score."""

    truth: str
    seen: tuple[str, float] | None
    unseen: tuple[str, float] | None

    def said(self, bias: float = 0.0) -> str:
        """The name of the better one, "nothing" if there is none."""
        if self.seen is None or self.unseen is None:
            one = self.seen or self.unseen
            return one[0] if one else "nothing"
        return self.seen[0] if self.seen[1] - bias >= self.unseen[1] else self.unseen[0]


def named_objects(pictures: InstancePictures, results: Sequence[Result], split: Split) -> list[Named]:
    """What is said of every object, by the detections that overlap it with an IoU of at least 0.5."""
    part = pictures.part
    names = dict(zip(part.ids(split.classes), split.classes, strict=True))
    unseen = set(part.ids(split.unseen))
    by_picture: dict[int, list[Result]] = {}
    for row in results:
        if row["category_id"] in names:
            by_picture.setdefault(row["image_id"], []).append(row)
    said = []
    for image_id, objects in part.by_image().items():
        found = sorted(by_picture.get(image_id, []), key=lambda one: -one["score"])
        for row in objects:
            if row["iscrowd"]:
                continue
            best: dict[bool, tuple[str, float]] = {}
            for one in found:
                kind = one["category_id"] in unseen
                if kind not in best and iou(one["bbox"], row["bbox"]) >= 0.5:
                    best[kind] = (names[one["category_id"]], one["score"])
            said.append(Named(names[row["category_id"]], best.get(False), best.get(True)))
    return said


def swept(pictures: InstancePictures, results: Sequence[Result], split: Split, kept: int) -> list[Scores]:
    """For each bias AP at 0.5 of boxes, and the share of objects that get their right name, by seen and unseen."""
    part = pictures.part
    seen, unseen = part.ids(split.seen), part.ids(split.unseen)
    named = named_objects(pictures, results, split)
    lines = []
    for bias in BIASES:
        found = scored(part, together(results, seen, bias, kept), [*seen, *unseen], "box")
        one, two = found.means(seen)["ap@0.5"], found.means(unseen)["ap@0.5"]
        first, second = (
            [thing.said(bias) == thing.truth for thing in named if (thing.truth in split.unseen) == kind]
            for kind in (False, True)
        )
        right = sum(first) / len(first) if first else math.nan, sum(second) / len(second) if second else math.nan
        lines.append(
            {"bias": bias, "seen": one, "unseen": two, "harmonic mean": harmonic_mean(one, two), "named seen": right[0],
             "named unseen": right[1], "named harmonic mean": harmonic_mean(*right)}
        )  # fmt: skip
    return lines


def iou(one: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of two boxes (left, top, width, height)."""
    across = min(one[0] + one[2], other[0] + other[2]) - max(one[0], other[0])
    down = min(one[1] + one[3], other[1] + other[3]) - max(one[1], other[1])
    if across <= 0 or down <= 0:
        return 0.0
    shared = across * down
    return shared / (one[2] * one[3] + other[2] * other[3] - shared)


def without_nan(value: Any) -> Any:
    """The same with None where a number is none."""
    if isinstance(value, dict):
        return {key: without_nan(one) for key, one in value.items()}
    if isinstance(value, list):
        return [without_nan(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value
