"""Moved to labs_common.data.readers."""

from labs_common.data.readers import binary_batches, python_batches

__all__ = [
    "binary_batches",
    "python_batches",
]
