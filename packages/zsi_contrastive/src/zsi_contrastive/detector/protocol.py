"""The two tasks: unseen classes alone (ZSI), and both kinds together (GZSI); what chance gives, what a bias does."""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator

from labs_common.sharding import place
from zsi_contrastive.detector.annotations import Instances, Split
from zsi_contrastive.detector.calibration import Calibration, calibrated, holding, presence, rules_of
from zsi_contrastive.detector.model import ZeroShotMaskRCNN
from zsi_contrastive.detector.options import DetectionOptions
from zsi_contrastive.detector.pictures import InstancePictures
from zsi_contrastive.detector.predict import (
    ON_IT,
    Result,
    predictions,
    query_of,
)
from zsi_contrastive.detector.regions import Query
from zsi_contrastive.detector.scoring import ClassScores, harmonic_mean, iou, of_classes, scored, together
from zsi_contrastive.detector.vectors import ClassVectors

# Dense at first: scores of unseen classes lie only a little below those of seen ones. Under `direct` they may lie above
# them; of biases that name as much the first is taken.
BIASES = (0.0, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, -0.05, -0.1, -0.2, -0.5)
AT_ONCE = 8  # pictures that the network sees at once
RANKS = (100, 300, 1000)  # proposals of a picture whose recall is measured
Scores = dict[str, float]


@dataclass(frozen=True)
class Evaluation:
    """The scores of a detector on the test pictures.

    Attributes:
        results: COCO's results, the best of seen and of unseen classes in every picture.
        zsi: scores of the unseen classes alone, by box and mask, in the pictures that show one.
        gzsi: scores by box and mask, each for `seen`, `unseen` and their `harmonic mean`, as the published code counts:
            the best of seen and of unseen classes stand in a picture apart, up to `kept` of each.
        one_list: the same where all classes compete for the `kept` places of a picture, with `bias`; and of `all`.
            Open-vocabulary detection calls AP at 0.5 there novel (unseen), base (seen) and all.
        classes: of every class its scores by box and mask in GZSI, and in one list.
        others: box scores of the unseen classes alone under other rules: random vectors, shuffled
            names, the vector of the nearest seen class, vectors as they were, …
        sweep: for each bias the scores of seen and unseen boxes, by `validation` and `test`.
        proposals: of objects of `seen` and of `unseen` classes, how many have one of a picture's best 100, … proposals
            on them (IoU 0.5), and what became of them; see `fates`. Empty without a detector.
        bias: what seen scores are lowered by.
        peer: what is to be known of a released detector whose boxes are beside ours; empty without one.
        named: shares of `seen` and `unseen` objects that get their own name in one list, their `harmonic mean`, and AP
            at 0.5 of boxes beside: without a bias, and with that which validation chose (calibrated stacking).
        presence: see `zsi_contrastive.detector.calibration.presence`.
        calibration: what validation chose.
        note: what training saw of the unseen classes; empty if it is nothing.
    """

    results: list[Result]
    zsi: dict[str, Scores]
    gzsi: dict[str, dict[str, Scores]]
    one_list: dict[str, dict[str, Scores]]
    classes: list[dict[str, Any]]
    others: dict[str, Scores] = field(default_factory=dict)
    sweep: dict[str, list[Scores]] = field(default_factory=dict)
    proposals: dict[str, Scores] = field(default_factory=dict)
    bias: float = 0.0
    peer: str = ""
    named: dict[str, Scores] = field(default_factory=dict)
    presence: dict[str, Scores] = field(default_factory=dict)
    calibration: Calibration | None = None
    note: str = ""

    def plain(self) -> dict[str, Any]:
        """Returns JSON values, without the results; what could not be computed is null."""
        said = {name: value for name, value in vars(self).items() if name not in ("results", "others")}
        calibration = asdict(replace(self.calibration, pictures=())) if self.calibration else None
        return _without_nan({**said, "calibration": calibration, "other rules": self.others})


