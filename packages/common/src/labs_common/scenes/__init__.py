"""Procedurally drawn scenes: the offline data, written in the real formats and read back by the same readers."""

from labs_common.scenes.captions import captions
from labs_common.scenes.files import TASKS, Task
from labs_common.scenes.world import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    Thing,
    picture,
    random_scene,
    scene_generator,
)

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "SHAPES",
    "SIZES",
    "TASKS",
    "TEXTURES",
    "Scene",
    "Task",
    "Thing",
    "captions",
    "picture",
    "random_scene",
    "scene_generator",
]
