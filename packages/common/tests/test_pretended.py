"""The pretended GPU raises what CUDA raises and counts exactly; and a check on it fails where a training has a bug."""

import copy
import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from labs_testing.pretended import Gpu, pretended_gpu
from labs_testing.pretended_runs import Asked, Budget, Ran, assert_within, on_pretended_gpu


@pytest.fixture
def gpu() -> Iterator[Gpu]:
    with pretended_gpu() as gpu:
        yield gpu


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape, device="cuda")


MIXED = "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"


@pytest.mark.parametrize(
    ("program", "error", "says"),
    [
        (lambda: ones(2) + torch.ones(2), RuntimeError, MIXED),
        (lambda: torch.ones(2) + ones(2), RuntimeError, MIXED),
        (lambda: torch.tensor(1.0).add_(ones()), RuntimeError, MIXED),
        (lambda: torch.cat([ones(2), torch.ones(2)]), RuntimeError, MIXED),
        (lambda: torch.stack([ones(), torch.tensor(1.0)]), RuntimeError, MIXED),
        (lambda: torch.nn.Linear(2, 2)(ones(1, 2)), RuntimeError, MIXED),
        (lambda: torch.nn.Linear(2, 2).to("cuda")(torch.ones(1, 2)), RuntimeError, MIXED),
        (lambda: F.cross_entropy(ones(2, 3), torch.tensor([0, 1])), RuntimeError, MIXED),
        (lambda: torch.nn.Embedding(3, 2).cuda()(torch.tensor([0])), RuntimeError, MIXED),
        (lambda: torch.ones(2).where(ones(2) > 0, 0), RuntimeError, MIXED),
        (lambda: ones(3).index_put_((torch.tensor([0, 1]),), torch.ones(2)), RuntimeError, MIXED),
        (lambda: torch.ones(3)[ones(2).long()], RuntimeError, "indices should be either on cpu"),
        (lambda: ones(2).numpy(), TypeError, "can't convert cuda:0 device type tensor to numpy"),
        (lambda: np.asarray(ones(2)), TypeError, "can't convert cuda:0 device type tensor to numpy"),
        (lambda: torch.randn(2, device="cuda", generator=torch.Generator()), RuntimeError, "Expected a 'cuda' device"),
        (lambda: torch.randn(2, generator=torch.Generator("cuda")), RuntimeError, "Expected a 'cpu' device"),
    ],
)  # fmt: skip
def test_it_raises_what_cuda_raises(program: Callable[[], object], error: type[Exception], says: str, gpu: Gpu) -> None:
    with pytest.raises(error, match=says.replace("(", r"\(")):
        program()


def test_where_tensors_are(gpu: Gpu) -> None:
    x, model = ones(2, 3), torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LSTM(3, 3)).to("cuda")
    x[:, torch.tensor([0])], x + torch.tensor(1.0), x.masked_fill_(x > 1, torch.tensor(0.0))  # as CUDA allows
    out, _ = model(x)
    out.sum().backward()
    there = [x, x.T[0], x.detach(), torch.zeros_like(x), x.new_zeros(2), torch.arange(3, device=x.device), x.cpu().to(x),
             out, *model.parameters(), *(p.grad for p in model.parameters()), copy.deepcopy(x),
             *copy.deepcopy(model).parameters(), F.one_hot(x.long(), 4), torch.tensor([1], device="cuda")]  # fmt: skip
    assert {str(tensor.device) for tensor in there if tensor is not None} == {"cuda:0"}
    assert all(tensor.is_cuda and not tensor.is_cpu for tensor in there if tensor is not None)
    here = [
        x.cpu(),
        x.to("cpu", torch.float64),
        torch.zeros_like(x, device="cpu"),
        torch.ones(2),
        torch.tensor(x.tolist()),
    ]
    assert {str(tensor.device) for tensor in here} == {"cpu"}
    torch.testing.assert_close(here[0].numpy(), np.ones((2, 3), np.float32))
    # A leaf of the CPU that is sent up gets its gradient on the CPU.
    leaf = torch.ones(2, requires_grad=True)
    (leaf.to("cuda") * 2).sum().backward()
    assert leaf.grad is not None
    assert (leaf.grad.device.type, leaf.grad.tolist()) == ("cpu", [2, 2])


def test_files_name_the_device(gpu: Gpu) -> None:
    file = io.BytesIO()
    torch.save(ones(2), file)
    file.seek(0)
    assert torch.load(file).is_cuda
    file.seek(0)
    assert torch.load(file, map_location="cpu").is_cpu


def test_without_it_such_a_file_cannot_be_read() -> None:
    file = io.BytesIO()
    with pretended_gpu():
        torch.save(ones(2), file)
    file.seek(0)
    with pytest.raises(RuntimeError, match=r"torch\.cuda\.is_available\(\) is False"):
        torch.load(file)
    assert not torch.cuda.is_available(), "nothing of it is left"
    assert torch.ones(2).numpy().sum() == 2


