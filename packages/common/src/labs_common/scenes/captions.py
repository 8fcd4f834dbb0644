"""Captions that are true of a scene, from a small grammar; and the claims that any sentence of it makes."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from labs_common.scenes.world import BACKGROUNDS, COLOURS, SHAPES, SIZES, TEXTURES, Scene, Thing

PER_PICTURE = 5
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
RELATIONS = ("to the left of", "to the right of", "above", "below")
CLEARLY = 0.12  # share of the side by which a thing must be farther left or higher for a caption to say so
KINDS = ("objects", "colours", "textures", "sizes", "counts", "relations", "places", "background")  # of claims
GRAMMAR = "grammar"


def captions(scene: Scene, generator: np.random.Generator, count: int = PER_PICTURE) -> list[str]:
    """Writes `count` different true sentences: what is there, how many, where, and on what background."""
    chosen = list(dict.fromkeys(_sentences(scene, generator)))[:count]
    if len(chosen) < count:
        raise AssertionError(f"the grammar has only {len(chosen)} sentences for {scene}")
    return chosen


def described(thing: Thing, detail: int = 2) -> str:
    """Names a thing by its colour and shape; from detail 1 on its texture, from 2 on its size."""
    words = [thing.colour, thing.shape]
    if detail >= 1 and thing.texture != "plain":
        words.insert(0, thing.texture)
    if detail >= 2 and thing.size != "medium":
        words.insert(0, thing.size)
    return " ".join(words)


def relations(scene: Scene) -> list[tuple[Thing, str, Thing]]:
    """Returns every pair of things of which one is clearly left of, right of, above or below the other."""
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
    """Yields sentences about what is seen, relations first; then more of a simpler kind until there are enough."""
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
    """Counts each shape: "two stars and one moon"."""
    counts = Counter(thing.shape for thing in things)
    return _listed([f"{NUMBERS[number]} {several(shape, number)}" for shape, number in counts.items()])


def several(shape: str, number: int) -> str:
    """Returns the word for so many things of a shape."""
    return shape if number == 1 else shape + ("es" if shape == "cross" else "s")


def place_of(thing: Thing) -> str:
    """Says where in the picture the thing's middle is, about in thirds: "in the upper left corner"."""
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


@dataclass(frozen=True)
class Claim:
    """One thing that a sentence says of a scene.

    Attributes:
        kind: one of `KINDS`, or `GRAMMAR` for a whole sentence that cannot be read.
        said: its words.
        right: whether the scene is so.
    """

    kind: str
    said: str
    right: bool


def _any_of(words: Iterable[str]) -> str:
    return "|".join(map(re.escape, words))


# The sentences of `captions` as patterns, without commas.
_SHAPES, _COLOURS, _TEXTURES = _any_of(SHAPES), _any_of(COLOURS), _any_of(TEXTURES)
_THING = rf"an? (?:(?:small|large) )?(?:(?:{_TEXTURES}) )?(?:(?:{_COLOURS}) )?(?:{_SHAPES})"
_GROUND = rf"on an? (?P<ground>{_any_of(BACKGROUNDS)}) background"
_WHERE = (
    r"(?P<where>in the (?:upper|lower) (?:left|right) corner|on the (?:left|right)|at the (?:top|bottom)|in the middle)"
)
_NUMBERED = {
    f"{word} {several(shape, number)}": (shape, number)
    for number, word in enumerate(NUMBERS)
    if number
    for shape in SHAPES
}
_COUNT = _any_of(_NUMBERED)
_FORMS = tuple(
    re.compile(form)
    for form in (
        rf"(?P<one>{_THING}) (?P<relation>{_any_of(RELATIONS)}) (?P<other>{_THING})",
        rf"(?P<counted>(?:{_COUNT})(?: (?:and )?(?:{_COUNT}))*)",
        rf"(?P<listed>{_THING}(?: (?:and )?{_THING})*) {_GROUND}",
        rf"(?:a picture with )?(?P<placed>{_THING}) {_WHERE}",
        rf"there is (?P<there>{_THING}) {_GROUND}",
        rf"(?P<shown>{_THING}) in the picture",
        rf"an? (?P<shape>{_SHAPES}) that is (?P<colour>{_COLOURS}) and (?P<texture>{_TEXTURES})",
    )
)


