"""Draws a scene into a picture."""

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from labs_common.scenes.world import BACKGROUNDS, COLOURS, Scene, Thing

FINER = 2  # drawn larger by this factor, then averaged: smooth edges


def picture(scene: Scene, side: int = 64) -> Image.Image:
    """The scene as an RGB picture of `side` times `side` pixels; the same bytes for the same scene."""
    generator = np.random.default_rng(scene.noise_seed)
    canvas = Image.new("RGB", (side * FINER, side * FINER), BACKGROUNDS[scene.background])
    _draw_clutter(canvas, scene, generator)
    for thing in scene.things:
        _draw_thing(canvas, thing, generator)
    levels = np.asarray(canvas.resize((side, side), Image.Resampling.BOX), dtype=np.float32)
    left, right, top, bottom = scene.light
    across, down = np.linspace(left, right, side, dtype=np.float32), np.linspace(top, bottom, side, dtype=np.float32)
    light = (across[None, :] + down[:, None])[..., None] / 2
    noise = generator.standard_normal((side, side, 3), dtype=np.float32) * scene.noise
    return Image.fromarray(np.clip(levels * light + noise, 0, 255).astype(np.uint8))


def _draw_clutter(canvas: Image.Image, scene: Scene, generator: np.random.Generator) -> None:
    """Short strokes and specks in the colours of things, so that a patch of colour proves nothing."""
    draw = ImageDraw.Draw(canvas)
    side = canvas.width
    palette = list(COLOURS.values())
    for _ in range(scene.clutter):
        x, y, dx, dy = generator.uniform((0, 0, -0.1, -0.1), (1, 1, 0.1, 0.1)) * side
        draw.line((x, y, x + dx, y + dy), fill=palette[generator.integers(len(palette))], width=max(1, side // 64))


def _draw_thing(canvas: Image.Image, thing: Thing, generator: np.random.Generator) -> None:
    corners = thing.outline(canvas.width)
    left, top = np.floor(corners.min(0)).astype(int)
    right, bottom = np.ceil(corners.max(0)).astype(int) + 1
    mask = Image.new("1", (int(right - left), int(bottom - top)))
    ImageDraw.Draw(mask).polygon((corners - (left, top)).ravel().tolist(), fill=1)
    shift = generator.integers(-18, 19, 3)
    shades = [
        tuple(int(level) for level in np.clip((np.array(COLOURS[thing.colour]) + shift) * factor, 0, 255))
        for factor in (1.0, 0.45)
    ]
    if thing.texture == "plain":
        canvas.paste(shades[0], (int(left), int(top)), mask)
        return
    # A pattern turns with its thing, in steps of an eighth.
    pattern = _pattern(thing.texture, round(thing.angle / np.pi * 4) % 4, canvas.width)
    fill = Image.new("RGB", mask.size, shades[0])
    fill.paste(shades[1], (0, 0), pattern.crop((0, 0, *mask.size)))
    canvas.paste(fill, (int(left), int(top)), mask)


@lru_cache(maxsize=64)
def _pattern(texture: str, eighths: int, side: int) -> Image.Image:
    """Where a texture is dark, as a mask over the whole canvas; its period is an eleventh of the side."""
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
