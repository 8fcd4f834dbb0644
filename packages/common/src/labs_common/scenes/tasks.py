"""Classification tasks on scenes: what a picture's label is, and scenes in which only looking closely tells it."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from labs_common.scenes.world import COLOURS, MOST_THINGS, SHAPES, TEXTURES, Scene, random_look, random_scene

LOOKS = tuple(f"{texture} {colour}" for colour in COLOURS for texture in TEXTURES)
MAIN = ((0.22, 0.38), (0.07, 0.16))  # a large thing first, smaller ones after it


@dataclass(frozen=True)
class Task:
    """A question about a scene, its possible answers, and scenes to ask it of."""

    question: str
    classes: tuple[str, ...]
    sample: Callable[[np.random.Generator], tuple[Scene, int]]


def _shape(generator: np.random.Generator) -> tuple[Scene, int]:
    scene = random_scene(generator, 1 + int(generator.integers(5)), MAIN)
    return scene, list(SHAPES).index(scene.things[0].shape)


def _texture(generator: np.random.Generator) -> tuple[Scene, int]:
    scene = random_scene(generator, 1 + int(generator.integers(5)), MAIN)
    return scene, TEXTURES.index(scene.things[0].texture)


def _count(generator: np.random.Generator) -> tuple[Scene, int]:
    count = 1 + int(generator.integers(MOST_THINGS))
    return random_scene(generator, count, ((0.1, 0.2),)), count - 1


def _look(generator: np.random.Generator) -> tuple[Scene, int]:
    """Five things of one colour and one texture, but of any shapes: every part of the picture shows the same look."""
    colour, texture = (list(options)[generator.integers(len(options))] for options in (COLOURS, TEXTURES))
    looks = [(list(SHAPES)[generator.integers(len(SHAPES))], colour, texture) for _ in range(5)]
    return random_scene(generator, 5, ((0.12, 0.22),), looks), LOOKS.index(f"{texture} {colour}")


def _striped_colour(generator: np.random.Generator) -> tuple[Scene, int]:
    """Three things of three textures and colours, one of them striped: texture has to be bound to colour."""
    others = [texture for texture in TEXTURES if texture != "striped"]
    generator.shuffle(others)
    textures = ["striped", *others[:2]]
    generator.shuffle(textures)
    colours = [list(COLOURS)[place] for place in generator.permutation(len(COLOURS))[:3]]
    looks = [(random_look(generator)[0], colour, texture) for colour, texture in zip(colours, textures, strict=True)]
    scene = random_scene(generator, 3, ((0.15, 0.24),), looks)
    return scene, list(COLOURS).index(colours[textures.index("striped")])


TASKS = {
    "shape": Task("Which shape has the largest thing?", tuple(SHAPES), _shape),
    "texture": Task("Which texture has the largest thing?", TEXTURES, _texture),
    "count": Task("How many things are there?", tuple(map(str, range(1, MOST_THINGS + 1))), _count),
    "look": Task("What do all things look like?", LOOKS, _look),
    "striped-colour": Task("Which colour has the striped thing?", tuple(COLOURS), _striped_colour),
}
