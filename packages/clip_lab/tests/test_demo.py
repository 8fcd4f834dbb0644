"""The search page, as somebody uses it: in a browser, both ways."""

import socket
from pathlib import Path
from typing import Any

import pytest
from labs_testing import commands as lab_commands
from labs_testing.browser import visited

from clip_lab.config import DemoConfig


def test_a_demo_without_a_model_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gradio", reason="needs the extra clip-lab[demo]")
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as free:  # other tests may have a page at the usual one
        port = free.getsockname()[1]
    assert "runs/" in lab_commands.here("clip_lab.demo", "--port", port, code=2).errors[0]


@pytest.mark.long
def test_sentences_find_pictures_and_pictures_captions_in_a_browser(run: Path, scenes: Path) -> None:
    pytest.importorskip("gradio", reason="needs the extra clip-lab[demo]")
    from clip_lab.demo import search_page

    picture = sorted((scenes / "Images").iterdir())[0]

    def thumbnails(tab: Any, where: str) -> None:
        tab.wait_for_function(
            "where => [...document.querySelectorAll(where + ' img')].filter(one => one.naturalWidth).length >= 3",
            arg=where, timeout=60_000,
        )  # fmt: skip

    def visit(tab: Any) -> None:
        tab.wait_for_selector("#sentence textarea", timeout=60_000)
        tab.fill("#sentence textarea", "a red circle")
        tab.click("#search")
        thumbnails(tab, "#found")
        tab.get_by_role("tab", name="A picture").click()
        tab.set_input_files("#picture input[type=file]", picture)
        tab.wait_for_selector("#picture img", timeout=60_000)
        tab.click("#ask")
        thumbnails(tab, "#like")
        assert picture.name in tab.inner_text("#like"), "nothing is more like a picture than itself"
        captions = (scenes / "Flickr8k.token.txt").read_text().splitlines()
        shown = tab.inner_text("#captions")
        assert sum(line.split("\t")[1] in shown for line in captions) >= 3

    visited(search_page(DemoConfig(checkpoint=str(run), data=scenes, top=3)), visit)
