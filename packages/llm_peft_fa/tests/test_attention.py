"""The kernels of GPUs against the blocks, as far as a CPU can run them: what they are asked for, not their speed."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import flex_attention as flex

from llm_peft_fa import attention
from llm_peft_fa.attention import agrees, block_mask, blocks_of, fastest
from llm_peft_fa.base import load_model
from llm_peft_fa.model import PackedCausalLM
from llm_peft_fa.packing import packed_row
from llm_peft_fa.templates import Encoded

CPU = torch.device("cpu")


def one_by_one(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts_q: torch.Tensor, starts_k: torch.Tensor,
    longest_q: int, longest_k: int, *, softmax_scale: float, window_size: tuple[int, int], softcap: float,
) -> torch.Tensor:  # fmt: skip
    """What a varlen kernel is to compute, written out: each conversation alone, from (row, heads, head width)."""
    assert starts_q is starts_k
    assert longest_q == longest_k == max((starts_q[1:] - starts_q[:-1]).tolist())
    assert window_size[1] == 0, "causal"
    k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], 1) for part in (k, v))
    out = []
    for start, end in zip(starts_q.tolist(), starts_q.tolist()[1:], strict=False):
        scores = torch.einsum("ihd,jhd->hij", q[start:end], k[start:end]) * softmax_scale
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        i, j = torch.arange(end - start)[:, None], torch.arange(end - start)
        hidden = (j > i) | (i - j > window_size[0]) if window_size[0] >= 0 else j > i
        out.append(torch.einsum("hij,jhd->ihd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v[start:end]))
    return torch.cat(out)


@pytest.fixture(autouse=True)
def kernels_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two varlen kernels by the reference; FlexAttention's dense form, which would run backwards here, is let."""

    def varlen(*parts: object, scale: float, window_size: tuple[int, int], enable_gqa: bool) -> torch.Tensor:
        assert enable_gqa == (parts[0].shape[1] != parts[1].shape[1])
        return one_by_one(*parts, softmax_scale=scale, window_size=window_size, softcap=0.0)

    def flash(*parts: object, causal: bool, **named: float) -> torch.Tensor:
        assert causal
        return one_by_one(*parts, **named)

    monkeypatch.setattr(attention, "varlen_attn", varlen)
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=flash))
    monkeypatch.setattr(flex, "_validate_device", lambda *parts: None)


@pytest.mark.parametrize(
    ("model", "kernel"),
    [("llama", "flash"), ("llama", "varlen"), ("llama", "flex"), ("gemma", "flash"), ("gemma", "flex")],
)
def test_kernels_give_the_loss_and_gradients_of_blocks(model: str, kernel: str, request: pytest.FixtureRequest) -> None:
    """Llama has grouped heads; Gemma 2 also a soft-cap, which varlen lacks, and a window of 16 in every other layer."""
    folder: Path = request.getfixturevalue(f"{model}_dir")
    items = [Encoded([2, *range(300, 300 + length)], [True] * (length + 1), "") for length in (40, 3, 60, 15)]
    base, row = load_model(str(folder)), packed_row(items)
    results = []
    for name in (kernel, "blocks"):
        base.zero_grad()
        loss = PackedCausalLM(base, name)(row)
        loss.backward()
        results.append((loss.detach(), {name: p.grad.clone() for name, p in base.named_parameters()}))
    (loss, gradients), (expected, theirs) = results
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, gradient in gradients.items():
        scale = theirs[name].abs().max()
        torch.testing.assert_close(gradient / scale, theirs[name] / scale, atol=1e-5, rtol=0)
    assert set(row.blocks.masks) == (set() if kernel != "flex" else {None, 16} if model == "gemma" else {None})


@pytest.mark.parametrize("lengths", [[300], [128, 256], [100, 28, 1, 500], [5] * 80, [127, 2, 255]])
@pytest.mark.parametrize("window", [None, 1, 16, 128, 129, 130, 255, 256, 400])
def test_the_mask_of_blocks_is_that_of_all_positions(lengths: list[int], window: int | None) -> None:
    conversation = blocks_of(lengths).conversation
    row = len(conversation)
    found = block_mask(conversation, window)
    expected = flex.create_block_mask(attention._sees(conversation, window), None, None, row, row, "cpu")
    assert found.shape == expected.shape
    for name in ("kv", "full_kv", "q", "full_q"):
        counts, order = (getattr(found, f"{name}_{what}") for what in ("num_blocks", "indices"))
        assert torch.equal(counts, getattr(expected, f"{name}_num_blocks")), name
        used = torch.arange(order.shape[-1]) < counts[..., None]
        assert torch.equal(order[used], getattr(expected, f"{name}_indices")[used]), name


def test_a_kernel_is_taken_when_it_agrees_with_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    agrees.cache_clear()
    shape = (CPU, torch.float32, 4, 2, 8, 8**-0.5)
    assert agrees("varlen", *shape, None, None)
    assert not agrees("varlen", *shape, 5.0, 9), "it has no soft-cap, and says so"
    assert agrees("flash", *shape, 5.0, 9)
    assert agrees("flex", *shape, 5.0, 9)
    right = attention._sees
    wrong = {"other conversations": lambda _, w: right(torch.zeros(200), w), "window": lambda c, _: right(c, 20)}
    for sees in wrong.values():
        agrees.cache_clear()
        monkeypatch.setattr(attention, "_sees", sees)
        assert not agrees("flex", *shape, 5.0, 9)


def test_a_cpu_takes_blocks() -> None:
    assert fastest(torch.zeros(1, 4, 10, 8, dtype=torch.bfloat16), 2, 1.0, None, None) == "blocks"


@pytest.mark.parametrize(
    ("capability", "installed", "softcap", "chosen"),
    [
        ((7, 5), True, None, "blocks"),
        ((8, 0), True, 5.0, "flash"),
        ((8, 0), False, 5.0, "flex"),
        ((9, 0), False, None, "varlen"),
    ],
)
def test_a_gpu_takes_the_first_that_it_has(
    capability: tuple[int, int], installed: bool, softcap: float | None, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    query = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, shape=(1, 4, 10, 8))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(attention, "agrees", lambda *asked: True)
    assert fastest(query, 2, 1.0, softcap, None) == chosen
    monkeypatch.setattr(attention, "agrees", lambda *asked: False)
    assert fastest(query, 2, 1.0, softcap, None) == "blocks"


def test_the_row_is_described_to_kernels() -> None:
    blocks = blocks_of([3, 1, 2])
    assert blocks.starts.tolist() == [0, 3, 4, 6]
    assert blocks.conversation.tolist() == [0, 0, 0, 1, 2, 2]
    assert blocks.longest == 3
    assert F.one_hot(blocks.conversation.long()).sum(0).tolist() == [3, 1, 2]
