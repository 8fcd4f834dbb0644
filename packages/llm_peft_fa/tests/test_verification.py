"""Architectures of real models: packed or padded, what is trained is what each model computes itself, or it is refused."""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, random_model
from commands import here, save
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from labs_common.errors import LabError
from llm_peft_fa import attention, packing, verification
from llm_peft_fa import model as model_module
from llm_peft_fa.attention import NAME
from llm_peft_fa.base import _attending, load_model, load_tokenizer
from llm_peft_fa.config import MethodOptions
from llm_peft_fa.methods import Setting, apply_method, resolved
from llm_peft_fa.model import Adapted, PackedCausalLM, decoder_layers, rope_boundary, virtual_tokens
from llm_peft_fa.packing import Packing, learnt_tokens
from llm_peft_fa.templates import Encoded
from llm_peft_fa.verification import Choice, choice

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2},
    "prefix_tuning": {"virtual_tokens": 3, "prompt_init": "random", "encoder_width": 0},
    "layers": {"layers": 1, "which": "last"},
}
# Convolutions, linear attention and state spaces go on from one conversation into the next; attention that transformers
# has not made exchangeable, or that has more in it than ours.
PADDED = {"qwen3_next", "qwen3_5_text", "gpt_oss", "lfm2", "falcon", "stablelm", "bloom", "mamba2", "phimoe",
          "llama4_text"}  # fmt: skip
SHARED = {"gemma3n_text", "gemma4_text"}  # later layers take an earlier one's keys and values, with its prefix in them
# PEFT has no prefix for a state, nor for the compressed keys of DeepSeek.
NO_PREFIX = {"qwen3_next", "qwen3_5_text", "lfm2", "mamba2", "deepseek_v3"}
QUICK = ("llama", "gemma2", "granite", "gpt_oss", "lfm2", "phimoe")
NAMES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in ARCHITECTURES]


def conversations() -> list[Encoded]:
    """Some longer than the window of 8, one shorter."""
    draw, made = random.Random(0), []
    for number, length in enumerate((12, 3, 21, 30)):
        ids = [draw.randrange(3, 64) for _ in range(length)]
        made.append(Encoded(ids, [False, *(draw.random() < 0.5 for _ in ids[2:]), True], f"row {number}"))
    return made


def adapted(base: PreTrainedModel, method: str) -> Adapted:
    return apply_method(base, resolved(MethodOptions(method=method, **METHODS[method])), Setting(None, 10))


def prompt(method: str) -> Callable[[PreTrainedModel], Adapted] | None:
    return (lambda small: adapted(small, method)) if method == "prefix_tuning" else None


def moved(model: Adapted) -> Adapted:
    """Lets what trains be something else than where it starts, which is zero for an update."""
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn_like(weight)
    return model


def gradients(model: Adapted) -> dict[str, torch.Tensor]:
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    for weight in model.parameters():
        weight.grad = None
    return found


def alone(model: Adapted, prefix: bool) -> torch.Tensor:
    """The mean loss by the model's own forward, or PEFT's, which gets one conversation at a time and no mask of ours."""
    items = conversations()
    total = torch.zeros(())
    for item in items:
        ids = torch.tensor([item.ids])
        labels = ids.masked_fill(~torch.tensor([item.learnt]), -100)
        own = {"attention_mask": torch.ones_like(ids), "use_cache": True} if prefix else {"use_cache": False}
        total = total + model(input_ids=ids, labels=labels, **own).loss * learnt_tokens([item])
    return total / learnt_tokens(items)


def own_attention(model: PreTrainedModel) -> None:
    if model._can_set_attn_implementation():
        model.set_attn_implementation("eager")


