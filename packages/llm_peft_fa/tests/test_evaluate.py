import csv
import importlib
import io
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from commands import here, save
from jinja2.exceptions import SecurityError
from peft import PeftModel
from transformers import AutoModelForCausalLM

from labs_common.errors import LabError
from llm_peft_fa import chat
from llm_peft_fa.base import load_model, load_tokenizer
from llm_peft_fa.config import ChatConfig, EvaluateConfig, MethodOptions
from llm_peft_fa.evaluate import _readings, harness_tasks
from llm_peft_fa.methods import Setting, apply_method, resolved
from llm_peft_fa.rate import check_judge_file, write_judge_file

SMALL = ("--test-prompts", "5", "--max-new-tokens", "4")


@pytest.fixture(scope="module")
def adapter(llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prefix of PEFT's, as somebody else may have trained it."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(str(llama_dir))
    options = resolved(MethodOptions(method="prefix_tuning", virtual_tokens=3, prompt_init="random"))
    model = apply_method(load_model(str(llama_dir)), options, Setting(tokenizer, 5))
    folder = tmp_path_factory.mktemp("somewhere")
    save(model, tokenizer, folder)
    return folder / "adapter"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "data.jsonl"
    rows = [{"instruction": f"پایتخت {n} کجاست؟", "output": f"شهر {n}"} for n in range(8)]
    file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return file


def test_any_adapter_is_measured_beside_its_base_and_given_to_judges(adapter: Path, data: Path, tmp_path: Path) -> None:
    judges = tmp_path / "to_rate.csv"
    arguments = ("--adapter", adapter, "--data", data, *SMALL, "--output", tmp_path / "out", "--judge-file", judges)
    here("evaluate", *arguments)
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["scores"]["before"]["validation loss"] != found["scores"]["after"]["validation loss"]
    assert (tmp_path / "out" / "report.html").exists()
    with judges.open(encoding="utf-8-sig", newline="") as stream:
        rows = list(csv.reader(stream))[1:]
    key = json.loads((tmp_path / "to_rate.csv.key.json").read_text())
    assert len(rows) == len(key) == 5
    sides = set()
    for row, which, answer in zip(rows, key, found["answers"], strict=True):
        said = {"base": answer["before"], "adapter": answer["after"]}
        assert (row[1], row[2], row[3]) == (answer["prompt"], said[which["A"]], said[which["B"]])
        sides.add(which["A"])
    assert sides == {"base", "adapter"}, "neither is always A"
    again = here("evaluate", *arguments, "--output", tmp_path / "again", code=2)
    assert "--judge-file" in again.stderr, "ratings are never overwritten"
    judges.rename(tmp_path / "sent_away.csv")
    with pytest.raises(LabError, match="--judge-file"):
        check_judge_file(judges)


def test_no_text_of_a_table_for_judges_is_a_formula(tmp_path: Path) -> None:
    said = {"base": ["-1"], "tuned": ["＝a"]}
    write_judge_file(tmp_path / "to_rate.csv", ["=HYPERLINK(0)"], said, 0)
    with (tmp_path / "to_rate.csv").open(encoding="utf-8-sig", newline="") as stream:
        (_, row) = csv.reader(stream)
    assert {row[1], row[2], row[3]} == {" =HYPERLINK(0)", " -1", " ＝a"}


def test_bytes_that_are_no_text_can_be_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(
        chat, "subject_of", lambda options: SimpleNamespace(name="it", tokenizer="", load=lambda: None, trained=None)
    )
    monkeypatch.setattr(chat, "load_tokenizer", lambda name: None)
    monkeypatch.setattr(
        chat, "streamed_answer", lambda model, words, said, *more: asked.append(said[-1]["content"]) or ""
    )
    for stdin in (io.TextIOWrapper(io.BytesIO(b"\xff?\nb\n"), "utf-8"), None):  # None where it was closed
        monkeypatch.setattr("sys.stdin", stdin)
        chat.chat(ChatConfig())
    assert asked == ["\ufffd?", "b"]


def test_any_model_is_measured_alone_or_beside_another(llama_dir: Path, data: Path, tmp_path: Path) -> None:
    here("evaluate", "--model", llama_dir, "--data", data, *SMALL, "--output", tmp_path / "alone")
    alone = json.loads((tmp_path / "alone" / "evaluation.json").read_text())["scores"]
    assert alone.keys() == {"after"}
    here("evaluate", "--model", llama_dir, "--base", llama_dir, "--data", data, *SMALL, "--output", tmp_path / "two")
    two = json.loads((tmp_path / "two" / "evaluation.json").read_text())["scores"]
    assert two["before"] == two["after"] == alone["after"]


def test_the_test_split_of_a_directory_is_measured(tmp_path: Path) -> None:
    subject: Any = SimpleNamespace(trained=None)
    config = EvaluateConfig()
    config.reading.data = str(tmp_path)
    for split in ("train", "validation", "test"):  # the best of those that are there
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"instruction": split, "output": "a"}))
        prompts, held_out = _readings(config, subject)
        assert prompts is held_out
        assert [talk.messages[0]["content"] for talk in prompts.conversations] == [split]
    config.reading.split = "train"
    assert _readings(config, subject)[0].conversations[0].messages[0]["content"] == "train"


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("--checkpoint", "a", "--model", "b"), "--checkpoint and --model"),
        (("--adapter", "{nothing}"), "--adapter"),
        (("--model", "{nothing}"), "--model"),
        (("--model", "{model}", "--judge-file", "x.csv"), "--judge-file"),
        (("--model", "{model}", "--base", "{model}", "--judge-file", "missing/x.csv"), "--judge-file"),
        (("--model", "{model}", "--also-instruct", "{nothing}"), "{nothing}"),
        (("--model", "{model}", "--lm-eval", "missing.yaml"), "--lm-eval"),
        (("--checkpoint", "{nothing}"), "--checkpoint"),
        (("--run", "{nothing}"), "--checkpoint"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[str, ...], names: str, llama_dir: Path, tmp_path: Path) -> None:
    filled = [argument.format(nothing=tmp_path / "nothing", model=llama_dir) for argument in arguments]
    done = here("evaluate", *filled, code=2)
    assert names.format(nothing=tmp_path / "nothing") in done.stderr
    assert "Traceback" not in done.stderr


