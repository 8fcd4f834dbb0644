"""Pictures with what was found in them: boxes, outlines and names."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as rle
from PIL import Image, ImageColor, ImageDraw, ImageFont

from labs_common.report.captioned import shown
from labs_common.report.figures import COLOURS

Result = dict[str, Any]


def drawn_on(image: Image.Image, results: Sequence[Result], names: Sequence[str], side: int = 320) -> Image.Image:
    """The picture, `side` pixels long, with each result's mask tinted, its box and its name.

    Results have a `bbox` and perhaps a `segmentation` of the whole picture, as COCO's results or annotations.
    """
    scale = side / max(image.size)
    canvas = shown(image, side).convert("RGB")
    for place, result in enumerate(results):
        if "segmentation" in result:
            canvas = _tinted(canvas, result["segmentation"], image.size, COLOURS[place % len(COLOURS)])
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(12)
    for place, (result, name) in enumerate(zip(results, names, strict=True)):
        colour = COLOURS[place % len(COLOURS)]
        left, top, across, down = (value * scale for value in result["bbox"])
        draw.rectangle((left, top, left + across, top + down), outline=colour, width=2)
        x0, y0, x1, y1 = draw.textbbox((0, 0), name, font=font)
        x = min(max(0.0, left), max(0.0, canvas.width - (x1 - x0) - 4))
        y = top - (y1 - y0) - 6 if top > y1 - y0 + 6 else top
        draw.rectangle((x, y, x + x1 - x0 + 4, y + y1 - y0 + 5), fill=colour)
        draw.text((x + 2 - x0, y + 2 - y0), name, fill="white", font=font)
    return canvas


def _tinted(canvas: Image.Image, outline: Any, size: tuple[int, int], colour: str) -> Image.Image:
    width, height = size
    if isinstance(outline, list):
        outline = rle.merge(rle.frPyObjects([part for part in outline if len(part) >= 6], height, width))
    elif isinstance(outline["counts"], list):
        outline = rle.frPyObjects(outline, height, width)
    inside = np.asarray(rle.decode(outline)) * 120
    mask = Image.fromarray(inside.astype(np.uint8)).resize(canvas.size, Image.Resampling.BILINEAR)
    return Image.composite(Image.new("RGB", canvas.size, ImageColor.getrgb(colour)), canvas, mask)
