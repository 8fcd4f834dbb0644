"""PiSSA's start against the exact decomposition, on a matrix too wide for it to be taken."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from llm_peft_fa.pissa import from_leading_part, leading_part

pytestmark = pytest.mark.quick
RANK = 8


def made() -> torch.nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=50, hidden_size=128, intermediate_size=160, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=2, initializer_range=0.3)  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def test_the_leading_vectors_are_those_of_an_exact_decomposition() -> None:
    """Singular values that fall as slowly as those of trained weights, in directions that are known."""
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(rows, 256))[0] for rows in (700, 256))
    values = torch.arange(1, 257).float() ** -0.35
    u, s, v = leading_part((left * values) @ right.T, RANK)
    torch.testing.assert_close(s, values[:RANK], rtol=1e-3, atol=0)
    for found, true in ((u, left), (v.T, right)):
        cosines = torch.linalg.svdvals(true[:, :RANK].T @ found)  # of the angles between the two subspaces
        assert (1 - cosines**2).mean().sqrt() < 0.02
    ours = (u * s) @ v - (left[:, :RANK] * values[:RANK]) @ right[:, :RANK].T
    assert ours.norm() < 0.03 * values[:RANK].norm()


def test_base_and_update_are_the_weight_and_a_seed_gives_the_same(tmp_path: Path) -> None:
    found = []
    for _ in range(2):
        model, before = made(), made().state_dict()
        adapted = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=32, target_modules="all-linear"))
        torch.manual_seed(1)
        from_leading_part(adapted)
        layer = model.model.layers[0].mlp.up_proj
        update = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * 32 / RANK
        whole = before["model.layers.0.mlp.up_proj.weight"]
        torch.testing.assert_close(layer.base_layer.weight + update, whole, rtol=0, atol=1e-5)
        energy = torch.linalg.svdvals(whole)[:RANK].square().sum().sqrt()
        assert update.norm().item() == pytest.approx(energy.item(), rel=2e-3), "no less than the largest part"
        found.append(update)
    assert torch.equal(*found)
