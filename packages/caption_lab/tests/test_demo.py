from pathlib import Path

import pytest
from labs_testing import commands as lab_commands
from PIL import Image

from caption_lab.config import DecoderOptions, DecodingOptions, EncoderOptions, VocabularyOptions
from caption_lab.encoder import make_encoder
from caption_lab.model import make_model
from caption_lab.saved import Captioner, save_captioner
from caption_lab.vocabulary import build_vocabulary


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
