"""Scenes of coloured, textured shapes with size, place and rotation: sampled, then drawn into a picture.

Lengths are shares of the picture's side, the origin is the upper left corner, angles are in radians.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {
    "red": (214, 40, 40), "orange": (245, 135, 20), "yellow": (240, 220, 40), "green": (40, 160, 60),
    "blue": (40, 80, 215), "purple": (130, 50, 180), "pink": (245, 140, 190), "white": (240, 240, 240),
}  # fmt: skip
TEXTURES = ("plain", "striped", "dotted", "checked")
BACKGROUNDS = {"dark": (32, 34, 40), "grey": (112, 114, 118), "teal": (40, 105, 110), "brown": (98, 74, 52)}
SIZES = ("small", "medium", "large")
SMALL, LARGE = 0.11, 0.19  # a radius below is called small, one above large
MOST_THINGS = 6
FINER = 2  # pictures are drawn larger by this factor, then averaged: smooth edges


def _turned(count: int, radii: Sequence[float]) -> np.ndarray:
    angles = np.arange(count) * (2 * math.pi / count) - math.pi / 2
    return np.stack([np.cos(angles), np.sin(angles)], 1) * np.resize(radii, count)[:, None]


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * math.pi, 24, endpoint=False)
    across = 16 * np.sin(t) ** 3
    up = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([across, -up - 2], 1) / 17


def _moon() -> np.ndarray:
    outer = np.linspace(-0.7 * math.pi, 0.7 * math.pi, 18)
    edge = np.stack([np.cos(outer), np.sin(outer)], 1)
    # The inner edge is an arc through the outer one's ends, run back.
    inner = np.linspace(0.62 * math.pi, -0.62 * math.pi, 14)[1:-1]
    start = edge[0]
    scale = abs(start[1]) / math.sin(0.62 * math.pi)
    back = np.stack([np.cos(inner) * scale + start[0] - math.cos(0.62 * math.pi) * scale, np.sin(inner) * scale], 1)
    return np.concatenate([edge, back])


# Outlines as simple polygons around the origin, no farther from it than 1.
SHAPES: dict[str, np.ndarray] = {
    "circle": _turned(28, [1.0]) * 0.92,
    "square": _turned(4, [1.0]),
    "triangle": _turned(3, [1.0]),
    "star": _turned(10, [1.0, 0.42]),
    "cross": np.array(
        [(-1, -3), (1, -3), (1, -1), (3, -1), (3, 1), (1, 1), (1, 3), (-1, 3), (-1, 1), (-3, 1), (-3, -1), (-1, -1)]
    ) / math.sqrt(10),
    "heart": _heart(),
    "moon": _moon(),
    "arrow": np.array([(0, -1), (0.85, -0.1), (0.35, -0.1), (0.35, 0.9), (-0.35, 0.9), (-0.35, -0.1), (-0.85, -0.1)]),
}  # fmt: skip


@dataclass(frozen=True)
class Thing:
    """One shape of a scene; `radius` is that of the circle around it."""

    shape: str
    colour: str
    texture: str
    x: float
    y: float
    radius: float
    angle: float

    def outline(self, side: float = 1.0) -> np.ndarray:
        """Returns the polygon's corners (corners, 2) as x and y in a picture of `side` pixels."""
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        turned = SHAPES[self.shape] @ np.array([[cos, sin], [-sin, cos]])
        return (turned * self.radius + (self.x, self.y)) * side

    @property
    def size(self) -> str:
        """small, medium or large."""
        return "small" if self.radius < SMALL else "large" if self.radius > LARGE else "medium"

    @property
    def unseen(self) -> bool:
        """Says whether this pairing of shape and colour is one of the quarter that is kept for zero-shot tests."""
        return (list(SHAPES).index(self.shape) + list(COLOURS).index(self.colour)) % 4 == 0


@dataclass(frozen=True)
class Scene:
    """Things from back to front on a background, under a light and behind a camera's noise.

    Attributes:
        light: brightness at the left, right, top and bottom edge (factors).
        noise: standard deviation of the camera's noise, in grey levels.
        noise_seed: seed of what the drawing itself leaves to chance (clutter and noise).
        clutter: how many specks and strokes that belong to nothing.
    """

    things: tuple[Thing, ...]
    background: str
    light: tuple[float, float, float, float]
    noise: float
    noise_seed: int
    clutter: int


def scene_generator(seed: int, index: int) -> np.random.Generator:
    """Returns the source of everything random in scene `index` of a set: the same for the same two numbers."""
    return np.random.default_rng([seed, index])


