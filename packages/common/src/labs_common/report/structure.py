"""Moved to labs_common.report.sections."""

from labs_common.report.sections import Structure, structure_of

__all__ = [
    "Structure",
    "structure_of",
]
