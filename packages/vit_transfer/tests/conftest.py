"""Small pictures, and small networks with random weights."""

from pathlib import Path

import pytest
import torch
from labs_testing.commands import first_rows, real_data
from safetensors.torch import save_file

from labs_common.scenes.files import write_parquet
from vit_transfer.config import ModelOptions
from vit_transfer.model import create


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn scenes with a class each, in three splits."""
    folder = tmp_path_factory.mktemp("scenes")
    splits = {"train": range(48), "validation": range(48, 60), "test": range(60, 84)}
    write_parquet(folder, "texture", splits, seed=0, side=32)
    return folder


def weights(folder: Path, name: str) -> Path:
    """A file of random weights, to stand for pre-trained ones."""
    torch.manual_seed(0)
    file = folder / f"{name}.safetensors"
    save_file(create(ModelOptions(model=name, pretrained=False), 7).state_dict(), file)
    return file


@pytest.fixture(scope="session")
def vit_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the tiny vision transformer."""
    return weights(tmp_path_factory.mktemp("vit"), "tiny-vit")


@pytest.fixture(scope="session")
def cnn_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the tiny CNN."""
    return weights(tmp_path_factory.mktemp("cnn"), "tiny-cnn")


@pytest.fixture(scope="session")
def real_pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real CIFAR-10 pictures."""
    return first_rows(real_data("cifar10-mini"), tmp_path_factory.mktemp("cifar"), 300)
