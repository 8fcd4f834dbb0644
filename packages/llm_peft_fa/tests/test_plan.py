"""The plan against the allocator's own account of real steps, and against figures for models that fit no test."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from commands import here
from labs_testing.pretended import pretended_gpu
from labs_testing.sharded import fake_group
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

from labs_common.errors import LabError
from labs_common.memory import Cost
from labs_common.plan import USABLE, Held, Machine, Sharing
from labs_common.sharding import shard
from llm_peft_fa import plan as module
from llm_peft_fa.attention import NAME
from llm_peft_fa.config import MethodOptions, ModelOptions, TrainConfig
from llm_peft_fa.losses import chunk_positions
from llm_peft_fa.methods import METHODS, Setting, apply_method, complete
from llm_peft_fa.model import PackedCausalLM, base_of, virtual_tokens
from llm_peft_fa.packing import packed_row
from llm_peft_fa.plan import Plan, fitted, outline, plan_of, useful_rows
from llm_peft_fa.templates import Encoded

CPU = Machine(False, 10**10, 10**10, "no", False)
LENGTH = 128
LLAMA_3B = LlamaConfig(
    vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
    num_key_value_heads=8, head_dim=128, tie_word_embeddings=True, max_position_embeddings=131072,
)  # fmt: skip
WIDE = LlamaConfig(
    vocab_size=32000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=2, tie_word_embeddings=True,
)  # fmt: skip
SMALL = LlamaConfig(
    vocab_size=8000, hidden_size=64, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=8192, tie_word_embeddings=True,
)  # fmt: skip


def config_of(folder: Path, config: LlamaConfig, method: str, **options: object) -> TrainConfig:
    """A training on a directory that holds a configuration and nothing else."""
    config.save_pretrained(folder)
    model = ModelOptions(model=str(folder))
    return complete(TrainConfig(model=model, method=MethodOptions(method=method, **options)))


def two_steps(
    config: TrainConfig,
    tokens: int,
    checkpointing: bool,
    device: str = "cpu",
    bf16: bool = False,
    chunk: int | None = None,
) -> None:
    """Makes the model and takes steps with a row of so many tokens."""
    torch.manual_seed(0)
    method = dataclasses.replace(config.method, prompt_init="random" if config.method.prompt_init else None)
    base = AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(config.model.model), attn_implementation=NAME)
    base = base.bfloat16() if bf16 else base.float()
    model = PackedCausalLM(apply_method(base, method, Setting(None, 100)), "blocks", chunk).train().to(device)
    if checkpointing:
        base_of(model.model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    virtual = virtual_tokens(model.model)
    items = [Encoded([1] * (LENGTH - virtual), [True] * (LENGTH - virtual), "")] * (tokens // LENGTH)
    row = packed_row(items, virtual=virtual).to(torch.device(device))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for _ in range(2):
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = model(row)
        loss.backward()
        optimizer.step()  # in the second pass its moments are there, and gradients, as in a step of several rows


def allocated(config: TrainConfig, tokens: int, checkpointing: bool) -> int:
    """The most bytes that PyTorch's allocator held at once in two real steps, by its own record of every block."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        two_steps(config, tokens, checkpointing)
    held = most = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@pytest.mark.alone
@pytest.mark.parametrize(
    ("method", "options", "rows"),
    [("lora", {"rank": 4}, 1536), ("layers", {"layers": 1, "which": "last"}, 1024), ("prompt_tuning", {}, 1024)],
)
def test_the_plan_is_what_the_allocator_gives(
    tmp_path: Path, method: str, options: dict[str, object], rows: int
) -> None:
    """For rows that are not those (2048 and 4096 tokens) from which it is made."""
    config = config_of(tmp_path, SMALL, method, **options)
    plan = plan_of(config, CPU, LENGTH)
    for checkpointing in (False, True):
        real = allocated(config, rows, checkpointing)
        assert plan.peak(rows, checkpointing) == pytest.approx(real, rel=0.15), checkpointing


@pytest.mark.pretended
def test_the_plan_is_the_peak_on_a_pretended_gpu(tmp_path: Path) -> None:
    """In bf16, with few layers and words; the same without a GPU, in float32 and with more layers is compared above."""
    shallow = LlamaConfig.from_dict(SMALL.to_dict() | {"num_hidden_layers": 2, "vocab_size": 1000})
    config = config_of(tmp_path, shallow, "lora", rank=4)
    plan = plan_of(config, Machine(True, 10**7, 10**7, "bf16", False), LENGTH)
    for checkpointing in (False, True):
        with pretended_gpu() as gpu:
            two_steps(config, 1024, checkpointing, "cuda", bf16=True, chunk=plan.chunk)
            peak = gpu.peak
        assert plan.peak(1024, checkpointing) == pytest.approx(peak, rel=0.15), checkpointing


