"""Runs `python -m zsi_contrastive.evaluate`, which measures a detector: see `detector/evaluate.py`."""

from zsi_contrastive import commands

if __name__ == "__main__":
    commands.evaluate()
