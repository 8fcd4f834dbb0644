"""What a sentence claims about a scene, and which of it is true: the inverse of `labs_common.scenes.captions`.

Reads the sentences of that grammar with or without their commas and capitals; a sentence of another form claims nothing
that could be checked, and is said to be none of the grammar.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from labs_common.scenes.captions import NUMBERS, RELATIONS, place_of, relations, several
from labs_common.scenes.world import BACKGROUNDS, COLOURS, SHAPES, TEXTURES, Scene, Thing

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
