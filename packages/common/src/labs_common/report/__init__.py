"""The report: figures and one self-contained HTML page."""

from labs_common.report.figures import (
    Cell,
    Row,
    architecture_figure,
    bar_figure,
    count_scatter_figure,
    curve_figure,
    heat_figure,
    histogram_figure,
    map_figure,
    matrix_figure,
    scatter_figure,
)
from labs_common.report.page import Code, Figure, Gallery, Section, Table, Text, save_figure, shown, write_report
from labs_common.report.sections import (
    asked_section,
    cost_section,
    curves_section,
    rerun_section,
    trained_section,
)

__all__ = [
    "Cell",
    "Code",
    "Figure",
    "Gallery",
    "Row",
    "Section",
    "Table",
    "Text",
    "architecture_figure",
    "asked_section",
    "bar_figure",
    "cost_section",
    "count_scatter_figure",
    "curve_figure",
    "curves_section",
    "heat_figure",
    "histogram_figure",
    "map_figure",
    "matrix_figure",
    "rerun_section",
    "save_figure",
    "scatter_figure",
    "shown",
    "trained_section",
    "write_report",
]
