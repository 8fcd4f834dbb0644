"""The report: figures, sections and one self-contained HTML page."""
