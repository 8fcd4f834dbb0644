"""A pytest plugin for the tests of all packages: a cache of their own, and one thread."""

import gc
from collections.abc import Iterator, Sequence
from multiprocessing import forkserver

import pytest
import torch

from labs_common.compare import processes

torch.set_num_threads(1)  # as in the processes that tests start: the same bytes need the same threads


# What runs import, of the labs that are installed; where DeepSpeed is, Accelerate imports it in every run.
LIBRARIES = ("labs_common.fitting", "caption_lab.train", "clip_lab.train", "llm_peft_fa.train", "vit_transfer.distill",
             "zsi_contrastive.detector.train", "zsi_contrastive.ssl.train", "deepspeed")  # fmt: skip


def pytest_collection_finish() -> None:
    """Every training ends with a garbage collection, which would go through all imported libraries: a second each."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Lets libraries that count what they lent see it come back."""
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="session")
def forked_runs() -> Iterator[None]:
    """The server from which runs are forked begins with the first of them, and is to suit those of all labs after it.

    A comparison's runs draw no report of their own, a second each: those of training commands do in their own tests.
    """
    asked, forked = forkserver.set_forkserver_preload, processes._forked

    def preload(libraries: Sequence[str]) -> None:
        asked([*libraries, *LIBRARIES])

    def without_report(module: str, arguments: list[str]) -> int:
        return forked(module, [*arguments, "--no-report"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forkserver, "set_forkserver_preload", preload)
        patch.setattr(processes, "_forked", without_report)
        yield


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads what this machine's user has in the cache, nor leaves anything there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