def check_trains_as_alone(base: PreTrainedModel, method: str, chosen: Choice, tokens: int = 44) -> Adapted:
    if chosen.attention != base.config._attn_implementation:
        base.set_attn_implementation(chosen.attention)
    model = moved(adapted(base, method))
    packing = Packing(tokens, virtual=virtual_tokens(model), padded=chosen.padded, boundary=rope_boundary(model))
    rows = packing.rows(conversations())
    assert len(rows) > 1
    assert any(row.input_ids.numel() > 30 for row in rows), "a row holds more than one"
    loss = sum(PackedCausalLM(model)(row) * row.weight for row in rows)
    loss.backward()
    ours = gradients(model)
    own_attention(base)
    expected = alone(model, method == "prefix_tuning")
    expected.backward()
    theirs = gradients(model)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert ours.keys() == theirs.keys()
    assert ours
    largest = max(gradient.abs().max() for gradient in theirs.values())
    for name, gradient in theirs.items():
        scale = max(gradient.abs().max(), 1e-3 * largest)  # of a bias of keys it is zero but for rounding
        torch.testing.assert_close(ours[name] / scale, gradient / scale, atol=1e-4, rtol=0)
    return model


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", METHODS)
def test_loss_gradients_and_result_are_those_of_the_model_itself(name: str, method: str, tmp_path: Path) -> None:
    base = _attending(random_model(name))
    if method == "prefix_tuning" and name in NO_PREFIX:
        with pytest.raises(LabError, match=r"a soft prompt .*; take lora"):
            choice(base, adapt=prompt(method))
        return
    chosen = choice(base, adapt=prompt(method))
    assert chosen.padded == (name in PADDED or (name in SHARED and method == "prefix_tuning")), chosen
    assert bool(chosen.why) == chosen.padded
    model = check_trains_as_alone(base, method, chosen)
    save(model, SimpleNamespace(save_pretrained=lambda folder: None), tmp_path)
    if method == "layers":
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
    else:
        loaded = PeftModel.from_pretrained(random_model(name), tmp_path / "adapter")
    ids = torch.tensor([conversations()[2].ids])
    with torch.no_grad():
        one, two = (it.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits for it in (loaded, model))
    torch.testing.assert_close(one, two, atol=1e-5 * float(two.abs().max()), rtol=0)


