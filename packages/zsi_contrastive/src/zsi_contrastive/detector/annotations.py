"""Classes that are seen in training and classes that are not; COCO's instances files, and their zero-shot parts."""

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from labs_common.data.images import MOST_PIXELS, first_of
from labs_common.errors import LabError, json_of
from labs_common.options import OnBadData
from labs_common.scenes.world import SHAPES, TEXTURES
from zsi_contrastive.detector.config import PUBLISHED, SCENES

CLASSES = files("zsi_contrastive.detector") / "classes"  # the published splits, and COCO's supercategories
RULES = {  # by --protocol
    "zsi": "no training picture has an unseen object, every test picture has one, none is in both",
    "ov-coco": "unseen objects in training pictures have no labels, every test picture has an object, none is in both",
}
KEPT_BACK = 4  # of the pairings of texture and shape, one in so many is unseen
YEAR = r"^(?:.*/)?COCO_[a-z]+\d{4}_"  # before the id in the names of COCO's pictures of 2014 and 2015
Json = dict[str, Any]
MOST = 2**53  # an id beyond is no longer the same number in other programs


@dataclass(frozen=True)
class Split:
    """Names of classes, in the order of their word vectors."""

    name: str
    seen: tuple[str, ...]
    unseen: tuple[str, ...]

    @property
    def classes(self) -> tuple[str, ...]:
        """Seen, then unseen."""
        return self.seen + self.unseen


def read_split(name: str) -> Split:
    """Reads a split by its name, or from a JSON file with the lists `seen` and `unseen`.

    Raises:
        LabError: there is no such split, or the file is not one.
    """
    if name == SCENES:
        return scenes_split()
    if name in PUBLISHED:
        found = json.loads((CLASSES / f"{name}.json").read_text(encoding="utf-8"))
        return Split(name, tuple(found["seen"]), tuple(found["unseen"]))
    path = Path(name)
    if not path.is_file():
        known = ", ".join((*PUBLISHED, SCENES))
        raise LabError(f'--split {name}: no such file; take {known}, or a JSON file with the lists "seen" and "unseen"')
    found = json_of(path, f"--split {name}")
    try:
        lists = [found["seen"], found["unseen"]]
    except (KeyError, TypeError) as error:
        raise LabError(f'--split {name}: is not JSON with the lists "seen" and "unseen" ({error})') from error
    for part in lists:
        if not isinstance(part, list) or not part or not all(isinstance(word, str) and word for word in part):
            raise LabError(f'--split {name}: "seen" and "unseen" must be lists of names of classes, none of them empty')
    if twice := sorted(word for word, count in Counter([*lists[0], *lists[1]]).items() if count > 1):
        raise LabError(f"--split {name}: names {', '.join(twice)} twice")
    return Split(path.stem, tuple(lists[0]), tuple(lists[1]))


def scenes_split() -> Split:
    """Pairs textures with shapes: every texture and every shape is seen, but a quarter of the pairings is not."""
    seen: list[str] = []
    unseen: list[str] = []
    for row, shape in enumerate(SHAPES):
        for column, texture in enumerate(TEXTURES):
            part = unseen if (row + column) % KEPT_BACK == 0 else seen
            part.append(f"{texture} {shape}")
    return Split(SCENES, tuple(seen), tuple(unseen))


