"""Moved to labs_common.scenes.files."""

from labs_common.scenes.files import LOOKS, TASKS, Task

__all__ = [
    "LOOKS",
    "TASKS",
    "Task",
]
