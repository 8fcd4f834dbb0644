"""What holds for the tests of all packages: no GPU, no hub, one thread each, as two workers share two cores."""

import os
import signal
import sys
from pathlib import Path

import pytest

os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
# DeepSpeed compiles here what it needs on a CPU: once, not once for every cache that a test makes for itself.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path.home() / ".cache" / "torch_extensions"))
# Dozens of processes import the same large libraries. Where Python is told to write no bytecode, each would compile all
# of them again, ten seconds a time.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Tests hang up on and interrupt trainings, which ignore it where these tests were started with nohup or by a script.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What stands in tests/ is marked; files that take longest come first, so that none is begun last."""
    documents = Path(__file__).parent / "tests"
    for item in items:
        if item.path.parent == documents:
            item.add_marker("documents")
    long = {item.path for item in items if item.get_closest_marker("pretended")}
    items.sort(key=lambda item: (item.path.parent != documents, item.path not in long))


pytest_plugins = ("labs_testing.costs", "labs_testing.fixtures")