@cache
def coco_groups() -> dict[str, tuple[str, ...]]:
    """Returns the 80 classes of COCO by supercategory; in this order they are in the order of their ids."""
    groups = json.loads((CLASSES / "coco.json").read_text(encoding="utf-8"))["groups"]
    return {group: tuple(names) for group, names in groups.items()}


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
        file_pictures: of a part, how many pictures its file has.
        part_pictures: of a part, how many the rule chose, before any were set aside.
    """

    source: str
    categories: list[Json]
    images: list[Json]
    annotations: list[Json]
    left_out: Counter[str] = field(default_factory=Counter)
    unusable: list[Json] = field(default_factory=list)
    file_pictures: int = 0
    part_pictures: int = 0

    def by_image(self) -> dict[int, list[Json]]:
        """Sorts the annotations by picture; pictures without any are missing."""
        found: dict[int, list[Json]] = defaultdict(list)
        for annotation in self.annotations:
            found[annotation["image_id"]].append(annotation)
        return found

    def ids(self, names: Sequence[str]) -> list[int]:
        """Returns the category ids of classes, in their order.

        Raises:
            LabError: the file does not know one of them.
        """
        known = {category["name"]: category["id"] for category in self.categories}
        if missing := [name for name in names if name not in known]:
            some = ", ".join(list(known)[:8])
            raise LabError(f"{self.source}: has no category {', '.join(missing)}; its categories are {some}, …")
        return [known[name] for name in names]

    def plain(self) -> Json:
        """Returns COCO's JSON."""
        return {"images": self.images, "annotations": self.annotations, "categories": self.categories}


def read_instances(path: Path, on_bad_data: OnBadData = "skip") -> Instances:
    """Reads and checks a file; what cannot be used of it (boxes without area, no outline) is left out and counted.

    Raises:
        LabError: it cannot be read, or is not COCO's format, or something cannot be used and `on_bad_data` is "error";
            the fault is named.
    """
    categories, images, annotations = _lists(path)
    for key, rows in (("categories", categories), ("images", images)):
        if twice := [number for number, count in Counter(row["id"] for row in rows).items() if count > 1]:
            raise LabError(f"{path}: two {key} have the id {twice[0]}")
    known, pictures = {row["id"] for row in categories}, {row["id"]: (row["height"], row["width"]) for row in images}
    left_out: Counter[str] = Counter()
    kept, unusable, named = [], [], []
    numbers = {n for row in annotations if isinstance(n := row.get("id"), int) and 0 < n < MOST}
    # Ids that are missing, zero, no numbers or not unique would confuse COCO's evaluation.
    renumber = len(numbers) < len(annotations)
    for place, row in enumerate(annotations):
        if row["category_id"] not in known:
            raise LabError(f"{path}: annotations[{place}] is of the unknown category {row['category_id']}")
        if row["image_id"] not in pictures:
            raise LabError(f"{path}: annotations[{place}] is of the unknown picture {row['image_id']}")
        if reason := _fault(row, *pictures[row["image_id"]]):
            left_out[reason] += 1
            unusable.append(row)
            named.append(f"annotations[{place}]: {reason}")
        else:
            usual = {"iscrowd": 0, "area": row["bbox"][2] * row["bbox"][3], "id": place + 1}
            kept.append({**usual, **row} | ({"id": place + 1} if renumber else {}))
    if named and on_bad_data == "error":
        raise LabError(f"{path}: {first_of(named)}; mend them, or leave them out with --on-bad-data skip")
    return Instances(str(path), categories, images, kept, left_out, unusable)


def _lists(path: Path) -> list[list[Json]]:
    """Reads categories, images and annotations, each row with the keys that are needed."""
    content = json_of(path, str(path))
    needed: dict[str, dict[str, type]] = {
        "categories": {"id": int, "name": str},
        "images": {"id": int, "file_name": str, "width": int, "height": int},
        "annotations": {"image_id": int, "category_id": int, "bbox": object},
    }
    lists = []
    for key, wanted in needed.items():
        rows = content.get(key) if isinstance(content, dict) else None
        if not isinstance(rows, list):
            raise LabError(f"{path}: has no list of {key}, as COCO's instances files have")
        for place, row in enumerate(rows):
            if lacks := sorted(wanted.keys() - (row.keys() if isinstance(row, dict) else set())):
                raise LabError(f"{path}: {key}[{place}] lacks {', '.join(lacks)}")
            for name, kind in wanted.items():
                if not isinstance(row[name], kind) or (kind is int and not -MOST < row[name] < MOST):
                    raise LabError(
                        f"{path}: {key}[{place}]: {name} must be {'text' if kind is str else 'a whole number'}"
                    )
            if key == "images" and not (
                min(row["width"], row["height"]) > 0 < row["width"] * row["height"] <= MOST_PIXELS
            ):
                raise LabError(f"{path}: {key}[{place}] has {row['width']} × {row['height']} pixels")
        lists.append(rows)
    return lists


