import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from labs_common.errors import LabError
from labs_common.frozen import cache as features
from labs_common.frozen.cache import CachedRows, ComputedRows, cached_rows
from labs_common.options import CacheOptions, TrainingOptions
from labs_common.training import make_accelerator

COUNT, WIDTH = 50, 6


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(features, "CHUNK_BYTES", 8 * WIDTH * 2)  # 8 rows of bf16
    return tmp_path


def front(view: int, places: Sequence[int]) -> torch.Tensor:
    return torch.stack([torch.linspace(place, place + view + 1, WIDTH) for place in places])


def make(recipe: object = 1, compute: features.Compute = front, views: int = 2) -> CachedRows:
    return cached_rows("toy", recipe, COUNT, views, WIDTH, "bf16", compute, shown=False)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_cached_rows_are_the_computed_ones(precision: features.RowPrecision) -> None:
    cached = cached_rows("toy", 1, COUNT, 2, WIDTH, precision, front, shown=False)
    plain = ComputedRows(front, precision)
    for view in (0, 1):
        places = [49, 0, 7, 7, 8]
        assert cached.rows(view, places).dtype == features.DTYPES[precision][0]
        assert torch.equal(cached.rows(view, places), plain.rows(view, places))
    assert cached.bytes_on_disk == 2 * COUNT * WIDTH * (4 if precision == "fp32" else 2)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32", "uint8"])
def test_rows_held_in_memory_are_those_on_disk(precision: features.KeptPrecision) -> None:
    cached = cached_rows("toy", 1, COUNT, 2, WIDTH, precision, front, shown=False)
    places = [49, 0, 7, 7, 8]
    before = [cached.rows(view, places) for view in (0, 1)]
    cached.hold(torch.device("cpu"))
    for view in (0, 1):
        (cached.folder / f"view-{view}.npy").write_bytes(b"")  # nobody reads it any more
        assert cached.rows(view, places).dtype == before[view].dtype
        assert torch.equal(cached.rows(view, places), before[view])


