"""Pictures with instances: found on disk, checked once, read as the network takes them."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from faster_coco_eval.core import mask as rle
from PIL import Image
from torchvision.models.detection.roi_heads import expand_boxes

from labs_common.data.images import BadPictureError, Pictures, checked, decoded, digests_of, within
from labs_common.errors import LabError
from labs_common.options import OnBadData
from zsi_contrastive.detector.annotations import Instances
from zsi_contrastive.detector.heads import Target
from zsi_contrastive.detector.regions import NARROW
from zsi_contrastive.detector.table import Json

MASK_FROM = 0.5  # the probability from which a pixel belongs to a thing


@dataclass(frozen=True, kw_only=True)
class InstancePictures(Pictures):
    """The pictures of a part, with their objects.

    Attributes:
        part: the annotations; a picture for each row of `part.images`.
        classes: names in the order of their labels, which begin at 1.
    """

    contents: Sequence[Path]
    part: Instances
    classes: tuple[str, ...]

    def image(self, place: int) -> Image.Image:
        """Reads picture `place` in RGB, turned as its annotations have it.

        Raises:
            LabError: it cannot be read; it is named.
        """
        try:
            return read_picture(self.contents[place], self.part.images[place])
        except BadPictureError as error:
            raise LabError(f"{self.contents[place]}: {error}") from error

    def fault(self, place: int) -> str:
        """Says whether a picture has another size than its annotations are for, in either position."""
        row = self.part.images[place]
        with Image.open(self.contents[place]) as image:
            fits = sorted(image.size) == sorted((row["width"], row["height"]))
            return "" if fits else _other_size(image, row)

    def fingerprint(self) -> str:
        """Returns a hash that changes with any picture or annotation."""
        rows = self.part.rows
        columns = (rows.image_ids, rows.category_ids, rows.boxes)
        return digests_of([*self.digests, *(column.tobytes() for column in columns)])

    def target(self, place: int) -> Target:
        """Returns boxes (n, 4), labels (n,) and masks (n, height, width) of a picture's objects, without crowds.

        Boxes are left, top, right and bottom in pixels, cut at the picture's edge; objects that are left without a
        pixel are dropped.
        """
        row = self.part.images[place]
        height, width = row["height"], row["width"]
        kept = []
        for annotation in self.part.of_image(row["id"]):
            left, top, across, down = annotation["bbox"]
            box = [max(0.0, left), max(0.0, top), min(width, left + across), min(height, top + down)]
            # torchvision refuses boxes without area; some of COCO's lie at or beyond the edge.
            if annotation["iscrowd"] or box[2] - box[0] < NARROW or box[3] - box[1] < NARROW:
                continue
            mask = mask_of(annotation["segmentation"], height, width)
            if mask.any():
                kept.append((box, self._labels[annotation["category_id"]], mask))
        boxes, numbers, masks = zip(*kept, strict=True) if kept else ((), (), ())
        return {
            "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor(numbers, dtype=torch.int64),
            "masks": torch.from_numpy(np.stack(masks) if kept else np.zeros((0, height, width), dtype=np.uint8)),
        }

    def subset(self, places: Sequence[int] | np.ndarray) -> Self:
        """Takes the pictures at these places, in this order, with their annotations."""
        images = [self.part.images[place] for place in places]
        ids = np.array([row["id"] for row in images], dtype=np.int64)
        rows = self.part.rows.take(np.isin(self.part.rows.image_ids, ids))
        return replace(super().subset(places), part=replace(self.part, images=images, annotations=rows))

    @cached_property
    def _labels(self) -> dict[int, int]:
        """Labels by category id; 0 would be background."""
        return {number: place for place, number in enumerate(self.part.ids(self.classes), 1)}


def instance_pictures(part: Instances, files: Sequence[Path], classes: Sequence[str]) -> InstancePictures:
    """Puts a part's annotations beside its pictures' files, which nobody has looked into; without files: ()."""
    return InstancePictures(
        source=part.source,
        contents=files,
        names=[row["file_name"] for row in part.images],
        left_out=Counter(part.left_out),
        part=part,
        classes=tuple(classes),
    )


def found_pictures(
    part: Instances, folders: Sequence[Path], classes: Sequence[str], on_bad_data: OnBadData, shown: bool
) -> InstancePictures:
    """Finds the pictures of a part in `folders`, and decodes every one once to see whether it can be used.

    Raises:
        LabError: a name leads out of the folders; some cannot be used and `on_bad_data` is "error", or none can.
    """
    files = []
    for row in part.images:
        # Of 118,287 names only what is there is followed through links: each of a name's folders would take a minute.
        there = (folder for folder in folders if os.path.isfile(f"{folder}/{row['file_name']}"))
        try:
            files.append(within(row["file_name"], next(there, folders[0])))
        except BadPictureError as error:
            raise LabError(f"{part.source}: the picture {row['file_name']!r} {error}") from error
    return checked(instance_pictures(part, files, classes), on_bad_data, shown)


def mask_of(outline: list[list[float]] | Json, height: int, width: int) -> np.ndarray:
    """Draws the pixels (height, width) inside polygons or run lengths: uint8, 0 or 1.

    Raises:
        LabError: run lengths of another size.
    """
    if isinstance(outline, list):
        polygons = [part for part in outline if len(part) >= 6 and len(part) % 2 == 0]
        found = rle.merge(rle.frPyObjects(polygons, height, width))
    elif list(outline["size"]) != [height, width]:
        raise LabError(f"annotations: run lengths of {outline['size']} in a picture of {[height, width]}")
    elif isinstance(outline["counts"], list):
        if sum(outline["counts"]) != height * width:
            raise LabError(f"annotations: run lengths that do not add up to a picture of {[height, width]}")
        found = rle.frPyObjects(outline, height, width)
    else:
        found = outline
    return rle.decode(found)


def run_lengths(masks: torch.Tensor, boxes: torch.Tensor, height: int, width: int) -> list[Json]:
    """Draws masks (n, side, side) of 0 to 1 into their boxes (n, 4) of a picture, as COCO's compressed run lengths.

    The pixels are those of torchvision's `paste_masks_in_image`, which draws each into a whole picture of its own.
    """
    side = masks.shape[-1]
    # One more pixel around the mask, and the box as much larger (He et al. 2017's code).
    framed = F.pad(masks, (1, 1, 1, 1))
    corners = expand_boxes(boxes, (side + 2) / side).to(torch.int64).tolist()
    codes = []
    for mask, (left, top, right, bottom) in zip(framed, corners, strict=True):
        size = max(bottom - top + 1, 1), max(right - left + 1, 1)
        drawn = F.interpolate(mask[None, None], size, mode="bilinear", align_corners=False)[0, 0] >= MASK_FROM
        first, column = max(top, 0), max(left, 0)
        inside = drawn[first - top : height - top, column - left : width - left]
        codes.append({"size": [height, width], "counts": _runs(inside.numpy(), first, column, height, width)})
    found: list[Json] = rle.frPyObjects(codes, height, width) if codes else []
    return [{"size": list(code["size"]), "counts": _text(code["counts"])} for code in found]


def _runs(pixels: np.ndarray, row: int, column: int, height: int, width: int) -> list[int]:
    """Counts COCO's run lengths of a picture that has these pixels (h, w), bool, at `row` and `column`, and no others.

    Runs go down the columns, one after the other, and begin with pixels that are off.
    """
    down, across = pixels.shape
    # A pixel that is off below each column, and one before all: no run goes from one to the next in what was cut out.
    columns = np.zeros(1 + across * (down + 1), dtype=bool)
    columns[1:].reshape(across, down + 1)[:, :down] = pixels.T
    changes = np.flatnonzero(columns[1:] != columns[:-1])  # where runs begin and end, in turn
    places = changes + (changes // (down + 1)) * (height - down - 1) + (column * height + row)
    # A run to the picture's lower edge goes on at the top of the next column: its end is that one's beginning.
    if row + down == height and (again := np.flatnonzero(places[1:-1:2] == places[2::2])).size:
        places = np.delete(places, np.concatenate([2 * again + 1, 2 * again + 2]))
    ends = [0, *places.tolist(), height * width]
    counts = [after - before for before, after in pairwise(ends)]
    return counts if counts[-1] else counts[:-1]


def _text(counts: bytes | str) -> str:
    return counts.decode("ascii") if isinstance(counts, bytes) else counts


def read_picture(file: Path, row: Json) -> Image.Image:
    """Reads a picture in RGB, in the size that its annotations are for: as it is stored, or turned as its camera says.

    Raises:
        BadPictureError: it cannot be decoded, or has another size.
    """
    for upright in (False, True):
        image = decoded(file, upright)
        if image.size == (row["width"], row["height"]):
            return image
    raise BadPictureError(_other_size(image, row))


def _other_size(image: Image.Image, row: Json) -> str:
    return f"is {image.width} × {image.height}; its annotations are for {row['width']} × {row['height']}"


def levels_of(image: Image.Image) -> torch.Tensor:
    """Turns a picture into a tensor (3, height, width) of 0 to 255."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).contiguous()


