"""Which classes are seen in training and which are not: the published splits, that of drawn scenes, and any file."""

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from labs_common.errors import LabError
from labs_common.scenes import SHAPES, TEXTURES
from zsi_contrastive.detector.config import PUBLISHED, SCENES

KEPT_BACK = 4  # of the pairings of texture and shape, one in so many is unseen


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
    """A split by name, or from a JSON file with the lists `seen` and `unseen`.

    Raises:
        LabError: there is no such split, or the file is not one.
    """
    if name == SCENES:
        return scenes_split()
    if name in PUBLISHED:
        found = json.loads(
            files("zsi_contrastive.detector").joinpath("classes", f"{name}.json").read_text(encoding="utf-8")
        )
        return Split(name, tuple(found["seen"]), tuple(found["unseen"]))
    path = Path(name)
    if not path.is_file():
        raise LabError(f"--split {name}: no such file; take {', '.join(PUBLISHED)}, {SCENES}, or a JSON file with the "
                       'lists "seen" and "unseen"')  # fmt: skip
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        lists = [found["seen"], found["unseen"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LabError(f'--split {name}: is not JSON with the lists "seen" and "unseen" ({error})') from error
    for part in lists:
        if not isinstance(part, list) or not part or not all(isinstance(word, str) and word for word in part):
            raise LabError(f'--split {name}: "seen" and "unseen" must be lists of names of classes, none of them empty')
    every = [*lists[0], *lists[1]]
    if twice := sorted({word for word in every if every.count(word) > 1}):
        raise LabError(f"--split {name}: names {', '.join(twice)} twice")
    return Split(path.stem, tuple(lists[0]), tuple(lists[1]))


def scenes_split() -> Split:
    """Pairings of a texture with a shape: every texture and every shape is seen, a quarter of the pairings is not."""
    seen: list[str] = []
    unseen: list[str] = []
    for row, shape in enumerate(SHAPES):
        for column, texture in enumerate(TEXTURES):
            part = unseen if (row + column) % KEPT_BACK == 0 else seen
            part.append(f"{texture} {shape}")
    return Split(SCENES, tuple(seen), tuple(unseen))


@cache
def coco_groups() -> dict[str, tuple[str, ...]]:
    """The 80 classes of COCO by supercategory; in this order they are in the order of their ids."""
    text = files("zsi_contrastive.detector").joinpath("classes", "coco.json").read_text(encoding="utf-8")
    return {group: tuple(names) for group, names in json.loads(text)["groups"].items()}
