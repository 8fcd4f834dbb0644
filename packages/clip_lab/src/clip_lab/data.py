"""Pictures and captions in: the splits, and pictures as the image tower sees them."""

from pathlib import Path
from typing import Any

import numpy as np

from clip_lab.image import ImageTower
from labs_common.data.described import Captions, Transform, read_captions
from labs_common.options import CaptionDataOptions
from labs_common.scenes import Scene, random_scene

# The offline world: so small that who is where has to be read as well, not only what there is.
SHAPES, COLOURS, RADII = ("circle", "square", "triangle"), ("red", "yellow", "green", "blue"), (0.15, 0.19)
TWO = 0.85
DEMO_SIDE, DEMO_COUNT = 32, 9000
RECIPE: dict[str, Any] = {"shapes": SHAPES, "colours": COLOURS, "radii": RADII, "two": TWO, "side": DEMO_SIDE}


def demo_scene(generator: np.random.Generator) -> Scene:
    """One plain thing, or two of them in most scenes."""
    count = 1 + int(generator.random() < TWO)
    looks = [
        (SHAPES[generator.integers(len(SHAPES))], COLOURS[generator.integers(len(COLOURS))], "plain")
        for _ in range(count)
    ]
    return random_scene(generator, count, (RADII,), looks)


def transform_of(tower: ImageTower) -> Transform:
    """The whole picture, squeezed into the tower's square."""
    return Transform(tower.size, tower.mean, tower.std, tower.interpolation)


def read_data(options: CaptionDataOptions, seed: int, shown: bool) -> Captions:
    """The splits of --data, or of the drawn scenes; see `read_captions`."""
    return read_captions(options, seed, shown, drawn_scenes)


def drawn_scenes() -> Path:
    """Drawn scenes with five captions each; made now if never before."""
    from labs_common.scenes.files import cached_flickr8k

    recipe = RECIPE | {"count": DEMO_COUNT, "format": 1}
    return cached_flickr8k("clip-scenes", recipe, DEMO_COUNT, DEMO_SIDE, demo_scene)
