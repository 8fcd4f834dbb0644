import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import LAUNCH, here
from test_ranking import entry

from labs_common.errors import LabError
from llm_peft_fa.compare import plan, table_rows
from llm_peft_fa.config import CompareConfig

SMALL = (
    "--conversations", "40", "--batch-size", "8", "--epochs", "1", "--test-prompts", "4", "--max-new-tokens", "4",
    "--tokens-per-batch", "300",
)  # fmt: skip


def test_specs_become_runs() -> None:
    assert len(plan(CompareConfig())) >= 6
    spec = "layers:which=last:layers=1:train_final_norm:learning_rate=0.5"
    planned = plan(CompareConfig(methods=f"{spec},lora,full"))
    run = planned[spec]
    assert (run.method.which, run.method.layers, run.method.train_final_norm) == ("last", 1, True)
    assert run.training.learning_rate == 0.5
    assert planned["lora"].training.learning_rate != planned["full"].training.learning_rate


@pytest.mark.parametrize(
    ("methods", "said"),
    [
        ("", "is empty"),
        ("lora,lora", "occurs twice"),
        ("magic", "magic"),
        ("lora:tokens=3", "tokens"),
        ("full:rank=3", "--rank"),
        ("lora:rank=0", "lora:rank=0: --rank: must be a whole number at least 1"),
        ("lora:learning_rate=fast", "learning_rate"),
    ],
)
def test_wrong_methods_are_named(methods: str, said: str) -> None:
    with pytest.raises(LabError, match=said):
        plan(CompareConfig(methods=methods))


def test_tables_have_mean_and_spread() -> None:
    row, base = table_rows({"a": entry("a", [9, 5], 7, 2)}, {"base": [{"exact match": 0.0}, {"exact match": 0.2}]})
    assert (row["exact match"], row["trained parameters"]) == (0.7, 7)
    assert row["exact match ±"] == pytest.approx(0.2828, abs=1e-4)
    assert base == {
        "method": "base", "exact match": 0.1, "exact match ±": pytest.approx(0.1414, abs=1e-4),
        "validation loss": 3.0, "validation loss ±": 0.0, "plain text loss": 0.9, "plain text loss ±": 0.0,
    }  # fmt: skip


@pytest.mark.kills
def test_killed_and_started_again_it_loses_at_most_the_method_under_way(llama_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "comparison"
    options = ["--model", str(llama_dir), "--methods", "layers:layers=1,prefix_tuning:virtual_tokens=3", *SMALL]
    command = [sys.executable, "-m", "llm_peft_fa.compare", *options, "--output", str(folder)]
    process = subprocess.Popen(command, env=os.environ, stderr=subprocess.DEVNULL, start_new_session=True)
    second = folder / "prefix_tuning-virtual_tokens=3" / "seed-0"
    for _ in range(30_000):
        if (second / "config.yaml").exists():
            break
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    first = folder / "layers-layers=1" / "seed-0" / "results.json"
    before = first.stat().st_mtime_ns
    assert not (folder / "report.html").exists()

    done = here("compare", *options, "--output", folder)
    assert first.stat().st_mtime_ns == before, "what was finished is not run again"
    assert f"report: {folder / 'report.html'}" in done.stdout
    rows = json.loads((folder / "comparison.json").read_text())["rows"]
    assert {row["method"] for row in rows} == {"layers:layers=1", "prefix_tuning:virtual_tokens=3", "base"}
    html = (folder / "report.html").read_text(encoding="utf-8")
    for heading in (
        "Which method", "Numbers", "Quality against cost", "Curves", "Strengths", "answered by all", "Budget",
    ):  # fmt: skip
        assert heading in html
    results = [
        json.loads((path / "results.json").read_text()) for path in folder.glob("*/seed-0") if "base" not in str(path)
    ]
    assert len(results) == 2
    assert len({(result["cost"]["steps"], result["cost"]["tokens"]) for result in results}) == 1, "one budget"
    assert len({result["before"]["validation loss"] for result in results}) == 1, "one base, without the soft prompt"
    assert all(result["cost"]["optimizer bytes"] >= 8 * result["cost"]["trainable"] for result in results)

    saved = (folder / "comparison.json").read_bytes()
    (folder / "report.html").unlink()
    here("compare", *options, "--output", folder)
    assert (folder / "report.html").exists(), "the report is made again from the JSON"
    assert (folder / "comparison.json").read_bytes() == saved
    said = here("compare", *options, "--output", folder, "--epochs", "2", code=2).stderr
    assert "--epochs" in said


@pytest.mark.long
def test_the_best_rate_of_the_search_is_taken(llama_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "search"
    here(
        "compare", "--model", llama_dir, "--methods", "lora:rank=2:learning_rate=0.01", "--search", "2",
        "--search-share", "0.5", *SMALL, "--output", folder,
    )  # fmt: skip
    tried = {
        json.loads(file.read_text())["config"]["training"]["learning_rate"]: json.loads(file.read_text())
        for file in folder.glob("search/*/rate-*/results.json")
    }
    assert sorted(tried) == pytest.approx([0.01 / 3, 0.01])
    assert {result["cost"]["steps"] for result in tried.values()} == {2}, "half of five steps"
    best = min(tried, key=lambda rate: tried[rate]["after"]["validation loss"])
    (final,) = folder.glob("lora*/seed-0/results.json")
    assert json.loads(final.read_text())["config"]["training"]["learning_rate"] == best


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("--methods", "magic"), "magic"),
        (("--methods", "lora", "--data", "missing.jsonl"), "missing.jsonl"),
        (("--seeds", "0"), "--seeds"),
        (("--launch", "missing.yaml"), "--launch"),
        (("--launch", "{full}/something"), "--launch"),
        (
            ("--methods", "full:pure_bf16,lora", "--optimizer", "paged_adamw_8bit"),
            "--pure-bf16: needs --precision bf16",
        ),
        (("--optimizer", "adamw_8bit", "--launch", str(LAUNCH / "fsdp.yaml")), "--optimizer adamw_8bit: FSDP"),
        (("--output", "{full}"), "--output"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[str, ...], names: str, llama_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").write_text("x")
    filled = [argument.format(full=tmp_path / "full") for argument in arguments]
    if "--output" not in filled:
        filled += ["--output", str(tmp_path / "out")]
    done = here("compare", "--model", llama_dir, *filled, code=2)
    said = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(said) == 1
    assert names in said[0]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists(), "nothing is left behind"