def evaluated(
    model: ZeroShotMaskRCNN,
    split: Split,
    vectors: ClassVectors,
    pictures: dict[str, InstancePictures],
    detection: DetectionOptions,
    accelerator: Accelerator,
    seed: int = 0,
    at_once: int = AT_ONCE,
    known: Calibration | None = None,
) -> Evaluation | None:
    """Looks for all classes in the test pictures, and in those of validation to see what a bias does.

    Called by all processes together; the main one gets the evaluation. `seed` is that of the random vectors, `known` a
    calibration that holds if scores are made by the same rules.
    """
    place(model.eval(), accelerator)
    model.regions.keep(detection.score_threshold, detection.nms_threshold, detection.kept)
    test = pictures["test"]
    both, unseen = test.part.ids(split.classes), test.part.ids(split.unseen)
    controls = random_queries(vectors, detection, seed)
    others = {name: query_of(vectors, rule, masks=False) for name, rule in other_rules(detection).items()}
    # One pass over the pictures answers all of them: the network's work is shared.
    queries = [query_of(vectors, detection), *controls, *others.values()]
    kinds = [both if len(query.groups) == 2 else unseen for query in queries]
    near = [nearest_seen_query(vectors, detection)] if controls else []
    queries += [*(query for query, _ in near), Query(vectors.unseen[:0], (), masks=False)]  # and the proposals
    kinds += [*([*range(len(query.vectors))] for query, _ in near), []]
    *found, proposed = predictions(model, test, queries, kinds, accelerator, at_once, "testing")
    part = pictures["validation"]
    there: list[Result] = []
    if len(part):
        query = query_of(vectors, detection, masks=False)
        (there,) = predictions(model, part, [query], [both], accelerator, at_once, "validating")
    if not accelerator.is_main_process:
        return None
    first = 1 + len(controls)
    tries = {"random vectors": found[1:first]}
    if len(unseen) > 1:
        tries["shuffled names"] = [shuffled_names(found[0], unseen, seed, number) for number in range(len(controls))]
    rows = {f"{name} (mean of {len(parts)})": parts for name, parts in tries.items() if parts}
    for (_, row_of), of_seen in zip(near, found[first + len(others) :], strict=True):
        rows["nearest seen class"] = [renamed(of_seen, unseen, row_of, detection.kept)]
    rows |= {name: [part] for name, part in zip(others, found[first:], strict=False)}
    measured_others = {name: _mean_scores(test.part, parts, unseen) for name, parts in rows.items()}
    sweep = {"test": swept(test, found[0], split, detection.kept)}
    if len(part):
        sweep["validation"] = swept(part, there, split, detection.kept)
    calibration = holding(known, detection)
    if calibration is None and len(part):
        calibration = calibrated(part.part, there, split, sweep["validation"], rules_of(detection))
    named = {"without a bias": sweep["test"][0]}
    there_rows: dict[str, Scores] = {}
    if calibration is not None:
        there_rows = presence(test.part, found[0], split, calibration)
        if (bias := calibration.seen_bias) is not None:
            line = min(sweep["test"], key=lambda line: abs(line["bias"] - bias))
            named["with validation's bias"] = line
    outlined = ("box", "mask") if model.parts.mask_head else ("box",)
    measured = scores_of(test, found[0], split, detection.seen_bias, detection.kept, outlined)
    return replace(
        measured,
        others=measured_others,
        sweep=sweep,
        proposals=fates(test, found[0], proposed, split),
        named=named,
        presence=there_rows,
        calibration=calibration,
    )


def shuffled_names(results: Sequence[Result], unseen: Sequence[int], seed: int, number: int) -> list[Result]:
    """Gives each unseen class's detections to another one, by a random cycle: what is left if names say nothing."""
    order = torch.randperm(len(unseen), generator=torch.Generator().manual_seed(1000 * seed + number)).tolist()
    new = {unseen[one]: unseen[other] for one, other in zip(order, [*order[1:], order[0]], strict=True)}
    return [{**row, "category_id": new[row["category_id"]]} for row in results if row["category_id"] in new]


def random_queries(vectors: ClassVectors, detection: DetectionOptions, seed: int) -> list[Query]:
    """Asks for random vectors of the same lengths in the place of the unseen classes: what chance gives."""
    queries = []
    for number in range(detection.controls):
        generator = torch.Generator().manual_seed(1000 * seed + number)
        drawn = torch.randn(vectors.unseen.shape, generator=generator)
        drawn = drawn / drawn.norm(dim=1, keepdim=True) * vectors.unseen.norm(dim=1, keepdim=True)
        queries.append(Query(drawn, (len(drawn),), detection.temperature, detection.transfer, masks=False))
    return queries


def nearest_seen_query(vectors: ClassVectors, detection: DetectionOptions) -> tuple[Query, list[int]]:
    """Asks for the seen classes that are most like an unseen one, each once; returns with it each unseen one's row.

    Named as the unseen ones, it is what it gives to know no new word. They score what they do among all seen classes.
    """
    cosines = F.normalize(vectors.unseen, dim=1) @ F.normalize(vectors.seen, dim=1).T
    nearest, rows = cosines.argmax(1).unique(return_inverse=True)
    others = torch.ones(len(vectors.seen), dtype=torch.bool)
    others[nearest] = False
    query = Query(
        vectors.seen[nearest], (len(nearest),), detection.temperature, detection.transfer, masks=False,
        rivals=(vectors.seen[others],),
    )  # fmt: skip
    return query, rows.tolist()


