import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from labs_common.device import (
    CPU,
    Later,
    begin_fast_arithmetic,
    constant,
    exact_float32,
    expect_fixed_shapes,
    mixed_precision,
    pinned,
    to_device,
    widest_float,
)

pytestmark = pytest.mark.quick
GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    """Puts torch's settings back."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.benchmark = before[1]


def test_only_a_gpu_gets_other_settings() -> None:
    for device, matrices, benchmark in ((CPU, "highest", False), (GPU, "high", True)):
        begin_fast_arithmetic(device)
        expect_fixed_shapes(device)
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark) == (matrices, benchmark)


def test_exact_float32_is_without_autocast_and_tf32_and_puts_both_back() -> None:
    begin_fast_arithmetic(GPU)
    with exact_float32(GPU):
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == "high"
    matrix = torch.rand(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert (matrix @ matrix).dtype == torch.bfloat16
        with exact_float32(CPU):
            assert torch.equal(matrix @ matrix, torch.mm(matrix, matrix))
            assert (matrix @ matrix).dtype == torch.float32
        assert (matrix @ matrix).dtype == torch.bfloat16


def test_apple_gpus_have_no_float64() -> None:
    assert widest_float(torch.device("mps")) == torch.float32
    assert widest_float(CPU) == widest_float(GPU) == torch.float64


def test_a_constant_is_made_once_and_can_train_after_an_evaluation() -> None:
    with torch.inference_mode():
        made = constant((0.25, 0.5), CPU)
    assert constant((0.25, 0.5), CPU) is made
    weight = torch.ones(2, requires_grad=True)
    (weight * made).sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [0.25, 0.5]


def test_on_a_cpu_nothing_is_copied() -> None:
    tensor = torch.rand(3)
    assert pinned(tensor, CPU) is tensor
    assert to_device(tensor, CPU) is tensor
    assert Later(tensor).read() is tensor


@pytest.mark.parametrize(
    ("gpu", "native", "expected"), [(True, True, "bf16"), (True, False, "fp16"), (False, False, "no")]
)
def test_auto_is_the_precision_that_the_gpu_computes_in(
    gpu: bool, native: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A T4 says that it supports bf16, but emulates it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    assert mixed_precision("auto") == expected
    assert (mixed_precision("fp32"), mixed_precision("bf16"), mixed_precision("fp16")) == ("no", "bf16", "fp16")


@pytest.mark.alone
def test_memory() -> None:
    # In a process of its own: another test may have held more before.
    code = """import torch
from labs_common.device import peak_memory
before = peak_memory()
block = torch.ones(1 << 30, dtype=torch.uint8)
print(peak_memory() - before)"""
    grown = int(subprocess.check_output([sys.executable, "-c", code], text=True))
    assert 1 << 29 <= grown <= 3 << 29, "importing torch may have held more than is held now"
