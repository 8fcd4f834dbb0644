"""Sentences that are true of a scene, from a small grammar."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from labs_common.scenes.world import BACKGROUNDS, COLOURS, SHAPES, TEXTURES, Scene, Thing

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


KINDS = ("objects", "colours", "textures", "sizes", "counts", "relations", "places", "background")
GRAMMAR = "grammar"


@dataclass(frozen=True)
class Claim:
    """One thing that a sentence says.

    Attributes:
        kind: one of `KINDS`, or `GRAMMAR` for a whole sentence that cannot be read.
        said: its words.
        right: whether the scene is so.
    """

    kind: str
    said: str
    right: bool


def _one_of(words: "list[str] | tuple[str, ...]") -> str:
    return "|".join(map(re.escape, words))


_SHAPES, _COLOURS, _TEXTURES = _one_of(tuple(SHAPES)), _one_of(tuple(COLOURS)), _one_of(TEXTURES)
_THING = rf"an? (?:(?:small|large) )?(?:(?:{_TEXTURES}) )?(?:(?:{_COLOURS}) )?(?:{_SHAPES})"
_GROUND = rf"on an? (?P<ground>{_one_of(tuple(BACKGROUNDS))}) background"
_WHERE = (
    r"(?P<where>in the (?:upper|lower) (?:left|right) corner|on the (?:left|right)|at the (?:top|bottom)|in the middle)"
)
_NUMBERED = {f"{word} {several(shape, number)}": (shape, number)
             for number, word in enumerate(NUMBERS) if number for shape in SHAPES}  # fmt: skip
_FORMS = tuple(
    re.compile(form)
    for form in (
        rf"(?P<one>{_THING}) (?P<relation>{_one_of(RELATIONS)}) (?P<other>{_THING})",
        rf"(?P<counted>(?:{_one_of(tuple(_NUMBERED))})(?: (?:and )?(?:{_one_of(tuple(_NUMBERED))}))*)",
        rf"(?P<listed>{_THING}(?: (?:and )?{_THING})*) {_GROUND}",
        rf"(?:a picture with )?(?P<placed>{_THING}) {_WHERE}",
        rf"there is (?P<there>{_THING}) {_GROUND}",
        rf"(?P<shown>{_THING}) in the picture",
        rf"an? (?P<shape>{_SHAPES}) that is (?P<colour>{_COLOURS}) and (?P<texture>{_TEXTURES})",
    )
)


def claims_of(sentence: str, scene: Scene) -> list[Claim]:
    """Every claim of the sentence, judged; one of kind `GRAMMAR` that is wrong if it cannot be read.

    A thing that is said to be there is right if one with that shape is there (objects), with that shape and colour
    (colours), and so on: each claim stands for itself. So do relations and places, which are right if they are of
    things with those shapes and colours, whatever else was said of them; relations are those of
    `labs_common.scenes.captions.relations`.
    """
    plain = " ".join(re.sub(r"[^\w\s]", " ", sentence.lower()).split())
    for form in _FORMS:
        if found := form.fullmatch(plain):
            return list(_judged(found, scene))
    return [Claim(GRAMMAR, sentence, False)]


def _judged(found: re.Match[str], scene: Scene) -> Iterator[Claim]:
    part = found.groupdict()
    for name in ("one", "other", "placed", "there", "shown"):
        if part.get(name):
            yield from _about_thing(part[name], scene)
    if part.get("relation"):
        one, other, said = _bare(part["one"]), _bare(part["other"]), part["relation"]
        right = any(
            how == said and _fits(first, one) and _fits(second, other) for first, how, second in relations(scene)
        )
        yield Claim("relations", f"{one} {said} {other}", right)
    if part.get("counted"):
        there = Counter(thing.shape for thing in scene.things)
        for words in re.findall(_one_of(tuple(_NUMBERED)), part["counted"]):
            shape, number = _NUMBERED[words]
            yield Claim("objects", shape, there[shape] > 0)
            yield Claim("counts", words, there[shape] == number)
    if part.get("listed"):
        for words, number in Counter(re.findall(_THING, part["listed"])).items():
            yield from _about_thing(words, scene)
            if number > 1:
                enough = sum(_fits(thing, words) for thing in scene.things) >= number
                yield Claim("counts", f"{number} × {words}", enough)
    if part.get("where"):
        thing, where = _bare(part["placed"]), part["where"]
        yield Claim("places", f"{thing} {where}", any(_fits(t, thing) and place_of(t) == where for t in scene.things))
    if part.get("ground"):
        yield Claim("background", part["ground"], part["ground"] == scene.background)
    if part.get("shape"):
        yield from _about_thing(f"a {part['texture']} {part['colour']} {part['shape']}", scene)


def _about_thing(words: str, scene: Scene) -> Iterator[Claim]:
    """Claims of "a large striped red star": its shape, then each further word together with all of those."""
    *said, shape = words.split()[1:]
    yield Claim("objects", shape, any(_fits(thing, f"a {shape}") for thing in scene.things))
    kinds = (("colours", COLOURS), ("textures", TEXTURES), ("sizes", ("small", "large")))
    known = shape
    for kind, words_of_kind in kinds:
        for word in said:
            if word in words_of_kind:
                known = f"{word} {known}"
                yield Claim(kind, known, any(_fits(thing, f"a {known}") for thing in scene.things))


def _bare(words: str) -> str:
    """Without texture and size: a red star."""
    return " ".join(["a", *(word for word in words.split()[1:] if word in SHAPES or word in COLOURS)])


def _fits(thing: Thing, words: str) -> bool:
    """Whether all that the words say is true of the thing."""
    return set(words.split()[1:]) <= {thing.shape, thing.colour, thing.texture, thing.size}