def renamed(results: Sequence[Result], unseen: Sequence[int], rows: Sequence[int], kept: int) -> list[Result]:
    """Gives each `unseen` category what was found for its row of `nearest_seen_query`; a picture keeps its best."""
    names: dict[int, list[int]] = defaultdict(list)
    for number, row in zip(unseen, rows, strict=True):
        names[row].append(number)
    named = [{**result, "category_id": number} for result in results for number in names[result["category_id"]]]
    return together(named, (), 0.0, kept)


def _mean_scores(part: Instances, results: Sequence[Sequence[Result]], unseen: Sequence[int]) -> Scores:
    scores = [zsi_scores(part, rows, unseen, "box") for rows in results]
    return {name: sum(one[name] for one in scores) / len(scores) for name in scores[0]}


def other_rules(detection: DetectionOptions) -> dict[str, DetectionOptions]:
    """Lists rules to compare with: the published transfer if another is used, and vectors as they were if refined."""
    rules = {}
    if detection.transfer != "code" or detection.temperature != 1:
        rules["the published code's transfer"] = replace(detection, transfer="code", temperature=1.0)
    if detection.refine != "none":
        rules["without refinement"] = replace(detection, refine="none")
    return rules


def scores_of(
    pictures: InstancePictures, results: Sequence[Result], split: Split, bias: float, kept: int, outlined: Sequence[str]
) -> Evaluation:
    """Scores what is `outlined` (box, mask or both) by COCO's results, a file's as well as our own, in both tasks.

    GZSI scores them as they are, as the published code does: it suppresses and cuts seen and unseen classes apart, so
    that a picture has up to twice `kept` results, of which COCO's evaluation takes 100 of each class. So the unseen
    classes score what they do alone. One list keeps the `kept` best of a picture, after `bias` was taken from the
    scores of seen classes.
    """
    part = pictures.part
    seen, unseen = part.ids(split.seen), part.ids(split.unseen)
    both = [*seen, *unseen]
    apart = of_classes(results, both)
    lists = apart, together(apart, seen, bias, kept)
    scores = {kind: [scored(part, rows, both, kind) for rows in lists] for kind in outlined}
    zsi = {
        kind: zsi_scores(part, apart, unseen, kind) if _without(part, unseen) else one.means(unseen)
        for kind, (one, _) in scores.items()
    }
    gzsi, one_list = (
        {kind: _of_kinds(found[place], seen, unseen) for kind, found in scores.items()} for place in (0, 1)
    )
    for kind, (_, two) in scores.items():
        one_list[kind]["all"] = two.means(both)
    objects = Counter(row["category_id"] for row in part.annotations if not row["iscrowd"])
    classes = []
    for name, number in zip(split.classes, both, strict=True):
        line: dict[str, Any] = {"class": name, "seen": number in seen, "objects": objects[number]}
        for kind, (one, two) in scores.items():
            line |= {f"{kind} gzsi": one.means([number]), f"{kind} one list": two.means([number])}
        classes.append(line)
    return Evaluation(list(results), zsi, gzsi, one_list, classes, bias=bias)


def zsi_scores(part: Instances, results: Sequence[Result], unseen: Sequence[int], kind: str) -> Scores:
    """Scores the unseen classes alone, in the pictures that show one: --protocol ov-coco has others as well."""
    rows = of_classes(results, unseen)
    if others := _without(part, unseen):
        part = replace(part, images=[row for row in part.images if row["id"] not in others])
        rows = [row for row in rows if row["image_id"] not in others]
    return scored(part, rows, unseen, kind).means(unseen)


def _without(part: Instances, wanted: Sequence[int]) -> set[int]:
    """Returns the ids of pictures that show none of these categories."""
    ids = set(wanted)
    return {row["id"] for row in part.images} - {
        row["image_id"] for row in part.annotations if row["category_id"] in ids
    }


def _of_kinds(found: ClassScores, seen: Sequence[int], unseen: Sequence[int]) -> dict[str, Scores]:
    of_seen, of_unseen = found.means(seen), found.means(unseen)
    means = {name: harmonic_mean(value, of_unseen[name]) for name, value in of_seen.items()}
    return {"seen": of_seen, "unseen": of_unseen, "harmonic mean": means}


