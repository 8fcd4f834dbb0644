import functools
import hashlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import save
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from labs_common.errors import LabError
from labs_common.options import names_in
from llm_peft_fa.adalora import RankBudget, orthogonality
from llm_peft_fa.base import check_quantization, load_model, load_tokenizer
from llm_peft_fa.config import MethodOptions
from llm_peft_fa.methods import METHODS, Setting, apply_method, resolved
from llm_peft_fa.model import Adapted, PackedCausalLM, structure_of, virtual_tokens
from llm_peft_fa.packing import packed_row
from llm_peft_fa.saved import adapted_model, initial_update, load_tuned
from llm_peft_fa.templates import Encoded

LINEAR = "(q|k|v|o|gate|up|down)_proj"
STEPS = 6
# Written down apart from the sources: what each method trains, by the names of PEFT and transformers.
VARIANTS: dict[str, tuple[dict[str, Any], str]] = {
    "prompt_tuning": ({"virtual_tokens": 3}, r"prompt_encoder\.default\.embedding\.weight"),
    "prompt_tuning random": ({"virtual_tokens": 3, "prompt_init": "random"}, r"prompt_encoder\..*"),
    "prompt_tuning vocabulary": ({"virtual_tokens": 3, "prompt_init": "vocabulary"}, r"prompt_encoder\..*"),
    "prefix_tuning": ({"virtual_tokens": 3}, r"prompt_encoder\.default\.embedding\.weight"),
    "prefix_tuning projected": (
        {"virtual_tokens": 3, "encoder_width": 8},
        r"prompt_encoder\.default\.(embedding\.weight|transform\.[02]\.(weight|bias))",
    ),
    "p_tuning": ({"virtual_tokens": 3}, r"prompt_encoder\.default\.(embedding\.weight|mlp_head\.[024]\.(weight|bias))"),
    "lora": ({"rank": 3}, rf".*{LINEAR}\.lora_[AB]\.default\.weight"),
    "lora on q and v": ({"rank": 3, "target_modules": ("q_proj", "v_proj")}, r".*[qv]_proj\.lora_[AB]\.default\.weight"),
    "rslora": ({"rank": 3}, rf".*{LINEAR}\.lora_[AB]\.default\.weight"),
    "dora": ({"rank": 3}, rf".*{LINEAR}\.lora_([AB]\.default|magnitude_vector\.default)\.weight"),
    "pissa": ({"rank": 3}, rf".*{LINEAR}\.lora_[AB]\.default\.weight"),
    "olora": ({"rank": 3}, rf".*{LINEAR}\.lora_[AB]\.default\.weight"),
    "adalora": ({"rank": 4}, rf".*{LINEAR}\.lora_[ABE]\.default"),
    "vera": ({"rank": 5}, rf".*{LINEAR}\.vera_lambda_[bd]\.default"),
    "loha": ({"rank": 3}, rf".*{LINEAR}\.hada_w[12]_[ab]\.default"),
    "lokr": ({"rank": 3}, rf".*{LINEAR}\.lokr_w[12](_[ab])?\.default"),
    "oft": ({"block_size": 8}, rf".*{LINEAR}\.oft_R\.default\.weight"),
    "ia3": ({}, r".*(k|v|down)_proj\.ia3_l\.default"),
    "layers": ({"layers": 1}, r"model\.layers\.[01]\..*"),
    "layers first": ({"layers": 1, "which": "first"}, r"model\.layers\.0\..*"),
    "layers last": ({"layers": 1, "which": "last", "train_final_norm": True}, r"model\.layers\.1\..*|model\.norm\.weight"),
    "layers head": (
        {"layers": 1, "which": "last", "train_head": True, "train_embeddings": True},
        r"model\.layers\.1\..*|model\.embed_tokens\.weight|lm_head\.weight",
    ),
    "full": ({}, r".*"),
}  # fmt: skip


@functools.cache
def tokenizer_of(folder: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(folder))


