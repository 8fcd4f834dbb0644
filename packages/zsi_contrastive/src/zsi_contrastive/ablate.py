"""Runs `python -m zsi_contrastive.ablate`, which compares variants of the detector: see `detector/compare.py`."""

from zsi_contrastive import commands

if __name__ == "__main__":
    commands.ablate()
