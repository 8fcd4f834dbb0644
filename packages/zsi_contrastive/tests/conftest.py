"""Small drawn scenes in COCO's format, and small detectors."""

from pathlib import Path

import pytest
from labs_testing.commands import real_data

from labs_common.scenes.files import write_coco
from zsi_contrastive.detector.annotations import scenes_split
from zsi_contrastive.detector.data import category


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn scenes of all classes; the rule has to sort them."""
    folder = tmp_path_factory.mktemp("scenes")
    write_coco(folder, {"train": range(40), "val": range(1000, 1026)}, 0, 48, category, scenes_split().classes)
    return folder


@pytest.fixture(scope="session")
def coco() -> Path:
    """Real pictures of COCO."""
    return real_data("coco-mini")


@pytest.fixture(scope="session")
def coco_vectors() -> Path:
    """Word vectors of COCO's classes."""
    return real_data("coco-word-vectors")