def built(variant: str, folder: Path, precision: str = "no") -> Adapted:
    method = variant.split()[0]
    options = resolved(MethodOptions(method=method, **VARIANTS[variant][0]))
    torch.manual_seed(0)
    return apply_method(load_model(str(folder), precision), options, Setting(tokenizer_of(folder), STEPS))


def trained(model: Adapted, steps: int = STEPS) -> PackedCausalLM:
    """A few steps of the method on one packed row, as the training loop takes them."""
    packed = PackedCausalLM(model).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, weight_decay=0.01)
    if "lora_E" in str(list(dict(model.named_parameters()))):
        RankBudget(model, optimizer)
    torch.manual_seed(1)
    items = [Encoded(torch.randint(300, 700, (length,)).tolist(), [True] * length, "") for length in (9, 20, 5)]
    row = packed_row(items, virtual=virtual_tokens(model))
    for _ in range(steps):
        (packed(row) / len(row.targets)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return packed


def hashes(model: torch.nn.Module) -> dict[str, str]:
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: hashlib.sha256(t.detach().contiguous().numpy().tobytes()).hexdigest() for name, t in tensors.items()}


def test_every_method_of_the_command_line_exists_and_is_tested() -> None:
    methods = set(names_in("llm_peft_fa.methods:METHODS"))
    assert methods == set(METHODS)
    assert {variant.split()[0] for variant in VARIANTS} == methods - {"qlora"}, "qlora has a test of its own"


@pytest.mark.parametrize("variant", VARIANTS)
def test_exactly_the_intended_parameters_change(variant: str, model_dir: Path) -> None:
    model = built(variant, model_dir)
    before = hashes(model)
    intended = {name for name in dict(model.named_parameters()) if re.fullmatch(VARIANTS[variant][1], name)}
    assert intended
    assert {name for name, p in model.named_parameters() if p.requires_grad} == intended
    trained(model)
    after = hashes(model)
    changed = {name for name in before if before[name] != after[name]}
    assert before.keys() == after.keys()
    assert changed == intended
    structure = structure_of(model)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert structure.trainable == sum(sizes[name] for name in intended)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    twice = sizes[next(name for name in sizes if name.endswith("embed_tokens.weight"))] if tied else 0
    assert (
        sum(row.times * (cell.trained + cell.fixed) for row in structure.rows for cell in row.cells)
        == sum(sizes.values()) + twice
    ), "the drawing shows all"


