"""Parts of pre-training against peers: neighbours, ranks, LARS, teacher, queue, optimizer groups."""

import dataclasses
import types
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from labs_common.cli import config_from_yaml
from labs_common.errors import LabError, RunStopped
from zsi_contrastive.ssl.config import METHODS, PretrainConfig, complete
from zsi_contrastive.ssl import evaluate as measures
from zsi_contrastive.ssl.train import make, make_optimizer
from zsi_contrastive.ssl.galleries import class_attention
from zsi_contrastive.ssl.methods import LOSSES, Step
from zsi_contrastive.ssl.model import Learner, make_learner
from zsi_contrastive.ssl.teacher import Memory, along_cosine

CONFIGS = Path(__file__).parents[1] / "configs"


def config(method: str, *, hidden: int = 16, **more: object) -> PretrainConfig:
    given = PretrainConfig(method=method)
    given.own.hidden, given.own.outputs = hidden, 8
    for name, value in more.items():
        setattr(given.own, name, value)
    return complete(given)


def learner(of: PretrainConfig) -> torch.nn.Module:
    torch.manual_seed(0)
    return make_learner(of)


def step_of(of: PretrainConfig, network: torch.nn.Module, memory: Memory, seed: int = 1) -> Step:
    generator = torch.Generator().manual_seed(seed)
    views = [torch.randn(6, 3, 32, 32, generator=generator) for _ in range(1 if of.method in ("gim", "cpc") else 2)]
    return Step(network, memory, of.own, Accelerator(cpu=True), views)


def test_neighbours_are_lightlys() -> None:
    peer = pytest.importorskip("lightly.utils.benchmarking", reason="lightly is the independent peer").knn_predict
    torch.manual_seed(0)
    bank, labels = torch.randn(300, 12), torch.randint(7, (300,))
    asked = torch.randn(50, 12)
    found = measures.knn_classes(measures.Features(bank, labels, 7, torch.arange(300)), asked, 21)
    normal = torch.nn.functional.normalize
    expected = peer(normal(asked, dim=1), normal(bank, dim=1).T, labels, 7, 21, 0.1)[:, 0]
    assert (found == expected).float().mean() > 0.99  # of equal votes either may win


def test_effective_rank_and_spread() -> None:
    torch.manual_seed(0)
    rows = torch.randn(2000, 16)
    assert measures.effective_rank(rows) == pytest.approx(16, abs=0.3)
    assert measures.effective_rank(rows[:, :3] @ torch.randn(3, 16)) < 3.1
    assert measures.spread(rows) == pytest.approx(1, abs=0.02)
    assert measures.spread(torch.ones(10, 16)) == pytest.approx(0, abs=1e-6)


def test_timms_lars_is_lightlys() -> None:
    peer = pytest.importorskip("lightly.utils.lars", reason="lightly is the independent peer").LARS
    given = config("simclr")
    given.training.optimizer, given.training.learning_rate, given.training.weight_decay = "lars", 0.3, 1e-2
    networks = [learner(given), learner(given)]
    ours = make_optimizer(given, networks[0])
    decayed = [p for p in networks[1].parameters() if p.ndim > 1]
    rest = [p for p in networks[1].parameters() if p.ndim <= 1]
    theirs = peer([{"params": decayed}, {"params": rest, "weight_decay": 0.0}], lr=0.3, momentum=0.9, weight_decay=1e-2)
    for seed in range(3):
        for network in networks:
            for number, parameter in enumerate(network.parameters()):
                generator = torch.Generator().manual_seed(100 * seed + number)
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        ours.step()
        theirs.step()
    for one, other in zip(*(network.parameters() for network in networks), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["moco", "byol", "dino"])
def test_the_teacher_follows_and_learns_nothing_itself(method: str) -> None:
    given = config(method)
    network = learner(given)
    memory = Memory(given, network, torch.device("cpu"))
    optimizer = make_optimizer(given, network)
    before = {name: value.clone() for name, value in memory.teacher.named_parameters()}
    LOSSES[method](step_of(given, network, memory)).backward()
    optimizer.step()
    memory.follow(network, 0.75)
    now = dict(network.named_parameters())
    for name, value in memory.teacher.named_parameters():
        torch.testing.assert_close(value, 0.75 * before[name] + 0.25 * now[name], rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(before[name], now[name]) for name in before)
    assert memory.audit(optimizer) == len(before)
    memory.follow(network, 0.0)
    assert all(torch.equal(value, now[name]) for name, value in memory.teacher.named_parameters())
    first = next(memory.teacher.parameters())
    first.grad = torch.zeros_like(first)
    with pytest.raises(RunStopped, match="given a gradient"):
        memory.audit(optimizer)


@pytest.mark.parametrize("method", METHODS)
def test_every_parameter_learns(method: str) -> None:
    """But for the layers behind those that start at zero."""
    given = config(method)
    network = learner(given)
    LOSSES[method](step_of(given, network, Memory(given, network, torch.device("cpu")))).backward()
    silent = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert all(".convs.0." in name for name in silent), silent