def claims_of(sentence: str, scene: Scene) -> list[Claim]:
    """Returns every claim of a sentence of this grammar, each right or wrong: the inverse of `captions`.

    Commas and capitals do not count. A sentence of another form gives one claim, of kind `GRAMMAR`, that is wrong.
    A thing that is said to be there is right if one with that shape is there (objects), with that shape and colour
    (colours), and so on: each claim stands for itself. So do relations and places, which are right if they are of
    things with those shapes and colours, whatever else was said of them; relations are those of `relations`.
    """
    plain = " ".join(re.sub(r"[^\w\s]", " ", sentence.lower()).split())
    for form in _FORMS:
        if found := form.fullmatch(plain):
            return list(_claims({name: said for name, said in found.groupdict().items() if said}, scene))
    return [Claim(GRAMMAR, sentence, False)]


def _claims(parts: dict[str, str], scene: Scene) -> Iterator[Claim]:
    """Yields the claims of a sentence's parts, named as the groups of `_FORMS` are."""
    for name in ("one", "other", "placed", "there", "shown"):
        if name in parts:
            yield from _about_thing(parts[name], scene)
    if "relation" in parts:
        one, other, said = _bare(parts["one"]), _bare(parts["other"]), parts["relation"]
        right = any(how == said and _fits(a, one) and _fits(b, other) for a, how, b in relations(scene))
        yield Claim("relations", f"{one} {said} {other}", right)
    if "counted" in parts:
        there = Counter(thing.shape for thing in scene.things)
        for words in re.findall(_COUNT, parts["counted"]):
            shape, number = _NUMBERED[words]
            yield Claim("objects", shape, there[shape] > 0)
            yield Claim("counts", words, there[shape] == number)
    if "listed" in parts:
        for words, number in Counter(re.findall(_THING, parts["listed"])).items():
            yield from _about_thing(words, scene)
            if number > 1:
                enough = sum(_fits(thing, words) for thing in scene.things) >= number
                yield Claim("counts", f"{number} × {words}", enough)
    if "where" in parts:
        said, where = _bare(parts["placed"]), parts["where"]
        right = any(_fits(thing, said) and place_of(thing) == where for thing in scene.things)
        yield Claim("places", f"{said} {where}", right)
    if "ground" in parts:
        yield Claim("background", parts["ground"], parts["ground"] == scene.background)
    if "shape" in parts:
        yield from _about_thing(f"a {parts['texture']} {parts['colour']} {parts['shape']}", scene)


def _about_thing(words: str, scene: Scene) -> Iterator[Claim]:
    """Yields the claims of "a large striped red star": its shape, then each further word together with those before."""
    *said, known = words.split()[1:]
    yield Claim("objects", known, any(_fits(thing, f"a {known}") for thing in scene.things))
    for kind, words_of_kind in (("colours", COLOURS), ("textures", TEXTURES), ("sizes", SIZES)):
        for word in said:
            if word in words_of_kind:
                known = f"{word} {known}"
                yield Claim(kind, known, any(_fits(thing, f"a {known}") for thing in scene.things))


def _bare(words: str) -> str:
    """Leaves out texture and size: a red star."""
    return " ".join(["a", *(word for word in words.split()[1:] if word in SHAPES or word in COLOURS)])


def _fits(thing: Thing, words: str) -> bool:
    """Says whether all that the words say is true of the thing."""
    return set(words.split()[1:]) <= {thing.shape, thing.colour, thing.texture, thing.size}
