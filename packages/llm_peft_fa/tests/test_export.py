"""What leaves the house: files that others read, a card, and a push to a stand-in of the hub."""

import base64
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import SMALL, here, save
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from labs_common.cli import config_to_yaml
from llm_peft_fa.base import check_quantization, load_model, load_tokenizer
from llm_peft_fa.config import DemoConfig, MethodOptions, ModelOptions, SubjectOptions, TrainConfig
from llm_peft_fa.demo import found_subjects
from llm_peft_fa.methods import Setting, apply_method, resolved
from llm_peft_fa.saved import subject_of, write_merged
from llm_peft_fa.templates import encode_prompt, stands_alone

IDS = torch.randint(300, 700, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def run(gemma_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of a base that has a licence and SentencePiece's file."""
    (gemma_dir / "README.md").write_text("---\nlicense: gemma\n---\n# Gemma\n")
    (gemma_dir / "tokenizer.model").write_bytes(b"pieces")
    run = tmp_path_factory.mktemp("runs") / "tuned"
    here("train", "--model", gemma_dir, "--output", run, *SMALL, "--max-steps", "3", "--no-report",
         "--template", "plain")  # fmt: skip
    yield run
    (gemma_dir / "README.md").unlink()
    (gemma_dir / "tokenizer.model").unlink()


@pytest.fixture(scope="module")
def merged(run: Path) -> Path:
    assert f"written: {run / 'exported-model'}" in here("export", run, "--to", "merged").stdout
    return run / "exported-model"


@pytest.fixture(scope="module")
def adapter(run: Path) -> Path:
    here("export", run, "--to", "adapter")
    return run / "exported-adapter"


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def test_the_merged_model_is_what_was_trained_and_has_each_tensor_once(
    run: Path, merged: Path, gemma_dir: Path
) -> None:
    """As transformers, vLLM and llama.cpp's convert_hf_to_gguf.py read it."""
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(gemma_dir), run / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(merged)
    torch.testing.assert_close(logits(plain), logits(tuned), atol=1e-4, rtol=0)
    config = json.loads((merged / "config.json").read_text())
    assert config["architectures"] == ["Gemma2ForCausalLM"]
    assert "quantization_config" not in config
    assert plain.config._attn_implementation != "labs_packed"
    with safe_open(merged / "model.safetensors", "pt") as file, safe_open(gemma_dir / "model.safetensors", "pt") as of:
        assert set(file.keys()) == set(of.keys())
        assert "lm_head.weight" not in set(file.keys()), "it is the embeddings"
    assert (merged / "model.safetensors").stat().st_size == pytest.approx(
        (gemma_dir / "model.safetensors").stat().st_size, rel=0.01
    )
    assert (merged / "tokenizer.model").read_bytes() == b"pieces", "llama.cpp reads Gemma's words from it"
    assert AutoTokenizer.from_pretrained(merged).chat_template
    assert (merged / "generation_config.json").exists()


def test_the_adapter_is_one_that_vllm_serves(run: Path, adapter: Path) -> None:
    """By vllm/lora/peft_helper.py and lora_model.py: what they refuse, and the names that they parse."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert (config["bias"], config["use_dora"], config["modules_to_save"]) == ("none", False, None)
    assert {"r", "lora_alpha", "target_modules"} <= config.keys()
    name = r"base_model\.model\.model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj\.lora_[AB]\.weight"
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        assert all(re.fullmatch(name, key) for key in file.keys())  # noqa: SIM118
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float32}, "as it trained"  # noqa: SIM118
    text = (adapter / "README.md").read_text()
    serve = re.search(r"^vllm serve .*", text, re.MULTILINE)[0]
    assert f"--enable-lora --max-lora-rank 8 --lora-modules tuned={adapter}" in serve, "a rank of 4 is not among vLLM's"
    template = Path(serve.split("--chat-template ")[1])
    assert template.parent == adapter
    assert template.read_text(encoding="utf-8") == stands_alone(load_tokenizer(str(run / "adapter")))


def test_the_cards_lines_of_python_ask_as_was_trained(
    adapter: Path, gemma_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The base has another template than the training had."""
    text = (adapter / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert f'"{gemma_dir}"' in code
    found: dict[str, Any] = {}
    exec(code.replace("max_new_tokens=256", "max_new_tokens=2"), found)
    trained = load_tokenizer(str(gemma_dir), "plain")
    assert found["asked"]["input_ids"][0].tolist() == encode_prompt(trained, found["chat"])
    assert found["model"].peft_config["default"].r == 4
    assert capsys.readouterr().out.endswith("\n")


def test_the_card_says_what_it_is_in_two_languages(run: Path, merged: Path) -> None:
    text = (merged / "README.md").read_text(encoding="utf-8")
    meta = yaml.safe_load(text.split("---\n")[1])
    assert (meta["license"], meta["language"], meta["library_name"]) == ("gemma", "fa", "transformers")
    scores = json.loads((run / "results.json").read_text())["after"]
    found = {one["name"]: one["value"] for one in meta["model-index"][0]["results"][0]["metrics"]}
    assert found == {name: scores[name] for name in ("exact match", "chrF", "validation loss") if name in scores}
    assert f"| chrF | {json.loads((run / 'results.json').read_text())['before']['chrF']:.3f} |" in text
    assert "آموزش" in text
    assert "generated Persian tasks" in text
    assert str(run.parent) not in meta.__repr__(), "nothing of this machine among what the hub shows"


def test_every_command_takes_what_was_exported(
    run: Path, merged: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, where in (("checkpoint", merged), ("checkpoint", adapter), ("model", adapter), ("adapter", adapter)):
        subject = subject_of(SubjectOptions(**{name: str(where) if name == "model" else where}))
        assert subject.adapted == (where == adapter), (name, where)
        trained = subject_of(SubjectOptions(checkpoint=run)).load()
        torch.testing.assert_close(logits(subject.load()), logits(trained), rtol=1e-5, atol=1e-4)
    said = here("chat", "--checkpoint", merged, "--max-new-tokens", "3", typed="سلام\n/quit\n")
    assert said.stdout.count("> ") == 2
    offered = found_subjects(DemoConfig(checkpoint=(run, merged, adapter), models=(str(adapter),)))
    assert {"tuned", "exported-model", "exported-adapter", str(adapter)} <= offered.keys()
    (tmp_path / "asked.jsonl").write_text('{"instruction": "سلام", "output": "سلام بر تو"}\n', encoding="utf-8")
    here("evaluate", "--model", adapter, "--data", "asked.jsonl", "--test-prompts", "1", "--max-new-tokens", "2")
    assert [path.name[:10] for path in (tmp_path / "runs").iterdir()] == ["evaluation"]


class Hub(BaseHTTPRequestHandler):
    """The calls of the hub's API that a push makes, as huggingface_hub makes them."""

    got: list[tuple[str, str | None, bytes]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.got.append((self.path, self.headers["Authorization"], body))
        if "refused" in self.path or b"refused" in body:
            return self.answer({"error": "no rights"}, 403)
        if self.path.endswith("/preupload/main"):
            asked = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                for one in json.loads(body)["files"]
            ]
            return self.answer({"files": asked})
        address = f"http://{self.headers['Host']}/someone/name"
        return self.answer(
            {"url": address, "commitUrl": f"{address}/commit/1", "commitOid": "1", "errors": [], "warnings": []}
        )

    def do_GET(self) -> None:
        self.answer({"error": "not found"}, 404)

    do_HEAD = do_GET  # noqa: N815 the name that http.server calls

    def answer(self, said: dict[str, object], code: int = 200) -> None:
        body = json.dumps(said).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A stand-in that listens on this machine."""
    Hub.got = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield Hub
    server.shutdown()
    server.server_close()


def test_a_push_makes_a_private_repository_with_the_files(hub: type[Hub], run: Path, tmp_path: Path) -> None:
    done = here("export", run, "--to", "hub", "--repo", "someone/name", "--output", tmp_path / "pushed")
    assert "/someone/name" in done.stdout
    assert "hf_secret" not in done.stdout + done.stderr
    calls = {path: body for path, _, body in hub.got}
    assert {token for _, token, _ in hub.got} == {"Bearer hf_secret"}
    made = json.loads(calls["/api/repos/create"])
    assert (made["name"], made["organization"]) == ("name", "someone")
    assert made.get("private") is True or made.get("visibility") == "private"
    lines = [json.loads(line) for line in calls["/api/models/someone/name/commit/main"].splitlines()]
    files = {
        line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
    }
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "pushed").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json"} <= files.keys()
    assert b"someone/name" in files["README.md"]
    assert b"hf download someone/name chat_template.jinja --local-dir .\nvllm serve" in files["README.md"]
    assert b" --chat-template chat_template.jinja\n" in files["README.md"]
    done = here("export", run, "--to", "hub", "--repo", "refused/x", "--output", tmp_path / "other", code=2)
    assert "--repo refused/x: the hub did not take it" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_cannot_be_written_is_one_line(
    run: Path, gemma_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    soft = resolved(MethodOptions(method="prompt_tuning", virtual_tokens=2, prompt_init="random"))
    tokenizer = load_tokenizer(str(gemma_dir))
    save(apply_method(load_model(str(gemma_dir)), soft, Setting(tokenizer, 1)), tokenizer, tmp_path)
    for said, *arguments in (
        ("run `hf auth login`", run, "--to", "hub", "--repo", "someone/name"),
        ("--repo: name where to push", run, "--to", "hub"),
        ("--repo: is of --to hub", run, "--repo", "someone/name"),
        ("--repo someone/a..b", run, "--to", "hub", "--repo", "someone/a..b"),
        ("is not empty", run, "--output", tmp_path),
        ("a soft prompt", tmp_path / "adapter", "--to", "merged"),
        ("is a whole model; take --to merged", gemma_dir, "--to", "adapter"),
        ("name the directory of a finished run", tmp_path / "adapter" / "nothing"),
    ):
        assert said in here("export", *arguments, code=2).stderr


def test_a_tied_head_that_trained_in_float32_is_written_once(gemma_dir: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(gemma_dir))
    base = load_model(str(gemma_dir), "bf16")
    full = apply_method(base, resolved(MethodOptions(method="full")), Setting(tokenizer, 1))
    save(full, tokenizer, tmp_path)
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert {file.get_tensor(name).dtype for name in names} == {torch.bfloat16}, "as the base was read"
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")),
                       logits(AutoModelForCausalLM.from_pretrained(gemma_dir, dtype=torch.bfloat16,
                                                                   attn_implementation="eager")))  # fmt: skip


def test_a_merged_qlora_has_the_values_of_its_four_bits(llama_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs the extra llm-peft-fa[quantization]")
    check_quantization()
    torch.manual_seed(0)
    base, tokenizer = load_model(str(llama_dir), quantized=True), load_tokenizer(str(llama_dir))
    model = apply_method(base, resolved(MethodOptions(method="qlora", rank=3)), Setting(tokenizer, 1))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    save(model, tokenizer, tmp_path)
    (tmp_path / "merged").mkdir()
    write_merged(tmp_path / "adapter", str(llama_dir), True, tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    found, expected = logits(plain), logits(model)
    assert (found - expected).norm() < 1e-4 * expected.norm()
    with safe_open(tmp_path / "merged" / "model.safetensors", "pt") as file:
        assert file.get_tensor("lm_head.weight").dtype == torch.float32, "as the base is; its head is not tied"
    # The adapter alone says that its base is held in four bits, and others' files beside it stay where they are.
    asked = TrainConfig(model=ModelOptions(model=str(llama_dir)), method=MethodOptions(method="qlora"))
    (tmp_path / "config.yaml").write_text(config_to_yaml(asked))
    (tmp_path / "adapter" / "optimizer.pt").write_bytes(b"of others")
    here("export", tmp_path, "--to", "adapter", "--output", tmp_path / "out")
    assert subject_of(SubjectOptions(checkpoint=tmp_path / "out")).quantized
    assert not (tmp_path / "out" / "optimizer.pt").exists()