# Of each program: device operators, host syncs, copies between host and device.
COUNTED: dict[str, tuple[Callable[[torch.Tensor], object], tuple[int, int, int]]] = {
    "views are free": (lambda x: x.T[1:].view_as(x.T[1:]).unsqueeze(0).expand(3, -1, -1).detach(), (0, 0, 0)),
    "memory is free": (lambda x: torch.empty(3, device="cuda").new_empty(2), (0, 0, 0)),
    "two kernels": (lambda x: (x + 1) * 2, (2, 0, 0)),
    "a factory": (lambda x: torch.zeros(3, device="cuda"), (1, 0, 0)),
    "nothing on the CPU": (lambda x: torch.ones(3).sum().item(), (0, 0, 0)),
    "item": (lambda x: x.sum().item(), (2, 1, 0)),
    "float and bool": (lambda x: (float(x[0, 0]), bool(x[0, 0] > 0)), (3, 2, 0)),
    "down": (lambda x: x.cpu(), (0, 1, 1)),
    "tolist": (lambda x: x.tolist(), (0, 1, 1)),
    "already there": (lambda x: (x.to("cuda"), x.cuda(), x.to(torch.float32)), (0, 0, 0)),
    "another dtype": (lambda x: x.to("cuda", torch.bfloat16), (1, 0, 0)),
    "up": (lambda x: torch.ones(2).to("cuda"), (0, 1, 1)),
    "numbers up": (lambda x: torch.tensor([1, 2], device="cuda"), (0, 1, 1)),
    "up, not waiting, from pageable memory": (lambda x: torch.ones(2).to("cuda", non_blocking=True), (0, 1, 1)),
    "up, not waiting, from pinned memory": (
        lambda x: torch.ones(2).pin_memory().to("cuda", non_blocking=True), (0, 0, 1),
    ),
    "down, not waiting": (lambda x: x.to("cpu", non_blocking=True), (0, 0, 1)),
    "into": (lambda x: x.copy_(torch.zeros(2, 3)), (0, 1, 1)),
    "a mask as an index": (lambda x: x[torch.ones(2, dtype=torch.bool, device="cuda")], (2, 1, 0)),
    "a number at a mask": (lambda x: x.masked_fill_(x > 2, 0.0), (2, 0, 0)),
    "an index of the CPU": (lambda x: x[torch.tensor([0, 1])], (1, 1, 1)),
    "a list as an index": (lambda x: x[[0, 1]], (1, 1, 1)),
    "a number at a list of places": (lambda x: x.__setitem__((..., [0, 2]), 5.0), (1, 1, 1)),
    "nonzero": (lambda x: x.nonzero(), (1, 1, 0)),
    "one_hot checks nothing": (lambda x: F.one_hot(torch.zeros(2, dtype=torch.long, device="cuda"), 3), (3, 0, 0)),
    "synchronize": (lambda x: torch.cuda.synchronize(), (0, 1, 0)),
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTED)
def test_it_counts_exactly(name: str, gpu: Gpu) -> None:
    program, expected = COUNTED[name]
    x = ones(2, 3)
    before = gpu.totals()
    program(x)
    assert tuple(count - before[kind] for kind, count in gpu.totals().items()) == expected, gpu


def test_a_backward_pass_and_an_optimizer_are_counted_too(gpu: Gpu) -> None:
    x, weight = ones(2, 3), ones(3, 4).requires_grad_()
    before = gpu.totals()
    (x @ weight).sum().backward()  # mm, sum; ones_like, the product with x.T
    assert gpu.totals()["operators"] - before["operators"] == 4
    assert weight.grad is not None
    torch.optim.SGD([weight], lr=0.1, foreach=True).step()
    assert gpu.operators["aten::_foreach_add_"] == 1
    torch.nn.utils.clip_grad_norm_([weight], 1.0)
    assert gpu.totals()["syncs"] == gpu.totals()["copies"] == 0


def test_the_line_is_the_projects(gpu: Gpu) -> None:
    x = ones(3)
    torch.nn.utils.clip_grad_norm_([x], 1.0)
    x.sum().item()
    line = test_the_line_is_the_projects.__code__.co_firstlineno + 3
    assert gpu.syncs == {f"tests/test_pretended.py:{line}": 1}


def test_memory(gpu: Gpu) -> None:
    kept = torch.empty(1000, 256, device="cuda")
    size = kept.numel() * 4
    assert gpu.allocated == size == torch.cuda.memory_allocated()
    view = kept[1:]
    del kept
    assert gpu.allocated == size, "a view keeps all of it"
    del view
    assert (gpu.allocated, gpu.peak) == (0, size)
    ones(1)
    assert gpu.peak == size
    torch.cuda.reset_peak_memory_stats()
    held = ones(1)
    assert torch.cuda.max_memory_allocated() == 512, "as CUDA's allocator rounds"
    del held


