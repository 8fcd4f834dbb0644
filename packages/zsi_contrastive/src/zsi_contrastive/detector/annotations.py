"""Classes that are seen in training and classes that are not; COCO's instances files, and their zero-shot parts."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from importlib.resources import files
from pathlib import Path

import numpy as np

from labs_common.data.images import MOST_PIXELS, first_of
from labs_common.errors import LabError, json_of
from labs_common.options import OnBadData
from labs_common.scenes.world import SHAPES, TEXTURES
from zsi_contrastive.detector.config import PUBLISHED, SCENES
from zsi_contrastive.detector.table import Json, Rows, StoredRows, digest_of, fault_of, read_stored, stored

CLASSES = files("zsi_contrastive.detector") / "classes"  # the published splits, and COCO's supercategories
RULES = {  # by --protocol
    "zsi": "no training picture has an unseen object, every test picture has one, none is in both",
    "ov-coco": "unseen objects in training pictures have no labels, every test picture has an object, none is in both",
}
KEPT_BACK = 4  # of the pairings of texture and shape, one in so many is unseen
YEAR = r"^(?:.*/)?COCO_[a-z]+\d{4}_"  # before the id in the names of COCO's pictures of 2014 and 2015
LARGE = 2**26  # bytes from which a file gets a table: val2017's 20 MB are read in a second
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
        annotations: as in the file, crowds among them; of a large file `Rows`, which lie on disk.
        left_out: annotations that cannot be used, with counts, by reason.
        unusable: these annotations; they still say what a picture shows.
        file_pictures: of a part, how many pictures its file has.
        part_pictures: of a part, how many the rule chose, before any were set aside.
    """

    source: str
    categories: list[Json]
    images: list[Json]
    annotations: Sequence[Json]
    left_out: Counter[str] = field(default_factory=Counter)
    unusable: list[Json] = field(default_factory=list)
    file_pictures: int = 0
    part_pictures: int = 0

    @cached_property
    def rows(self) -> Rows:
        """The annotations with their columns."""
        return self.annotations if isinstance(self.annotations, Rows) else Rows.of(self.annotations)

    def of_image(self, number: int) -> list[Json]:
        """Returns the annotations of the picture with this id."""
        order, ids = self._by_image_id
        first, last = np.searchsorted(ids, (number, number + 1))
        return [self.rows[int(place)] for place in order[first:last]]

    @cached_property
    def _by_image_id(self) -> tuple[np.ndarray, np.ndarray]:
        order = self.rows.image_ids.argsort(kind="stable")
        return order, self.rows.image_ids[order]

    def in_memory(self) -> "Instances":
        """Reads all annotations, for those that are looked at over and over."""
        return replace(self, annotations=list(self.annotations))

    def by_image(self) -> dict[int, list[Json]]:
        """Sorts the annotations by picture; pictures without any are missing."""
        found: dict[int, list[Json]] = defaultdict(list)
        for annotation in self.annotations:
            found[annotation["image_id"]].append(annotation)
        return found

    def showing(self, names: Sequence[str]) -> set[int]:
        """Returns the ids of pictures with an object of these classes, be it a crowd or one that cannot be used."""
        wanted = self.ids(names)
        shown = self.rows.image_ids[np.isin(self.rows.category_ids, wanted)].tolist()
        return {*shown, *(row["image_id"] for row in self.unusable if row["category_id"] in wanted)}

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
        return {"images": self.images, "annotations": list(self.annotations), "categories": self.categories}


def read_instances(path: Path, on_bad_data: OnBadData = "skip") -> Instances:
    """Reads and checks a file; what cannot be used of it (boxes without area, no outline) is left out and counted.

    A large file is read once: later its checked annotations are taken from a table in the cache.

    Raises:
        LabError: it cannot be read, or is not COCO's format, or something cannot be used and `on_bad_data` is "error";
            the fault is named.
    """
    if path.is_file() and path.stat().st_size >= LARGE:
        digest = digest_of(path)
        rows, rest = read_stored(_table(path, digest), (_stored_rows, (path, digest)))
        named = rest.pop("named")
        found = Instances(str(path), annotations=rows, **rest | {"left_out": Counter(rest["left_out"])})
    else:
        found, named = _checked(path)
    if named and on_bad_data == "error":
        raise LabError(f"{path}: {first_of(named)}; mend them, or leave them out with --on-bad-data skip")
    return found


def _table(path: Path, digest: str) -> Path:
    def make() -> tuple[Sequence[Json], Json]:
        found, named = _checked(path)
        kept = {name: getattr(found, name) for name in ("categories", "images", "left_out", "unusable")}
        return found.annotations, kept | {"named": named}

    return stored(path, digest, make)


def _stored_rows(path: Path, digest: str) -> StoredRows:
    """Opens a file's table in another process, or makes it on another machine."""
    rows, _ = read_stored(_table(path, digest), (_stored_rows, (path, digest)))
    assert isinstance(rows.source, StoredRows)
    return rows.source


def _checked(path: Path) -> tuple[Instances, list[str]]:
    """Reads a file without a table, and names what cannot be used of it."""
    categories, images, annotations = _lists(path)
    for key, rows in (("categories", categories), ("images", images)):
        if twice := [number for number, count in Counter(row["id"] for row in rows).items() if count > 1]:
            raise LabError(f"{path}: two {key} have the id {twice[0]}")
    if twice := [name for name, count in Counter(row["name"] for row in categories).items() if count > 1]:
        raise LabError(f"{path}: two categories have the name {twice[0]}; give their objects the same id")
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
        if reason := fault_of(row, *pictures[row["image_id"]]):
            left_out[reason] += 1
            unusable.append(row)
            named.append(f"annotations[{place}]: {reason}")
        else:
            usual = {"iscrowd": 0, "area": row["bbox"][2] * row["bbox"][3], "id": place + 1}
            kept.append({**usual, **row} | ({"id": place + 1} if renumber else {}))
    return Instances(str(path), categories, images, kept, left_out, unusable), named


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
        crowds = {name: int(part.rows.crowds.sum()) for name, part in parts.items()}
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
    training = {row["id"]: row["file_name"] for row in parts.train.images}
    for number in train.showing(_there(train, parts.split.unseen)) if parts.protocol == "zsi" else ():
        if number in training:
            raise LabError(f"{train.source}: the training picture {training[number]} has an unseen object")
    for part in (parts.unseen, parts.both):
        shown = part.showing(
            parts.split.unseen if parts.protocol == "zsi" else [row["name"] for row in part.categories]
        )
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
    rows = whole.rows
    usable = rows.image_ids[np.isin(rows.category_ids, whole.ids(wanted)) & ~(rows.crowds & training)]
    good = set(usable.tolist()) - whole.showing(refused)
    chosen = [image for image in whole.images if image["id"] in good]
    return _with_classes(whole, chosen, kept)


def _with_classes(whole: Instances, chosen: list[Json], kept: Sequence[str]) -> Instances:
    """Takes these pictures of a file, with the annotations of the `kept` classes."""
    ids = np.array([image["id"] for image in chosen], dtype=np.int64)
    rows = whole.rows.take(np.isin(whole.rows.image_ids, ids) & np.isin(whole.rows.category_ids, whole.ids(kept)))
    names = {row["id"]: row for row in whole.categories}
    categories = [names[number] for number in whole.ids(kept)]
    counts = len(whole.images), len(chosen)
    return Instances(whole.source, categories, chosen, rows, whole.left_out, [], *counts)
