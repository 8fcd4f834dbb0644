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
    assert parts(Sharing(8, fsdp=True)) == (100, 50, 200)
    assert HELD.shared(Sharing(8)).buffers == 400, "DistributedDataParallel's buckets of gradients"
    assert HELD.shared(Sharing(8, fsdp=True)).buffers == 50 + 2 * 30


@pytest.mark.parametrize("gpus", [1, 2, 8, 64])
def test_zero_as_deepspeed_estimates_it(gpus: int) -> None:
    """Its estimators know one training, of all weights in 16 bits by Adam, and leave out buckets."""
    second = pytest.importorskip("deepspeed.runtime.zero.stage_1_and_2", reason="needs the extra deepspeed")
    third = pytest.importorskip("deepspeed.runtime.zero.stage3")
    count, layer = 3_000_000_000, 100_000_000
    # As the model was before DeepSpeed: a base in 16 bits, and in float32 what trains.
    held = Held(count, count, 4 * count, 4 * count, 8 * count, itemsize=2)

    def states(stage: int) -> tuple[int, int]:
        found = held.shared(Sharing(gpus, stage))
        return found.weights + found.gradients + found.optimizer, found.buffers

    _, wanted = second.estimate_zero2_model_states_mem_needs(count, gpus, cpu_offload=False)
    assert states(2) == (pytest.approx(wanted, rel=1e-6), 2 * 500_000_000)
    _, wanted, gathered = third.estimate_zero3_model_states_mem_needs(count, layer, gpus, cpu_offload=False)
    live = 2 * 1_000_000_000 if gpus > 1 else 0  # instead of one layer: DeepSpeed keeps what it has gathered
    # It leaves out gradients in 16 bits, which are there: a tiny network held 16 bytes a value, 20 in its step.
    assert states(3) == (pytest.approx(wanted - gathered + 2 * count / gpus, rel=1e-6), 2 * 500_000_000 + live)
    whole, _ = states(1)
    assert whole == pytest.approx(states(2)[0] + 2 * count * (1 - 1 / gpus), rel=1e-6), "gradients are whole"


def test_zero_in_float32() -> None:
    """As measured with two processes and an optimizer of the bytes of a value: 20 bytes each, and weights for all."""
    held = Held(parameters=100, trained=50, weights=400, gradients=200, optimizer=400)
    found = held.shared(Sharing(2, 2))
    assert (found.weights, found.gradients, found.optimizer) == (400, 100, 50 * 16 // 2)
    assert found.buffers == 4 * 500_000_000, "a bucket, whatever the model"
    assert held.shared(Sharing(2, 3)).buffers == 4 * 500_000_000 + 400, "a small model stays gathered"


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
    for name, count in (("endless", ".inf"), ("nobody", "0")):
        (tmp_path / f"{name}.yaml").write_text(f"num_processes: {count}\ndistributed_type: MULTI_GPU\n")
    (tmp_path / "text.yaml").write_text(f"{common}FSDP\nfsdp_config: x\n")
    (tmp_path / "deep.yaml").write_text("[" * 1000)
    os.mkfifo(tmp_path / "pipe.yaml")
    for name, said in (
        *((name, "is no configuration of Accelerate") for name in ("list", "endless", "nobody", "deep", "text")),
        ("none", "cannot be read"), ("pipe", "cannot be read"),
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
    assert held.itemsize == 4, "without a weight in 16 bits DeepSpeed leaves all in float32"

    def there(sharing: Sharing, accumulating: bool = False) -> list[bool]:
        before_step(model, "bf16", sharing, accumulating)
        return [parameter.grad is not None for parameter in model.parameters()]

    assert there(Sharing()) == [False] * 4
    assert there(Sharing(), accumulating=True) == there(Sharing(2, stage=2)) == [True, False, True, True]
    assert there(Sharing(2, fsdp=True)) == [False, False, True, True], "those outside of layers come and stay"
    assert [parameter.dtype for parameter in model.parameters()] == [torch.float32] + [torch.bfloat16] * 3