def _fault(annotation: Mapping[str, Any], height: int, width: int) -> str:
    """Says why an annotation of a picture of that size cannot be used; empty if it can."""
    outline = annotation.get("segmentation")
    if reason := box_fault(annotation["bbox"]):
        return reason
    if not is_number(annotation.get("area", 0)) or annotation.get("iscrowd", 0) not in (0, 1):
        return "area that is no number, or iscrowd neither 0 nor 1"
    if isinstance(outline, list):
        # A polygon is x, y, x, y, …: three points are six numbers.
        polygons = [part for part in outline if isinstance(part, list) and len(part) >= 6 and len(part) % 2 == 0]
        if not polygons:
            return "outline of fewer than three points"
        near = 10 * max(height, width)  # a line to a point far away would be drawn pixel by pixel
        try:
            fine = all(math.isfinite(sum(part)) and -near < min(part) <= max(part) < near for part in polygons)
        except (TypeError, OverflowError):
            fine = False
        return "" if fine else "outline of something other than points near the picture"
    if isinstance(outline, dict):
        return "" if is_run_lengths(outline, height, width) else "run lengths that are not COCO's"
    return "no outline"


def box_fault(box: Any) -> str:
    """Says why a value is no box (left, top, width, height); empty if it is one."""
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
        return "box that is not four numbers"
    return "box without area" if box[2] <= 0 or box[3] <= 0 else ""


def is_number(value: Any) -> bool:
    """Says whether a value of a JSON file is a number that can be computed with in float32."""
    return isinstance(value, (int, float)) and -1e30 < value < 1e30


def is_run_lengths(outline: Mapping[str, Any], height: int, width: int) -> bool:
    """Says whether COCO's run lengths, plain or compressed, are of a picture of that size: its library reads any."""
    counts = outline.get("counts")
    if outline.get("size") != [height, width] or not isinstance(counts, (list, str)):
        return False
    found: list[Any] = counts if isinstance(counts, list) else []
    value = shift = 0
    for letter in counts if isinstance(counts, str) else "":
        # Six bits of a letter from "0" on: five of the number, the lowest first, and whether more follow.
        bits = ord(letter) - 48
        if not 0 <= bits < 64 or shift > 60:
            return False
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16) << (shift - 4)  # the highest bit is the sign
            found.append(value + (found[-2] if len(found) > 2 else 0))  # but for the first three, a difference
            value = shift = 0
    whole = all(isinstance(run, int) and run >= 0 for run in found)
    return whole and not shift and sum(found) == height * width


@dataclass(frozen=True)
class ZeroShotParts:
    """The parts into which a split cuts a training and a test file.

    Attributes:
        train: pictures with at least one seen object and no unseen one, with seen objects.
        unseen: test pictures with unseen objects, with these alone (ZSI).
        both: the same pictures with seen and unseen objects (GZSI).
        protocol: a key of `RULES`; in ov-coco training pictures may show unseen objects, and `both` are the pictures
            with an object of either kind.
    """

    split: Split
    train: Instances
    unseen: Instances
    both: Instances
    protocol: str = "zsi"

    def counts(self) -> list[tuple[str, int, int, int]]:
        """Counts pictures, objects and crowds of each part, after its name."""
        parts = {"training, seen": self.train, "test, unseen": self.unseen, "test, both": self.both}
        crowds = {name: sum(bool(row["iscrowd"]) for row in part.annotations) for name, part in parts.items()}
        return [
            (name, len(part.images), len(part.annotations) - crowds[name], crowds[name]) for name, part in parts.items()
        ]


