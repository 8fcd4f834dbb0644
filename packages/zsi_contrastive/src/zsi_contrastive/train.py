"""Runs `python -m zsi_contrastive.train`, which trains a zero-shot detector: see `detector/train.py`."""

from zsi_contrastive import commands

if __name__ == "__main__":
    commands.train()
