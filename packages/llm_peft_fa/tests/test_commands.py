"""The commands, with the options that a user types."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from commands import LAUNCH, LIBRARIES, SMALL, here, trained, without_rank
from labs_testing.commands import command
from labs_testing.pretended_runs import Budget
from labs_testing.promises import TrainingPromises
from labs_testing.trainings import Otherwise, Training
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(scope="module")
def finished(gemma_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run of the real command."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    done = command(
        "accelerate.commands.launch", "--config_file", LAUNCH / "cpu.yaml", "-m", "llm_peft_fa.train",
        "--model", gemma_dir, "--output", run, *SMALL, "--merge", "--save-every", "5",
    )  # fmt: skip
    assert f"report: {run / 'report.html'}" in done.stdout
    (run.parent / "said.txt").write_text(done.stderr)
    return run


def test_the_first_screen_is_whole_before_the_first_step(finished: Path) -> None:
    said = (finished.parent / "said.txt").read_text()
    (screen,) = re.findall(r"^lora on .*?─\n(.*?)^─+\n", said, re.DOTALL | re.MULTILINE)
    names = re.findall(r"^(\w+) ", screen, re.MULTILINE)
    assert names == ["model", "method", "data", "tokens", "template", "memory", "work", "example", "rows"]
    assert re.search(r"^rows     packed: states and loss are those of the model's own", screen, re.MULTILINE)
    assert re.findall(r"packed|padded", said) == ["packed"], "it is said once"


def test_a_run_leaves_everything_that_it_promises(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert {
        "config.yaml", "environment.json", "metrics.jsonl", "timing.jsonl", "results.json", "answers.json",
        "report.html", "figures", "checkpoints", "adapter", "merged", "frozen.json",
    } <= names  # fmt: skip
    results = json.loads((finished / "results.json").read_text())
    assert results["after"]["validation loss"] < results["before"]["validation loss"]
    assert {"exact match", "chrF", "words per answer", "validation perplexity"} <= results["after"].keys()
    html = (finished / "report.html").read_text(encoding="utf-8")
    for heading in ("What was asked", "Data", "What trained", "Curves", "Numbers", "Answers before and after", "Cost"):
        assert heading in html
    asked, given_by_us = html.split("chosen for it")[0], html.split("chosen for it")[1].split("every option")[0]
    assert "--rank" in asked
    assert "--learning-rate" in given_by_us
    assert "--rank" not in given_by_us
    assert "hashed before and after training: all are unchanged" in html
    first = json.loads((finished / "answers.json").read_text())[0]
    assert first["prompt"] in html


class TestPromises(TrainingPromises):
    @pytest.fixture(scope="class")
    def training(self, finished: Path, gemma_dir: Path) -> Training:
        return Training(
            "llm_peft_fa.train",
            LIBRARIES,
            ("--model", gemma_dir, *SMALL, "--merge"),
            finished,
            "adapter/adapter_model.safetensors",
            ("answers.json",),
            two=Otherwise(losses=1e-5, weights=1e-5),
            launch=LAUNCH,
            zero=(),
            sharded=Otherwise(losses=1e-4),
            gpu=Budget(operators=1800, syncs=2, copies=20),
        )


def test_evaluate_repeats_the_numbers_of_the_run(finished: Path, tmp_path: Path) -> None:
    small = ("--test-prompts", "6", "--max-new-tokens", "6", "--output", tmp_path)
    here("evaluate", "--checkpoint", finished, *small)
    again = json.loads((tmp_path / "evaluation.json").read_text())["scores"]
    first = json.loads((finished / "results.json").read_text())
    for side in ("before", "after"):
        for name, value in again[side].items():
            assert first[side][name] == pytest.approx(value, rel=1e-6), "the loss is summed in other rows"
    assert (tmp_path / "report.html").exists()


def test_chat_streams_resets_and_quits(finished: Path) -> None:
    typed = "سلام\n/reset\nسلام\n/quit\nنه\n"
    done = here("chat", "--checkpoint", finished, "--max-new-tokens", "5", typed=typed)
    first, reset, second = done.stdout.split("> ")[1:4]
    assert first == second != reset, "after /reset the same question gets the same answer"
    assert done.stdout.count("> ") == 4, "nothing is read after /quit"
    assert "forgotten" in done.stderr


def test_inspect_counts_and_reports(gemma_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    good = {"instruction": "پایتخت ایران کجاست؟", "input": "", "output": "تهران"}
    typed = good | {"output": "تهران كه شهري بزرگ است"}
    file.write_text("\n".join([json.dumps(good)] * 2 + [json.dumps(typed), "{bad"]))
    done = here("inspect", "--data", file, "--model", gemma_dir, "--output", tmp_path / "report", "--bases", gemma_dir)
    assert "conversations:  3" in done.stderr
    assert "near-duplicates of an earlier conversation:  1" in done.stderr
    assert "Persian  3" in done.stderr
    assert "where  3" in done.stderr
    assert "arabic letter kaf (ك)  arabic letter keheh  1  1" in done.stderr
    words = sum(len(f"{row['instruction']} {row['output']}".split()) for row in (good, good, typed))
    texts = [row[part].replace("ك", "ک").replace("ي", "ی") for row in (good, good, typed) for part in row]
    tokenizer = AutoTokenizer.from_pretrained(gemma_dir)
    per_word = round(sum(len(tokenizer.tokenize(text)) for text in texts if text) / words, 3)
    assert done.stderr.count(f"{gemma_dir}  {len(tokenizer):,}  {per_word}") == 2, "the base and the same again"
    assert "instruct" in done.stderr.lower()
    assert "--method lora trains" in done.stderr
    assert f"{file}:4: bad JSON" in done.stderr
    html = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert "تهران" in html
    assert "<svg" in html


@pytest.mark.alone
def test_layers_leave_a_model_that_is_evaluated_and_forgetting_is_measured(gemma_dir: Path, tmp_path: Path) -> None:
    text = tmp_path / "plain.txt"
    text.write_text("پایتخت ایران تهران است.\n\nپایتخت فرانسه پاریس است.\n", encoding="utf-8")
    run = tmp_path / "run"
    options = [*without_rank(SMALL), "--epochs", "1", "--gradient-checkpointing"]
    done = here("train", "--model", gemma_dir, "--method", "layers", "--layers", "1", "--which", "last", "--plain-text",
                text, "--output", run, *options)  # fmt: skip
    results = json.loads((run / "results.json").read_text())
    said, _, after = re.sub(r" *\n {2,}", " ", done.stderr).partition("step 0:")
    assert f"layers: {results['cost']['trainable']:,} of {results['cost']['parameters']:,} parameters train" in said
    assert "rows of 300 tokens, with gradient checkpointing" in said
    assert "8 steps of 8 rows" in said
    assert re.search(r"expected: \d+ s for 2 steps, by the last 5", after), "of 8 steps six are done"
    assert results["before"]["plain text loss"] != results["after"]["plain text loss"]
    assert results["cost"]["disk bytes"] == (run / "model" / "model.safetensors").stat().st_size
    assert results["cost"]["optimizer bytes"] >= 8 * results["cost"]["trainable"]
    own = AutoModelForCausalLM.from_pretrained(run / "model")
    base = AutoModelForCausalLM.from_pretrained(gemma_dir)
    changed = {name for name, p in own.named_parameters() if not torch.equal(p, base.get_parameter(name))}
    assert changed == {name for name, _ in base.named_parameters() if name.startswith("model.layers.1.")}
    here(
        "evaluate", "--checkpoint", run, "--test-prompts", "6", "--max-new-tokens", "6", "--output", tmp_path / "again"
    )
    again = json.loads((tmp_path / "again" / "evaluation.json").read_text())["scores"]
    for side in ("before", "after"):
        for name in again[side]:
            assert again[side][name] == pytest.approx(results[side][name], rel=1e-5)
    html = (run / "report.html").read_text(encoding="utf-8")
    assert "input below" in html, "the drawing of what trains"


@pytest.mark.alone
def test_adalora_killed_and_resumed_gives_the_same_bytes(gemma_dir: Path, tmp_path: Path) -> None:
    options = [
        *SMALL,
        "--model",
        gemma_dir,
        "--method",
        "adalora",
        "--no-answer-base",
        "--no-report",
        "--save-every",
        "3",
        "--epochs",
        "1",
    ]
    here("train", *options, "--output", tmp_path / "whole")
    here("train", *options, "--output", tmp_path / "killed")
    for later in sorted((tmp_path / "killed" / "checkpoints").glob("step-*"))[1:]:
        shutil.rmtree(later)
    shutil.rmtree(tmp_path / "killed" / "adapter")
    here("train", "--resume", tmp_path / "killed", "--no-report")
    one, two = trained(tmp_path / "whole"), trained(tmp_path / "killed")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_show_batch_writes_nothing(gemma_dir: Path, tmp_path: Path) -> None:
    done = here("train", "--model", gemma_dir, *SMALL, "--show-batch", "--output", tmp_path / "run")
    assert done.stdout.count("⟦") >= 8
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("--data", "{prose}"), "prose.jsonl:1"),
        (("--data", "{long}", "--max-length", "64"), "long.jsonl:"),
        (("--method", "magic"), "--method"),
        (("--target-modules", "wq"), "wq"),
        (("--method", "full", "--rank", "4"), "--rank"),
        (("--method", "prefix_tuning", "--merge"), "--merge"),
        (("--plain-text", "{nothing}"), "--plain-text"),
        (("--template", "{nothing}"), "--template"),
        (("--prompts", "{nothing}"), "--prompts"),
        (("--compile",), "--compile: attention in blocks"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    arguments: tuple[str, ...], names: str, gemma_dir: Path, tmp_path: Path
) -> None:
    """What every training command is asked stands in labs_testing/bad_inputs.py; this is of this lab."""
    files = {name: tmp_path / f"{name}.jsonl" for name in ("prose", "long", "nothing")}
    files["prose"].write_text("not JSON\n")
    row = json.dumps({"instruction": "کتاب " * 90, "output": "نان"})
    files["long"].write_text("\n".join([row] * 30))
    before = sorted(tmp_path.iterdir())
    filled = [argument.format(**files) for argument in arguments]
    if "--model" not in filled and "--resume" not in filled:
        filled += ["--model", str(gemma_dir)]
    if not {"--output", "--resume"} & set(filled):
        filled += ["--output", str(tmp_path / "run")]
    done = here("train", *filled, code=2)
    said = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(said) == 1
    assert names in said[0]
    assert "Traceback" not in done.stderr
    assert sorted(tmp_path.iterdir()) == before
    assert "Traceback" in here("train", *filled, "--debug", code=2).stderr


def test_resume_with_other_options_or_a_broken_checkpoint(finished: Path) -> None:
    assert "--rank" in here("train", "--resume", finished, "--rank", "8", code=2).stderr
    (newest,) = sorted((finished / "checkpoints").glob("step-*"))[-1:]
    file = newest / "trainable.safetensors"
    whole = file.read_bytes()
    try:
        file.write_bytes(whole[:100])
        done = here("train", "--resume", finished, code=2)
        assert str(newest) in done.stderr
        assert "Traceback" not in done.stderr
    finally:
        file.write_bytes(whole)


@pytest.mark.long
def test_real_conversations_teach_a_random_model_something(real_chats: Path, gemma_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "real"
    here(
        "train", "--model", gemma_dir, "--data", real_chats / "train.jsonl", "--validation-fraction",
        "0.02", "--max-steps", "3", "--batch-size", "4", "--test-prompts", "2",
        "--max-new-tokens", "4", "--track", "none", "--no-report", "--output", run,
    )  # fmt: skip
    results = json.loads((run / "results.json").read_text())
    assert results["after"]["validation loss"] < results["before"]["validation loss"]
