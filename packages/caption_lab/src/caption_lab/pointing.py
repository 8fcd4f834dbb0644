"""Tells whether attention is right: on drawn scenes it is known where the things are that a word names."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from labs_common.scenes.captions import NUMBERS, RELATIONS, several
from labs_common.scenes.world import COLOURS, SHAPES, SIZES, TEXTURES, Scene, Thing

FINE = 8  # points across a place at which it is looked whether a thing is there: a thing is several wide
BEGIN = {"a", "an", *NUMBERS}  # of the name of a thing
PLURAL = {several(shape, 2): shape for shape in SHAPES}
KIND_OF = {
    word: kind
    for kind, words in (("objects", SHAPES), ("colours", COLOURS), ("textures", TEXTURES), ("sizes", SIZES))
    for word in words
}


class Pointing(NamedTuple):
    """Scores of the maps of a kind of words; all but the first are means over the words.

    Attributes:
        words: how many there are.
        hits: share of the words whose map has its maximum at a place that a named thing touches (the pointing game of
            Zhang et al. 2016).
        mass: share of the map on such places.
        others: share of hits with the map of a word of the same kind in another picture.
        chance: share of such places among all.
    """

    words: int
    hits: float
    mass: float
    others: float
    chance: float


def named_things(words: Sequence[str], scene: Scene) -> list[tuple[int, str, list[Thing]]]:
    """Finds the words of a caption that name things: the word's place, its kind, and the things.

    A word of "a large red star" names all things to which the whole name fits, the words of a relation those of both
    names. Words whose name fits nothing are left out: the caption is wrong there, and nobody knows what is meant.
    """
    plain = [word.lower() for word in words]
    begins = [place for place, word in enumerate(plain) if word in BEGIN]
    found: list[tuple[int, str, list[Thing]]] = []
    before, relation = list[Thing](), range(0)
    for begin, end in zip(begins, [*begins, len(plain)][1:], strict=True):
        said = {place: PLURAL.get(plain[place], plain[place]) for place in range(begin, end)}
        looks = {place: word for place, word in said.items() if word in KIND_OF}
        name = set(looks.values())
        things = [one for one in scene.things if name <= {one.shape, one.colour, one.texture, one.size}]
        if not name & set(SHAPES):  # a background
            things = []
        if before and things:
            found += [(place, "relations", before + things) for place in relation]
        found += [(place, KIND_OF[word], things) for place, word in looks.items() if things]
        relation = range(max(looks, default=begin) + 1, end)
        before = things if " ".join(plain[place] for place in relation) in RELATIONS else []
    return found


def touched(things: Sequence[Thing], side: int) -> np.ndarray:
    """Returns true for the places (rows, columns) of a grid of `side` × `side` that the things' outlines touch."""
    canvas = Image.new("1", (side * FINE, side * FINE))
    for thing in things:
        ImageDraw.Draw(canvas).polygon([tuple(corner) for corner in thing.outline(side * FINE).tolist()], fill=1)
    return np.asarray(canvas).reshape(side, FINE, side, FINE).max((1, 3))


def pointing(maps: Sequence[tuple[Sequence[str], np.ndarray]], scenes: Sequence[Scene]) -> Mapping[str, Pointing]:
    """Judges the words and maps (words, rows, columns) of each caption, by kind of word."""
    by_kind: dict[str, list[tuple[int, np.ndarray, np.ndarray]]] = {}
    for number, ((words, attention), scene) in enumerate(zip(maps, scenes, strict=True)):
        for place, kind, things in named_things(words, scene):
            where = touched(things, attention.shape[-1])
            by_kind.setdefault(kind, []).append((number, attention[place], where))
    found = {}
    for kind, judged in by_kind.items():
        hits, mass, others, chance = [], [], [], []
        for turn, (number, attention, where) in enumerate(judged):
            hits.append(where.flat[attention.argmax()])
            mass.append(attention[where].sum() / attention.sum())
            chance.append(where.mean())
            # The next one of another picture; the last ones' is among the first.
            other = next((map_ for of, map_, _ in judged[turn:] + judged[:turn] if of != number), None)
            others += [] if other is None else [where.flat[other.argmax()]]
        shares = (float(np.mean(part)) if part else 0.0 for part in (hits, mass, others, chance))
        found[kind] = Pointing(len(judged), *shares)
    return found
