"""Pictures with classes as labs use them: three splits, set aside where the data lacks one."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from labs_common.data.pictures import LabelledPictures, checked, stratified_parts
from labs_common.data.readers import read_pictures
from labs_common.data.splits import print_left_out
from labs_common.errors import LabError
from labs_common.options import ClassDataOptions

SPLITS = ("train", "validation", "test")


def read_classes(
    options: ClassDataOptions, seed: int, shown: bool, drawn: Callable[[], Path]
) -> dict[str, LabelledPictures]:
    """Training, validation and test pictures by name, every one decoded once; splits that the data lacks are set aside.

    What was left out is printed if `shown`; `drawn` gives the directory of the scenes that are read without --data.

    Raises:
        LabError: the data cannot be read, or some of it and --on-bad-data says so, or it is too small.
    """
    data = options.data or str(drawn())
    found = read_pictures(data)
    parts = {"train": found.train, "validation": found.validation, "test": found.test}
    if options.data is None:
        parts = {name: replace(part, source="drawn scenes") if part else None for name, part in parts.items()}
    splits = {name: checked(part, options.on_bad_data, shown) for name, part in parts.items() if part is not None}
    for name, share in (("test", options.test_fraction), ("validation", options.validation_fraction)):
        if name not in splits:
            kept, aside = stratified_parts(splits["train"].labels, share, seed)
            if not len(aside):
                raise LabError(f"--data {data}: {len(splits['train'])} pictures are too few for a {name} split: no "
                               "class has two")  # fmt: skip
            splits[name] = splits["train"].subset(aside)
            splits["train"] = splits["train"].subset(kept)
    if options.limit:
        splits = {name: _at_most(part, options.limit, seed) for name, part in splits.items()}
    missing = sorted(set(range(len(splits["train"].classes))) - set(splits["train"].labels.tolist()))
    if missing:
        raise LabError(f"--data {data}: no training picture of class {splits['train'].classes[missing[0]]}; take a "
                       "larger --limit or other data")  # fmt: skip
    if shown:
        print_left_out(splits)
    return {name: splits[name] for name in SPLITS}


def _at_most(pictures: LabelledPictures, limit: int, seed: int) -> LabelledPictures:
    """At most `limit` pictures, evenly over the classes, in an order that does not change."""
    generator = np.random.default_rng([seed, 1])
    shuffled = generator.permutation(len(pictures))
    turn = np.zeros(len(pictures), dtype=np.int64)  # how many of its class come before each
    for label in np.unique(pictures.labels):
        members = shuffled[pictures.labels[shuffled] == label]
        turn[members] = np.arange(len(members))
    return pictures.subset(np.sort(shuffled[np.argsort(turn[shuffled], kind="stable")[:limit]]))
