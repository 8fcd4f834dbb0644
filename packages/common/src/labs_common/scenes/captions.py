"""Sentences that are true of a scene, from a small grammar."""

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from labs_common.scenes.world import Scene, Thing

PER_PICTURE = 5
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
RELATIONS = ("to the left of", "to the right of", "above", "below")
CLEARLY = 0.12  # how much farther left or higher a thing must be for the caption to say so


def captions(scene: Scene, generator: np.random.Generator, count: int = PER_PICTURE) -> list[str]:
    """`count` different true sentences about the scene: what is there, how many, where, and on what background."""
    found = dict.fromkeys(_sentences(scene, generator))
    chosen = list(found)[:count]
    if len(chosen) < count:
        raise AssertionError(f"the grammar has only {len(chosen)} sentences for {scene}")
    return chosen


def described(thing: Thing, detail: int = 2) -> str:
    """The words for a thing: its colour and shape; from detail 1 on its texture, from 2 on its size."""
    words = [thing.colour, thing.shape]
    if detail >= 1 and thing.texture != "plain":
        words.insert(0, thing.texture)
    if detail >= 2 and thing.size != "medium":
        words.insert(0, thing.size)
    return " ".join(words)


def relations(scene: Scene) -> list[tuple[Thing, str, Thing]]:
    """Every pair of things of which one is clearly to the left of, to the right of, above or below the other."""
    found = []
    for one in scene.things:
        for other in scene.things:
            across, down = other.x - one.x, other.y - one.y
            if across > CLEARLY and across > abs(down):
                found += [(one, "to the left of", other), (other, "to the right of", one)]
            if down > CLEARLY and down > abs(across):
                found += [(one, "above", other), (other, "below", one)]
    return found


def _sentences(scene: Scene, generator: np.random.Generator) -> Iterator[str]:
    """Sentences about what is seen, relations first; then more of a simpler kind until there are enough."""
    things, ground = list(scene.things), f"on a {scene.background} background"
    pairs = [pair for pair in relations(scene) if described(pair[0]) != described(pair[2])]
    for place in generator.permutation(len(pairs))[:2]:
        one, relation, other = pairs[place]
        yield f"{_a(described(one))} {relation} {_a(described(other))}"
    yield _counted(things)
    order = [things[place] for place in generator.permutation(len(things))]
    yield f"{_listed([_a(described(thing, 0)) for thing in order])} {ground}"
    main = max(things, key=lambda thing: thing.radius)
    yield f"{_a(described(main))} {place_of(main)}"
    for thing in order:
        yield f"there is {_a(described(thing))} {ground}"
        yield f"{_a(described(thing, 1))} in the picture"
        yield f"a picture with {_a(described(thing, 0))} {place_of(thing)}"
        yield f"{_a(thing.shape)} that is {thing.colour} and {thing.texture}"


def _counted(things: Sequence[Thing]) -> str:
    """How many of each shape, such as "two stars and one moon"."""
    counts = Counter(thing.shape for thing in things)
    parts = [f"{NUMBERS[number]} {several(shape, number)}" for shape, number in counts.items()]
    return _listed(parts)


def several(shape: str, number: int) -> str:
    """The word for so many things of a shape."""
    return shape if number == 1 else shape + ("es" if shape == "cross" else "s")


def place_of(thing: Thing) -> str:
    """Where in the picture the thing's middle is, in thirds: "in the upper left corner"."""
    across = "left" if thing.x < 0.38 else "right" if thing.x > 0.62 else ""
    down = "upper" if thing.y < 0.38 else "lower" if thing.y > 0.62 else ""
    if across and down:
        return f"in the {down} {across} corner"
    if across:
        return f"on the {across}"
    return {"upper": "at the top", "lower": "at the bottom", "": "in the middle"}[down]


def _a(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
