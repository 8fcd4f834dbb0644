"""What several GPUs hold each, and the option that asks for it; the labs compare whole plans with what was measured."""

import os
from pathlib import Path

import pytest
import torch

from labs_common.errors import LabError
from labs_common.options import PlanOptions
from labs_common.plan import Held, Sharing, before_step, held_by, sharing_asked

pytestmark = pytest.mark.quick
HELD = Held(parameters=10, trained=5, weights=800, gradients=400, optimizer=1600, outside=50, layer=30)
LAUNCH = Path(__file__).parents[2] / "llm_peft_fa" / "launch"


def test_gpus_share_what_they_spread() -> None:
    def parts(sharing: Sharing) -> tuple[int, int, int]:
        held = HELD.shared(sharing)
        return held.weights, held.gradients, held.optimizer

    assert HELD.shared(Sharing()) == HELD
    assert parts(Sharing(8)) == (800, 400, 1600)
    assert parts(Sharing(8, stage=1)) == (800, 400, 200)
    assert parts(Sharing(8, stage=2)) == (800, 50, 200)
    assert parts(Sharing(8, stage=3)) == parts(Sharing(8, fsdp=True)) == (100, 50, 200)
    assert HELD.shared(Sharing(8)).buffers == 400, "DistributedDataParallel's buckets of gradients"
    assert HELD.shared(Sharing(8, fsdp=True)).buffers == 50 + 2 * 30
    assert HELD.shared(Sharing(8, stage=2)).buffers == 4 * 500_000_000, "DeepSpeed's bucket, whatever the model"
    assert HELD.shared(Sharing(8, stage=3)).buffers == 4 * 500_000_000 + 800, "a small model stays gathered"


@pytest.mark.parametrize(
    ("file", "gpus", "wanted"),
    [("fsdp", 8, Sharing(8, fsdp=True)), ("fsdp", 0, Sharing(2, fsdp=True)), ("deepspeed_zero2", 4, Sharing(4, 2)),
     ("deepspeed_zero3", 4, Sharing(4, 3)), ("multi_gpu", 0, Sharing(2)), (None, 4, Sharing(4)), (None, 0, Sharing())],
)  # fmt: skip
def test_a_launch_that_is_not_under_way(file: str | None, gpus: int, wanted: Sharing) -> None:
    launch = None if file is None else LAUNCH / f"{file}.yaml"
    assert sharing_asked(PlanOptions(gpus=gpus, plan_launch=launch)) == wanted


def test_a_launch_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the variables that `accelerate launch` sets."""
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert sharing_asked(PlanOptions()) == Sharing(16)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert sharing_asked(PlanOptions()) == Sharing(16, fsdp=True)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    assert sharing_asked(PlanOptions(gpus=4)) == Sharing(4, 3)


def test_what_is_no_launch(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- 1\n")
    common = "num_processes: 2\ndistributed_type: "
    (tmp_path / "elsewhere.yaml").write_text(
        f"{common}DEEPSPEED\ndeepspeed_config: {{deepspeed_config_file: x.json}}\n"
    )
    offload = "{zero_stage: 2, offload_optimizer_device: cpu}"
    (tmp_path / "host.yaml").write_text(f"{common}DEEPSPEED\ndeepspeed_config: {offload}\n")
    (tmp_path / "parts.yaml").write_text(f"{common}FSDP\nfsdp_config: {{fsdp_offload_params: true}}\n")
    os.mkfifo(tmp_path / "pipe.yaml")
    for name, said in (
        ("list", "is no configuration of Accelerate"), ("none", "cannot be read"), ("pipe", "cannot be read"),
        ("elsewhere", "does not say zero_stage"), ("host", "the host's memory"), ("parts", "the host's memory"),
    ):  # fmt: skip
        file = tmp_path / f"{name}.yaml"
        with pytest.raises(LabError, match=f"--plan-launch {file}: .*{said}"):
            sharing_asked(PlanOptions(plan_launch=file))


def test_units_and_what_is_there_before_a_step() -> None:
    """Three layers of 4 × 4, of which the first is frozen, behind 4 × 8 that trains."""
    with torch.device("meta"):
        layers = [torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False)) for _ in range(3)]
        model = torch.nn.Sequential(torch.nn.Linear(8, 4, bias=False), torch.nn.ModuleList(layers))
    layers[0].requires_grad_(False)
    held = held_by(model, "bf16", moments=1)
    assert (held.parameters, held.trained) == (32 + 48, 32 + 32)
    assert (held.weights, held.gradients, held.optimizer) == (4 * 80, 4 * 64, 4 * 64)
    assert (held.outside, held.layer) == (4 * 32, 2 * 16), "a layer travels in 16 bits"
    assert held_by(model, "no").layer == 4 * 16

    def there(sharing: Sharing, accumulating: bool = False) -> list[bool]:
        before_step(model, "bf16", sharing, accumulating)
        return [parameter.grad is not None for parameter in model.parameters()]

    assert there(Sharing()) == [False] * 4
    assert there(Sharing(), accumulating=True) == there(Sharing(2, stage=2)) == [True, False, True, True]
    assert there(Sharing(2, fsdp=True)) == [False, False, True, True], "those outside of layers come and stay"
    assert [parameter.dtype for parameter in model.parameters()] == [torch.float32] + [torch.bfloat16] * 3