@pytest.mark.parametrize(("free", "held"), [(0, False), (2399, False), (2400, True)])
def test_rows_are_held_if_a_quarter_of_the_free_memory_is_enough(
    free: int, held: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """50 rows of 6 values of 16 bits are 600 bytes."""
    asked: list[torch.device] = []
    monkeypatch.setattr(features, "free_bytes", lambda device: free)
    monkeypatch.setattr(CachedRows, "hold", lambda rows, device: asked.append(device))
    accelerator = make_accelerator(TrainingOptions())
    features.front_rows("toy", None, front, COUNT, WIDTH, 1, CacheOptions(), accelerator)
    assert asked == ([accelerator.device] if held else [])


def test_what_many_rows_cost_is_said_before(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for tried in range(2):  # few rows are computed at once, of many some are for the estimate
        monkeypatch.setattr(features, "MANY", COUNT if tried else COUNT + 1)
        clock = iter((0.0, 16 * 6.0))  # six seconds a row
        monkeypatch.setattr(features.time, "perf_counter", lambda clock=clock: next(clock))
        cached_rows("toy", tried, COUNT, 1, WIDTH, "bf16", front, shown=True)
        said = capsys.readouterr().err
        assert ("about 5.0 minutes to compute" in said) == bool(tried)


def test_computed_once_and_a_changed_recipe_is_a_miss() -> None:
    asked: list[int] = []

    def counted(view: int, places: Sequence[int]) -> torch.Tensor:
        asked.extend(places)
        return front(view, places)

    make({"weights": "a"}, counted)
    assert sorted(asked) == sorted([*range(COUNT), *range(COUNT)])
    make({"weights": "a"}, counted)
    assert len(asked) == 2 * COUNT
    make({"weights": "b"}, counted)
    assert len(asked) == 4 * COUNT


def test_goes_on_after_an_error_where_it_stopped() -> None:
    asked: list[int] = []

    def failing(view: int, places: Sequence[int]) -> torch.Tensor:
        if len(asked) == 3 * 8:
            raise KeyboardInterrupt
        asked.extend(places)
        return front(view, places)

    with pytest.raises(KeyboardInterrupt):
        make(compute=failing)
    done: list[int] = []

    def counted(view: int, places: Sequence[int]) -> torch.Tensor:
        done.extend(places)
        return front(view, places)

    rows = make(compute=counted)
    assert len(done) == 2 * COUNT - 3 * 8
    assert torch.equal(rows.rows(1, range(COUNT)), front(1, range(COUNT)).bfloat16())


def _fill(log: str, chunk_bytes: int, seconds: float) -> None:
    features.CHUNK_BYTES = chunk_bytes

    def slow(view: int, places: Sequence[int]) -> torch.Tensor:
        time.sleep(seconds)
        with Path(log).open("a") as file:
            file.write(json.dumps([os.getpid(), view, *places]) + "\n")
        return front(view, places)

    rows = make(compute=slow)
    assert torch.equal(rows.rows(0, range(COUNT)), front(0, range(COUNT)).bfloat16())


def test_processes_share_the_work_and_finish_what_a_killed_one_left(tmp_path: Path) -> None:
    log = tmp_path / "log"
    start = multiprocessing.get_context("fork").Process
    two = [start(target=_fill, args=(str(log), features.CHUNK_BYTES, 0.05)) for _ in range(2)]
    for process in two:
        process.start()
    for process in two:
        process.join()
    assert [process.exitcode for process in two] == [0, 0]
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    chunks = [(view, places[0]) for _, view, *places in lines]
    assert len(chunks) == len(set(chunks)) == 14  # each once
    assert len({pid for pid, *_ in lines}) == 2  # by both

    shutil.rmtree(tmp_path / "foundation-labs")
    log.unlink()
    killed = start(target=_fill, args=(str(log), features.CHUNK_BYTES, 0.1))
    killed.start()
    while not log.exists() or len(log.read_text().splitlines()) < 3:
        time.sleep(0.01)
    waiting = start(target=_fill, args=(str(log), features.CHUNK_BYTES, 0.001))
    waiting.start()  # meets the claim of the first one, which then dies with it
    time.sleep(0.03)
    assert killed.pid is not None
    os.kill(killed.pid, signal.SIGKILL)
    waiting.join()
    assert waiting.exitcode == 0


def test_a_full_disk_and_a_broken_cache_are_said_in_a_line(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(cache)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=100))
    with pytest.raises(LabError, match=r"frozen features need 0.00 MB .* 0.00 MB are free.*--no-cache"):
        make()
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    folder = make().folder
    np.save(folder / "view-0.npy", np.zeros(3))
    with pytest.raises(
        LabError, match=r"cannot be used .*view-0.npy holds.*delete it, set XDG_CACHE_HOME .*, or add --no-cache"
    ):
        make()
    (folder / "view-1.npy").unlink()
    with pytest.raises(LabError, match=r"cannot be used .*delete it, set XDG_CACHE_HOME .*, or add --no-cache"):
        make()


class Front(torch.nn.Linear):
    """Counts what goes through it."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(3, WIDTH)
        self.sizes: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(x))
        return super().forward(x)


def of_front(front: Front, recipe: object = 1, cache: bool = True) -> features.Rows:
    inputs = torch.arange(COUNT * 3.0).reshape(COUNT, 3)
    return features.front_rows(
        "toy/front", front, lambda view, places: front(inputs[list(places)] + view), COUNT, WIDTH, recipe,
        CacheOptions(cache), make_accelerator(TrainingOptions()), views=2, batch=5,
    )  # fmt: skip


def test_a_front_runs_once_for_each_sample_in_batches_and_without_a_gradient() -> None:
    front = Front()
    rows = of_front(front)
    assert sum(front.sizes) == 2 * COUNT
    assert max(front.sizes) == 5
    assert isinstance(rows, CachedRows)
    assert (
        features.disk_bytes([rows, None, of_front(Front(), cache=False)]) == rows.bytes_on_disk == 2 * COUNT * WIDTH * 2
    )
    again = Front()
    assert torch.equal(of_front(again).rows(1, range(COUNT)), rows.rows(1, range(COUNT)))
    assert not again.sizes, "read from the disk"
    plain = of_front(Front(), cache=False).rows(1, [3, 4])
    assert torch.equal(plain, rows.rows(1, [3, 4]))
    assert not plain.requires_grad


def test_everything_that_the_output_depends_on_is_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = make_accelerator(TrainingOptions())

    def key(front: torch.nn.Module) -> str:
        return json.dumps(features.front_key(front, accelerator))

    plain = key(Front())
    assert key(Front()) == plain
    moved, other, configured = Front(), torch.nn.Sequential(Front(), torch.nn.ReLU()), Front()
    with torch.no_grad():
        moved.bias[0] += 1
    configured.config = {"attention": "eager"}
    headed = Front()
    headed.heads = 3  # a plain attribute, which a module's description may leave out
    padded = torch.nn.Conv2d(3, 6, 3, padding=1)
    unpadded = torch.nn.Conv2d(3, 6, 3)
    unpadded.load_state_dict(padded.state_dict())
    monkeypatch.setattr(accelerator.state, "_mixed_precision", "bf16")
    rounded = key(Front())
    monkeypatch.undo()
    monkeypatch.setattr(features, "_version", lambda name: "9")
    of_other_libraries = key(Front())
    monkeypatch.undo()
    keys = [
        plain,
        key(moved),
        key(other),
        key(configured),
        key(headed),
        key(padded),
        key(unpadded),
        rounded,
        of_other_libraries,
    ]
    assert len(set(keys)) == len(keys)


def test_a_chunk_is_at_most_a_few_hundred_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """With small rows the first sign of progress came after minutes, and a kill lost everything."""
    monkeypatch.setattr(features, "CHUNK_BYTES", 2**25)
    asked: list[int] = []

    def compute(view: int, places: Sequence[int]) -> torch.Tensor:
        asked.append(len(places))
        return torch.zeros(len(places), 1)

    cached_rows("small", 1, 1000, 1, 1, "bf16", compute, shown=False)
    assert max(asked) == features.CHUNK_ROWS == 256
    assert sum(asked) == 1000
