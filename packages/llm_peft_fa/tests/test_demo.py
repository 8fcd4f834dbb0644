from pathlib import Path
from typing import Any

import pytest
from commands import here
from labs_testing.browser import visited

from llm_peft_fa.config import DemoConfig
from llm_peft_fa.demo import chat_page, found_subjects


def test_nothing_to_talk_to_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = here("demo", code=2).stderr
    assert "gradio" in said.lower() or "runs/" in said


def test_two_models_answer_side_by_side_in_a_browser(llama_dir: Path) -> None:
    pytest.importorskip("gradio", reason="needs the extra llm-peft-fa[demo]")

    def visit(tab: Any) -> None:
        tab.wait_for_selector("#question textarea", timeout=60_000)
        assert tab.get_attribute("#question textarea", "dir") == "rtl"
        tab.fill("#question textarea", "پایتخت ایران کجاست؟")
        tab.click("#send")
        said = {}
        for side in ("left", "right"):
            tab.wait_for_selector(f"#answers-{side} .bot.message", timeout=60_000)
            tab.wait_for_timeout(2000)
            assert "پایتخت ایران" in tab.inner_text(f"#answers-{side} .user.message")
            said[side] = tab.inner_text(f"#answers-{side} .bot.message").strip()
        assert said["left"] == said["right"] != "", "the same model on both sides says the same"
        tab.click("#forget")
        tab.wait_for_selector("#answers-left .bot.message", state="detached", timeout=20_000)

    visited(chat_page(found_subjects(DemoConfig(models=(str(llama_dir),))), max_new_tokens=4), visit)