def random_scene(
    generator: np.random.Generator,
    things: int | None = None,
    radii: Sequence[tuple[float, float]] = ((0.08, 0.24),),
    looks: Sequence[tuple[str, str, str]] | None = None,
) -> Scene:
    """Samples a scene of `things` shapes, by default one to five.

    `radii` are the ranges of the first, second, … thing's size (the last one is for the rest), `looks` the shape,
    colour and texture of each, by default drawn from all pairings. Later things lie in front and may hide
    a part of earlier ones, never most of one. Where a thing finds no room it is made smaller.
    """
    count = int(generator.integers(1, 6)) if things is None else things
    placed: list[Thing] = []
    for number in range(count):
        look = random_look(generator) if looks is None else looks[number]
        low, high = radii[min(number, len(radii) - 1)]
        radius = float(generator.uniform(low, high))
        while True:  # twelve tries for each size
            spots = generator.uniform(radius * 0.9, 1 - radius * 0.9, (12, 2))
            fitting = [spot for spot in spots if all(_apart(spot, radius, other) for other in placed)]
            if fitting:
                break
            radius *= 0.85
        x, y = map(float, fitting[0])
        placed.append(Thing(*look, x, y, radius, float(generator.uniform(0, 2 * math.pi))))
    left, right, top, bottom = map(float, generator.uniform(0.65, 1.15, 4))
    return Scene(
        things=tuple(placed),
        background=list(BACKGROUNDS)[generator.integers(len(BACKGROUNDS))],
        light=(left, right, top, bottom),
        noise=float(generator.uniform(3, 14)),
        noise_seed=int(generator.integers(2**31)),
        clutter=int(generator.integers(2, 9)),
    )


def random_look(generator: np.random.Generator) -> tuple[str, str, str]:
    """Samples shape, colour and texture, each with equal chances."""
    choices = (tuple(SHAPES), tuple(COLOURS), TEXTURES)
    shape, colour, texture = (options[generator.integers(len(options))] for options in choices)
    return shape, colour, texture


def _apart(spot: np.ndarray, radius: float, other: Thing) -> bool:
    """Says whether a thing at `spot` would leave most of `other` to be seen, and be seen itself."""
    distance = math.hypot(spot[0] - other.x, spot[1] - other.y)
    return distance >= max(radius, other.radius) + 0.3 * min(radius, other.radius)


def picture(scene: Scene, side: int = 64) -> Image.Image:
    """Draws the scene as an RGB picture of `side` times `side` pixels; the same bytes for the same scene."""
    generator = np.random.default_rng(scene.noise_seed)
    canvas = Image.new("RGB", (side * FINER, side * FINER), BACKGROUNDS[scene.background])
    _draw_clutter(canvas, scene, generator)
    for thing in scene.things:
        _draw_thing(canvas, thing, generator)
    levels = np.asarray(canvas.resize((side, side), Image.Resampling.BOX), dtype=np.float32)  # (side, side, 3)
    left, right, top, bottom = scene.light
    across, down = np.linspace(left, right, side, dtype=np.float32), np.linspace(top, bottom, side, dtype=np.float32)
    light = (across[None, :] + down[:, None])[..., None] / 2
    noise = generator.standard_normal((side, side, 3), dtype=np.float32) * scene.noise
    return Image.fromarray(np.clip(levels * light + noise, 0, 255).astype(np.uint8))


def _draw_clutter(canvas: Image.Image, scene: Scene, generator: np.random.Generator) -> None:
    """Draws short strokes and specks in the colours of things, so that a patch of colour proves nothing."""
    draw = ImageDraw.Draw(canvas)
    side = canvas.width
    palette = list(COLOURS.values())
    for _ in range(scene.clutter):
        x, y, dx, dy = generator.uniform((0, 0, -0.1, -0.1), (1, 1, 0.1, 0.1)) * side
        draw.line((x, y, x + dx, y + dy), fill=palette[generator.integers(len(palette))], width=max(1, side // 64))


def _draw_thing(canvas: Image.Image, thing: Thing, generator: np.random.Generator) -> None:
    corners = thing.outline(canvas.width)
    left, top = map(int, np.floor(corners.min(0)))
    right, bottom = map(int, np.ceil(corners.max(0)) + 1)
    mask = Image.new("1", (right - left, bottom - top))
    ImageDraw.Draw(mask).polygon((corners - (left, top)).ravel().tolist(), fill=1)
    colour = np.array(COLOURS[thing.colour]) + generator.integers(-18, 19, 3)  # a name stands for a range of colours
    shades = [tuple(map(int, np.clip(colour * factor, 0, 255))) for factor in (1.0, 0.45)]  # light and dark
    if thing.texture == "plain":
        canvas.paste(shades[0], (left, top), mask)
        return
    # A pattern turns with its thing, in steps of an eighth.
    pattern = _pattern(thing.texture, round(thing.angle / np.pi * 4) % 4, canvas.width)
    fill = Image.new("RGB", mask.size, shades[0])
    fill.paste(shades[1], (0, 0), pattern.crop((0, 0, *mask.size)))
    canvas.paste(fill, (left, top), mask)


@lru_cache(maxsize=64)
def _pattern(texture: str, eighths: int, side: int) -> Image.Image:
    """Returns where a texture is dark, as a mask over the whole canvas; its period is an eleventh of the side."""
    place = np.arange(side) / side * 11
    x, y = np.meshgrid(place, place)
    angle = eighths * np.pi / 4
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    if texture == "striped":
        dark = along % 1 < 0.45
    elif texture == "dotted":
        dark = (along % 1 - 0.5) ** 2 + (across % 1 - 0.5) ** 2 < 0.1
    else:
        dark = (np.floor(along) + np.floor(across)) % 2 == 0
    return Image.fromarray(dark)
