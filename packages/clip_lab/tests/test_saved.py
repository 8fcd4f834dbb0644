"""Conversions to other libraries' formats: the libraries read them, and compute the same."""

from pathlib import Path

import pytest
import torch
from labs_testing import commands as lab_commands
from PIL import Image
from transformers import VisionTextDualEncoderModel

from clip_lab.encoder import load_encoder

SENTENCES = ["a red circle to the left of a blue square", "one triangle"]


@pytest.mark.alone
def test_exports_have_the_same_features(run: Path, scenes: Path, tmp_path: Path) -> None:
    other = tmp_path / "vit"
    lab_commands.here("clip_lab.train", "--data", scenes, "--image", "test_vit", "--no-image-pretrained", "--text-width", "32", "--text-layers",
                      "1", "--embedding", "32", "--batch-size", "16", "--track", "none", "--no-report", "--objective",
                      "siglip", "--tokenizer", "clip", "--limit", "16", "--max-steps", "1", "--output", other)  # fmt: skip
    with Image.open(next((scenes / "Images").iterdir())) as image:
        picture = image.convert("RGB")
    for checkpoint, to in ((run, "transformers"), (other, "transformers"), (other, "open_clip")):
        exported = tmp_path / f"{checkpoint.name}-{to}"
        lab_commands.here("clip_lab.export", "--checkpoint", checkpoint, "--to", to, "--output", exported)
        ours, theirs = load_encoder(str(checkpoint)), load_encoder(str(exported))
        one, two = ours.view(picture)[None], theirs.view(picture)[None]
        torch.testing.assert_close(one, two)
        torch.testing.assert_close(ours.embedded(one), theirs.embedded(two), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(ours.read(SENTENCES), theirs.read(SENTENCES), atol=1e-5, rtol=1e-4)
        assert theirs.scale == pytest.approx(ours.scale, rel=1e-5)
    assert "--to transformers" in lab_commands.here("clip_lab.export", "--checkpoint", run, "--to", "open_clip",
                                                    "--output", tmp_path / "no", code=2).errors[0]  # fmt: skip
    assert not (tmp_path / "no").exists()
    # The library itself reads them.
    model = VisionTextDualEncoderModel.from_pretrained(tmp_path / "clip-transformers")
    ours = load_encoder(str(run))
    with torch.no_grad():
        found = model(input_ids=ours.ours.words(SENTENCES), pixel_values=ours.view(picture)[None])  # type: ignore[union-attr]
    torch.testing.assert_close(found.text_embeds, ours.read(SENTENCES), atol=1e-5, rtol=1e-4)
