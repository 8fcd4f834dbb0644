"""A pytest plugin for the tests of all packages: a cache of their own, and one thread."""

import gc
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)  # as in the processes that tests start: the same bytes need the same threads


def pytest_collection_finish() -> None:
    """Every training ends with a garbage collection, which would go through all imported libraries: a second each."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Lets libraries that count what they lent see it come back."""
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads what this machine's user has in the cache, nor leaves anything there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
