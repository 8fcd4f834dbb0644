"""Models of other libraries behind one face: against the libraries themselves."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
import transformers
from open_clip.transform import image_transform
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoTokenizer

from clip_lab.encoder import View, load_encoder
from clip_lab.tokens import Words, clip_bpe
from labs_common.errors import LabError

SENTENCES = ["a red circle to the left of a blue square", "one triangle"]


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
WORDS = SIZES | {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407}
LOOKS = SIZES | {"image_size": 32, "patch_size": 16}
SQUARE = {"height": 32, "width": 32}
MIDDLE = {"size": {"shortest_edge": 32}, "crop_size": SQUARE}
# Families of transformers: configuration, network and image processor, made small.
FAMILIES: dict[str, tuple[Callable[[], Any], Any, Any]] = {
    "clip": (lambda: transformers.CLIPConfig(text_config=WORDS, vision_config=LOOKS, projection_dim=24),
             transformers.CLIPModel, transformers.CLIPImageProcessor(**MIDDLE)),
    "metaclip_2": (lambda: transformers.MetaClip2Config(text_config=WORDS, vision_config=LOOKS, projection_dim=24),
                   transformers.MetaClip2Model, transformers.CLIPImageProcessor(**MIDDLE)),
    "siglip": (lambda: transformers.SiglipConfig(text_config=WORDS | {"max_position_embeddings": 64},
                                                 vision_config=LOOKS),
               transformers.SiglipModel, transformers.SiglipImageProcessor(size=SQUARE)),
    "align": (lambda: transformers.AlignConfig(
                  text_config=WORDS, projection_dim=80,
                  vision_config={"image_size": 64, "width_coefficient": 0.25, "depth_coefficient": 0.25}),
              transformers.AlignModel, transformers.EfficientNetImageProcessor(size=SQUARE, do_center_crop=False)),
    "altclip": (lambda: transformers.AltCLIPConfig(text_config=WORDS | {"project_dim": 16}, vision_config=LOOKS,
                                                   projection_dim=16),
                transformers.AltCLIPModel, transformers.CLIPImageProcessor(**MIDDLE)),
    "chinese_clip": (lambda: transformers.ChineseCLIPConfig(text_config=WORDS, vision_config=LOOKS, projection_dim=16),
                     transformers.ChineseCLIPModel, transformers.ChineseCLIPImageProcessor(**MIDDLE)),
    "clipseg": (lambda: transformers.CLIPSegConfig(text_config=WORDS, vision_config=LOOKS, projection_dim=16),
                transformers.CLIPSegModel, transformers.ViTImageProcessor(size=SQUARE)),
    "dual": (lambda: transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
                 transformers.ViTConfig(**LOOKS), transformers.BertConfig(**WORDS), projection_dim=16),
             transformers.VisionTextDualEncoderModel, transformers.ViTImageProcessor(size=SQUARE)),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_families_of_transformers_are_read_as_by_the_library(family: str, tmp_path: Path) -> None:
    """With random weights: the scaled cosines are the family's own logits, the features its own pooled states."""
    config, network, processor = FAMILIES[family]
    torch.manual_seed(0)
    model = network(config())
    if family == "align":  # random weights let its many batch norms vanish, if they have seen nothing
        model.temperature.data.fill_(0.05)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0
        model.vision_model(pixel_values=torch.randn(8, 3, 32, 32))
    model.eval().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    Words(clip_bpe(), 77).save(tmp_path)
    encoder = load_encoder(str(tmp_path))
    pictures = torch.randn(3, 3, 32, 32)
    padding = {"padding": "max_length", "max_length": 64} if family == "siglip" else {"padding": True}
    words = AutoTokenizer.from_pretrained(tmp_path)(SENTENCES, return_tensors="pt", **padding)
    with torch.no_grad():
        found = model(**words, pixel_values=pictures)
        features = model.vision_model(pixel_values=pictures).pooler_output
        torch.testing.assert_close(encoder.features(pictures), features.reshape(3, -1))
    logits = found.logits_per_image - getattr(model, "logit_bias", torch.zeros(()))
    cosines = encoder.embedded(pictures) @ encoder.read(SENTENCES).T
    torch.testing.assert_close(encoder.scale * cosines, logits.detach(), atol=1e-5, rtol=1e-4)


