"""Pictures with classes: the drawn ones, their features from a frozen model, computed once, and the audit of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from clip_lab.data import COLOURS, RADII, SHAPES
from clip_lab.encoder import Encoder
from labs_common.cache import cached_directory, path_name
from labs_common.data import LabelledPictures
from labs_common.data.classes import read_classes
from labs_common.data.images import decoding_threads
from labs_common.features import ComputedRows, Rows, cached_rows
from labs_common.options import ClassDataOptions
from labs_common.progress import console, tracked
from labs_common.scenes import picture, random_scene, scene_generator
from labs_common.scenes.files import encoded

DEMO_SIDE = 32
DEMO_COUNTS = {"train": 40, "validation": 20, "test": 40}  # of each class
AT_ONCE = 256


def read_splits(options: ClassDataOptions, seed: int) -> dict[str, LabelledPictures]:
    """The splits of --data, or drawn things to be named by colour and shape; see `read_classes`."""
    return read_classes(options, seed, True, drawn_things)


def drawn_things() -> Path:
    """A folder per split, in it one per class, of pictures of one thing each; made now if never before."""
    names = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]

    def make(folder: Path) -> None:
        console.print(f"drawing {len(names) * sum(DEMO_COUNTS.values())} things to be named")
        number = 0
        for split, count in DEMO_COUNTS.items():
            for name in names:
                (folder / split / name).mkdir(parents=True)
                colour, shape = name.split()
                for _ in range(count):
                    number += 1
                    scene = random_scene(scene_generator(2, number), 1, (RADII,), [(shape, colour, "plain")])
                    (folder / split / name / f"{number:05d}.png").write_bytes(encoded(picture(scene, DEMO_SIDE)))

    return cached_directory(
        "clip-things", {"names": names, "counts": DEMO_COUNTS, "side": DEMO_SIDE, "format": 1}, make
    )


@dataclass(frozen=True)
class Features:
    """What a frozen model makes of a split: (pictures, width), with labels (pictures,), on the CPU."""

    values: torch.Tensor
    labels: torch.Tensor

    def to(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Both on a device."""
        return self.values.to(device), self.labels.to(device)

    def few(self, count: int, seed: int) -> "Features":
        """`count` pictures of each class by chance, or all of a class that has no more."""
        generator = np.random.default_rng([seed, count])
        places: list[int] = []
        for label in torch.unique(self.labels).tolist():
            members = np.flatnonzero(self.labels.numpy() == label)
            places += generator.permutation(members)[:count].tolist()
        return Features(self.values[sorted(places)], self.labels[sorted(places)])


def features_of(
    encoder: Encoder, splits: dict[str, LabelledPictures], what: str, batch_size: int, cache: bool
) -> dict[str, Features]:
    """Every split's features, `tower` or `embedding`, in bfloat16 on disk, each picture computed once.

    Raises:
        LabError: the model has no embeddings, or the cache's disk is full or broken.
    """
    return {name: _split_features(name, encoder, part, what, batch_size, cache) for name, part in splits.items()}


def _split_features(
    name: str, encoder: Encoder, pictures: LabelledPictures, what: str, batch_size: int, cache: bool
) -> Features:
    @torch.no_grad()
    def compute(_: int, places: Sequence[int]) -> torch.Tensor:
        parts = []
        for first in range(0, len(places), batch_size):
            at = places[first : first + batch_size]
            seen = list(decoding_threads().map(lambda place: encoder.view(pictures.image(place)), at))
            parts.append(_output(encoder, torch.stack(seen), what))
        return torch.cat(parts)

    recipe = encoder.recipe() | {"pictures": pictures.fingerprint(), "what": what}
    rows: Rows
    if cache:
        width = compute(0, [0]).shape[1]
        rows = cached_rows(f"{path_name(encoder.name)}-{name}", recipe, len(pictures), 1, width, "bf16", compute)
    else:
        rows = ComputedRows(compute, "bf16")
    starts = range(0, len(pictures), AT_ONCE)
    parts = [rows.rows(0, range(first, min(first + AT_ONCE, len(pictures)))).float().cpu()
             for first in tracked(starts, f"features of the {name} pictures", len(starts), not cache)]  # fmt: skip
    return Features(torch.cat(parts), torch.from_numpy(pictures.labels))


def _output(encoder: Encoder, pictures: torch.Tensor, what: str) -> torch.Tensor:
    """What a probe reads of pictures, on the CPU."""
    if what == "embedding":
        return encoder.embedded(pictures)
    return encoder.features(pictures.to(encoder.device)).float().cpu()
