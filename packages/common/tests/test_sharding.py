"""Layers as units of FSDP2, on processes that do not exist and on two that do."""

import multiprocessing

import pytest
import torch
from labs_testing.commands import free_port
from labs_testing.sharded import assert_in_layers, fake_group
from torch import nn
from toy.shards import Layer, Tied, check

from labs_common.compare.processes import start_server
from labs_common.sharding import repeated_layers, shard


class Block(nn.Sequential):
    """One library's."""


OtherBlock = type("Block", (nn.Sequential,), {})  # and another's of the same name


def other_block() -> nn.Module:
    block: nn.Module = OtherBlock(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    return block


def test_layers_are_what_is_repeated_and_has_parts() -> None:
    one, two = (nn.Sequential(*(make() for _ in range(3))) for make in (lambda: Block(nn.Linear(2, 2)), other_block))
    convolutions = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1))
    stages = nn.ModuleList(nn.Sequential(Layer(4), Layer(4)) for _ in range(2))
    model = nn.Module()
    model.one, model.two, model.convolutions, model.stages, model.head = one, two, convolutions, stages, Layer(4)
    inner = [layer for stage in stages for layer in stage]  # type: ignore[attr-defined]
    found = repeated_layers(model)
    assert set(found) == {*one, *two, *stages, *inner}
    for stage in stages:
        assert all(found.index(layer) < found.index(stage) for layer in stage)  # type: ignore[attr-defined]


def test_a_network_of_transformers_says_what_its_layers_are() -> None:
    """Experts stand in a list too, but not every process computes each."""
    model = nn.Sequential(*(nn.Sequential(Layer(4), nn.ModuleList(Block(nn.Linear(2, 2)) for _ in range(4)))
                            for _ in range(3)))  # fmt: skip
    inside = nn.Module()
    inside.network = model
    model._no_split_modules = ["Layer"]  # type: ignore[assignment]
    assert [type(layer) for layer in repeated_layers(inside)] == [Layer] * 3


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_units_of_eight_processes(precision: str) -> None:
    """With weights of two types, of which some train, and a matrix of columns that lie apart."""
    model = Tied(16)
    model.layers[1].bfloat16()
    model.layers[2].norm.bfloat16().requires_grad_(False)
    model.layers[2].linear.weight = nn.Parameter(torch.randn(16, 32)[:, ::2])
    assert_in_layers(model, precision=precision)


def test_what_was_channels_last_is_sharded_too() -> None:
    model = nn.Sequential(other_block(), other_block()).to(memory_format=torch.channels_last)
    with fake_group():
        shard(model, torch.device("cpu"))
        assert all(hasattr(one, "to_local") and one.to_local().is_contiguous() for one in model.parameters())


def test_two_processes_share_one_network() -> None:
    start_server(None, ["toy.shards"])
    port, context = free_port(), multiprocessing.get_context("forkserver")
    both = [context.Process(target=check, args=(rank, port)) for rank in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in both] == [0, 0]
