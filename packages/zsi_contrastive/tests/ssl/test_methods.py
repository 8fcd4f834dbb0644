"""The methods: what they learn and remember, and what they fill in for options that were left open."""

import dataclasses
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from labs_common.cli import config_from_yaml, parse
from labs_common.errors import LabError, RunStopped
from zsi_contrastive.ssl.compare import plan
from zsi_contrastive.ssl.config import CompareConfig, PretrainConfig
from zsi_contrastive.ssl.methods import METHODS, Memory, Step, complete
from zsi_contrastive.ssl.model import Learner
from zsi_contrastive.ssl.train import make_optimizer

CONFIGS = Path(__file__).parents[2] / "configs"


def config(method: str, *, hidden: int = 16, **more: object) -> PretrainConfig:
    given = PretrainConfig(method=method)
    given.own.hidden, given.own.outputs = hidden, 8
    for name, value in more.items():
        setattr(given.own, name, value)
    return complete(given)


def learner(of: PretrainConfig) -> torch.nn.Module:
    torch.manual_seed(0)
    return METHODS[of.method].network(of)


def step_of(of: PretrainConfig, network: torch.nn.Module, memory: Memory, seed: int = 1) -> Step:
    generator = torch.Generator().manual_seed(seed)
    views = [torch.randn(6, 3, 32, 32, generator=generator) for _ in range(METHODS[of.method].full_views)]
    return Step(network, memory, of.own, Accelerator(cpu=True), views, of.own.teacher_temperature or 0.04)


@pytest.mark.parametrize("method", ["moco", "byol", "dino"])
def test_the_teacher_follows_and_learns_nothing_itself(method: str) -> None:
    given = config(method)
    network = learner(given)
    memory = Memory(given, network, torch.device("cpu"))
    optimizer = make_optimizer(given.training, network)
    before = {name: value.clone() for name, value in memory.teacher.named_parameters()}
    METHODS[method].loss(step_of(given, network, memory)).backward()
    optimizer.step()
    memory.update_teacher(network, 0.75)
    now = dict(network.named_parameters())
    for name, value in memory.teacher.named_parameters():
        torch.testing.assert_close(value, 0.75 * before[name] + 0.25 * now[name], rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(before[name], now[name]) for name in before)
    assert memory.check_teacher(optimizer) == len(before)
    memory.update_teacher(network, 0.0)
    assert all(torch.equal(value, now[name]) for name, value in memory.teacher.named_parameters())
    first = next(memory.teacher.parameters())
    first.grad = torch.zeros_like(first)
    with pytest.raises(RunStopped, match="given a gradient"):
        memory.check_teacher(optimizer)


@pytest.mark.parametrize("method", METHODS)
def test_every_parameter_learns(method: str) -> None:
    """But for the layers behind those that start at zero."""
    given = config(method)
    network = learner(given)
    METHODS[method].loss(step_of(given, network, Memory(given, network, torch.device("cpu")))).backward()
    silent = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert all(".convs.0." in name for name in silent), silent


def test_the_queue_forgets_the_oldest() -> None:
    given = config("moco", queue=10)
    memory = Memory(given, learner(given), torch.device("cpu"))
    keys = torch.nn.functional.normalize(torch.randn(14, 8), dim=1)
    for part in keys.split(4):
        memory.enqueue(part)
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


@pytest.mark.parametrize("loss", ["hadsell", "nce", "supervised"])
def test_other_losses_of_simclr_learn(loss: str) -> None:
    """Steps on one batch lower them."""
    given = config("simclr", loss=loss)
    network = learner(given)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    memory = Memory(given, network, torch.device("cpu"))
    step = step_of(given, network, memory)._replace(labels=torch.arange(6) % 3)
    found = []
    for _ in range(8):
        optimizer.zero_grad()
        value = METHODS["simclr"].loss(step)
        value.backward()
        optimizer.step()
        found.append(float(value.detach()))
    assert found[-1] < 0.9 * found[0]


def test_a_teacher_drops_no_paths_and_a_byol_without_predictor_compares_projections() -> None:
    given = PretrainConfig(method="dino")
    given.encoder = dataclasses.replace(given.encoder, backbone="test_vit", side=32, drop_path=0.3)
    given = complete(given)
    network = learner(given)
    memory = Memory(given, network, torch.device("cpu"))
    views = step_of(given, network, memory).views
    assert torch.equal(memory.teacher(views)[0][0], memory.teacher(views)[0][0])
    assert not torch.equal(network(views)[0][0], network(views)[0][0])
    bare = learner(config("byol", predictor="none"))
    assert bare.prediction is None


@pytest.mark.parametrize(("centring", "same"), [("mean", False), ("none", True)])
def test_without_centring_a_common_answer_of_the_teacher_stays(centring: str, same: bool) -> None:
    given = config("dino", centring=centring)
    network = learner(given)
    memory = Memory(given, network, torch.device("cpu"))
    step = step_of(given, network, memory)
    memory.centre = torch.zeros(8)
    without = METHODS["dino"].loss(step)
    memory.centre = torch.linspace(-1, 1, 8)
    assert torch.allclose(without, METHODS["dino"].loss(step), rtol=1e-5) == same


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
    for method, name, value in (
        ("moco", "loss", "nce"), ("simclr", "centring", "none"), ("simclr", "predictor", "none"),
        ("gim", "norm_splits", 2), ("cpc", "projected", True), ("byol", "koleo", 0.1), ("barlow", "momentum", 0.5),
        ("vicreg", "temperature", 0.5), ("dino", "ahead", 3), ("simclr", "teacher_warmup", 3),
    ):  # fmt: skip
        refused(f"--{name.replace('_', '-')}: ", method=method, **{name: value})
    for method in METHODS:  # what was filled in is no choice of the user's
        done = complete(PretrainConfig(method=method))
        assert complete(done) == done


def test_compare_gives_each_method_its_own_options() -> None:
    def planned(*arguments: str) -> dict[str, PretrainConfig]:
        return plan(parse(CompareConfig, "compare", list(arguments)))

    runs = planned("--methods", "simclr,byol,dino:koleo=0.1,gim", "--predictor", "none", "--projected")
    assert [run.own.predictor for run in runs.values()] == ["mlp", "none", "mlp", "mlp"]
    assert [run.measure.projected for run in runs.values()] == [True, True, True, False]
    with pytest.raises(LabError, match="byol:centring=none: --centring: is of dino"):
        planned("--methods", "byol,byol:centring=none")


def test_lightlys_benchmark_is_configured() -> None:
    for method in ("simclr", "moco", "byol", "dino"):
        done = complete(config_from_yaml(PretrainConfig, CONFIGS / f"cifar10_{method}.yaml"))
        assert done.method == method
        usual = PretrainConfig(method=method, encoder=dataclasses.replace(done.encoder, side=0))
        assert complete(usual).training.learning_rate == done.training.learning_rate == pytest.approx(0.24)
        assert done.training.weight_decay == 5e-4
        assert done.own.momentum_end == done.own.momentum == 0.99
        network = METHODS[method].network(done)
        with torch.no_grad():
            (out, _), (features, _) = network.eval()([torch.zeros(2, 3, 32, 32)] * 2)
        assert features.shape == (2, 512)
        assert out.shape[1] == {"byol": 256, "dino": 2048}.get(method, 128)
        # A ResNet-18 with this stem and no classifier.
        assert sum(p.numel() for p in network.encoder.parameters()) == 11_168_832
