"""Tiny random models of real architectures, with a real tokenizer."""

from pathlib import Path

import pytest
from labs_testing.commands import real_data
from random_models import random_gemma, random_llama


@pytest.fixture(scope="session")
def gemma_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Gemma 2."""
    return random_gemma(tmp_path_factory.mktemp("gemma"))


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama."""
    return random_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(params=["gemma", "llama"])
def model_dir(request: pytest.FixtureRequest) -> Path:
    """Each architecture in turn."""
    return request.getfixturevalue(f"{request.param}_dir")


@pytest.fixture(scope="session")
def real_chats() -> Path:
    """Real Persian conversations."""
    return real_data("persian-qa-chat")
