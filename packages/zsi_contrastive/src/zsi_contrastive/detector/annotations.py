"""COCO's instances files, checked, and the rule that makes zero-shot parts of them."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from labs_common.errors import LabError
from zsi_contrastive.detector.splits import Split

Json = dict[str, Any]


@dataclass(frozen=True)
class Instances:
    """An instances file of COCO, or a part of one.

    Attributes:
        source: the file, for messages.
        categories: as in the file; ids may have gaps.
        images: as in the file.
        annotations: as in the file, crowds among them.
        left_out: annotations that cannot be used, with counts, by reason.
        unusable: these annotations; they still say what a picture shows.
    """

    source: str
    categories: list[Json]
    images: list[Json]
    annotations: list[Json]
    left_out: Counter[str] = field(default_factory=Counter)
    unusable: list[Json] = field(default_factory=list)

    def by_image(self) -> dict[int, list[Json]]:
        """The annotations of each picture that has some."""
        found: dict[int, list[Json]] = defaultdict(list)
        for annotation in self.annotations:
            found[annotation["image_id"]].append(annotation)
        return found

    def ids(self, names: Sequence[str]) -> list[int]:
        """The category ids of classes, in their order.

        Raises:
            LabError: the file does not know one of them.
        """
        known = {category["name"]: category["id"] for category in self.categories}
        if missing := [name for name in names if name not in known]:
            raise LabError(f"{self.source}: has no category {', '.join(missing)}; its categories are "
                           f"{', '.join(list(known)[:8])}, …")  # fmt: skip
        return [known[name] for name in names]

    def plain(self) -> Json:
        """As COCO's JSON."""
        return {"images": self.images, "annotations": self.annotations, "categories": self.categories}