@dataclass(frozen=True)
class Packed:
    """Tensors in one row of bytes: they go to a GPU in one copy, from memory that it can read by itself.

    Attributes:
        content: all their bytes (n,), uint8.
        layouts: dtype and shape of each, in their order.
    """

    content: torch.Tensor
    layouts: tuple[tuple[torch.dtype, torch.Size], ...]

    def to(self, device: torch.device) -> list[torch.Tensor]:
        """Copies the tensors to a device and takes them apart there."""
        content = self.content.to(device, non_blocking=True)
        found, first = [], 0
        for dtype, shape in self.layouts:
            last = first + shape.numel() * dtype.itemsize
            found.append(content[first:last].view(dtype).view(shape))
            first = last
        return found


def packed(tensors: Sequence[torch.Tensor]) -> Packed:
    """Puts tensors into one row of bytes. Those with larger elements come first, so that each lies where it may."""
    # In numpy: torch would give the thread that reads ahead threads of its own.
    parts = [tensor.numpy().reshape(-1).view(np.uint8) for tensor in tensors]
    content = torch.from_numpy(np.concatenate(parts))
    pinned = content.pin_memory() if torch.cuda.is_available() else content
    return Packed(pinned, tuple((tensor.dtype, tensor.shape) for tensor in tensors))


def mirrored(picture: torch.Tensor, target: Target) -> tuple[torch.Tensor, Target]:
    """Exchanges left and right."""
    left, top, right, bottom = target["boxes"].unbind(1)
    turned = torch.stack([picture.shape[-1] - right, top, picture.shape[-1] - left, bottom], 1)
    return picture.flip(-1), {**target, "boxes": turned, "masks": target["masks"].flip(-1)}
