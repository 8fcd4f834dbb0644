"""Moved to labs_common.report.pictures."""

from labs_common.report.pictures import captioned_data_section, shown

__all__ = [
    "captioned_data_section",
    "shown",
]
