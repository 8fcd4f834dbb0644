"""Checks which column of a matrix is which class: the order has to be right, and nothing in the file says what it is.

Related things have similar vectors. If the columns stand in the order of the split, classes of one supercategory of
COCO are closer to each other than to the rest; in a wrong order they are not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from labs_common.errors import LabError
from zsi_contrastive.detector.annotations import Split, coco_groups

SHUFFLES = 500  # enough that their standard deviation is known to 3 %
FEW = 10  # with fewer known classes hardly two share a supercategory
# Deviations above shuffled columns from which an order is believed: the published matrices have 25 and 28 in their own
# order, and chance gives 4 once in 30,000 times.
SURE = 4.0
# An order that fits less than this share of another's excess is not the right one: 48/17 by COCO's ids has 7 of 25.
CLEARLY = 0.75


@dataclass(frozen=True)
class OrderCheck:
    """The outcome of a check of how well an order of columns fits the classes' names.

    Attributes:
        excess: how many standard deviations the mean cosine within supercategories lies above that of shuffles.
        others: the same for other orders that the columns might have.
        known: how many of the classes are COCO's; with few of them nothing can be said.
    """

    excess: float
    others: dict[str, float]
    known: int

    @property
    def verdict(self) -> str:
        """Says in a sentence how well the columns fit."""
        if self.known < FEW:
            return f"the order of the columns cannot be checked: {self.known} of the classes are COCO's"
        others = ", ".join(f"{name} {value:.1f}" for name, value in self.others.items())
        return (
            f"the columns fit the names of their classes: related ones are {self.excess:.1f} standard deviations more "
            f"alike than in shuffled columns ({others})"
        )


def checked_order(vectors: torch.Tensor, split: Split, source: str) -> OrderCheck:
    """Compares the columns (classes, d) as they are named with other orders that they might have, and with shuffles.

    Raises:
        LabError: the columns do not stand in the order of the split.
    """
    names = split.classes
    given = _excess(vectors, names)
    known = sum(name in _groups() for name in names)
    if known < FEW:
        return OrderCheck(0.0, {}, known)
    ids = [name for group in coco_groups().values() for name in group]
    place = {name: number for number, name in enumerate(ids)}
    by_id = [
        name for part in (split.seen, split.unseen) for name in sorted(part, key=lambda name: place.get(name, len(ids)))
    ]
    others = {
        "in the order of COCO's category ids": _excess(vectors, by_id),
        "one column earlier": _excess(vectors, (*names[1:], names[0])),
        "one column later": _excess(vectors, (names[-1], *names[:-1])),
    }
    likely = max(others, key=lambda name: others[name])
    if given < CLEARLY * others[likely] and others[likely] > SURE:
        raise LabError(
            f"--word-vectors {source}: the columns do not stand in the order of the split {split.name} but {likely} "
            f"(related classes are {given:.1f} against {others[likely]:.1f} deviations more alike than shuffled ones); "
            "give a split file with the classes in that order"
        )
    if given < SURE:
        raise LabError(
            f"--word-vectors {source}: the columns do not fit the classes of the split {split.name} in its order: "
            f"related classes are no more alike than shuffled ones ({given:.1f} deviations); give a split file with "
            "the classes in the order of the columns"
        )
    return OrderCheck(given, others, known)


def neighbours(vectors: torch.Tensor, names: Sequence[str], count: int = 3) -> list[list[tuple[str, float]]]:
    """Finds the most similar others of each class (classes, d), with their cosines."""
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    cosines = (unit @ unit.T).fill_diagonal_(-2)  # less than any cosine: none is its own neighbour
    best, places = cosines.topk(min(count, len(names) - 1), dim=1)
    return [
        [(names[place], float(value)) for place, value in zip(row, values, strict=True)]
        for row, values in zip(places.tolist(), best.tolist(), strict=True)
    ]


@cache
def _groups() -> dict[str, str]:
    return {name: group for group, names in coco_groups().items() for name in names}


def _excess(vectors: torch.Tensor, names: Sequence[str]) -> float:
    """Counts by how many standard deviations of shuffles vectors of one supercategory are more alike, so named."""
    places = [place for place, name in enumerate(names) if name in _groups()]
    groups = [_groups()[names[place]] for place in places]
    unit = vectors[places] / vectors[places].norm(dim=1, keepdim=True)
    cosines = unit @ unit.T
    together = torch.tensor([[one == other for other in groups] for one in groups], dtype=torch.bool)
    together = together.reshape(len(groups), len(groups)).fill_diagonal_(False)
    if not together.any():
        return 0.0
    generator = torch.Generator().manual_seed(0)
    shuffled = []
    for _ in range(SHUFFLES):
        order = torch.randperm(len(groups), generator=generator)
        shuffled.append(cosines[order][:, order][together].mean())
    spread = torch.stack(shuffled)
    return float((cosines[together].mean() - spread.mean()) / spread.std())


def check_lengths(vectors: torch.Tensor, source: str, names: Sequence[str]) -> None:
    """Makes sure that each class's vector (classes, d) says something.

    Raises:
        LabError: one has no length, or is not finite.
    """
    for name, length in zip(names, vectors.norm(dim=1).tolist(), strict=True):
        if not 0 < length < float("inf"):
            raise LabError(f"--word-vectors {source}: the vector of {name} has the length {length}; mend it")
