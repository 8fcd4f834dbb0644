"""Masks in a picture as run lengths, against torchvision and pycocotools; tensors in one row of bytes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models.detection.roi_heads import paste_masks_in_image

from labs_common.errors import LabError
from zsi_contrastive.detector.annotations import Instances
from zsi_contrastive.detector.pictures import found_pictures, packed, run_lengths

pytestmark = pytest.mark.quick


def test_masks_are_those_of_torchvision_and_pycocotools() -> None:
    """Boxes of all sizes, at and over each edge, of the whole picture, and less than a pixel wide."""
    coco = pytest.importorskip("pycocotools.mask", reason="the independent run lengths")
    torch.manual_seed(0)
    height, width = 43, 60
    boxes = torch.rand(60, 4) * torch.tensor([50, 35, 30, 25])
    boxes[:, 2:] += boxes[:, :2]
    odd = [[0, 0, 60, 43], [0, 0, 7, 43], [50, 0, 60, 43], [3, 42.5, 20, 43], [59.5, 5, 60, 40], [9, 9, 9.02, 9.02],
           [0, 0, 1, 1], [-3, -2, 5, 6]]  # fmt: skip
    boxes = torch.cat([boxes, torch.tensor(odd)])
    boxes = torch.minimum(boxes, torch.tensor([60, 43, 60, 43]))
    masks = torch.nn.functional.interpolate(torch.rand(len(boxes), 1, 5, 5), (14, 14), mode="bilinear")[:, 0]
    masks[::5] = 1  # also at the top and the bottom of their boxes: runs go on in the next column
    masks[1] = 0
    found = run_lengths(masks, boxes, height, width)
    pixels = paste_masks_in_image(masks[:, None], boxes, (height, width))[:, 0] >= 0.5
    assert len(found) == len(pixels)
    assert int(pixels[60].all(0).sum()) > 40, "runs over several columns of the whole picture"
    assert not pixels[1].any()
    for code, expected in zip(found, pixels.numpy(), strict=True):
        right = coco.encode(np.asfortranarray(expected.astype(np.uint8)))
        assert code == {"size": right["size"], "counts": right["counts"].decode()}
    assert run_lengths(masks[:0], boxes[:0], height, width) == []


def test_tensors_in_a_row_of_bytes() -> None:
    tensors = [
        torch.tensor([2**40, -1]), torch.zeros(0, dtype=torch.int64), torch.randn(3, 4), torch.zeros(0, 4),
        torch.randint(0, 255, (2, 3, 5), dtype=torch.uint8), torch.zeros(0, 3, 3, dtype=torch.uint8),
        torch.randint(0, 255, (3, 7, 2), dtype=torch.uint8).flip(-1),
    ]  # fmt: skip
    again = packed(tensors).to(torch.device("cpu"))
    assert [(tensor.dtype, tensor.shape) for tensor in again] == [(tensor.dtype, tensor.shape) for tensor in tensors]
    assert all(map(torch.equal, again, tensors))


@pytest.mark.parametrize("name", ["../secret.png", "{}/secret.png", "..\\secret.png", "link.png", 5, "a" * 300])
def test_a_file_name_stays_inside_of_the_pictures(name: object, tmp_path: Path) -> None:
    folders = [tmp_path / "train", tmp_path / "val"]
    for folder in folders:
        folder.mkdir()
    for file in (tmp_path / "secret.png", folders[1] / "own.png"):
        Image.new("RGB", (4, 4)).save(file)
    (folders[0] / "link.png").symlink_to("../secret.png")

    def read(file_name: object) -> list[Path]:
        image = {"id": 1, "file_name": file_name, "width": 4, "height": 4}
        part = Instances("train.json", [{"id": 1, "name": "cat"}], [image], [])
        return list(found_pictures(part, folders, ["cat"], "error", shown=False).contents)

    assert read("own.png") == [folders[1] / "own.png"]
    said = "train.json: .*" + ("cannot be used" if isinstance(name, str) and len(name) > 200 else "lies outside")
    with pytest.raises(LabError, match=said):
        read(name.format(tmp_path) if isinstance(name, str) else name)
