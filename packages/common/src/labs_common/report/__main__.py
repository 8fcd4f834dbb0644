"""Runs `python -m labs_common.report`, which makes a PDF of a report: see `pdf.py`."""

from labs_common.cli import run_command
from labs_common.report.pdf import PdfConfig

if __name__ == "__main__":
    run_command("labs_common.report.pdf:pdf", PdfConfig, "labs_common.report")
