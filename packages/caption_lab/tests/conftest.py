"""Small drawn scenes with captions, and captioners with random encoders."""

from pathlib import Path

import pytest
from labs_testing.commands import real_data

from caption_lab.tiny import demo_scene
from labs_common.scenes.files import write_flickr8k


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
