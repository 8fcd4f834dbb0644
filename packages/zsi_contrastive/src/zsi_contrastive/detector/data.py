"""Pictures, classes and their vectors as training takes them: COCO's, or drawn scenes in COCO's format."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from labs_common.cache import cached_directory
from labs_common.data.splits import print_left_out
from labs_common.errors import LabError
from labs_common.progress import console
from labs_common.scenes.files import write_coco
from labs_common.scenes.world import Scene, Thing
from zsi_contrastive.detector.annotations import ZeroShotParts, read_instances, zero_shot_parts
from zsi_contrastive.detector.columns import checked_order
from zsi_contrastive.detector.config import DataOptions, WordOptions
from zsi_contrastive.detector.pictures import InstancePictures, found_pictures
from zsi_contrastive.detector.splits import Split, read_split, scenes_split
from zsi_contrastive.detector.vectors import ClassVectors, read_class_vectors

SIDE = 96
DRAWN = {"train": range(3500), "val": range(100_000, 100_740)}  # about 1,600 and 400 of them are wanted
SEED = 0


@dataclass(frozen=True)
class ZeroShotData:
    """All that is read.

    Attributes:
        split: the classes.
        pictures: `train` with seen objects; `validation` and `test` with both kinds.
        vectors: of the classes.
        notes: what a reader should know of the vectors.
        counts: of the whole parts, before any limit: see `ZeroShotParts.counts`.
    """

    split: Split
    pictures: dict[str, InstancePictures]
    vectors: ClassVectors
    notes: tuple[str, ...]
    counts: list[tuple[str, int, int, int]]


def read_data(data: DataOptions, words: WordOptions, seed: int, shown: bool) -> ZeroShotData:
    """Reads a completed config's pictures and vectors, and checks that they fit together.

    Raises:
        LabError: something cannot be read, or does not fit.
    """
    split = read_split(data.split)
    vectors, notes = read_vectors(words, split)
    pictures, counts = read_pictures(data, split, seed, shown)
    if shown:
        print_left_out({name: pictures[name] for name in ("train", "test")})
        for note in notes:
            console.print(f"{words.word_vectors}: {note}")
    return ZeroShotData(split, pictures, vectors, notes, counts)


def read_pictures(
    data: DataOptions, split: Split, seed: int, shown: bool, training: bool = True
) -> tuple[dict[str, InstancePictures], list[tuple[str, int, int, int]]]:
    """Training, validation and test pictures, each decoded once, and the counts of the whole parts.

    Without `training` those of it, which are many, are not looked at.

    Raises:
        LabError: something cannot be read.
    """
    parts, folder = read_parts(data, split)
    both = _pictures(parts, folder, data, "both", shown)
    order = np.random.default_rng([seed, 1]).permutation(len(both))
    first = round(data.validation_fraction * len(both))
    pictures = {
        "validation": _limited(both, sorted(order[:first].tolist()), data.limit, seed),
        "test": _limited(both, sorted(order[first:].tolist()), data.limit, seed),
    }
    if training:
        train = _pictures(parts, folder, data, "train", shown)
        pictures = {"train": _limited(train, range(len(train)), data.limit, seed), **pictures}
    return pictures, parts.counts()


def read_vectors(words: WordOptions, split: Split) -> tuple[ClassVectors, tuple[str, ...]]:
    """Vectors of the classes, and notes on them; a matrix's columns are checked against the names.

    Raises:
        LabError: they cannot be read, or stand in another order.
    """
    vectors = read_class_vectors(words.word_vectors, split)
    notes = vectors.notes
    if vectors.by_column and words.columns == "check":
        notes = (*notes, checked_order(vectors.classes, split, words.word_vectors).verdict)
    return vectors, notes


def read_parts(data: DataOptions, split: Split) -> tuple[ZeroShotParts, Path]:
    """The training and test parts of the data, and its directory.

    Raises:
        LabError: a file is missing, or not what it should be.
    """
    folder = data.data or drawn_scenes()
    if not folder.is_dir():
        raise LabError(f"--data {folder}: no such directory")
    train = data.train_annotations or instances_file(folder, "train")
    test = data.test_annotations or instances_file(folder, "val")
    first, second = read_instances(train), read_instances(test)
    if data.data is None:  # not where this machine keeps its cache
        first, second = replace(first, source="drawn scenes, training"), replace(second, source="drawn scenes, test")
    return zero_shot_parts(first, second, split), folder


def instances_file(folder: Path, name: str) -> Path:
    """`annotations/instances_NAME….json` under a directory of COCO.

    Raises:
        LabError: there is none, or more than one.
    """
    found = sorted((folder / "annotations").glob(f"instances_{name}*.json"))
    if len(found) != 1:
        said = "holds no" if not found else f"holds {len(found)} files"
        option = "train" if name == "train" else "test"
        raise LabError(f"--data {folder}: {said} annotations/instances_{name}*.json; name one with "
                       f"--{option}-annotations")  # fmt: skip
    return found[0]


def drawn_scenes() -> Path:
    """The directory of the drawn scenes, made on first use."""

    def write(folder: Path) -> None:
        console.print("drawing scenes (once)")
        unseen = set(scenes_split().unseen)
        classes = scenes_split().classes

        def shows_unseen(scene: Scene) -> bool:
            return any(category(thing) in unseen for thing in scene.things)

        write_coco(folder, {"train": DRAWN["train"]}, SEED, SIDE, category, classes, lambda s: not shows_unseen(s))
        write_coco(folder, {"val": DRAWN["val"]}, SEED, SIDE, category, classes, shows_unseen)

    recipe = {"what": "zsi scenes", "side": SIDE, "seed": SEED, **{name: str(part) for name, part in DRAWN.items()}}
    return cached_directory("zsi-scenes", recipe, write)


def category(thing: Thing) -> str:
    """The class of a drawn thing."""
    return f"{thing.texture} {thing.shape}"


def picture_folders(folder: Path) -> list[Path]:
    """Where pictures may lie under a directory of COCO."""
    inner = [path for parent in (folder, folder / "images") if parent.is_dir() for path in sorted(parent.iterdir())]
    return [folder, *(path for path in inner if path.is_dir() and path.name != "annotations")]


def _pictures(parts: ZeroShotParts, folder: Path, data: DataOptions, which: str, shown: bool) -> InstancePictures:
    part = parts.train if which == "train" else parts.both
    classes = parts.split.seen if which == "train" else parts.split.classes
    return found_pictures(part, picture_folders(folder), classes, data.on_bad_data, shown)


def _limited(pictures: InstancePictures, places: range | list[int], limit: int, seed: int) -> InstancePictures:
    chosen = list(places)
    if limit and len(chosen) > limit:
        order = np.random.default_rng([seed, 3]).permutation(len(chosen))[:limit]
        chosen = [chosen[place] for place in sorted(order.tolist())]
    return pictures.subset(chosen)
