"""Small drawn pictures."""

from pathlib import Path

import pytest

from labs_common.scenes.files import write_parquet


@pytest.fixture(scope="session")
def looks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("looks")
    write_parquet(folder, "look", {"train": range(96), "validation": range(96, 120), "test": range(120, 160)}, 0, 16)
    return folder