@pytest.mark.parametrize("variant", [name for name in VARIANTS if " " not in name or "projected" in name])
def test_the_result_loads_in_plain_peft_or_transformers(variant: str, model_dir: Path, tmp_path: Path) -> None:
    model = built(variant, model_dir)
    initial = initial_update(model)
    packed = trained(model).eval()
    save(packed.model, tokenizer_of(model_dir), tmp_path, initial)
    assert not list(tmp_path.rglob("*.bin"))
    ids = torch.randint(300, 700, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        # Plain transformers: its own attention, and the base anew.
        plain = AutoModelForCausalLM.from_pretrained(model_dir, attn_implementation="eager")
        untuned = plain(ids).logits
        if isinstance(model, PeftModel):
            loaded = PeftModel.from_pretrained(plain, tmp_path / "adapter")
        else:
            loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
            assert loaded.config._attn_implementation == "eager"
        own = {"attention_mask": torch.ones_like(ids)} if virtual_tokens(model) or "prefix" in variant else {}
        expected = model(ids, **own).logits[:, -24:]
        scale = expected.abs().max()
        there = loaded.eval()(ids, **own).logits[:, -24:]
        torch.testing.assert_close(there / scale, expected / scale, atol=1e-4, rtol=0)
        assert not torch.allclose(untuned / scale, expected / scale, atol=1e-3), "training changed nothing"
        ours = load_tuned(tmp_path, str(model_dir))
        torch.testing.assert_close(ours(ids, **own).logits[:, -24:] / scale, expected / scale, atol=1e-4, rtol=0)
        if isinstance(ours, PeftModel):
            with ours.disable_adapter():
                torch.testing.assert_close(ours(ids).logits / scale, untuned / scale, atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", ["prompt_tuning", "prefix_tuning", "prefix_tuning projected", "p_tuning"])
def test_generation_with_a_soft_prompt_follows_its_own_logits(variant: str, model_dir: Path, tmp_path: Path) -> None:
    save(trained(built(variant, model_dir)).model, tokenizer_of(model_dir), tmp_path)
    model = load_tuned(tmp_path, str(model_dir))
    ids = torch.randint(300, 700, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    padding = 5 if "prefix" in variant else 0  # on the left, as in a batch of prompts; `answers` pads no others
    mask[0, :padding] = 0
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=-1)
    for row, start in ((0, padding), (1, 0)):
        text = ids[row : row + 1, start:]
        for _ in range(8):
            with torch.no_grad():
                logits = model(input_ids=text, attention_mask=torch.ones_like(text)).logits
            text = torch.cat([text, logits[:, -1:].argmax(-1)], 1)
        assert out[row, 12:].tolist() == text[0, -8:].tolist()


def test_lora_is_its_formula(model_dir: Path) -> None:
    for variant, scale in (("lora", 32 / 3), ("rslora", 32 / 3**0.5)):
        layer = built(variant, model_dir).get_base_model().model.layers[0].self_attn.q_proj
        x = torch.randn(5, layer.in_features)
        torch.nn.init.normal_(layer.lora_B["default"].weight)
        update = x @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T * scale
        torch.testing.assert_close(layer(x), layer.base_layer(x) + update)


def test_adalora_regularises_and_prunes_as_peft_does(model_dir: Path) -> None:
    model = built("adalora", model_dir)
    ids = torch.randint(300, 700, (1, 9))
    regularised = model(input_ids=ids, labels=ids).loss - model.base_model.model(input_ids=ids, labels=ids).loss
    assert orthogonality(model).item() == pytest.approx(regularised.item(), rel=1e-3)
    row = packed_row([Encoded(ids[0].tolist(), [True] * 9, "")])
    packed = PackedCausalLM(model)
    added = packed.train()(row) - packed.eval()(row)
    assert added.item() == pytest.approx(orthogonality(model).item() * 8, rel=1e-3)
    trained(model)
    left = [sum(kept) for kept in model.peft_config["default"].rank_pattern.values()]
    start = model.peft_config["default"].init_r
    assert sum(left) == 4 * len(left) < start * len(left), "the mean rank is --rank"


def test_adalora_goes_on_from_its_state(model_dir: Path) -> None:
    model = built("adalora", model_dir)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    budget = RankBudget(model, optimizer)
    packed = PackedCausalLM(model).train()
    row = packed_row([Encoded(torch.randint(300, 700, (12,)).tolist(), [True] * 12, "")])

    def step() -> None:
        packed(row).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    step()
    saved = {
        "budget": torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, budget.state_dict()),
        "model": {name: p.clone() for name, p in model.state_dict().items()},
        "optimizer": torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, optimizer.state_dict()),
    }  # fmt: skip
    for _ in range(3):
        step()
    expected = hashes(model)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    budget.adalora.rankallocator.reset_ipt()
    budget.load_state_dict(saved["budget"])
    for _ in range(3):
        step()
    assert hashes(model) == expected


