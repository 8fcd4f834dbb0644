"""Moved to labs_common.report.captions, .page."""

from labs_common.report.captions import captioned_data_section
from labs_common.report.page import shown

__all__ = ["captioned_data_section", "shown"]
