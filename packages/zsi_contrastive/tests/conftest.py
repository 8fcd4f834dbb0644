"""Small drawn scenes in COCO's format, and small detectors."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from lab_commands import real_data

from labs_common.scenes.files import write_coco
from zsi_contrastive.data import category
from zsi_contrastive.splits import scenes_split

torch.set_num_threads(1)  # as in the processes that are started here: the same bytes need the same threads


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads what this machine's user has in the cache, nor leaves anything there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


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