@dataclass(frozen=True)
class Named:
    """An object's class, and the best detections on it: of a seen and of an unseen class, each as name and score."""

    truth: str
    seen: tuple[str, float] | None
    unseen: tuple[str, float] | None

    def said(self, bias: float = 0.0) -> str:
        """Returns the name of the better one, "nothing" if there is none."""
        if self.seen is None or self.unseen is None:
            one = self.seen or self.unseen
            return one[0] if one else "nothing"
        return self.seen[0] if self.seen[1] - bias >= self.unseen[1] else self.unseen[0]


def named_objects(pictures: InstancePictures, results: Sequence[Result], split: Split) -> list[Named]:
    """Finds what is said of every object, by the detections that overlap it with an IoU of at least 0.5."""
    part = pictures.part
    names = dict(zip(part.ids(split.classes), split.classes, strict=True))
    unseen = set(part.ids(split.unseen))
    by_picture: dict[int, list[Result]] = defaultdict(list)
    for row in sorted(of_classes(results, list(names)), key=lambda row: -row["score"]):
        by_picture[row["image_id"]].append(row)
    said = []
    for image_id, objects in part.by_image().items():
        for row in objects:
            if row["iscrowd"]:
                continue
            best: dict[bool, tuple[str, float]] = {}
            for one in by_picture[image_id]:
                kind = one["category_id"] in unseen
                if kind not in best and iou(one["bbox"], row["bbox"]) >= ON_IT:
                    best[kind] = (names[one["category_id"]], one["score"])
            said.append(Named(names[row["category_id"]], best.get(False), best.get(True)))
    return said


def fates(
    pictures: InstancePictures, results: Sequence[Result], first: Sequence[Result], split: Split
) -> dict[str, Scores]:
    """Says what became of the objects of seen and of unseen classes: where in the detector each was lost.

    Of each kind the number of `objects` and shares of it: `recall@100`, … is of those that one of so many proposals of
    their picture is on, whatever it is called. Each object is one of `named` (a detection on it has its class),
    `misnamed` (there are detections on it, of other classes), `dropped` (a proposal was on it, but no detection is
    left) and `not proposed`. `results` are the best of each kind in a picture, `first` is what `first_proposals` says.
    """
    part = pictures.part
    unseen = set(part.ids(split.unseen))
    ranks = {row["id"]: row["rank"] for row in first}
    by_picture: dict[int, list[Result]] = defaultdict(list)
    for row in results:
        by_picture[row["image_id"]].append(row)
    counts: dict[str, Counter[str]] = {"seen": Counter(), "unseen": Counter()}
    for image_id, objects in part.by_image().items():
        for row in objects:
            if row["iscrowd"]:
                continue
            rank, category = ranks[row["id"]], row["category_id"]
            on = {one["category_id"] for one in by_picture[image_id] if iou(one["bbox"], row["bbox"]) >= ON_IT}
            fate = "named" if category in on else "misnamed" if on else "dropped" if rank else "not proposed"
            count = counts["unseen" if category in unseen else "seen"]
            count.update(["objects", fate, *(f"recall@{most}" for most in RANKS if 0 < rank <= most)])
    names = [*(f"recall@{most}" for most in RANKS), "named", "misnamed", "dropped", "not proposed"]
    return {
        kind: {"objects": count["objects"]}
        | {name: count[name] / count["objects"] if count["objects"] else math.nan for name in names}
        for kind, count in counts.items()
    }


def swept(pictures: InstancePictures, results: Sequence[Result], split: Split, kept: int) -> list[Scores]:
    """Measures for each bias AP at 0.5 of boxes, and the share of objects that get their right name: seen, unseen."""
    part = pictures.part
    seen, unseen = part.ids(split.seen), part.ids(split.unseen)
    named = named_objects(pictures, results, split)
    lines = []
    for bias in BIASES:
        found = scored(part, together(results, seen, bias, kept), [*seen, *unseen], "box")
        of_seen, of_unseen = found.means(seen)["ap@0.5"], found.means(unseen)["ap@0.5"]
        right: dict[bool, list[bool]] = {True: [], False: []}
        for thing in named:
            right[thing.truth in split.unseen].append(thing.said(bias) == thing.truth)
        share_of_seen, share_of_unseen = (
            sum(right[kind]) / len(right[kind]) if right[kind] else math.nan for kind in (False, True)
        )
        lines.append(
            {
                "bias": bias,
                "seen": of_seen,
                "unseen": of_unseen,
                "harmonic mean": harmonic_mean(of_seen, of_unseen),
                "named seen": share_of_seen,
                "named unseen": share_of_unseen,
                "named harmonic mean": harmonic_mean(share_of_seen, share_of_unseen),
            }
        )
    return lines


def _without_nan(value: Any) -> Any:
    """Puts None where a number is NaN, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _without_nan(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value