@pytest.mark.alone
@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_plan_of_eight_gpus_is_what_torch_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """PyTorch's own account of a step under FSDP2, on shapes, by the first of eight processes."""
    config = config_of(tmp_path, WIDE, method)
    plan = plan_of(config, Machine(False, 10**10, 10**10, "bf16", True), 512, Sharing(8, fsdp=True))
    row = packed_row([Encoded([1] * 512, [True] * 512, "")])
    model = PackedCausalLM(outline(config.model.model, config.method, torch.bfloat16), "shapes", plan.chunk).train()
    with fake_group():
        mesh = init_device_mesh("cpu", (8,))  # a process finds its place in it by values, which shapes do not have
        monkeypatch.setattr(
            "torch.distributed.fsdp._fully_shard._fully_shard._init_default_mesh", lambda *_, **__: mesh
        )
        with FakeTensorMode(allow_non_fake_inputs=True):
            for part in model.modules():
                for own in (part._parameters, part._buffers):
                    for name, tensor in own.items():
                        if isinstance(tensor, torch.nn.Parameter):  # those that are tied are so again below
                            own[name] = torch.nn.Parameter(
                                torch.empty(tensor.shape, dtype=tensor.dtype), tensor.requires_grad
                            )
                        elif tensor is not None:
                            own[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
            base_of(model.model).tie_weights()
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=False)
            shard(model, torch.device("cpu"), "bf16", optimizer=optimizer)
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
            optimizer.step()  # makes its moments
            with FSDPMemTracker(model, optimizer) as tracker:
                with torch.autocast("cpu", torch.bfloat16):
                    loss = model(row)
                loss.backward()
                optimizer.step()
    counted = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    assert plan.peak(512, False) == pytest.approx(counted, rel=0.15)


