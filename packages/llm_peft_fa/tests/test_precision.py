"""A base in float16, as GPUs from before 2020 want it, on a CPU's autocast."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from labs_common.errors import LabError
from llm_peft_fa import base as module
from llm_peft_fa.answers import answers, streamed_answer
from llm_peft_fa.attention import NAME
from llm_peft_fa.base import load_model, load_tokenizer
from llm_peft_fa.config import GenerationOptions, MethodOptions
from llm_peft_fa.methods import METHODS, Setting, apply_method, resolved
from llm_peft_fa.metrics import Prompt
from llm_peft_fa.model import PackedCausalLM, arithmetic, virtual_tokens
from llm_peft_fa.packing import packed_row
from llm_peft_fa.templates import Encoded
from llm_peft_fa.verification import choice

pytestmark = pytest.mark.quick
ITEMS = [Encoded([2, *range(305, 325)], [True] * 21, "") for _ in range(3)]
PROMPT = Prompt([{"role": "user", "content": "سلام"}])


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "prefix_tuning", "prompt_tuning", "layers"])
def test_what_trains_is_float32_and_what_answers_is_not(gemma_dir: Path, method: str) -> None:
    tokenizer = load_tokenizer(str(gemma_dir))
    losses = []
    for precision in ("fp16", "no"):
        torch.manual_seed(0)
        own = {"layers": 1} if method == "layers" else {}
        options = resolved(MethodOptions(method=method, **own))
        if METHODS[method].kind == "soft prompt":
            options.virtual_tokens = 4
        model = apply_method(load_model(str(gemma_dir), precision), options, Setting(tokenizer, 10))
        row = packed_row(ITEMS, virtual=virtual_tokens(model))
        with torch.autocast("cpu", torch.float16, enabled=precision == "fp16"):
            loss = PackedCausalLM(model).train()(row)
        trained = [p for p in model.parameters() if p.requires_grad]
        assert {p.dtype for p in trained} == {torch.float32}
        optimizer = torch.optim.AdamW(trained, lr=1e-6)
        scaler = torch.amp.GradScaler("cpu", init_scale=64, enabled=precision == "fp16")  # as it is after some halvings
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)  # which refuses gradients in float16
        before = [p.clone() for p in trained]
        scaler.step(optimizer)
        # A step that float16 would lose: the next number after 0.01 is 8e-6 away.
        assert any(not torch.equal(p, was) for p, was in zip(trained, before, strict=True))
        assert all(p.grad.isfinite().all() for p in trained)
        losses.append(loss.item())
        model.eval()
        options = GenerationOptions(max_new_tokens=3)
        assert len(answers(model, tokenizer, [PROMPT], options, Accelerator())) == 1
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_layers_add_up_in_float32(gemma_dir: Path) -> None:
    model = load_model(str(gemma_dir), "fp16")
    assert choice(model) == (NAME, "")
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    seen = []
    for layer in model.get_decoder().layers:
        layer.register_forward_hook(lambda module, given, out: seen.append(out.dtype))
    with torch.no_grad(), arithmetic(model):
        PackedCausalLM(model)(packed_row(ITEMS))
    assert seen == [torch.float32] * 2


def test_answers_are_in_the_precision_that_the_machine_is_fast_in(
    gemma_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_model(str(gemma_dir)).dtype == torch.float32, "on a CPU"
    monkeypatch.setattr(module, "mixed_precision", lambda asked: "fp16")
    model, tokenizer = load_model(str(gemma_dir)), load_tokenizer(str(gemma_dir))
    dtypes = []
    model.get_decoder().layers[0].mlp.register_forward_hook(lambda module, given, out: dtypes.append(out.dtype))
    assert isinstance("".join(streamed_answer(model, tokenizer, PROMPT.messages, 3)), str)
    assert set(dtypes) == {torch.float16}


def test_an_answer_that_fails_is_not_waited_for(gemma_dir: Path) -> None:
    """Logits that are divided by next to nothing are infinite, and nothing can be drawn by them."""
    model, tokenizer = load_model(str(gemma_dir)), load_tokenizer(str(gemma_dir))
    with pytest.raises(LabError, match="cannot answer"):
        list(streamed_answer(model, tokenizer, PROMPT.messages, 3, temperature=1e-40))
