"""Moved to labs_common.report.classes, .captions, .page."""

from labs_common.report.captions import captioned_data_section
from labs_common.report.classes import Predictions, class_data_section, class_sections, said_line, wilson_interval
from labs_common.report.page import shown

__all__ = [
    "Predictions",
    "captioned_data_section",
    "class_data_section",
    "class_sections",
    "said_line",
    "shown",
    "wilson_interval",
]
