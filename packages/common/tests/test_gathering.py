"""Losses in chunks and over two processes, against the whole loss in one."""

import multiprocessing
from pathlib import Path

import pytest
import torch

from labs_common.gathering import gathered, in_chunks, mean_over_processes

pytestmark = pytest.mark.quick


def pairs(own: torch.Tensor, labels: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Sum over `own` of a loss with every row of `other`."""
    return ((own @ other.T).logsumexp(1) * (labels + 1)).sum()


@pytest.mark.parametrize("chunk", [1, 3, 10, 4096])
def test_in_chunks_it_is_the_whole_loss_with_its_gradients(chunk: int) -> None:
    torch.manual_seed(0)
    own, other, labels = torch.randn(10, 4).requires_grad_(), torch.randn(7, 4).requires_grad_(), torch.arange(10)
    whole, found = pairs(own, labels, other), in_chunks(pairs, (own, labels), (other,), chunk)
    torch.testing.assert_close(found, whole)
    expected = torch.autograd.grad(3 * whole, [own, other])
    for one, wanted in zip(torch.autograd.grad(3 * found, [own, other]), expected, strict=True):
        torch.testing.assert_close(one, wanted)
    assert not in_chunks(pairs, (own.detach(), labels), (other.detach(),), chunk).requires_grad


def test_in_chunks_it_is_in_float32_under_autocast() -> None:
    """Logits of a hundred: in bf16 they would be off by a half."""
    torch.manual_seed(0)
    own, other, labels = torch.randn(10, 64), 10 * torch.randn(7, 64), torch.arange(10)
    whole = pairs(own, labels, other)
    with torch.autocast("cpu", torch.bfloat16):
        found = in_chunks(pairs, (own, labels), (other,), 4)
        low = in_chunks(pairs, (own.bfloat16(), labels), (other.bfloat16(),), 4)
        assert abs(pairs(own, labels, other) - whole) > 1e-4 * whole, "else this test shows nothing"
    torch.testing.assert_close(found, whole)
    torch.testing.assert_close(low, pairs(own.bfloat16().float(), labels, other.bfloat16().float()))


def one_of_two(rank: int, file: str) -> None:
    """The mean over processes of both halves' losses and gradients is that of the whole; integers are gathered too."""
    torch.manual_seed(0)
    rows, weight, labels = torch.randn(6, 4), torch.randn(4, 5).requires_grad_(), torch.arange(6)
    whole = pairs(rows @ weight, labels, rows @ weight) / 6
    expected = [whole.detach(), *torch.autograd.grad(whole, [weight])]
    torch.distributed.init_process_group("gloo", f"file://{file}", rank=rank, world_size=2)
    mine = slice(3 * rank, 3 * rank + 3)
    own = rows[mine] @ weight
    loss = pairs(own, labels[mine], gathered(own)) / 3
    for found, wanted in zip([loss, *torch.autograd.grad(loss, [weight])], expected, strict=True):
        torch.testing.assert_close(mean_over_processes(found), wanted)
    assert gathered(labels[mine]).tolist() == labels.tolist()
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_loss_and_gradients_of_one(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")  # what the test needs has been imported here
    processes = [context.Process(target=one_of_two, args=(rank, str(tmp_path / "met"))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]


def test_one_process_has_its_own_rows() -> None:
    rows = torch.randn(3, 2)
    assert gathered(rows) is rows
    assert mean_over_processes(rows) is rows
