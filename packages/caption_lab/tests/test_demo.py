import socket
from functools import partial
from pathlib import Path

import pytest
from labs_testing import commands as lab_commands
from PIL import Image

from caption_lab.config import DecoderOptions, EncoderOptions, VocabularyOptions
from caption_lab.encoder import make_encoder
from caption_lab.model import make_model
from caption_lab.saved import Captioner, save_captioner
from caption_lab.vocabulary import build_vocabulary
from labs_common.options import DecodingOptions, PageOptions
from labs_common.pages import serve


def described(checkpoint: Path, image: Image.Image | None, beams: int = 2) -> tuple[str, list]:
    """What the page's button does, without a browser."""
    pytest.importorskip("gradio", reason="needs the extra caption-lab[demo]")
    from caption_lab.demo import caption_page

    (function,) = [function.fn for function in caption_page(checkpoint, DecodingOptions()).fns.values()]
    return function(image, beams)


def test_the_page_says_what_it_sees_and_where_it_looked(finished: Path, tmp_path: Path) -> None:
    picture = Image.new("RGB", (50, 30), "red")
    caption, looks = described(finished, picture)
    assert [word for _, word in looks] == caption.split()
    assert described(finished, None) == ("", [])
    # A captioner that sees one vector looks nowhere.
    encoder = make_encoder(EncoderOptions(pretrained=False, pool=1))
    options, vocabulary = DecoderOptions(width=16), build_vocabulary(["a dog", "two cats"], VocabularyOptions())
    model = make_model("show_tell", encoder, options, vocabulary)
    save_captioner(tmp_path / "blind", Captioner("show_tell", model, vocabulary, options), model.state_dict())
    caption, looks = described(tmp_path / "blind", picture)
    assert isinstance(caption, str)
    assert looks == []


def test_a_demo_without_a_captioner_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gradio", reason="needs the extra caption-lab[demo]")
    monkeypatch.chdir(tmp_path)
    assert "runs/" in lab_commands.here("caption_lab.demo", code=2).errors[0]


def test_a_running_page_is_this_machine_s_and_gives_no_file(finished: Path, tmp_path: Path) -> None:
    """Neither by its address nor as the picture that a browser says it has uploaded."""
    pytest.importorskip("gradio", reason="needs the extra caption-lab[demo]")
    import httpx  # which gradio brings

    from caption_lab.demo import caption_page

    private = tmp_path / "private.png"
    Image.new("RGB", (8, 8)).save(private)
    port = int(lab_commands.free_port())
    page = caption_page(finished, DecodingOptions())
    page.launch = partial(page.launch, prevent_thread_lock=True)  # else `serve` waits for Ctrl-C
    serve(page, PageOptions(port=port))
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            assert client.get("/config").status_code == 200
            here = Path("pyproject.toml").resolve()
            for path in (
                private,
                here,
                "pyproject.toml",
                finished / "config.yaml",
                "/etc/passwd",
                "..%2f..%2fetc/passwd",
            ):
                for route in ("/gradio_api/file=", "/file=", "/static/", "/assets/", "/gradio_api/proxy="):
                    assert client.get(f"{route}{path}").status_code in (400, 403, 404), f"{route}{path}"

            def described(path: str) -> str:
                sent = {"data": [{"path": path, "meta": {"_type": "gradio.FileData"}}, 1]}
                event = client.post("/gradio_api/call/describe", json=sent).json()["event_id"]
                return client.get(f"/gradio_api/call/describe/{event}", timeout=60).text

            assert "event: error" in described(str(private))
            uploaded = client.post("/gradio_api/upload", files={"files": ("own.png", private.read_bytes())}).json()
            assert "event: complete" in described(uploaded[0]), "the page works"
        with socket.socket() as other, pytest.raises(ConnectionRefusedError):
            other.connect(("127.0.0.2", port))  # of this machine too, but not the address that is asked for
    finally:
        page.close()