def test_chat_with_an_adapter(adapter: Path) -> None:
    done = here("chat", "--adapter", adapter, "--max-new-tokens", "3", typed="سلام\n/quit\n")
    assert done.stdout.count("> ") == 2


def test_a_saved_result_is_named_as_before_too(adapter: Path, tmp_path: Path) -> None:
    """Scripts and config files of version 0.1 say --run."""
    run = tmp_path / "run"
    file = tmp_path / "config.yaml"
    file.write_text(f"run: {run}\nmax_new_tokens: 3\n")
    for command in ("evaluate", "chat"):
        for arguments in (("--checkpoint", run), ("--run", run), ("--config", file)):
            assert f"--checkpoint {run}" in here(command, *arguments, code=2).stderr
    file.write_text(f"runs:\n- {run}\n")
    for arguments in (("--checkpoint", run), ("--run", run), ("--runs", run), ("--config", file)):
        assert f"--checkpoint {run}" in here("demo", *arguments, code=2).stderr
    run.mkdir()
    shutil.copytree(adapter, run / "adapter")
    recorded = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    (run / "config.yaml").write_text(f"model:\n  model: {recorded}\nmethod:\n  method: prefix_tuning\n")
    file.write_text(f"run: {run}\nmax_new_tokens: 3\n")
    said = {here("chat", *arguments, "--max-new-tokens", "3", typed="سلام\n/quit\n").stdout
            for arguments in (("--checkpoint", run), ("--run", run), ("--config", file))}  # fmt: skip
    assert len(said) == 1


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("process_docs: !function ran.f", "'!function'"),
        ("include: [sub/inner.txt]", "'!function'"),
        ("task: [{task: inner, metric_list: [{metric: ran.py}]}]", "metric 'ran.py' is a script"),
        ("metric_list: [{metric: acc, hf_evaluate: true}]", "metric 'acc' is a script"),
        ("doc_to_text: !!python/name:os.system", "python/name:os.system"),
        ("task: [", "--lm-eval"),
    ],
)
def test_a_task_file_runs_no_code(lines: str, said: str, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra llm-peft-fa[lm-eval]")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "inner.txt").write_text("include: ../own.yaml\nfilter: !function ran.f\n")
    task = tmp_path / "own.yaml"
    task.write_text(f"{lines}\n")
    with pytest.raises(LabError) as refused:
        harness_tasks(str(task), SimpleNamespace(num_processes=1))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    task.write_text("task: own\nmetric_list: [{metric: word_perplexity}]\n")
    assert harness_tasks(str(task), SimpleNamespace(num_processes=1))[0] == [str(task)]
    utils = importlib.import_module("lm_eval.utils")
    assert utils.apply_template("{{ a | regex_replace('b', 'c') }}", {"a": "bb"}) == "cc"
    with pytest.raises(SecurityError):
        utils.apply_template("{{ cycler.__init__.__globals__.os.getpid() }}", {})


@pytest.mark.long
def test_a_task_of_the_harness_sees_the_adapter(adapter: Path, llama_dir: Path, data: Path, tmp_path: Path) -> None:
    """One of the user's own; perplexity of its text as transformers and PEFT compute it, without and with the prefix."""
    pytest.importorskip("lm_eval", reason="needs the extra llm-peft-fa[lm-eval]")
    text = "پایتخت ایران تهران است"
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": text}), encoding="utf-8")
    task = tmp_path / "own.yaml"
    task.write_text(
        f"""task: own
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "texts.jsonl"}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: word_perplexity
"""
    )
    here("evaluate", "--adapter", adapter, "--data", data, *SMALL, "--lm-eval", task, "--output", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())["lm-eval"]
    tokenizer, plain = load_tokenizer(str(llama_dir)), AutoModelForCausalLM.from_pretrained(llama_dir)
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids]])
    for side, model in (("before", plain), ("after", PeftModel.from_pretrained(plain, adapter))):
        with torch.no_grad():
            loss = F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum")
        assert found[side]["own"]["word_perplexity"] == pytest.approx(math.exp(float(loss) / 4), rel=1e-3), side
    assert "Standard tasks" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
