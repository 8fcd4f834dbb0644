"""Runs `python -m zsi_contrastive.predict`, which finds things in pictures: see `detector/predict.py`."""

from zsi_contrastive import commands

if __name__ == "__main__":
    commands.predict()
