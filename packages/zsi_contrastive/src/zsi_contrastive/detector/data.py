"""Pictures, classes and vectors as training takes them: COCO's, or drawn scenes in COCO's format; and their batches."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from labs_common.cache import cached_directory
from labs_common.data.images import decoding_threads, print_refused
from labs_common.errors import LabError
from labs_common.progress import console
from labs_common.scenes.files import write_coco
from labs_common.scenes.world import Scene, Thing
from labs_common.steps import own_part
from zsi_contrastive.detector.annotations import (
    Instances,
    Split,
    ZeroShotParts,
    read_instances,
    read_split,
    scenes_split,
    zero_shot_parts,
)
from zsi_contrastive.detector.columns import checked_order
from zsi_contrastive.detector.config import DataOptions
from zsi_contrastive.detector.heads import Samples, Target
from zsi_contrastive.detector.options import WordOptions
from zsi_contrastive.detector.pictures import InstancePictures, Packed, found_pictures, levels_of, mirrored, packed
from zsi_contrastive.detector.vectors import ClassVectors, read_class_vectors

SIDE = 96  # of drawn scenes, in pixels
# Of these about 1,600 show no unseen pairing, and 400 of the second show one; so few that training takes minutes.
DRAWN = {"train": range(3500), "val": range(100_000, 100_740)}
SEED = 0  # of the drawn scenes: the same ones for every run
Made = TypeVar("Made")
KEPT_BYTES = 2**29  # training data that is smaller stays in memory once it is decoded


@dataclass(frozen=True)
class ZeroShotData:
    """All that is read.

    Attributes:
        split: the classes.
        pictures: `train` with seen objects; `validation` and `test` with both kinds.
        vectors: of the classes.
        counts: of the whole parts, before any limit: see `ZeroShotParts.counts`.
        protocol: the rule by which they were made.
    """

    split: Split
    pictures: dict[str, InstancePictures]
    vectors: ClassVectors
    counts: list[tuple[str, int, int, int]]
    protocol: str


def from_main_process(accelerator: Accelerator, make: Callable[[], Made]) -> Made:
    """Returns in every process what `make` makes in the main one: what was read and checked there, for instance.

    Raises:
        LabError: in all processes, if `make` does.
    """
    outcome: list[Made | LabError | None] = [None]
    if accelerator.is_main_process:
        try:
            outcome = [make()]
        except LabError as error:
            outcome = [error]
    (made,) = broadcast_object_list(outcome)
    if isinstance(made, LabError):
        raise made
    return made


def read_data(data: DataOptions, words: WordOptions, seed: int, shown: bool) -> ZeroShotData:
    """Reads a completed config's pictures and vectors, and checks that they fit together.

    With `shown`, progress, what is left out and notes on the vectors are printed.

    Raises:
        LabError: something cannot be read, or does not fit.
    """
    split = read_split(data.split)
    vectors = read_vectors(words, split, shown)
    pictures, counts = read_pictures(data, split, seed, shown)
    if shown:
        print_refused({name: pictures[name] for name in ("train", "test")})
    return ZeroShotData(split, pictures, vectors, counts, data.protocol)


def read_pictures(
    data: DataOptions, split: Split, seed: int, shown: bool, training: bool = True
) -> tuple[dict[str, InstancePictures], list[tuple[str, int, int, int]]]:
    """Reads training, validation and test pictures, each decoded once, and counts the whole parts.

    Without `training` those of it, which are many, are not looked at.

    Raises:
        LabError: something cannot be read.
    """
    parts, folder = read_parts(data, split)
    folders = picture_folders(folder)
    both = found_pictures(parts.both.in_memory(), folders, split.classes, data.on_bad_data, shown)
    order = np.random.default_rng([seed, 1]).permutation(len(both))
    first = round(data.validation_fraction * len(both))
    pictures = {"validation": both.subset(np.sort(order[:first])), "test": both.subset(np.sort(order[first:]))}
    if training:
        train = found_pictures(parts.train, folders, split.seen, data.on_bad_data, shown)
        pictures = {"train": train, **pictures}
    if data.limit:
        pictures = {name: part.at_most(data.limit, seed) for name, part in pictures.items()}
    return pictures, parts.counts()


def read_vectors(words: WordOptions, split: Split, shown: bool, like: ClassVectors | None = None) -> ClassVectors:
    """Reads the classes' vectors and prints notes on them; a matrix's columns are checked against the names.

    Raises:
        LabError: they cannot be read, or stand in another order.
    """
    vectors = read_class_vectors(words.word_vectors, split, like)
    if vectors.by_column and words.columns == "check":
        verdict = checked_order(vectors.classes, split, words.word_vectors).verdict
        vectors = replace(vectors, notes=(*vectors.notes, verdict))
    for note in vectors.notes if shown else ():
        console.print(f"{words.word_vectors}: {note}")
    return vectors


def read_parts(data: DataOptions, split: Split) -> tuple[ZeroShotParts, Path]:
    """Reads the training and test parts of the data, and says in which directory they are.

    Raises:
        LabError: a file is missing, or not what it should be.
    """
    train, test = read_file(data, "train"), read_file(data, "val")
    return zero_shot_parts(train, test, split, data.protocol), data.data or drawn_scenes()


def read_file(data: DataOptions, name: str) -> Instances:
    """Reads the whole file of the data that is called train or val.

    Raises:
        LabError: it is missing, or not what it should be.
    """
    folder = data.data or drawn_scenes()
    if not folder.is_dir():
        raise LabError(f"--data {folder}: no such directory")
    asked, said = (data.train_annotations, "training") if name == "train" else (data.test_annotations, "test")
    found = read_instances(asked or instances_file(folder, name), data.on_bad_data)
    # Drawn scenes: not where this machine keeps its cache.
    return found if data.data is not None else replace(found, source=f"drawn scenes, {said}")


def instances_file(folder: Path, name: str) -> Path:
    """Finds `annotations/instances_NAME….json` under a directory of COCO.

    Raises:
        LabError: there is none, or more than one.
    """
    found = sorted((folder / "annotations").glob(f"instances_{name}*.json"))
    if len(found) != 1:
        said = "holds no" if not found else f"holds {len(found)} files"
        option = "--train-annotations" if name == "train" else "--test-annotations"
        raise LabError(f"--data {folder}: {said} annotations/instances_{name}*.json; name one with {option}")
    return found[0]


def drawn_scenes() -> Path:
    """Returns the directory of the drawn scenes, which are made on first use."""
    split = scenes_split()

    def shows_unseen(scene: Scene) -> bool:
        return any(category(thing) in split.unseen for thing in scene.things)

    def write(folder: Path) -> None:
        console.print("drawing scenes (once)")
        for name, wanted in (("train", lambda scene: not shows_unseen(scene)), ("val", shows_unseen)):
            write_coco(folder, {name: DRAWN[name]}, SEED, SIDE, category, split.classes, wanted)

    recipe = {"what": "zsi scenes", "side": SIDE, "seed": SEED, **{name: str(part) for name, part in DRAWN.items()}}
    return cached_directory("zsi-scenes", recipe, write)


def category(thing: Thing) -> str:
    """Names the class of a drawn thing."""
    return f"{thing.texture} {thing.shape}"


def picture_folders(folder: Path) -> list[Path]:
    """Lists the directories in which pictures may lie, under a directory of COCO."""
    inner = [path for parent in (folder, folder / "images") if parent.is_dir() for path in sorted(parent.iterdir())]
    return [folder, *(path for path in inner if path.is_dir() and path.name != "annotations")]


@dataclass(frozen=True)
class Batch:
    """A process's part of an optimizer step.

    Attributes:
        content: for each picture its labels, boxes, masks and levels (3, height, width) of 0 to 255.
        count: pictures.
        share: what the mean loss is multiplied by, so that the step's loss is the mean over all processes' pictures.
    """

    content: Packed
    count: int
    share: float

    def to(self, device: torch.device) -> Samples:
        """Copies it to a device."""
        tensors = self.content.to(device)
        labels, boxes, masks, levels = (
            tensors[first : first + self.count] for first in range(0, len(tensors), self.count)
        )
        targets = [
            {"boxes": box, "labels": label, "masks": mask}
            for box, label, mask in zip(boxes, labels, masks, strict=True)
        ]
        return Samples([level.float() / 255 for level in levels], targets)


class PictureBatches:
    """Makes the micro-batches of `labs_common.steps.ShuffledSteps`: decoded, and mirrored by chance.

    Pictures that fit into memory together are decoded once.
    """

    def __init__(
        self, pictures: InstancePictures, at_once: int, flip: bool, seed: int, rank: int = 0, processes: int = 1
    ) -> None:
        """Takes `at_once` pictures into a micro-batch, 0 for a process's whole part of a step."""
        self.pictures, self.at_once, self.flip, self.seed = pictures, at_once, flip, seed
        self.rank, self.processes = rank, processes
        objects = Counter(pictures.part.rows.image_ids.tolist())
        # Bytes: three colours and a mask for each object, of every pixel.
        size = sum(row["width"] * row["height"] * (3 + objects[row["id"]]) for row in pictures.part.images)
        self._kept: dict[int, tuple[torch.Tensor, Target]] | None = {} if size < KEPT_BYTES else None
        self._mirrored: dict[int, np.ndarray] = {}  # of the present epoch: which pictures

    def __call__(self, places: list[int], epoch: int, step: int) -> list[Batch]:
        """Returns this process's micro-batches of the step with these pictures."""
        mine, share = own_part(places, self.rank, self.processes)
        size = self.at_once or len(mine)
        parts = [mine[first : first + size] for first in range(0, len(mine), size)]
        return [self._batch(part, self._turned(epoch), share * len(part) / len(mine)) for part in parts]

    def _turned(self, epoch: int) -> np.ndarray:
        """Draws the pictures that are mirrored in this epoch, after its order and by the same generator."""
        if epoch not in self._mirrored:
            generator = np.random.default_rng([self.seed, epoch])
            generator.permutation(len(self.pictures))
            self._mirrored = {epoch: generator.random(len(self.pictures)) < (0.5 if self.flip else 0.0)}
        return self._mirrored[epoch]

    def _batch(self, places: Sequence[int], turned: np.ndarray, share: float) -> Batch:
        def one(place: int) -> tuple[torch.Tensor, Target]:
            levels, target = self._read(place)
            return mirrored(levels, target) if turned[place] else (levels, target)

        levels, targets = zip(*decoding_threads().map(one, places), strict=True)
        # The largest elements first: see `packed`.
        content = [target[name] for name in ("labels", "boxes", "masks") for target in targets]
        return Batch(packed([*content, *levels]), len(places), share)

    def _read(self, place: int) -> tuple[torch.Tensor, Target]:
        """Reads a picture's levels (3, height, width) of 0 to 255 and its objects; only once if all fit into memory."""
        if self._kept is not None and place in self._kept:
            return self._kept[place]
        found = levels_of(self.pictures.image(place)), self.pictures.target(place)
        if self._kept is not None:
            self._kept[place] = found
        return found
