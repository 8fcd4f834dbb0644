"""Small drawn scenes with captions, and a captioner with a random encoder."""

import shutil
from pathlib import Path

import pytest
import torch
from labs_testing.commands import here, real_data

from caption_lab import tiny
from caption_lab.tiny import demo_scene
from labs_common.scenes.files import write_flickr8k

SMALL = ("--no-pretrained", "--width", "32", "--batch-size", "32", "--epochs", "3", "--track", "none")
WILD = {"initializer_range": 0.5}  # so that different pictures get different captions
ENDS = {"bos_token_id": 0, "eos_token_id": 0}


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn scenes with five captions each, as Flickr8k is laid out."""
    folder = tmp_path_factory.mktemp("scenes")
    write_flickr8k(folder, range(60), side=32, sample=demo_scene)
    return folder


@pytest.fixture(scope="session")
def real_pictures() -> Path:
    """Real photographs with captions."""
    return real_data("flickr8k-mini")


@pytest.fixture(scope="session")
def options(scenes: Path) -> tuple[object, ...]:
    return ("--model", "show_attend_tell", "--data", scenes, *SMALL)


@pytest.fixture(scope="session")
def finished(options: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    done = here("caption_lab.train", *options, "--output", run, "--save-every", "4")
    assert f"report: {run / 'report.html'}" in done.stdout
    return run


@pytest.fixture(scope="session")
def languages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A GPT-2 as the tiny one is made, hardly trained, and a Llama with the same tokens, whose head is not tied."""
    from transformers import (  # takes seconds, which other tests need not wait
        AutoModelForCausalLM,
        GPT2Config,
        LlamaConfig,
    )

    gpt2, llama = tmp_path_factory.mktemp("gpt2"), tmp_path_factory.mktemp("llama")
    sizes = tiny.LANGUAGE["sizes"] | {"n_embd": 32, "n_layer": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            tiny, "LANGUAGE", tiny.LANGUAGE | {"scenes": 40, "steps": 2, "batch": 8, "tokens": 300, "sizes": sizes}
        )
        tiny._make_language(gpt2)
    torch.manual_seed(0)
    for folder, config in (
        (gpt2, GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64, **ENDS, **WILD)),
        (llama, LlamaConfig(vocab_size=310, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_key_value_heads=2,
                            num_attention_heads=4, **ENDS, **WILD)),
    ):  # fmt: skip
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(gpt2 / name, llama / name)
    return {"gpt2": gpt2, "llama": llama}
