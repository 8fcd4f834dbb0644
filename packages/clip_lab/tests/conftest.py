"""Small drawn scenes with captions, and a cache of the tests' own."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from lab_commands import real_data

from clip_lab.data import demo_scene
from labs_common.scenes.files import write_flickr8k

torch.set_num_threads(1)  # as in the processes that are started here: the same bytes need the same threads


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads what this machine's user has in the cache, nor leaves anything there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn scenes with five captions each, as Flickr8k is laid out."""
    folder = tmp_path_factory.mktemp("scenes")
    write_flickr8k(folder, range(60), side=32, sample=demo_scene)
    return folder


@pytest.fixture(scope="session")
def real_pictures() -> Path:
    """Real photographs with captions."""
    return real_data("flickr8k-mini")


@pytest.fixture(scope="session")
def real_classes() -> Path:
    """Real pictures of CIFAR-10."""
    return real_data("cifar10-mini")
