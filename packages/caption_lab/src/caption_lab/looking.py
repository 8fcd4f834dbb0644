"""Where the captioner looked for each word: its attention over the places of the picture, as pictures."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from caption_lab.config import DecodingOptions
from caption_lab.decoding import write
from caption_lab.export import Captioner, features_of

SIDE, ACROSS = 150, 6


def looked_at(
    captioner: Captioner, images: Sequence[Image.Image], options: DecodingOptions
) -> list[tuple[list[str], torch.Tensor]]:
    """For each picture the words of its caption and their attention (words, rows, columns).

    Empty if the captioner does not attend.
    """
    levels = [captioner.transform.levels(image) for image in images]
    device = next(captioner.model.parameters()).device
    features = features_of(captioner, captioner.transform.normalised(levels).to(device))
    written = write(captioner.model.decoder, features, captioner.length, replace(options, top_p=0.0), attention=True)
    if not written.attention:
        return []
    found = []
    for numbers, attention in zip(written.words, written.attention, strict=True):
        words = captioner.vocabulary.decode(numbers).split()
        found.append((words, attention[: len(words)].unflatten(1, captioner.model.encoder.grid)))
    return found


def word_tiles(image: Image.Image, words: Sequence[str], attention: torch.Tensor) -> list[tuple[Image.Image, str]]:
    """The picture under the map of each word."""
    return [(under_map(image, part), word) for word, part in zip(words, attention, strict=True)]


def under_map(image: Image.Image, attention: torch.Tensor, side: int = SIDE) -> Image.Image:
    """The picture, dark where `attention` (rows, columns) is least, at `side` pixels."""
    low, high = float(attention.min()), float(attention.max())
    levels = ((attention - low) / max(high - low, 1e-12) * 255).round().byte().cpu().numpy()
    grown = Image.fromarray(levels).resize((side, side), Image.Resampling.BICUBIC)
    colours = Image.fromarray((255 * mpl.colormaps["inferno"](np.asarray(grown))[..., :3]).astype(np.uint8))
    return Image.blend(image.resize((side, side), Image.Resampling.BILINEAR), colours, 0.6)


def save_heatmap(image: Image.Image, words: Sequence[str], attention: torch.Tensor, file: Path) -> None:
    """Writes a PNG: the picture, then the picture under the map of each word, row by row."""
    tiles = [(image.resize((SIDE, SIDE)), ""), *word_tiles(image, words, attention)]
    rows = -(-len(tiles) // ACROSS)
    canvas = Figure(figsize=(1.7 * ACROSS, 1.9 * rows), layout="constrained")
    for place, (tile, word) in enumerate(tiles):
        axes = canvas.add_subplot(rows, ACROSS, place + 1)
        axes.imshow(tile)
        axes.set_title(word, fontsize=10)
        axes.set_axis_off()
    part = file.with_name(f".{file.name}.part")
    canvas.savefig(part, format="png", dpi=110)
    part.replace(file)
