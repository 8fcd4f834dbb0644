"""Runs `python -m zsi_contrastive.words`, which shows and checks word vectors: see `detector/words.py`."""

from zsi_contrastive import commands

if __name__ == "__main__":
    commands.words()
