import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from labs_common.data.images import decoding_threads
from labs_common.steps import ShuffledSteps, own_part, read_ahead

pytestmark = pytest.mark.quick


def steps(samples: int = 23, size: int = 5, **more: object) -> ShuffledSteps:
    return ShuffledSteps(samples, size, 7, lambda places, epoch, step: [(step, epoch, places)], **more)


def test_each_sample_comes_once_in_an_epoch_in_an_order_of_the_seed_and_the_epoch() -> None:
    source = steps()
    assert len(source) == 5
    epochs = [[part for (part,) in source.steps(epoch, 0)] for epoch in (0, 1)]
    for epoch, parts in enumerate(epochs):
        assert [step for step, _, _ in parts] == [epoch * 5 + place for place in range(5)]
        assert Counter(place for *_, places in parts for place in places) == Counter(range(23))
    first, second = ([place for *_, places in parts for place in places] for parts in epochs)
    assert first == np.random.default_rng([7, 0]).permutation(23).tolist()
    assert first != second
    assert [part for (part,) in source.steps(0, 3)] == epochs[0][3:], "resumed in the middle"


def test_whole_batches_and_another_order() -> None:
    assert len(steps(whole=True)) == 4
    assert len(list(steps(whole=True).steps(0, 0))) == 4
    backwards = steps(order=lambda epoch: range(22, -1, -1))
    assert next(backwards.steps(0, 0)) == [(0, 0, [22, 21, 20, 19, 18])]


@pytest.mark.parametrize(("count", "processes"), [(10, 1), (10, 3), (2, 3), (1, 4)])
def test_shares_average_over_processes_to_the_mean_over_all_samples(count: int, processes: int) -> None:
    values = np.random.default_rng(0).random(count)
    parts = [own_part(range(count), rank, processes) for rank in range(processes)]
    means = [values[mine].mean() * share for mine, share in parts]
    assert np.mean(means) == pytest.approx(values.mean())
    assert Counter(place for mine, share in parts if share for place in mine) == Counter(range(count))
    assert all(mine for mine, _ in parts), "every process takes part"


def test_the_next_step_is_read_while_one_is_computed() -> None:
    read: list[int] = []
    ahead = read_ahead(lambda step: read.append(step) or step, range(2, 6))
    assert next(ahead) == 2
    for _ in range(1000):
        if read == [2, 3]:
            break
        time.sleep(0.01)
    assert read == [2, 3], "the next, and no more than the next"
    assert list(ahead) == [3, 4, 5]


def test_torch_starts_no_threads_where_steps_are_read() -> None:
    """They would be more than there are cores, and every operator of the training would wait for sleeping ones."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert list(read_ahead(lambda step: torch.get_num_threads(), range(2))) == [1, 1]
        assert decoding_threads().submit(torch.get_num_threads).result() == 1
        assert torch.get_num_threads() == 3
        with ThreadPoolExecutor(1) as later:
            assert later.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(before)
