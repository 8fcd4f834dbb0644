import hashlib

import pytest
import torch

from labs_common.errors import LabError, RunStopped
from labs_common.frozen import audit
from labs_common.frozen.audit import FrozenAudit, device_hash, frozen_tensors, tensor_hash, train_only

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


def signed(value: int) -> int:
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


def mixed(value: int) -> int:
    """SplitMix64's finaliser in Python's integers, with shifts that keep the sign."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        value = signed((value ^ (value >> shift)) * factor)
    return signed(value ^ (value >> 31)) | 1


@pytest.mark.parametrize("chunk", [2, 1 << 22])
def test_hashes_on_the_device_are_sums_of_words(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "WORDS", chunk)
    words = torch.randint(-(2**62), 2**62, (5,), generator=torch.Generator().manual_seed(0))
    places = [signed((place + 1) * 0x9E3779B97F4A7C15) for place in range(5)]
    one = sum(word * mixed(place) for word, place in zip(words.tolist(), places, strict=True))
    two = sum(word * mixed(place + 0x1234567) for word, place in zip(words.tolist(), places, strict=True))
    assert device_hash(words).tolist() == [signed(one), signed(two)]


def test_hashes_on_the_device_tell_what_has_changed() -> None:
    """A bit, two values that change places, a sign, a sum that stays the same."""
    whole = torch.randn(300, 77, generator=torch.Generator().manual_seed(0))
    flipped, swapped, shifted = whole.clone(), whole.clone(), whole.clone()
    flipped.view(torch.int32)[299, 76] ^= 1
    swapped[0, 0], swapped[7, 3] = whole[7, 3], whole[0, 0]
    words = shifted.flatten().view(torch.int64)
    words[0] += 1
    words[1] -= 1
    assert torch.equal(device_hash(whole.clone()), device_hash(whole))
    assert all((device_hash(other) != device_hash(whole)).all() for other in (flipped, swapped, shifted, -whole))
    odd = torch.arange(5, dtype=torch.uint8)  # no whole number of words
    assert not torch.equal(device_hash(odd), device_hash(odd.flip(0)))


def test_a_run_that_began_on_a_gpu_is_audited_on_a_cpu() -> None:
    model = torch.nn.Linear(3, 2).requires_grad_(False)
    model.bias.requires_grad_(True)
    one, two = device_hash(model.weight).tolist()
    begun = {"weight": f"{one:x}:{two:x}"}
    here = FrozenAudit(model)
    here.check(begun)
    with torch.no_grad():
        model.weight[0, 0] += 1
    with pytest.raises(RunStopped, match="weight"):
        here.check(begun)