@pytest.mark.parametrize(("method", "packing"), [("lora", "auto"), ("lora", "never"), ("prefix_tuning", "auto")])
def test_a_conversation_beyond_the_first_context_leaves_the_factors_of_others_alone(
    method: str, packing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LongRoPE as of Phi 3: of 12, 3, 21 and 30 tokens the last is beyond, and with a prefix of 3 the last two are."""
    monkeypatch.setattr(verification, "LENGTHS", (11, 15, 6))  # real models' first context is longer than what is tried
    factors = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 4.0, 8.0]}
    rope = {"rope_type": "longrope", "rope_theta": 100.0, "original_max_position_embeddings": 21, **factors}
    base = _attending(random_model("phi3", rope_parameters=rope, original_max_position_embeddings=21))
    chosen = choice(base, packing, prompt(method))
    assert chosen.padded == (packing == "never")
    check_trains_as_alone(base, method, chosen, tokens=200)


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt_oss", marks=pytest.mark.long), "lfm2"])
def test_a_base_in_four_bits_too(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes", reason="needs the extra llm-peft-fa[quantization]")
    monkeypatch.setitem(METHODS, "qlora", {"rank": 2})
    random_model(name).save_pretrained(tmp_path)
    base = load_model(str(tmp_path), quantized=True)
    chosen = choice(base)
    assert chosen.padded == (name in PADDED)
    check_trains_as_alone(base, "qlora", chosen)


def without(place: object, name: str, changed: Callable[..., Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """A way to break the code: `changed` gets what stood there and then its arguments."""
    whole = getattr(place, name)
    return lambda patch: patch.setattr(place, name, lambda *given, **more: changed(whole, *given, **more))


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("gpt_oss", lambda patch: patch.setattr(attention, "PASSED_ON", attention.PASSED_ON | {"s_aux"})),
        ("llama", without(packing, "blocks_of", lambda whole, lengths: whole([sum(lengths)]))),
        ("mistral", without(attention, "_causal", lambda whole, *given: whole(*given[:5], None, given[6]))),
        ("gemma2", without(attention, "_causal", lambda whole, *given: whole(*given[:4], None, *given[5:]))),
        (
            "llama",
            without(attention, "_causal", lambda whole, q, k, v, scale, *rest: whole(q, k, v, 1.1 * scale, *rest)),
        ),
    ],
    ids=["an argument is dropped", "conversations see each other", "no window", "no soft-cap", "another scale"],
)
def test_wrong_attention_is_noticed(
    name: str, broken: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _attending(random_model(name))
    before = choice(model)
    broken(monkeypatch)
    found = choice(model)
    assert found.padded, "padded batches do not go through it"
    assert "hidden states differ" in found.why
    assert before.padded == (name == "gpt_oss")


def test_logits_that_are_scaled_otherwise_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_module, "logit_scale", lambda model: 1.0)
    with pytest.raises(LabError, match="GraniteForCausalLM computes something that training does not know"):
        choice(_attending(random_model("granite")))


def test_the_option_is_followed() -> None:
    lfm2, llama = (_attending(random_model(name)) for name in ("lfm2", "llama"))
    with pytest.raises(LabError, match=r"--packing always: Lfm2ForCausalLM cannot be packed .* take --packing auto"):
        choice(lfm2, "always")
    assert choice(llama, "always") == (NAME, "")
    assert choice(llama, "never") == ("sdpa", "--packing never")
    # SDPA in transformers leaves Gemma 2's soft-cap out.
    assert choice(_attending(random_model("gemma2")), "never") == ("eager", "--packing never")


def test_a_small_copy_is_looked_at_and_the_model_left_alone() -> None:
    kinds = {"layer_types": ["sliding_attention"] * 2 + ["full_attention"] * 3, "num_hidden_layers": 5}
    model = _attending(random_model("gemma2", **kinds)).bfloat16()
    before = {name: (id(weight), weight.clone()) for name, weight in model.named_parameters()}
    small = verification._cut(model, verification._kinds(model))
    assert [layer.self_attn.sliding_window for layer in decoder_layers(small)] == [verification.WINDOW, None]
    assert small.config.layer_types == ["sliding_attention", "full_attention"]
    assert small.get_input_embeddings().weight is model.get_input_embeddings().weight, "a vocabulary is not copied"
    assert {weight.dtype for weight in decoder_layers(small).parameters()} == {torch.float32}
    assert choice(model) == (NAME, "")
    assert [layer.self_attn.sliding_window for layer in decoder_layers(model)] == [8, 8, None, None, None]
    assert model.config.sliding_window == 8
    assert {name: id(weight) for name, weight in model.named_parameters()} == {n: one for n, (one, _) in before.items()}
    assert all(torch.equal(weight, before[name][1]) for name, weight in model.named_parameters())


def test_generation_keeps_what_packed_attention_does_not_have() -> None:
    own, ours = random_model("gpt_oss"), _attending(random_model("gpt_oss"))
    assert ours.config._attn_implementation == NAME
    ids = torch.tensor([conversations()[3].ids])
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, own(ids).logits)


@pytest.mark.long
def test_a_model_that_cannot_be_packed_trains_and_is_measured(gemma_dir: Path, tmp_path: Path) -> None:
    """From the command to the evaluation of what was written, which is the run's own."""
    tokenizer = load_tokenizer(str(gemma_dir))
    stops = [1, tokenizer.convert_tokens_to_ids("<end_of_turn>")]
    base = random_model("lfm2", vocab_size=len(tokenizer), max_position_embeddings=4096, eos_token_id=stops)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    few = ("--test-prompts", 1, "--max-new-tokens", 1)
    settings = ("--model", tmp_path / "base", "--output", tmp_path / "run", "--conversations", 20, "--max-steps", 2)
    more = ("--batch-size", 8, "--rank", 2, "--track", "none", "--no-answer-base", "--tokens-per-batch", 400)
    done = here("train", *settings, *more, *few)
    unfolded = re.sub(r" *\n {2,}", " ", done.stderr)
    said = re.search(r"rows +padded, not packed \((.*?)\): (\d+)% is padding; states and loss are", unfolded)
    assert "hidden states differ" in said[1]
    assert 0 < int(said[2]) < 50
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [line["validation/loss"] for line in lines if "validation/loss" in line]
    here("evaluate", "--checkpoint", tmp_path / "run", *few)
    found = json.loads((tmp_path / "run/evaluation/evaluation.json").read_text())
    assert losses[0] != losses[-1]
    assert json.dumps(found["scores"]).count(str(losses[-1])[:7]) >= 1, found["scores"]