@pytest.mark.parametrize("variant", ["pissa", "olora"])
def test_pissa_and_olora_become_adapters_as_peft_converts_them(variant: str, model_dir: Path, tmp_path: Path) -> None:
    model = built(variant, model_dir)
    initial = initial_update(model)
    model.save_pretrained(tmp_path / "start")
    packed = trained(model)
    save(packed.model, tokenizer_of(model_dir), tmp_path, initial)
    model.save_pretrained(tmp_path / "peft", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    ours, theirs = (adapted_model(tmp_path / name, str(model_dir)) for name in ("adapter", "peft"))
    theirs_state = get_peft_model_state_dict(theirs)
    for name, tensor in get_peft_model_state_dict(ours).items():
        assert tensor.shape == theirs_state[name].shape
    ids = torch.randint(300, 700, (1, 16))
    with torch.no_grad():
        one, two = ours(ids).logits, theirs(ids).logits
    torch.testing.assert_close(one / two.abs().max(), two / two.abs().max(), atol=2e-5, rtol=0)


def test_qlora_trains_beside_a_base_in_four_bits(model_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs the extra llm-peft-fa[quantization]")
    check_quantization()
    options = resolved(MethodOptions(method="qlora", rank=3))
    torch.manual_seed(0)
    base = load_model(str(model_dir), quantized=True)
    model = apply_method(base, options, Setting(tokenizer_of(model_dir), STEPS))
    quantized = {name for name, p in model.named_parameters() if p.dtype == torch.uint8}
    assert {name.split(".")[-3] for name in quantized} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    before = hashes(model)
    packed = trained(model).eval()
    after = hashes(model)
    assert {name for name in before if before[name] != after[name]} == {name for name in before if ".lora_" in name}
    save(packed.model, tokenizer_of(model_dir), tmp_path)
    ids = torch.randint(300, 700, (2, 24))
    with torch.no_grad():
        expected = model(ids).logits
        loaded = load_tuned(tmp_path, str(model_dir), quantized=True)(ids).logits
    torch.testing.assert_close(loaded / expected.abs().max(), expected / expected.abs().max(), atol=1e-4, rtol=0)
    full = {name: p.numel() for name, p in load_model(str(model_dir)).named_parameters()}
    structure = structure_of(model)
    assert structure.parameters - structure.trainable == sum(full.values()), "two weights in a byte are counted as two"


def test_qlora_without_its_extra_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(LabError, match=r"llm-peft-fa\[quantization\]"):
        check_quantization()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_bf16_base_trains_in_float32_under_autocast(variant: str, llama_dir: Path) -> None:
    """What a GPU run does; the CPU has the same autocast."""
    model = built(variant, llama_dir, "bf16")
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if not p.requires_grad and "ranknum" not in n} <= {
        torch.bfloat16
    }
    packed = PackedCausalLM(model).train()
    items = [Encoded(torch.randint(300, 700, (length,)).tolist(), [True] * length, "") for length in (9, 20)]
    row = packed_row(items, virtual=virtual_tokens(model))
    with torch.autocast("cpu", torch.bfloat16):
        loss = packed(row)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
    assert any(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "full", "rank": 8}, "--rank: --method full takes --pure-bf16"),
        ({"method": "prefix_tuning", "target_modules": ("q_proj",)}, "--target-modules"),
        ({"method": "lora", "virtual_tokens": 8}, "--virtual-tokens"),
        ({"method": "lora", "train_head": True}, "--train-head"),
        ({"method": "prompt_tuning", "prompt_init": "random", "prompt_text": "x"}, "--prompt-text"),
        ({"method": "prefix_tuning", "prompt_init": "vocabulary"}, "--prompt-init vocabulary"),
        ({"method": "prefix_tuning", "prompt_init": "text", "encoder_width": 8}, "--prompt-init text"),
    ],
)
def test_options_that_do_not_fit_are_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(LabError, match=said):
        resolved(MethodOptions(**options))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "lora", "target_modules": ("wq",)}, "wq"),
        ({"method": "lora", "target_modules": ("q_proj", "lm_head")}, "--target-modules: the head"),
        ({"method": "layers", "layers": 3}, "--layers 3"),
        ({"method": "prefix_tuning", "virtual_tokens": 16}, "sliding window"),
        ({"method": "oft", "block_size": 7}, "--block-size 7"),
        ({"method": "layers", "layers": 1, "train_head": True}, "--train-embeddings"),
        ({"method": "adalora"}, "adalora"),
    ],
)
def test_options_that_do_not_fit_the_model_are_named(options: dict[str, Any], said: str, gemma_dir: Path) -> None:
    setting = Setting(tokenizer_of(gemma_dir), 3)
    with pytest.raises(LabError, match=said):
        apply_method(load_model(str(gemma_dir)), resolved(MethodOptions(**options)), setting)


def test_a_missing_adapter_is_named(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(LabError, match=r"adapter_config\.json"):
        adapted_model(tmp_path / "nothing", str(model_dir))