def test_the_queue_forgets_the_oldest() -> None:
    given = config("moco", queue=10)
    memory = Memory(given, learner(given), torch.device("cpu"))
    keys = torch.nn.functional.normalize(torch.randn(14, 8), dim=1)
    for part in keys.split(4):
        memory.remember(part)
    kept = {tuple(row) for row in memory.queue.numpy().round(5).tolist()}
    assert kept == {tuple(row) for row in keys[4:].numpy().round(5).tolist()}
    other = Memory(given, learner(given), torch.device("cpu"))
    other.load_state_dict(memory.state_dict())
    torch.testing.assert_close(other.queue, memory.queue)
    assert other.place == memory.place == 4


def test_views_of_one_size_go_through_together_and_small_ones_too() -> None:
    given = config("dino")
    network = learner(given).eval()
    views = [torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32), torch.randn(2, 3, 16, 16)]
    found, features = network(views)
    assert isinstance(network, Learner)
    for view, out in zip(views, found, strict=True):
        torch.testing.assert_close(out, network.projection(network.encoder(view)), rtol=1e-4, atol=1e-5)
    for view, seen in zip(views[:2], features, strict=True):
        torch.testing.assert_close(seen, network.encoder(view), rtol=1e-4, atol=1e-5)


def test_schedules() -> None:
    assert along_cosine(0, 10, 0.99, 1.0) == pytest.approx(0.99)
    assert along_cosine(10, 10, 0.99, 1.0) == pytest.approx(1.0)
    assert along_cosine(5, 10, 0.04, 0.4) == pytest.approx(0.22)
    schedule = pytest.importorskip("lightly.utils.scheduler", reason="lightly is the independent peer").cosine_schedule
    assert along_cosine(3, 10, 0.9, 1.0) == pytest.approx(schedule(3, 11, 0.9, 1.0), abs=1e-9)


def test_class_attention_is_what_the_block_computes() -> None:
    timm = pytest.importorskip("timm")
    network = timm.create_model("test_vit", num_classes=0, img_size=64).eval()
    pictures = torch.randn(2, 3, 64, 64)
    found = class_attention(network, pictures)
    assert found.shape == (2, network.blocks[-1].attn.num_heads, 4, 4)
    attention = network.blocks[-1].attn
    attention.fused_attn = False
    kept = []
    handle = attention.attn_drop.register_forward_hook(lambda _m, inputs, _o: kept.append(inputs[0]))
    network(pictures)
    handle.remove()
    torch.testing.assert_close(found.flatten(2), kept[0][:, :, 0, 1:])
    tokenless = timm.create_model("test_vit", num_classes=0, img_size=64, class_token=False, global_pool="avg").eval()
    assert class_attention(tokenless, pictures) is None


def test_options_that_contradict_are_refused() -> None:
    def refused(match: str, **given: object) -> None:
        asked = PretrainConfig()
        for name, value in given.items():
            holder = next(part for part in (asked, asked.encoder, asked.views, asked.own, asked.measure, asked.training)
                          if hasattr(part, name))  # fmt: skip
            setattr(holder, name, value)
        with pytest.raises(LabError, match=match):
            complete(asked)

    refused("networks of its own", method="gim", backbone="resnet18")
    refused("gim and cpc alone", backbone="resnet50v2")
    refused("multiple of 8", method="cpc", side=30)
    refused("ResNets of torchvision", stem="small")
    refused("only dino", local_crops=2)
    refused("crop-scale", crop_scale=(0.9, 0.2))
    refused("--flip", flip=1.5)
    refused("--prior", prior=1.0)
    refused("--momentum", momentum=2.0)
    refused("--bank", bank=0)


@pytest.mark.parametrize("kind", ["DEEPSPEED", "FSDP"])
def test_sharded_weights_are_refused(kind: str) -> None:
    launched = types.SimpleNamespace(num_processes=2, distributed_type=DistributedType[kind])
    with pytest.raises(LabError, match="multi_gpu"):
        make(config("byol"), launched)
    with pytest.raises(LabError, match="multiple of the 3 processes"):
        make(config("byol"), types.SimpleNamespace(num_processes=3))


def test_lightlys_benchmark_is_configured() -> None:
    for method in ("simclr", "moco", "byol", "dino"):
        done = complete(config_from_yaml(PretrainConfig, CONFIGS / f"cifar10_{method}.yaml"))
        assert done.method == method
        usual = PretrainConfig(method=method, encoder=dataclasses.replace(done.encoder, side=0))
        assert complete(usual).training.learning_rate == done.training.learning_rate == pytest.approx(0.24)
        assert done.training.weight_decay == 5e-4
        assert done.own.momentum_end == done.own.momentum == 0.99
        network = make_learner(done)
        with torch.no_grad():
            (out, _), (features, _) = network.eval()([torch.zeros(2, 3, 32, 32)] * 2)
        assert features.shape == (2, 512)
        assert out.shape[1] == {"byol": 256, "dino": 2048}.get(method, 128)
        # A ResNet-18 with this stem and no classifier.
        assert sum(p.numel() for p in network.encoder.parameters()) == 11_168_832