def read_instances(path: Path) -> Instances:
    """Reads and checks a file; what cannot be used of it (boxes without area, no outline) is left out and counted.

    Raises:
        LabError: it cannot be read, or is not COCO's format; the fault is named.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LabError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise LabError(f"{path}: is not JSON ({error})") from error
    lists = []
    for key, wanted in (("categories", {"id", "name"}), ("images", {"id", "file_name", "width", "height"}),
                        ("annotations", {"image_id", "category_id", "bbox"})):  # fmt: skip
        rows = content.get(key) if isinstance(content, dict) else None
        if not isinstance(rows, list):
            raise LabError(f"{path}: has no list of {key}, as COCO's instances files have")
        for place, row in enumerate(rows):
            if not isinstance(row, dict) or not wanted <= row.keys():
                lacks = ", ".join(sorted(wanted - (row.keys() if isinstance(row, dict) else set())))
                raise LabError(f"{path}: {key}[{place}] lacks {lacks}")
        lists.append(rows)
    categories, images, annotations = lists
    for key, rows in (("categories", categories), ("images", images)):
        if twice := [number for number, count in Counter(row["id"] for row in rows).items() if count > 1]:
            raise LabError(f"{path}: two {key} have the id {twice[0]}")
    known, pictures = {row["id"] for row in categories}, {row["id"]: row for row in images}
    left_out: Counter[str] = Counter()
    kept, unusable = [], []
    numbers = Counter(row.get("id") for row in annotations)
    # Ids that are missing, zero or not unique would confuse COCO's evaluation.
    renumber = any(not number for number in numbers) or len(numbers) < len(annotations)
    for place, row in enumerate(annotations):
        if row["category_id"] not in known:
            raise LabError(f"{path}: annotations[{place}] is of the unknown category {row['category_id']}")
        if row["image_id"] not in pictures:
            raise LabError(f"{path}: annotations[{place}] is of the unknown picture {row['image_id']}")
        reason = _fault(row)
        if reason:
            left_out[reason] += 1
            unusable.append(row)
        else:
            usual = {"iscrowd": 0, "area": row["bbox"][2] * row["bbox"][3], "id": place + 1}
            kept.append({**usual, **row} | ({"id": place + 1} if renumber else {}))
    return Instances(str(path), categories, images, kept, left_out, unusable)


def _fault(annotation: Mapping[str, Any]) -> str:
    """Why an annotation cannot be used, or nothing."""
    box = annotation["bbox"]
    if not isinstance(box, list) or len(box) != 4:
        return "box that is not four numbers"
    if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in box):
        return "box that is not four numbers"
    if box[2] <= 0 or box[3] <= 0:
        return "box without area"
    outline = annotation.get("segmentation")
    if isinstance(outline, list):
        if not any(isinstance(part, list) and len(part) >= 6 and len(part) % 2 == 0 for part in outline):
            return "outline of fewer than three points"
        return ""
    if isinstance(outline, dict):
        fine = isinstance(outline.get("counts"), (list, str)) and len(outline.get("size", ())) == 2
        return "" if fine else "run lengths that are not COCO's"
    return "no outline"


@dataclass(frozen=True)
class ZeroShotParts:
    """What a split makes of a training and a test file.

    Attributes:
        train: pictures with at least one seen object and no unseen one, with seen objects.
        unseen: test pictures with unseen objects, with these alone (ZSI).
        both: the same pictures with seen and unseen objects (GZSI).
    """

    split: Split
    train: Instances
    unseen: Instances
    both: Instances

    def counts(self) -> list[tuple[str, int, int, int]]:
        """Of each part its name, pictures, objects and crowds."""
        return [
            (name, len(part.images), sum(not row["iscrowd"] for row in part.annotations),
             sum(bool(row["iscrowd"]) for row in part.annotations))
            for name, part in (("training, seen", self.train), ("test, unseen", self.unseen), ("test, both", self.both))
        ]  # fmt: skip


def zero_shot_parts(train: Instances, test: Instances, split: Split) -> ZeroShotParts:
    """Applies the paper's rule.

    A crowd counts as an object, and so does one whose annotation cannot be used; but a training picture needs a seen
    object that can, or there is nothing to learn from it. Classes that are in neither list do not count.

    Raises:
        LabError: a file lacks a class, or no picture is left.
    """
    parts = ZeroShotParts(
        split,
        _part(train, split.seen, split.seen, split.unseen, training=True),
        _part(test, split.unseen, split.unseen),
        _part(test, split.classes, split.unseen),
    )
    for part, what in ((parts.train, "a seen object and no unseen one"), (parts.unseen, "an unseen object")):
        if not part.images:
            raise LabError(f"{part.source}: no picture has {what} of the split {split.name}")
    check_parts(parts, train)
    return parts


def check_parts(parts: ZeroShotParts, train: Instances) -> None:
    """Makes sure that what the parts promise is so, by looking at the whole training file again.

    Raises:
        LabError: a training picture has an unseen object, a test picture none, or one is in both.
    """
    unseen = set(train.ids(parts.split.unseen))
    training = {row["id"]: row["file_name"] for row in parts.train.images}
    for row in (*train.annotations, *train.unusable):
        if row["category_id"] in unseen and row["image_id"] in training:
            raise LabError(f"{train.source}: the training picture {training[row['image_id']]} has an unseen object")
    unseen = set(parts.unseen.ids(parts.split.unseen))
    for part in (parts.unseen, parts.both):
        with_unseen = {row["image_id"] for row in part.annotations if row["category_id"] in unseen}
        for row in part.images:
            if row["id"] not in with_unseen:
                raise LabError(f"{part.source}: the test picture {row['file_name']} has no unseen object")
            if training.get(row["id"]) == row["file_name"]:
                raise LabError(f"{part.source}: {row['file_name']} is a training picture too")


def _part(
    whole: Instances, kept: Sequence[str], wanted: Sequence[str], refused: Sequence[str] = (), training: bool = False
) -> Instances:
    """Pictures with a `wanted` and without a `refused` object, with the annotations of the `kept` classes."""
    keep, want, refuse = (set(whole.ids(names)) for names in (kept, wanted, refused))
    shown: dict[int, set[int]] = defaultdict(set)
    usable: dict[int, set[int]] = defaultdict(set)
    for row in [*whole.annotations, *whole.unusable]:
        shown[row["image_id"]].add(row["category_id"])
    for row in whole.annotations:
        if not (training and row["iscrowd"]):
            usable[row["image_id"]].add(row["category_id"])
    chosen = [image for image in whole.images if usable[image["id"]] & want and not shown[image["id"]] & refuse]
    ids = {image["id"] for image in chosen}
    rows = [row for row in whole.annotations if row["image_id"] in ids and row["category_id"] in keep]
    names = {row["id"]: row for row in whole.categories}
    return Instances(whole.source, [names[number] for number in whole.ids(kept)], chosen, rows, whole.left_out)
