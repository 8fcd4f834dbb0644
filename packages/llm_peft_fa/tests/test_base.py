"""Bases and adapters that are hostile or damaged: no code of theirs runs, and one line says what is wrong."""

import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from commands import here
from huggingface_hub import constants
from labs_testing.damage import OWN_CODE, Damage, cut, edited, hostile, without, written
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from labs_common.errors import LabError
from llm_peft_fa.base import base_config, load_model, load_tokenizer, model_path, own_template, unloaded_model
from llm_peft_fa.config import SubjectOptions
from llm_peft_fa.saved import adapted_model, subject_of

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def shards(place: str, name: str = WEIGHTS) -> Damage:
    """Lays the weights somewhere, and writes an index that names them."""

    def damage(folder: Path) -> None:
        names = load_file(folder / WEIGHTS)
        shutil.move(folder / WEIGHTS, folder / place)
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, name)}))

    return damage


OWN = edited("config.json", model_type="mine", auto_map=OWN_CODE)


@pytest.mark.parametrize(
    ("damage", "weights", "words"),  # what is said of the weights and of the tokenizer; None where it can be read
    [
        (OWN, "code of its own", None),
        (edited("config.json", auto_map=OWN_CODE), None, None),  # the library's own class
        (edited("tokenizer_config.json", tokenizer_class="E", auto_map=OWN_CODE), None, "code of its own"),
        (without(WEIGHTS, "1.self_attn.q"), "lack model.layers.1.self_attn.q_proj.weight, which would be random", None),
        (without(WEIGHTS, "lm_head"), "lack lm_head.weight", None),
        (without(WEIGHTS, "layers"), "and 13 more tensors", None),
        (cut(WEIGHTS), f"{WEIGHTS} is truncated", None),
        (written(WEIGHTS, b""), f"{WEIGHTS} is truncated", None),
        (cut("config.json"), "config.json: is not JSON", "config.json: is not JSON"),
        (written("config.json", b"[]"), "config.json", "cannot be loaded"),
        (edited("config.json", num_hidden_layers="two"), "num_hidden_layers", "num_hidden_layers"),
        (edited("config.json", hidden_size=48), "another shape for lm_head.weight, model.embed", None),
        (cut("tokenizer.json"), None, "tokenizer.json: is not JSON"),
        (written("tokenizer.json", b"{}"), None, "cannot be loaded"),
        (cut("tokenizer_config.json"), None, "tokenizer_config.json: is not JSON"),
        (written(INDEX, b"{"), f"{INDEX} is no index", f"{INDEX} is no index"),
        (shards("one.safetensors", "one.safetensors"), None, None),
        (shards("one.safetensors", "two.safetensors"), "two.safetensors, which is not in that", "two.safetensors"),
        (shards("../one.safetensors", "../one.safetensors"), "../one.safetensors, which is not in", "../one.safetensors"),
        (shards("..\\one.safetensors", "..\\one.safetensors"), "which is not in that directory", "one.safetensors"),
    ],
)  # fmt: skip
def test_a_base_runs_no_code_and_has_all_its_weights(
    damage: Damage, weights: str | None, words: str | None, llama_dir: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = tmp_path / "model"
    shutil.copytree(llama_dir, folder)
    ran = hostile(folder, monkeypatch)
    damage(folder)
    for load, said in ((load_model, weights), (load_tokenizer, words), (own_template, words)):
        if said is None:
            load(str(folder))
        else:
            with pytest.raises(LabError, match=f"^--model {folder}: ") as caught:
                load(str(folder))
            assert said in str(caught.value)
            assert "\n" not in str(caught.value)
    assert not ran.exists(), "code of the model ran"


def test_a_command_with_y_piped_to_it_runs_no_code(
    llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(llama_dir, folder)
    ran = hostile(folder, monkeypatch)
    OWN(folder)
    for options in (("train", "--model", folder, "--output", tmp_path / "run"), ("chat", "--model", folder)):
        done = here(*options, code=2, typed="y\ny\ny\n")
        assert len(done.errors) == 1
        assert "code of its own" in done.errors[0]
        assert "[y/N]" not in done.stdout + done.stderr
    assert not ran.exists()


@pytest.fixture(scope="module")
def adapter(llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of LoRA, on the random Llama."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(load_model(str(llama_dir)), config).save_pretrained(folder)
    return folder


def deeper(folder: Path) -> None:
    """Adds a third layer's tensors: an adapter of a larger base."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    more = {name.replace("layers.1", "layers.2"): tensor.clone() for name, tensor in tensors.items()}
    save_file(more | tensors, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (edited("adapter_config.json"), None),
        (edited("adapter_config.json", task_type=None,
                auto_mapping={"parent_library": "evil", "base_model_class": "Model"}, auto_map=OWN_CODE), None),
        (edited("adapter_config.json", megatron_config={}, megatron_core="evil"), None),
        (edited("adapter_config.json", megatron_config={"a": 1}, megatron_core="evil"), "megatron_core"),
        (cut("adapter_config.json"), "adapter_config.json: is not JSON"),
        (written("adapter_config.json", b"[]"), "cannot be loaded"),
        (edited("adapter_config.json", peft_type="MINE"), "MINE"),
        (edited("adapter_config.json", r="two"), "cannot be loaded"),
        (edited("adapter_config.json", r=3), "size mismatch"),
        (edited("adapter_config.json", target_modules=["no_proj"]), "no_proj"),
        (cut("adapter_model.safetensors"), "adapter_model.safetensors is truncated"),
        (without("adapter_model.safetensors", "layers.1.self_attn.q_proj.lora_B"), "layers.1.self_attn.q_proj.lora_B"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "adapter_model"),
        (deeper, "another base than"),
    ],
)  # fmt: skip
def test_an_adapter_runs_no_code_and_fits_its_base(
    damage: Damage, said: str | None, adapter: Path, llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    ran = hostile(folder, monkeypatch)
    monkeypatch.syspath_prepend(folder)  # so that a name which is imported is found
    damage(folder)
    if said is None:
        adapted_model(folder, str(llama_dir))
    else:
        with pytest.raises(LabError, match=str(folder)) as caught:
            adapted_model(folder, str(llama_dir))
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not ran.exists(), "code of the adapter ran"


def test_an_adapter_of_another_base_or_of_one_with_code_is_refused(
    adapter: Path, llama_dir: Path, gemma_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(LabError, match="size mismatch"):
        adapted_model(adapter, str(gemma_dir))
    base, own = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(llama_dir, base)
    shutil.copytree(adapter, own)
    ran = hostile(base, monkeypatch)
    OWN(base)
    edited("adapter_config.json", base_model_name_or_path=str(base))(own)
    with pytest.raises(LabError, match=f"--model {base}: needs Python code of its own"):
        subject_of(SubjectOptions(adapter=own)).load()
    with pytest.raises(LabError, match="code of its own"):
        unloaded_model(base_config(str(base)))
    assert not ran.exists()


def test_a_directory_that_is_not_there_is_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a hub id could be meant."""
    (tmp_path / "runs" / "there").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("./nothing", "../nothing/there", "/nothing/there", "~/runs/nothing", "runs/nothing/there"):
        for load in (base_config, load_tokenizer, lambda name: subject_of(SubjectOptions(model=name))):
            with pytest.raises(LabError, match=rf"^--model {name}: no such directory; give tiny, a directory or a hub"):
                load(name)
    for load in (base_config, load_tokenizer):
        with pytest.raises(LabError, match=r"^--model runs/nothing \(no such directory\): cannot be loaded"):
            load("runs/nothing")
    assert [model_path(name) for name in ("~/runs/there", "./runs/there", "acme/llama", "gpt2")] == [
        str(tmp_path / "runs" / "there"), "./runs/there", "acme/llama", "gpt2",
    ]  # fmt: skip


# As the hub answers for a model with a licence that nobody accepted, without and with a token, and for one that is
# private or not there: https://github.com/huggingface/huggingface_hub/blob/main/src/huggingface_hub/utils/_http.py
REFUSED = {"licence": (401, "GatedRepo"), "accepted-not": (403, "GatedRepo"), "private": (401, "RepoNotFound")}


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does for what it does not give."""

    def do_GET(self) -> None:
        status, code = next(answer for name, answer in REFUSED.items() if f"acme/{name}" in self.path)
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub on this machine, in the place of the real one."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        pattern = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", pattern)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield
        server.shutdown()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "licence",
            "needs a licence: accept it at https://huggingface.co/acme/licence, then log in by `hf auth login`",
        ),
        ("accepted-not", "needs a licence: accept it at https://huggingface.co/acme/accepted-not"),
        ("private", "no such model, or it is private: check the name; for a private one log in by `hf auth login`"),
    ],
)
@pytest.mark.usefixtures("hub")
def test_a_model_that_is_not_for_everybody_says_how_to_get_it(name: str, says: str) -> None:
    done = here("train", "--model", f"acme/{name}", "--conversations", "40", code=2)
    assert len(done.errors) == 1
    assert f"--model acme/{name}: " in done.errors[0]
    assert says in done.errors[0]
    assert "HF_TOKEN" in done.errors[0]
    for load in (load_model, base_config):
        with pytest.raises(LabError, match="HF_TOKEN") as caught:
            load(f"acme/{name}")
        assert says in str(caught.value)
        assert "\n" not in str(caught.value)
