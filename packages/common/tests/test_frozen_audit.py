import hashlib

import pytest
import torch

from labs_common.errors import LabError, RunStopped
from labs_common.frozen.audit import FrozenAudit, frozen_tensors, tensor_hash, train_only

pytestmark = pytest.mark.quick


def network() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 2, 3))


def test_train_only_returns_what_trains() -> None:
    model = network()
    assert train_only(model, lambda name: name.startswith("2.")) == ["2.weight", "2.bias"]
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["2.weight", "2.bias"]
    with pytest.raises(LabError, match="nothing to train"):
        train_only(model, lambda name: False)


def test_audit_sees_a_changed_weight_and_running_statistics() -> None:
    model = network()
    train_only(model, lambda name: name.startswith("2."))
    audit = FrozenAudit(model)
    model.eval()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    audit.check()

    model.train()  # the frozen BatchNorm now moves its statistics, which requires_grad does not prevent
    model(torch.randn(2, 3, 8, 8))
    with pytest.raises(RunStopped, match=r"1\.num_batches_tracked, 1\.running_mean, 1\.running_var"):
        audit.check()


def test_buffers_of_a_trained_module_may_move() -> None:
    model = network()
    train_only(model, lambda name: name.startswith("1."))
    assert {name for name, _ in frozen_tensors(model)} == {"0.weight", "0.bias", "2.weight", "2.bias"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_hash_is_over_the_bytes(dtype: torch.dtype) -> None:
    tensor = torch.arange(6).reshape(2, 3).to(dtype)
    raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    assert tensor_hash(tensor) == hashlib.blake2b(raw, digest_size=16).hexdigest()
    assert tensor_hash(tensor.T.contiguous().T) == tensor_hash(tensor)
    assert tensor_hash(torch.tensor(1.0)) != tensor_hash(torch.tensor(-1.0))


def test_table_counts_layers_together() -> None:
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])})
    model["head"] = torch.nn.Linear(2, 1)
    train_only(model, lambda name: name.startswith("head"))
    audit = FrozenAudit(model)
    assert audit.table() == [
        {"module": "head", "trained": 3, "frozen": 0, "verified": 0},
        {"module": "layers.*", "trained": 0, "frozen": 12, "verified": 4},
    ]
