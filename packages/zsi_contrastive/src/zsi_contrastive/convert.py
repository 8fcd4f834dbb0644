"""Runs `python -m zsi_contrastive.convert`, which reads checkpoints of others: see `detector/convert.py`."""

from zsi_contrastive import commands

if __name__ == "__main__":
    commands.convert()
