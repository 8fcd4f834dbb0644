"""Models of other libraries behind one face: against the libraries themselves."""

from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from clip_lab.encoder import View, load_encoder
from clip_lab.tokens import Words, clip_bpe
from labs_common.errors import LabError

SENTENCES = ["a red circle to the left of a blue square", "one triangle"]


def test_released_formats_are_read(tmp_path: Path) -> None:
    """A CLIP of transformers with random weights, from a real configuration made small; a timm tower."""
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(text_config=small | {"vocab_size": 49408, "eos_token_id": 49407, "bos_token_id": 49406},
                        vision_config=small | {"image_size": 32, "patch_size": 16}, projection_dim=24)  # fmt: skip
    model = CLIPModel(config).eval()
    model.save_pretrained(tmp_path / "clip")
    Words(clip_bpe(), 77).save(tmp_path / "clip")
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        tmp_path / "clip"
    )
    encoder = load_encoder(str(tmp_path / "clip"))
    assert (encoder.view.size, encoder.view.squeezed) == (32, False)
    pictures = torch.randn(2, 3, 32, 32)
    words = Words(clip_bpe(), 77)(SENTENCES)
    with torch.no_grad():
        found = model(input_ids=words, pixel_values=pictures)
        pooled = model.vision_model(pixel_values=pictures).pooler_output
        torch.testing.assert_close(encoder.features(pictures), pooled)
    torch.testing.assert_close(encoder.embedded(pictures), found.image_embeds, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(encoder.read(SENTENCES), found.text_embeds, atol=1e-5, rtol=1e-4)
    tower = load_encoder("timm:test_vit,random")
    with torch.no_grad():
        assert tower.features(torch.randn(2, 3, 160, 160)).shape == (2, 64)
    with pytest.raises(LabError, match="reads no text"):
        tower.read(["a dog"])
    with pytest.raises(LabError, match="no embeddings"):
        tower.embedded(pictures)


@pytest.mark.parametrize("size", [(50, 81), (64, 64), (81, 50), (40, 33)])
def test_the_view_is_the_libraries_own(size: tuple[int, int]) -> None:
    """Middle squares and squeezed pictures are those of open_clip's transform, exactly."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8))
    mean, std = (0.48, 0.45, 0.4), (0.26, 0.25, 0.27)
    found = View(32, mean, std, "bicubic", squeezed=False)(image)
    torch.testing.assert_close(found, image_transform(32, is_train=False, mean=mean, std=std)(image))
    squeezed = View(32, mean, std, "bicubic", squeezed=True)(image)
    torch.testing.assert_close(
        squeezed,
        image_transform(32, is_train=False, mean=mean, std=std, resize_mode="squash", interpolation="bicubic")(image),
    )


def test_what_is_no_model_is_named(tmp_path: Path) -> None:
    for spec, said in ((str(tmp_path), "no trained model"), ("timm:resnt50", "resnet50"), ("RN51:openai", "RN51"),
                       ("someone/something", "someone/something")):  # fmt: skip
        with pytest.raises(LabError, match=said):
            load_encoder(spec)
