"""Two processes that share the weights of a small network; what each finds is asserted here."""

import copy
import os
import time

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object
from labs_testing.sharded import force_fsdp
from torch.distributed.tensor import DTensor

from labs_common.checkpoint import changing_tensors, restore_tensors
from labs_common.errors import LabError
from labs_common.launch import main_process_first
from labs_common.sharding import place, reshard, shard, whole

CPU = torch.device("cpu")


class Layer(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.linear = torch.nn.LayerNorm(width), torch.nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x + self.linear(self.norm(x))
        return y


class Tied(torch.nn.Module):
    """Tokens in, a summed loss out; the head is the embeddings, as in many language models."""

    mask: torch.Tensor

    def __init__(self, width: int = 8, words: int = 13) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(words, width)
        self.layers = torch.nn.ModuleList(Layer(width) for _ in range(3))
        self.head = torch.nn.Linear(width, words, bias=False)
        self.head.weight = self.words.weight
        self.scale = torch.nn.Parameter(torch.tensor([14.2857]))  # of fewer rows than there are processes
        self.register_buffer("mask", torch.arange(words) % 2 == 0)
        self.layers[0].requires_grad_(False)

    def forward(self, ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        x = self.words(ids)
        for layer in self.layers:
            x = layer(x)
        return torch.logsumexp(self.head(x).float().masked_fill(self.mask, 0), -1).sum() * weight * self.scale[0]


def check(rank: int, port: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true", "FSDP_VERSION": "2"}  # fmt: skip
    torch.set_num_threads(1)
    force_fsdp()
    accelerator = Accelerator()
    torch.manual_seed(0)
    plain = Tied()
    ids, weight = torch.randint(13, (2, 40)), torch.tensor(1.2345)
    model = read_by_one(plain, rank)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    shard(model, CPU, "bf16", optimizer=optimizer)
    check_weights(model, plain, optimizer)
    check_step(model, plain, rank, ids, weight)
    check_small_gradients(model, plain, rank, ids[0])
    check_kept(model, plain, rank)
    check_answers(plain, accelerator, rank, ids[rank], weight)
    check_errors(accelerator, rank)
    dist.destroy_process_group()


def check_errors(accelerator: Accelerator, rank: int) -> None:
    """An error of either process is one of both, and nobody waits; what goes well goes on, the main process first."""
    for fails, error in ((0, LabError("no such data")), (1, LabError("no such data")), (1, OSError("no such data"))):
        begun = False
        expected = pytest.raises(type(error) if rank == fails else LabError, match="no such data")
        with expected, main_process_first(accelerator):
            begun = True
            if rank == fails:
                raise error
        assert begun == (rank <= fails)
    times = [0.0, 0.0]
    with main_process_first(accelerator):
        times[rank] = time.monotonic()
        time.sleep(0.01)
    first, second = (sum(pair) for pair in zip(*gather_object([times]), strict=True))
    assert second - first >= 0.01


def read_by_one(plain: Tied, rank: int) -> Tied:
    """The network as a launch has it that spreads weights: process 1 has none."""
    model = copy.deepcopy(plain) if rank == 0 else copy.deepcopy(plain).to("meta")
    model.head.weight = model.words.weight  # `to` has cut the tie
    return model


def check_weights(model: Tied, plain: Tied, optimizer: torch.optim.Optimizer) -> None:
    """Process 1 had nothing, and both have all now; what is tied stays tied."""
    state = plain.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(whole(tensor), state[name]), name
    assert model.head.weight is model.words.weight
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {
        id(p) for p in model.parameters() if p.requires_grad
    }


def check_step(model: Tied, plain: Tied, rank: int, ids: torch.Tensor, weight: torch.Tensor) -> None:
    """Layers compute in bfloat16, the rest and the loss do not; gradients are summed in float32."""
    seen = {}
    model.layers[1].linear.register_forward_hook(lambda linear, _i, _o: seen.update(layer=linear.weight.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids[rank], weight)
    reference = copy.deepcopy(plain)
    with torch.autocast("cpu", torch.bfloat16):
        parts = [reference(one, weight) for one in ids]
    assert seen == {"layer": torch.bfloat16}
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, parts[rank], rtol=1e-2, atol=0)
    assert not torch.equal(loss, loss.bfloat16().float()), "the loss is not rounded"
    loss.backward()
    (sum(parts) / 2).backward()  # type: ignore[union-attr]
    for name, parameter in model.named_parameters():
        expected = reference.get_parameter(name).grad
        assert (expected is None) == (parameter.grad is None), name
        if expected is not None:
            assert isinstance(parameter.grad, DTensor)
            assert parameter.grad.dtype == torch.float32
            torch.testing.assert_close(
                whole(parameter.grad), expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max())
            )


def check_small_gradients(model: Tied, plain: Tied, rank: int, ids: torch.Tensor) -> None:
    """One big gradient and one small: in bfloat16 the small one would be lost."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        once = model(ids, torch.tensor(1.0 if rank else 2.0**-12))
        once.backward()
        with torch.no_grad():
            gradient = model(ids, torch.tensor(1.0)) / float(plain.scale.detach())
    reshard(model)  # the last pass has left what is outside of layers whole
    assert model.scale.grad is not None
    exact = gradient * (1 + 2.0**-12) / 2
    assert not torch.equal(exact.bfloat16(), exact)
    torch.testing.assert_close(whole(model.scale.grad), exact[None], rtol=2e-5, atol=0)


def check_kept(model: Tied, plain: Tied, rank: int) -> None:
    """What checkpoints hold is whole, in the main process alone, and comes back into the parts."""
    state = plain.state_dict()
    kept = changing_tensors(model, rank == 0)
    assert bool(kept) == (rank == 0)
    assert not any(name.startswith("layers.0") for name in kept)
    before = {name: tensor for name, tensor in state.items() if not name.startswith("layers.0")}
    del before["head.weight"]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0)
    restore_tensors(model, before)
    for name, tensor in model.state_dict().items():
        assert torch.equal(whole(tensor), torch.zeros_like(state[name]) if "layers.0" in name else state[name]), name


def check_answers(plain: Tied, accelerator: Accelerator, rank: int, ids: torch.Tensor, weight: torch.Tensor) -> None:
    """A model that only answers is spread too, and answers the same."""
    answers = read_by_one(plain, rank)
    assert place(answers, accelerator)
    assert isinstance(answers.layers[2].linear.weight, DTensor)
    assert not isinstance(answers.words.weight, DTensor)
    with torch.no_grad():
        torch.testing.assert_close(answers(ids, weight), plain(ids, weight))