TOWER = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16}
READER = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
# Families of open_clip, made small: the network's description and the width before the projection.
DESCRIPTIONS: dict[str, tuple[dict[str, Any], int]] = {
    "resnet": ({"vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8}, "text_cfg": READER}, 16),
    "vit": ({"vision_cfg": TOWER, "text_cfg": READER}, 32),
    "vit, quick": ({"vision_cfg": TOWER, "text_cfg": READER, "quick_gelu": True}, 32),
    "vit, mean": ({"vision_cfg": TOWER | {"pool_type": "avg", "final_ln_after_pool": True}, "text_cfg": READER}, 32),
    "coca": ({"vision_cfg": TOWER | {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
              "text_cfg": READER | {"context_length": 76, "embed_cls": True, "output_tokens": True},
              "multimodal_cfg": READER | {"context_length": 76, "attn_pooler_heads": 2}, "custom_text": True}, 16),
    "siglip": ({"vision_cfg": {"image_size": 32, "timm_model_name": "test_vit", "timm_model_pretrained": False,
                               "timm_pool": "map", "timm_proj": "none"}, "init_logit_bias": -10, "custom_text": True,
                "text_cfg": READER | {"context_length": 64, "no_causal_mask": True, "proj_bias": True}}, 64),
    "convnext": ({"vision_cfg": {"image_size": 64, "timm_model_name": "test_convnext", "timm_model_pretrained": False,
                                 "timm_pool": "", "timm_proj": "linear"}, "text_cfg": READER}, 64),
}  # fmt: skip


@pytest.mark.parametrize("family", DESCRIPTIONS)
def test_families_of_open_clip_are_read_as_by_the_library(family: str, tmp_path: Path) -> None:
    description, width = DESCRIPTIONS[family]
    embedding = 64 if family == "siglip" else 16
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": description | {"embed_dim": embedding}}))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()},
              tmp_path / "open_clip_model.safetensors")  # fmt: skip
    encoder = load_encoder(str(tmp_path))
    pictures = torch.randn(3, 3, encoder.view.size, encoder.view.size)
    words = open_clip.tokenize(SENTENCES, description["text_cfg"]["context_length"])
    with torch.no_grad():
        images, texts = model.encode_image(pictures, normalize=True), model.encode_text(words, normalize=True)
        features = encoder.features(pictures)
    assert features.shape == (3, width)
    visual: Any = model.visual
    if getattr(visual, "proj", None) is not None:  # what the model itself projects
        torch.testing.assert_close(F.normalize(features @ visual.proj, dim=-1), images, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(encoder.embedded(pictures), images, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(encoder.read(SENTENCES), texts, atol=1e-5, rtol=1e-4)
    assert encoder.scale == pytest.approx(model.logit_scale.detach().exp().item())


def test_a_tower_alone_has_features() -> None:
    pictures = torch.randn(2, 3, 160, 160)
    tower = load_encoder("timm:test_vit,random")
    with torch.no_grad():
        assert tower.features(pictures).shape == (2, 64)
    with pytest.raises(LabError, match="reads no text"):
        tower.read(["a dog"])
    with pytest.raises(LabError, match="no embeddings"):
        tower.embedded(pictures)


@pytest.mark.parametrize(
    ("network", "processor"),
    [
        (lambda: transformers.Siglip2Model(transformers.Siglip2Config(text_config=WORDS, vision_config=SIZES)),
         transformers.Siglip2ImageProcessor),
        (lambda: transformers.FlavaModel(transformers.FlavaConfig(text_config=WORDS, image_config=LOOKS,
                                                                  multimodal_config=SIZES, hidden_size=32)),
         transformers.FlavaImageProcessor),
    ],
    ids=["NaFlex", "FLAVA"],
)  # fmt: skip
def test_families_that_take_more_than_a_picture_are_refused(
    network: Callable[[], Any], processor: Callable[[], Any], tmp_path: Path
) -> None:
    network().save_pretrained(tmp_path)
    processor().save_pretrained(tmp_path)
    Words(clip_bpe(), 77).save(tmp_path)
    with pytest.raises(LabError, match="more than pictures of one size; take a CLIP or SigLIP"):
        load_encoder(str(tmp_path))


@pytest.mark.parametrize(("tag", "quick"), [("openai", True), ("laion400m_e31", True), ("laion2b_s34b_b79k", False)])
def test_open_clips_weights_get_the_activation_that_they_were_trained_with(
    tag: str, quick: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tags are open_clip's own; the network is made small, its weights are random."""
    network = {
        "embed_dim": 16, "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }  # fmt: skip
    peer = open_clip.CLIP(**network, quick_gelu=quick).eval()
    for parameter in peer.parameters():
        parameter.data *= 3  # far enough from zero for the activations to differ
    save_file(peer.state_dict(), tmp_path / "weights.safetensors")
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-B-32", network)
    monkeypatch.setattr(
        open_clip.factory, "download_pretrained", lambda *_, **__: str(tmp_path / "weights.safetensors")
    )
    encoder = load_encoder(f"ViT-B-32:{tag}")
    pictures = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        images = peer.encode_image(pictures, normalize=True)
        texts = peer.encode_text(open_clip.get_tokenizer("ViT-B-32")(SENTENCES), normalize=True)
    torch.testing.assert_close(encoder.embedded(pictures), images, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(encoder.read(SENTENCES), texts, atol=1e-5, rtol=1e-4)


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


def test_of_a_long_strip_only_the_middle_is_enlarged() -> None:
    """All of it would be 224 × 13,440,000 pixels."""
    view = View(224, (0.5,) * 3, (0.5,) * 3, "bicubic", squeezed=False)
    assert view(Image.new("RGB", (1, 60_000), "red")).unique().tolist() == [-1, 1]


def test_what_is_no_model_is_named(tmp_path: Path) -> None:
    for spec, said in ((str(tmp_path), "no trained model"), ("timm:resnt50", "resnet50"), ("RN51:openai", "RN51"),
                       ("someone/something", "someone/something")):  # fmt: skip
        with pytest.raises(LabError, match=said):
            load_encoder(spec)
