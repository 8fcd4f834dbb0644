import pytest
import torch
from transformers.loss.loss_utils import ForCausalLMLoss

from llm_peft_fa import losses as module
from llm_peft_fa.losses import chunk_positions, chunked_cross_entropy

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (2.0, 1.0), (None, 0.25), (2.0, 3.0)])
@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_transformers_loss_on_all_logits(
    softcap: float | None, scale: float, trained_head: bool, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_LOGITS", 7 * 50)  # chunks of 7, with a rest
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 50, bias=bias).requires_grad_(trained_head)
    hidden = torch.randn(24, 16, requires_grad=True)
    targets = torch.randint(50, (24,))
    results = []
    for ours in (True, False):
        hidden.grad = head.weight.grad = None
        if bias:
            head.bias.grad = None
        if ours:
            value = chunked_cross_entropy(hidden, head, targets, softcap, scale=scale) / 24
        else:
            logits = scale * head(hidden)
            logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
            value = ForCausalLMLoss(logits[None], labels=None, vocab_size=50, shift_labels=targets[None])
        (3 * value).backward()
        results.append([value, hidden.grad, head.weight.grad, head.bias.grad if bias else None])
    for one, two in zip(*results, strict=True):
        assert (one is None) == (two is None)
        if one is not None:
            torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)


def test_gradients_by_finite_differences() -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(5, 11, bias=False).double().requires_grad_(False)
    hidden = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(11, (6,))
    chunked_cross_entropy(hidden, head, targets, 1.5).backward()
    with torch.no_grad():
        for place in ((0, 0), (3, 4), (5, 2)):
            values = []
            for move in (1e-3, -1e-3):
                moved = hidden.detach().clone()
                moved[place] += move
                logits = 1.5 * torch.tanh(head(moved) / 1.5)
                values.append(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
            assert hidden.grad[place].item() == pytest.approx(((values[0] - values[1]) / 2e-3).item(), rel=1e-3)


def test_no_position_gives_zero_and_zero_gradient() -> None:
    head = torch.nn.Linear(4, 9, bias=False)
    hidden = torch.randn(3, 4, requires_grad=True)
    value = chunked_cross_entropy(hidden[:0], head, torch.empty(0, dtype=torch.long))
    value.backward()
    assert value.item() == 0
    assert hidden.grad.abs().sum() == 0


@pytest.mark.parametrize("chunk", [1, 7, 24, 1000])
def test_the_chunk_changes_nothing(chunk: int) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 50)
    hidden, targets = torch.randn(24, 16, requires_grad=True), torch.randint(50, (24,))
    results = []
    for size in (None, chunk):
        hidden.grad = head.weight.grad = None
        loss = chunked_cross_entropy(hidden, head, targets, 2.0, size)
        loss.backward()
        results.append([loss, hidden.grad, head.weight.grad])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


def test_chunks_are_as_large_as_the_memory_allows() -> None:
    gemma, llama = 256_000, 128_256
    assert [chunk_positions(size, None) for size in (gemma, llama)] == [16, 32], "on a CPU as before"
    for memory in (16e9, 24e9, 80e9, 141e9):
        for size in (gemma, llama, 1024):
            positions = chunk_positions(size, int(memory))
            assert 4 * positions * size <= memory / 64, "float32"
            assert positions >= 200, "1,200 learnt tokens read the head six times, not 75"
    assert chunk_positions(1024, int(80e9)) == 2048