@pytest.mark.alone
def test_figures_of_llama_3_2_3b(tmp_path: Path) -> None:
    """As measured for all 28 layers at once on shapes: 15.4 GB for 2,048 tokens, 24.3 GB for 4,096, 27.8 TFLOP."""
    config = config_of(tmp_path, LLAMA_3B, "lora")
    plan = plan_of(config, Machine(True, 24 * 10**9, 23 * 10**9, "bf16", True))
    assert plan.held.parameters - plan.held.trained == 3_212_749_824, "as its model card has it"
    assert plan.peak(2048, False) == pytest.approx(15.4e9, rel=0.15)
    assert plan.peak(4096, False) == pytest.approx(24.3e9, rel=0.15)
    assert plan.flops(2048, False) == pytest.approx(27.8e12, rel=0.02)
    assert plan.flops(2048, True) > 1.2 * plan.flops(2048, False), "the forward pass comes twice"
    usable = 0.9 * 23e9
    assert plan.choice([4096], usable) == (4096, True), "the row stays, and checkpointing makes it fit"
    assert plan.choice([512, 1024, 2048, 4096], usable) == (2048, False)


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the measuring on shapes, where only what is counted matters."""
    monkeypatch.setattr(module, "step_cost", lambda *_: Cost(10, 20, 30))


@pytest.mark.alone
@pytest.mark.usefixtures("unmeasured")
def test_what_is_counted(tmp_path: Path) -> None:
    gpu = Machine(True, 80 * 10**9, 79 * 10**9, "bf16", True)
    gemma = Gemma2Config(
        vocab_size=256000, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8,
        num_key_value_heads=4, head_dim=256,
    )  # fmt: skip
    plan = plan_of(config_of(tmp_path / "gemma", gemma, "full"), gpu)
    assert plan.held.parameters == plan.held.trained == 2_614_341_888, "as its model card has it"
    # Trained weights and their gradients are in float32, and AdamW has two moments of each.
    assert (plan.held.gradients, plan.held.optimizer) == (4 * plan.held.trained, 8 * plan.held.trained)
    assert plan.held.weights == pytest.approx(4 * plan.held.parameters, rel=1e-4)
    assert plan.chunk == chunk_positions(256000, 80 * 10**9) == 1220

    lora, qlora = (plan_of(config_of(tmp_path / name, LLAMA_3B, name), gpu) for name in ("lora", "qlora"))
    linear = 28 * (2 * 3072 * 3072 + 2 * 3072 * 1024 + 3 * 3072 * 8192)
    assert lora.held.trained == qlora.held.trained
    # Dettmers et al. 2023: double quantisation takes 0.127 bits more than four for a weight.
    assert lora.held.weights - qlora.held.weights == pytest.approx(linear * (16 - 4.127) / 8, rel=1e-3)
    assert qlora.extra == 2 * 3072 * 8192


@pytest.mark.usefixtures("unmeasured")
def test_what_optimizers_hold(tmp_path: Path) -> None:
    """Bytes of weights, gradients and moments for each value; bitsandbytes scales 256 moments by 4 bytes."""
    gpu = Machine(True, 24 * 10**9, 23 * 10**9, "bf16", True)
    scales = 2 * 4 / 256
    for optimizer, pure, each in (
        ("adamw", False, (4, 4, 8)),
        ("adamw_8bit", False, (4, 4, 2 + scales)),
        ("adamw_8bit", True, (2, 2, 2 + scales)),
        ("paged_adamw_8bit", True, (2, 2, scales)),
    ):
        config = config_of(tmp_path, WIDE, "full", pure_bf16=pure)
        config.training.optimizer = optimizer
        held = plan_of(config, gpu).held
        for found, expected in zip((held.weights, held.gradients, held.optimizer), each, strict=True):
            assert found / held.trained == pytest.approx(expected, rel=0.01, abs=0.002), optimizer
    config.training.optimizer = "adamw_8bit"
    with pytest.raises(LabError, match="--precision bf16"):  # an older GPU
        plan_of(config, Machine(True, 16 * 10**9, 15 * 10**9, "fp16", False))


@pytest.mark.alone
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.usefixtures("unmeasured")
def test_every_method_has_a_plan(tmp_path: Path, method: str) -> None:
    plan = plan_of(config_of(tmp_path, SMALL, method), CPU)
    assert 0 < plan.held.trained <= plan.held.parameters


LINE = Plan(
    Held(parameters=10, trained=2, weights=600, gradients=100, optimizer=200, outside=50, layer=30), chunk=8,
    short=(1000, Cost(1000, 900, 5), Cost(100, 200, 6)), long=(2000, Cost(2000, 1900, 10), Cost(200, 300, 12)),
)  # fmt: skip


def test_the_choice_prefers_what_is_fast() -> None:
    assert [LINE.peak(tokens, on) for tokens, on in ((500, False), (4000, False), (4000, True))] == [1400, 4900, 1400]
    assert LINE.choice([1000, 4000], 5000) == (4000, False)
    assert LINE.choice([1000, 4000], 2000) == (1000, False), "a shorter row before checkpointing"
    assert LINE.choice([1000, 4000], 1450) == (4000, True)
    assert LINE.choice([1000, 4000], 1000) is None
    assert useful_rows(1900) == [512, 1024, 2048], "none longer than a step needs"


def test_a_gpu_gets_what_fits_and_a_cpu_what_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, accelerator = config_of(tmp_path, SMALL, "lora"), Accelerator()
    here_ = fitted(config, accelerator, [30] * 100)
    assert (here_.data.tokens_per_batch, here_.model.gradient_checkpointing) == (2048, False)
    monkeypatch.setattr(
        module, "plan_of", lambda *_: dataclasses.replace(LINE, held=dataclasses.replace(LINE.held, weights=10**6))
    )
    gpu = Machine(True, 10**9, 10**9, "bf16", True)
    assert module._choice(config, accelerator, gpu, [30] * 100) == (2048, False), "too small to be measured"
    for free, lengths, chosen in (
        (1_010_000, [30] * 100, (1024, False)),  # 32 conversations need no longer row
        (1_003_000, [30] * 100, (1024, False)),
        (1_001_200, [30] * 100, (512, False)),
        (1_000_600, [30] * 100, (1024, True)),
        (1_000_100, [30] * 100, (512, True)),  # nothing fits: the least, and a line says so
        (1_003_000, [30] * 99 + [3000], (2048, True)),  # one is longer than any row
    ):
        machine = dataclasses.replace(gpu, free=free / USABLE)
        assert module._choice(config, accelerator, machine, lengths) == chosen, (free, lengths[-1])


@pytest.mark.alone
def test_the_command_prints_it_and_loads_nothing(
    gemma_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    SMALL.save_pretrained(tmp_path / "shapes")
    monkeypatch.chdir(tmp_path)
    costs = Cost(10**9, 2 * 10**9, 10**12)
    monkeypatch.setattr(module, "step_cost", lambda *_: costs)
    for folder in (gemma_dir, tmp_path / "shapes"):
        said = here("train", "--plan", "--model", folder, "--gpu-memory", "24").stdout
        assert "chosen: --tokens-per-batch" in said
    assert re.search(r"2,048: +2.0 GB +2.0 GB fits", said)
    said = here("train", "--plan", "--model", folder, "--gpu-memory", "1").stdout
    assert "nothing fits" in said
    assert [path.name for path in tmp_path.iterdir()] == ["shapes"], "no run is begun"