def zero_shot_parts(train: Instances, test: Instances, split: Split, protocol: str = "zsi") -> ZeroShotParts:
    """Applies the rule of a protocol.

    A crowd counts as an object, and so does one whose annotation cannot be used; but a training picture needs a seen
    object that can, or there is nothing to learn from it. Classes that are in neither list do not count.

    Raises:
        LabError: the test file lacks a class, the training file a seen one, or no picture is left.
    """
    openly = protocol == "ov-coco"
    parts = ZeroShotParts(
        split,
        _part(train, split.seen, split.seen, () if openly else _there(train, split.unseen), training=True),
        _part(test, split.unseen, split.unseen),
        _part(test, split.classes, split.classes if openly else split.unseen),
        protocol,
    )
    for part, what in ((parts.train, "a seen object and no unseen one"), (parts.unseen, "an unseen object")):
        if not part.images:
            raise LabError(f"{part.source}: no picture has {what} of the split {split.name}")
    check_parts(parts, train)
    return parts


def all_of(test: Instances, split: Split) -> Instances:
    """Takes all pictures of a file, with the objects of a split's classes.

    Raises:
        LabError: the file lacks a class.
    """
    return _with_classes(test, test.images, split.classes)


def check_parts(parts: ZeroShotParts, train: Instances) -> None:
    """Makes sure that the parts keep the rule, by looking at the whole training file again.

    Raises:
        LabError: a training picture has an unseen object, a test picture none, or one is in both.
    """
    unseen = set(train.ids(_there(train, parts.split.unseen)))
    training = {row["id"]: row["file_name"] for row in parts.train.images}
    for row in (*train.annotations, *train.unusable) if parts.protocol == "zsi" else ():
        if row["category_id"] in unseen and row["image_id"] in training:
            raise LabError(f"{train.source}: the training picture {training[row['image_id']]} has an unseen object")
    unseen = set(parts.unseen.ids(parts.split.unseen))
    for part in (parts.unseen, parts.both):
        tested = unseen if parts.protocol == "zsi" else set(part.ids([row["name"] for row in part.categories]))
        shown = {row["image_id"] for row in part.annotations if row["category_id"] in tested}
        for row in part.images:
            if row["id"] not in shown:
                raise LabError(f"{part.source}: the test picture {row['file_name']} has no unseen object")
            if row["id"] in training and _same_picture(training[row["id"]], row["file_name"]):
                raise LabError(f"{part.source}: {row['file_name']} is a training picture too")


def _same_picture(one: str, other: str) -> bool:
    """Says whether two names of an id are of one picture: COCO's years differ in the prefix (COCO_val2014_…) alone."""
    return re.sub(YEAR, "", one) == re.sub(YEAR, "", other)


def _there(whole: Instances, names: Sequence[str]) -> list[str]:
    """Takes the classes that a file knows: what `prepare` wrote for training has none of the unseen ones."""
    known = {category["name"] for category in whole.categories}
    return [name for name in names if name in known]


def _part(
    whole: Instances, kept: Sequence[str], wanted: Sequence[str], refused: Sequence[str] = (), training: bool = False
) -> Instances:
    """Takes pictures with a `wanted` and without a `refused` object, with the annotations of the `kept` classes."""
    want, refuse = (set(whole.ids(names)) for names in (wanted, refused))
    shown: dict[int, set[int]] = defaultdict(set)
    usable: dict[int, set[int]] = defaultdict(set)
    for row in [*whole.annotations, *whole.unusable]:
        shown[row["image_id"]].add(row["category_id"])
    for row in whole.annotations:
        if not (training and row["iscrowd"]):
            usable[row["image_id"]].add(row["category_id"])
    chosen = [image for image in whole.images if usable[image["id"]] & want and not shown[image["id"]] & refuse]
    return _with_classes(whole, chosen, kept)


def _with_classes(whole: Instances, chosen: list[Json], kept: Sequence[str]) -> Instances:
    """Takes these pictures of a file, with the annotations of the `kept` classes."""
    keep, ids = set(whole.ids(kept)), {image["id"] for image in chosen}
    rows = [row for row in whole.annotations if row["image_id"] in ids and row["category_id"] in keep]
    names = {row["id"]: row for row in whole.categories}
    categories = [names[number] for number in whole.ids(kept)]
    counts = len(whole.images), len(chosen)
    return Instances(whole.source, categories, chosen, rows, whole.left_out, [], *counts)
