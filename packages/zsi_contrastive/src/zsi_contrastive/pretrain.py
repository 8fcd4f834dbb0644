"""Runs `python -m zsi_contrastive.pretrain`, which learns features without labels: see `ssl/train.py`."""

from zsi_contrastive import commands

if __name__ == "__main__":
    commands.pretrain()
