"""Pictures with instances: found on disk, checked once, read as the network takes them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from faster_coco_eval.core import mask as rle
from PIL import Image

from labs_common.data.images import BadPictureError, decoded
from labs_common.data.pictures import digests_of, examined, refusal
from labs_common.errors import LabError
from labs_common.options import OnBadData
from zsi_contrastive.detector.annotations import Instances, Json
from zsi_contrastive.detector.regions import Target


@dataclass(frozen=True)
class InstancePictures:
    """The pictures of a part, with their objects.

    Attributes:
        part: the annotations.
        files: the picture of each row of `part.images`.
        classes: names in the order of their labels, which begin at 1.
        digests: a hash of each file.
        left_out: pictures and objects that cannot be used, with counts, by reason; `examples` names the first.
    """

    part: Instances
    files: tuple[Path, ...]
    classes: tuple[str, ...]
    digests: tuple[bytes, ...] = ()
    left_out: Counter[str] = field(default_factory=Counter)
    examples: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.part.images)

    @property
    def names(self) -> list[str]:
        """The pictures' file names."""
        return [row["file_name"] for row in self.part.images]

    @property
    def source(self) -> str:
        """The annotation file."""
        return self.part.source

    def fingerprint(self) -> str:
        """Changes with any picture or annotation."""
        objects = repr([[row["image_id"], row["category_id"], row["bbox"]] for row in self.part.annotations]).encode()
        return digests_of([*self.digests, objects])

    def image(self, place: int) -> Image.Image:
        """Picture `place` in RGB, as its annotations have it.

        Raises:
            LabError: it cannot be read; it is named.
        """
        try:
            return read_picture(self.files[place], self.part.images[place])
        except BadPictureError as error:
            raise LabError(f"{self.files[place]}: {error}") from error

    def target(self, place: int, objects: dict[int, list[Json]], labels: dict[int, int]) -> Target:
        """Boxes, labels and masks of the picture's objects; crowds are left out.

        `objects` are `part.by_image()`, `labels` those of `label_of`.
        """
        row = self.part.images[place]
        height, width = row["height"], row["width"]
        kept = []
        for annotation in objects.get(row["id"], []):
            left, top, across, down = annotation["bbox"]
            box = [max(0.0, left), max(0.0, top), min(width, left + across), min(height, top + down)]
            if annotation["iscrowd"] or box[2] - box[0] < 1e-2 or box[3] - box[1] < 1e-2:
                continue
            mask = mask_of(annotation["segmentation"], height, width)
            if mask.any():
                kept.append((box, labels[annotation["category_id"]], mask))
        boxes, numbers, masks = zip(*kept, strict=True) if kept else ((), (), ())
        return {
            "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor(numbers, dtype=torch.int64),
            "masks": torch.from_numpy(np.stack(masks) if kept else np.zeros((0, height, width), dtype=np.uint8)),
        }

    def label_of(self) -> dict[int, int]:
        """The label, from 1, of each category id."""
        return {number: place for place, number in enumerate(self.part.ids(self.classes), 1)}

    def subset(self, places: Sequence[int]) -> "InstancePictures":
        """The pictures at these places, in this order."""
        images = [self.part.images[place] for place in places]
        ids = {row["id"] for row in images}
        rows = [row for row in self.part.annotations if row["image_id"] in ids]
        return replace(
            self,
            part=replace(self.part, images=images, annotations=rows),
            files=tuple(self.files[place] for place in places),
            digests=tuple(self.digests[place] for place in places) if self.digests else (),
        )


def mask_of(outline: list[list[float]] | Json, height: int, width: int) -> np.ndarray:
    """The pixels (height, width) of 0 and 1 inside polygons or run lengths.

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
    pixels: np.ndarray = rle.decode(found)
    return pixels


def read_picture(file: Path, row: Json) -> Image.Image:
    """The picture in RGB, in the size that its annotations are for: as it is on disk, or turned as its camera says.

    Raises:
        BadPictureError: it cannot be decoded, or has another size.
    """
    wanted = (row["width"], row["height"])
    for upright in (False, True):
        image = decoded(file, upright)
        if image.size == wanted:
            return image
    raise BadPictureError(f"is {image.width} × {image.height}; its annotations are for {wanted[0]} × {wanted[1]}")


def found_pictures(
    part: Instances, folders: Sequence[Path], classes: Sequence[str], on_bad_data: OnBadData, shown: bool
) -> InstancePictures:
    """The pictures of a part, looked for in `folders`, every one decoded once.

    Raises:
        LabError: some cannot be used and `on_bad_data` is "error", or none can.
    """
    files = [_found(row["file_name"], folders) for row in part.images]
    outcomes = examined(files, f"checking {part.source}", shown)
    reasons = [reason for _, reason in outcomes]
    for place, (file, row) in enumerate(zip(files, part.images, strict=True)):
        if not reasons[place]:
            with Image.open(file) as image:
                if sorted(image.size) != sorted((row["width"], row["height"])):
                    size = f"{image.width} × {image.height}"
                    reasons[place] = f"is {size}; its annotations are for {row['width']} × {row['height']}"
    bad = [(row["file_name"], reason) for row, reason in zip(part.images, reasons, strict=True) if reason]
    pictures = InstancePictures(
        part, tuple(files), tuple(classes), tuple(digest for digest, _ in outcomes), Counter(part.left_out)
    )
    if not bad:
        return pictures
    if on_bad_data == "error" or len(bad) == len(files):
        remedy = "mend them, or leave them out with --on-bad-data skip" if len(bad) < len(files) else "none is left"
        raise LabError(refusal(part.source, bad, remedy, len(files)))
    kept = pictures.subset([place for place, reason in enumerate(reasons) if not reason])
    return replace(
        kept,
        left_out=kept.left_out + Counter(reason for _, reason in bad),
        examples=tuple(f"{name}: {reason}" for name, reason in bad[:5]),
    )


def levels_of(image: Image.Image) -> torch.Tensor:
    """A picture (3, height, width) of 0 to 255."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).contiguous()


def as_tensor(image: Image.Image) -> torch.Tensor:
    """A picture (3, height, width) of 0 to 1."""
    return levels_of(image).float() / 255


def mirrored(picture: torch.Tensor, target: Target) -> tuple[torch.Tensor, Target]:
    """Left and right exchanged."""
    width = picture.shape[-1]
    boxes = target["boxes"]
    turned = torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1)
    return picture.flip(-1), {**target, "boxes": turned, "masks": target["masks"].flip(-1)}


def _found(name: str, folders: Sequence[Path]) -> Path:
    """Where a picture lies; the first folder's place if it is nowhere."""
    return next((folder / name for folder in folders if (folder / name).is_file()), folders[0] / name)
