"""Moved to labs_common.report.pictures."""

from labs_common.report.pictures import (
    MISTAKES,
    Predictions,
    class_data_section,
    class_sections,
    said_line,
    wilson_interval,
)

__all__ = [
    "MISTAKES",
    "Predictions",
    "class_data_section",
    "class_sections",
    "said_line",
    "wilson_interval",
]
