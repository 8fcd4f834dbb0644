"""Moments in 8 bits against PyTorch's AdamW, weights in bfloat16, and checkpoints of both."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from commands import here
from safetensors import safe_open

from labs_common.checkpoint import load_checkpoint, save_checkpoint
from labs_common.errors import LabError
from llm_peft_fa import optimizers as module
from llm_peft_fa.config import LanguageTrainingOptions, MethodOptions, TrainConfig
from llm_peft_fa.optimizers import OPTIMIZERS, check_optimizer, optimizer_of, rounded

EIGHT_BIT = [name for name, optimizer in OPTIMIZERS.items() if optimizer.eight_bit]


def config_of(optimizer: str, pure: bool = False, rate: float = 1e-2) -> TrainConfig:
    training = LanguageTrainingOptions(optimizer=optimizer, learning_rate=rate, weight_decay=0.1)
    return TrainConfig(training=training, method=MethodOptions(method="full", pure_bf16=pure))


def stepped(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for number in steps:
        rows = torch.randn(16, 96, generator=torch.Generator().manual_seed(number)).to(model.weight.dtype)
        (model(rows) - rows[:, :64]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def made(dtype: torch.dtype = torch.float32) -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(96, 64).to(dtype)  # a matrix of 6144 values in 8 bits, and a bias of 64 that is too small


@pytest.mark.parametrize("name", EIGHT_BIT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eight_bits_step_as_adamw_does(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes", reason="needs the extra llm-peft-fa[quantization]")
    monkeypatch.setattr(module, "SLICE", 1024)  # the matrix is taken in six parts
    exact, ours, start = made(), made(dtype), made().weight.detach()
    stepped(exact, torch.optim.AdamW(exact.parameters(), lr=1e-2, weight_decay=0.1), range(20))
    optimizer = optimizer_of(config_of(name, dtype == torch.bfloat16), ours.parameters())
    stepped(ours, optimizer, range(20))
    way = (exact.weight - start).norm()
    assert (ours.weight.float() - exact.weight).norm() < (0.03 if dtype == torch.float32 else 0.06) * way
    assert {p.dtype for p in ours.parameters()} == {dtype}
    state = optimizer.state[ours.weight]
    assert (state["state1"].dtype, state["step"], len(optimizer.state)) == (torch.uint8, 20, 2)
    for parameter in ours.parameters():  # what a plan counts; paged moments lie elsewhere on a GPU only
        kept = sum(
            optimizer.state[parameter][key].nbytes
            for key in optimizer.state[parameter]
            if key[:-1] in ("state", "absmax")
        )
        assert OPTIMIZERS[name].held(parameter.numel()) == kept


def test_small_steps_are_not_lost_in_bf16() -> None:
    """Of a thousandth of the distance to the next number, a thousandth of the values take it."""
    values = torch.full((1_000_000,), 1 + 2**-7 / 1000)
    found = rounded(values, torch.Generator().manual_seed(0))
    assert set(found.tolist()) == {1.0, 1 + 2**-7}
    assert found.double().mean().item() - 1 == pytest.approx(2**-7 / 1000, rel=0.15)
    assert torch.equal(rounded(-values, torch.Generator().manual_seed(0)), -found), "towards and away from zero alike"
    assert torch.equal(rounded(found.float(), torch.Generator()), found), "what bf16 can hold stays"


def test_a_weight_in_bf16_moves_by_steps_that_it_cannot_hold() -> None:
    """With a gradient that stays, AdamW's step is the learning rate: a 78th of the way down to the next number."""
    pytest.importorskip("bitsandbytes", reason="needs the extra llm-peft-fa[quantization]")
    weight = torch.nn.Parameter(torch.ones(300, 200, dtype=torch.bfloat16))
    config = config_of("adamw_8bit", pure=True, rate=5e-5)
    config.training.weight_decay = 0.0
    optimizer = optimizer_of(config, [weight])
    for _ in range(40):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert 1 - weight.double().mean().item() == pytest.approx(40 * 5e-5, rel=0.05)


@pytest.mark.parametrize("name", EIGHT_BIT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_goes_on_to_the_same_weights(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs the extra llm-peft-fa[quantization]")
    accelerator, config = Accelerator(), config_of(name, dtype == torch.bfloat16)
    model, other = made(dtype), made(dtype)
    optimizer, second = (optimizer_of(config, one.parameters()) for one in (model, other))
    stepped(model, optimizer, range(3))
    save_checkpoint(tmp_path / "step-00000003", accelerator, model, optimizer, {"step": 3})
    stepped(model, optimizer, range(3, 6))
    load_checkpoint(tmp_path / "step-00000003", accelerator, other, second)
    stepped(other, second, range(3, 6))
    assert torch.equal(other.weight, model.weight)
    assert torch.equal(other.bias, model.bias)


def test_a_training_keeps_weights_in_bf16_and_moments_in_bytes(gemma_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs the extra llm-peft-fa[quantization]")
    AcceleratorState._reset_state()  # of the tests before, which has another precision
    run = tmp_path / "run"
    here("train", "--model", gemma_dir, "--method", "full", "--pure-bf16", "--optimizer", "adamw_8bit", "--precision",
         "bf16", "--conversations", "20", "--batch-size", "8", "--max-steps", "4", "--test-prompts", "0", "--track", "none",
         "--no-report", "--output", run)  # fmt: skip
    cost = json.loads((run / "results.json").read_text())["cost"]
    assert 2 * cost["trainable"] < cost["optimizer bytes"] < 3 * cost["trainable"]
    losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [line["validation/loss"] for line in losses if "validation/loss" in line]
    assert found[-1] < found[0]
    AcceleratorState._reset_state()
    with safe_open(run / "model" / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118


@pytest.mark.parametrize(
    ("optimizer", "pure", "precision", "sharded", "said"),
    [
        ("adamw_8bit", True, "fp16", False, "--pure-bf16: needs --precision bf16"),
        ("adamw", True, "bf16", False, "take adamw_8bit"),
        ("paged_adamw_8bit", False, "bf16", True, "take adamw"),
        ("adamw_8bit", False, "bf16", False, r"llm-peft-fa\[quantization\]"),
    ],
)
def test_what_does_not_go_together_is_one_line(
    optimizer: str, pure: bool, precision: str, sharded: bool, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(LabError, match=said):
        check_optimizer(config_of(optimizer, pure), precision, sharded)
