"""Moved to labs_common.scenes.world."""

from labs_common.scenes.world import picture

__all__ = [
    "picture",
]