def test_autocast_is_cudas(gpu: Gpu) -> None:
    linear, lstm, cell = (module.to("cuda") for module in (
        torch.nn.Linear(3, 3), torch.nn.LSTM(3, 3), torch.nn.LSTMCell(3, 3)))  # fmt: skip
    with torch.autocast("cuda", torch.bfloat16):
        assert torch.is_autocast_enabled("cuda")
        y = linear(ones(2, 3))
        assert y.dtype == torch.bfloat16
        assert cell(ones(2, 3))[0].dtype == torch.bfloat16
        assert lstm(ones(2, 3))[0].dtype == torch.float16, "cuDNN's, whatever is asked for"
        wide = [y.softmax(-1), y.exp(), y.sum(), y.norm(), y**2, F.normalize(y), F.layer_norm(y, (3,)),
                F.cross_entropy(y, ones(2).long())]  # fmt: skip
        assert {tensor.dtype for tensor in wide} == {torch.float32}
        assert {tensor.dtype for tensor in (y + y, y.relu(), y.mean())} == {torch.bfloat16}
        with torch.autocast("cpu", enabled=False):
            assert linear(ones(2, 3)).dtype == torch.bfloat16, "this is of another device"
        with torch.autocast("cuda", enabled=False):
            assert linear(ones(2, 3)).dtype == torch.float32
        assert linear(ones(2, 3)).dtype == torch.bfloat16, "the inner block is over"
    with torch.autocast("cuda"):
        assert linear(ones(2, 3)).dtype == torch.float16, "CUDA's default"
    expected = linear(ones(2, 3))
    torch.testing.assert_close(y.float(), expected, atol=2e-2, rtol=2e-2)


def test_a_gpu_that_only_emulates_bf16() -> None:
    with pretended_gpu(bf16=False):
        assert torch.cuda.is_bf16_supported()
        assert not torch.cuda.is_bf16_supported(including_emulation=False)
        assert torch.cuda.get_device_capability() == (7, 5)


STEPS = ("--max-steps", 5, "--evaluate-every", 5, "--save-every", 3, "--track", "none", "--precision", "bf16")


# The toy has two micro-batches a step, each of two tensors that are sent up and one loss that is read.
TOY = Budget(operators=90, syncs=6, copies=5)


def toy(folder: Path, *more: object) -> Ran:
    asked = Asked("toy.training", ("--output", folder / "run", *STEPS, *more))
    return on_pretended_gpu(["labs_common.fitting"], folder, asked)[0]


@pytest.mark.alone
def test_a_training_is_counted_by_its_lines(tmp_path: Path) -> None:
    ran = toy(tmp_path)
    assert_within(ran, TOY)
    assert len(ran.steps) == 3, "neither the first, nor the one after the checkpoint"
    for step in ran.steps:
        (line, count), *others = ((line, count) for line, count in step["copies"].items() if line.startswith("toy/"))
        assert (count, others) == (4, []), step["copies"]
        assert step["syncs"][line] == 4
        assert step["operators"]["aten::bernoulli_"] == 2, "one for each micro-batch"


@pytest.mark.parametrize("counted", ["operators", "syncs", "copies"])
def test_a_budget_that_is_too_small_names_the_lines(counted: str) -> None:
    done = {"operators": {"aten::mm": 3}, "syncs": {"lab/train.py:7": 2}, "copies": {"lab/data.py:8": 2}}
    limits = {name: sum(lines.values()) for name, lines in done.items()}
    ran = Ran("", "", 0, steps=[{name: {} for name in done}, done])
    assert_within(ran, Budget(**limits))
    with pytest.raises(AssertionError, match=next(iter(done[counted]))):
        assert_within(ran, Budget(**limits | {counted: limits[counted] - 1}))
    with pytest.raises(AssertionError, match="no step was counted"):
        assert_within(Ran("", "", 0), TOY)


@pytest.mark.alone
def test_a_tensor_left_on_the_cpu_is_found(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=MIXED):
        toy(tmp_path, "--seeded-bug", "left on the CPU")


def test_a_step_that_waits_is_found(tmp_path: Path) -> None:
    ran = toy(tmp_path, "--seeded-bug", "waits in each step")
    with pytest.raises(AssertionError, match=r"8 syncs in a step; the budget is 6:\n.*toy/training\.py"):
        assert_within(ran, TOY)


@pytest.mark.pretended
def test_a_resumed_run_has_the_same_bytes(tmp_path: Path) -> None:
    """Weights, optimizer and the random numbers of dropout go back to the device."""
    toy(tmp_path / "whole")
    whole, again = tmp_path / "whole" / "run", tmp_path / "again"
    shutil.copytree(whole, again)
    (again / "model.safetensors").unlink()
    shutil.rmtree(again / "checkpoints" / "step-00000005")
    on_pretended_gpu(["labs_common.fitting"], tmp_path / "said", Asked("toy.training", ("--resume", again)))
    for name in ("metrics.jsonl", "model.safetensors"):
        assert (again / name).read_bytes() == (whole / name).read_bytes(), name
