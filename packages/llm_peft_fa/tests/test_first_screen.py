"""What a training prints before any weight is read."""

import io
import re
from pathlib import Path

import pytest
from accelerate import Accelerator
from rich.console import Console
from test_templates import CHAT

from labs_common.memory import Cost
from labs_common.plan import Held, Machine, Sharing
from llm_peft_fa import report
from llm_peft_fa.base import load_tokenizer
from llm_peft_fa.config import TrainConfig
from llm_peft_fa.data import Conversation, Reading
from llm_peft_fa.methods import complete
from llm_peft_fa.plan import Plan
from llm_peft_fa.report import print_first_screen
from llm_peft_fa.table import encode_all

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(("terminal", "colours"), [(True, True), (True, False), (False, False)])
def test_the_first_screen_fits_a_terminal_and_marks_what_is_learnt(
    terminal: bool, colours: bool, llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = io.StringIO()
    monkeypatch.delenv("NO_COLOR", raising=False)
    screen = Console(file=said, force_terminal=terminal, no_color=not colours, width=80, highlight=False)
    monkeypatch.setattr(report, "console", screen)
    config = TrainConfig()
    config.model.model, config.method.method, config.training.batch_size = str(llama_dir), "lora", 2
    tokenizer = load_tokenizer(str(llama_dir), "auto", "off")
    long = [{"role": "user", "content": "کتاب " * 200}, {"role": "assistant", "content": "نان " * 200}]
    reading = Reading("chats.jsonl", [Conversation(CHAT, "chats.jsonl:1"), Conversation(long, "chats.jsonl:2")])
    texts = {"training": encode_all(tokenizer, reading, 4096, "error"), "validation": []}
    print_first_screen(complete(config), Accelerator(cpu=True), {"training": reading}, texts, tokenizer)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", said.getvalue())
    assert all(len(line.rstrip()) <= 80 for line in plain.splitlines())
    assert len(plain.splitlines()) <= 20
    words = " ".join(message["content"] for message in CHAT + long).split()
    pieces = sum(len(tokenizer.encode(message["content"], add_special_tokens=False)) for message in CHAT + long)
    tokens, learnt = (
        sum(map(size, texts["training"])) for size in (lambda row: len(row.ids), lambda row: sum(row.learnt))
    )
    unfolded = re.sub(r" *\n {2,}", " ", plain)
    assert f"tokens   {tokens:,}, {learnt / tokens:.0%} of them learnt; {pieces / len(words):.2f} per word" in unfolded
    assert "2 steps of 2 rows" in unfolded
    assert ("⟦تهران<end_of_turn>⟧" in unfolded) is not colours
    assert ("\x1b[1;32m" in said.getvalue()) is colours


def test_on_a_gpu_the_first_screen_has_the_peak_of_the_plan(llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A plan whose numbers are known; that those of real plans are right is shown where plans are tested.
    held = Held(parameters=100, trained=10, weights=4 * 10**9, gradients=10**9, optimizer=2 * 10**9)
    costs = [(tokens, Cost(0, tokens * 10**7, 0), Cost(0, tokens * 10**6, 0)) for tokens in (1000, 2000)]
    asked = []

    def plan_of(config: TrainConfig, machine: Machine, length: int, sharing: Sharing) -> Plan:
        asked.append((config.model.model, length, sharing.gpus))
        return Plan(held, 16, *costs, extra=5 * 10**8)

    said = io.StringIO()
    monkeypatch.setattr(report, "console", Console(file=said, width=300))
    monkeypatch.setattr(report, "machine_here", lambda precision: Machine(True, 10**7, 10**7, precision, False))
    monkeypatch.setattr(report, "plan_of", plan_of)
    config = TrainConfig()
    config.model.model, config.model.gradient_checkpointing = str(llama_dir), True
    config.data.tokens_per_batch = 3000
    tokenizer = load_tokenizer(str(llama_dir))
    reading = Reading("chats.jsonl", [Conversation(CHAT, "chats.jsonl:1")])
    texts = {"training": encode_all(tokenizer, reading, 4096, "error"), "validation": []}
    print_first_screen(complete(config), Accelerator(cpu=True), {"training": reading}, texts, tokenizer)
    assert "at most 10.5 GB of 0.009 GB: rows of 3,000 tokens, with gradient checkpointing; " in said.getvalue()
    assert "weights 4.0 GB, gradients 1.0 GB, optimizer 2.0 GB" in said.getvalue()
    assert asked == [(str(llama_dir), len(texts["training"][0].ids), 1)]
