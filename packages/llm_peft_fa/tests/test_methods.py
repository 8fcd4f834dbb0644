from pathlib import Path
from typing import get_args

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from transformers import AutoModelForCausalLM

from labs_common.errors import LabError
from llm_peft_fa.adapters import adapted_model, save_adapter, save_merged
from llm_peft_fa.config import Method, MethodOptions
from llm_peft_fa.methods import METHODS, lora
from llm_peft_fa.model import load_model, load_tokenizer
from llm_peft_fa.packed import PackedCausalLM


def test_every_method_of_the_command_line_exists() -> None:
    assert set(get_args(Method)) == set(METHODS)


def test_lora_trains_all_linear_layers_but_the_head(model_dir: Path) -> None:
    adapted = lora(load_model(str(model_dir)), MethodOptions(rank=3, alpha=6.0))
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    modules = {name.split(".lora_")[0].rsplit(".", 1)[1] for name in trained}
    assert modules == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert all(".lora_" in name for name in trained)
    layer = adapted.get_base_model().model.layers[0].self_attn.q_proj
    x = torch.randn(5, layer.in_features)
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    update = x @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T * 6.0 / 3
    torch.testing.assert_close(layer(x), layer.base_layer(x) + update)


def test_lora_names_targets_that_do_not_exist(model_dir: Path) -> None:
    with pytest.raises(LabError, match="wq"):
        lora(load_model(str(model_dir)), MethodOptions(target_modules=("wq",)))
    with pytest.raises(LabError, match="lora"):
        lora(load_model(str(model_dir)), MethodOptions(rank=0))


def test_adapter_and_merged_model_load_in_peft_and_transformers(model_dir: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = load_tokenizer(str(model_dir))
    adapted = lora(load_model(str(model_dir)), MethodOptions(rank=4))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    save_adapter(Accelerator(cpu=True), PackedCausalLM(adapted), tokenizer, tmp_path / "adapter")
    assert not list((tmp_path / "adapter").glob("*.bin"))
    ids = torch.randint(300, 700, (2, 24))
    with torch.no_grad():
        expected = adapted(ids).logits
        plain = AutoModelForCausalLM.from_pretrained(model_dir, attn_implementation="eager")
        assert not torch.allclose(plain(ids).logits, expected, atol=1e-2)
        loaded = PeftModel.from_pretrained(plain, tmp_path / "adapter")
        scale = expected.abs().max()
        torch.testing.assert_close(loaded(ids).logits / scale, expected / scale, atol=1e-5, rtol=0)
        save_merged(adapted_model(tmp_path / "adapter", str(model_dir)), tokenizer, tmp_path / "merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert merged.config._attn_implementation != "labs_packed"
        torch.testing.assert_close(merged(ids).logits / scale, expected / scale, atol=2e-5, rtol=0)


def test_a_missing_adapter_is_named(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(LabError, match="no adapter"):
        adapted_model(tmp_path / "nothing", str(model_dir))
