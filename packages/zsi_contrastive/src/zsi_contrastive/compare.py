"""Runs `python -m zsi_contrastive.compare`, which compares methods of pre-training: see `ssl/compare.py`."""

from zsi_contrastive import commands

if __name__ == "__main__":
    commands.compare()
