"""Runs `python -m zsi_contrastive.prepare`, which writes zero-shot parts of COCO: see `detector/prepare.py`."""

from zsi_contrastive import commands

if __name__ == "__main__":
    commands.prepare()
