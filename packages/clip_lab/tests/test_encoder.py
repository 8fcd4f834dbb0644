"""Models of other libraries behind one face: against the libraries themselves."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from labs_testing import commands as lab_commands
from open_clip import coca_model
from open_clip.transform import image_transform
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config
from transformers import AutoTokenizer

from clip_lab.encoder import View, _timm_view, load_encoder
from clip_lab.evaluate import written
from clip_lab.released import _processor_view
from clip_lab.saved import load_any
from clip_lab.tokens import Words, clip_bpe
from labs_common.data.captions import read_captioned
from labs_common.errors import LabError
from labs_common.options import DecodingOptions

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
              transformers.AlignModel, transformers.EfficientNetImageProcessor(size=SQUARE, resample=2, include_top=False)),
    "altclip": (lambda: transformers.AltCLIPConfig(text_config=WORDS | {"project_dim": 16}, vision_config=LOOKS,
                                                   projection_dim=16),
                transformers.AltCLIPModel, transformers.CLIPImageProcessor(**MIDDLE)),
    "chinese_clip": (lambda: transformers.ChineseCLIPConfig(text_config=WORDS, vision_config=LOOKS, projection_dim=16),
                     transformers.ChineseCLIPModel, transformers.ChineseCLIPImageProcessor(**MIDDLE)),
    "clipseg": (lambda: transformers.CLIPSegConfig(text_config=WORDS, vision_config=LOOKS, projection_dim=16),
                transformers.CLIPSegModel, transformers.ViTImageProcessor(size=SQUARE)),
    "groupvit": (lambda: transformers.GroupViTConfig(
                     text_config=WORDS, projection_dim=16, projection_intermediate_dim=16,
                     vision_config=LOOKS | {"depths": [1, 1, 1], "num_group_tokens": [4, 2, 0],
                                            "num_output_groups": [4, 2, 0]}),
                 transformers.GroupViTModel, transformers.CLIPImageProcessor(**MIDDLE)),
    # Its own start of the pictures' weights is 1e-10, which is nothing in half precision.
    "blip": (lambda: transformers.BlipConfig(
                 text_config=WORDS, vision_config=LOOKS | {"initializer_range": 0.02}, projection_dim=16),
             transformers.BlipModel, transformers.BlipImageProcessor(size=SQUARE)),
    "aimv2": (lambda: transformers.Aimv2Config(text_config=WORDS, vision_config=LOOKS, projection_dim=16),
              transformers.Aimv2Model, transformers.CLIPImageProcessor(**MIDDLE)),
    "dual": (lambda: transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
                 transformers.ViTConfig(**LOOKS), transformers.BertConfig(**WORDS), projection_dim=16),
             transformers.VisionTextDualEncoderModel, transformers.ViTImageProcessor(size=SQUARE)),
}  # fmt: skip

# What open_clip's own `generate` takes from transformers to write greedily.
NEEDS = ("LogitsProcessorList", "MinLengthLogitsProcessor", "RepetitionPenaltyLogitsProcessor", "MaxLengthCriteria",
         "StoppingCriteriaList")  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_families_of_transformers_are_read_as_by_the_library(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a plain name, with random weights: the scaled cosines are the family's own logits, the features its states."""
    config, network, processor = FAMILIES[family]
    torch.manual_seed(0)
    model = network(config())
    if family == "align":  # random weights let its many batch norms vanish, if they have seen nothing
        model.temperature.data.fill_(0.05)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0
        model.vision_model(pixel_values=torch.randn(8, 3, 32, 32))
    monkeypatch.chdir(tmp_path)
    name = f"someone/{family}"
    model.eval().half().save_pretrained(name)  # as many are published
    model = network.from_pretrained(name, dtype=torch.float32)
    processor.save_pretrained(name)
    Words(clip_bpe(), 77).save(tmp_path / name)
    encoder = load_encoder(name)
    pictures = torch.randn(3, 3, 32, 32)
    padding = {"padding": "max_length", "max_length": 64} if family == "siglip" else {"padding": True}
    words = AutoTokenizer.from_pretrained(name)(SENTENCES, return_tensors="pt", **padding)
    if family == "siglip":  # was trained without a mask, whatever a tokenizer gives
        del words["attention_mask"]
    with torch.no_grad():
        found = model(**words, pixel_values=pictures)
        features = model.vision_model(pixel_values=pictures).pooler_output
        torch.testing.assert_close(encoder.features(pictures), features.reshape(3, -1))
    logits = found.logits_per_image - getattr(model, "logit_bias", torch.zeros(()))
    cosines = encoder.embedded(pictures) @ encoder.read(SENTENCES).T
    torch.testing.assert_close(encoder.scale * cosines, logits.detach(), atol=1e-5, rtol=1e-4)


# Tags of open_clip, and whether their weights were trained with QuickGELU (Radford et al.'s own activation).
TAGS = {
    "RN50:openai": True, "RN101:yfcc15m": True, "ViT-B-32:openai": True, "ViT-B-32:laion400m_e31": True,
    "ViT-B-32:laion2b_s34b_b79k": False, "ViT-H-14:laion2b_s32b_b79k": False, "ViT-bigG-14:laion2b_s39b_b160k": False,
    "ViT-L-14-CLIPA:datacomp1b": False, "coca_ViT-B-32:laion2b_s13b_b90k": False, "ViT-B-16-SigLIP:webli": False,
    "convnext_base_w:laion2b_s13b_b82k": False,
}  # fmt: skip


def shrunk(name: str, words: Path) -> dict[str, Any]:
    """The library's own description of a network with fewer and narrower layers, and all else as it is."""
    found = copy.deepcopy(open_clip.get_model_config(name)) | {"embed_dim": 64}
    vision, text = found["vision_cfg"], found["text_cfg"]
    text |= {"width": 32, "heads": 2, "layers": 1, "vocab_size": 49408}
    if "multimodal_cfg" in found:
        found["multimodal_cfg"] |= {"width": 32, "heads": 2, "layers": 1, "attn_pooler_heads": 2}
        vision["attn_pooler_heads"] = 2
        found["embed_dim"] = 32
    if "hf_tokenizer_name" in text:
        text["hf_tokenizer_name"] = str(words)
        text.pop("tokenizer_kwargs", None)  # are of the real one
    if "timm_model_name" in vision:
        vision |= {"timm_model_name": "test_convnext" if "convnext" in name else "test_vit", "image_size": 64}
    elif isinstance(vision["layers"], list):
        vision |= {"layers": [1, 1, 1, 1], "width": 8, "image_size": 64}
    else:
        vision |= {"layers": 2, "width": 32, "head_width": 16, "image_size": 2 * vision["patch_size"]}
    return found


@pytest.mark.parametrize("tag", TAGS)
def test_released_networks_of_open_clip_are_read_as_by_the_library(
    tag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the tag's own name, from the library's own description, made small; with random weights."""
    name = tag.partition(":")[0]
    Words(clip_bpe(), 77).save(tmp_path / "words")
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, shrunk(name, tmp_path / "words"))
    torch.manual_seed(0)
    peer = open_clip.create_model(name, force_quick_gelu=TAGS[tag], pretrained_text=False).eval()
    for parameter in peer.parameters():
        if parameter.ndim:
            parameter.data *= 2  # far enough from zero for the activations to differ
    file = tmp_path / "weights.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in peer.state_dict().items()}, file)
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: str(file))
    encoder = load_encoder(tag)
    pictures = torch.randn(3, 3, encoder.view.size, encoder.view.size)
    with torch.no_grad():
        images = peer.encode_image(pictures, normalize=True)
        texts = peer.encode_text(open_clip.get_tokenizer(name)(SENTENCES), normalize=True)
        features = encoder.features(pictures)
    visual: Any = peer.visual
    if getattr(visual, "proj", None) is not None:  # what the model itself projects
        torch.testing.assert_close(F.normalize(features @ visual.proj, dim=-1), images, atol=1e-5, rtol=1e-4)
    elif hasattr(visual, "trunk"):
        torch.testing.assert_close(F.normalize(visual.head(features), dim=-1), images, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(encoder.embedded(pictures), images, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(encoder.read(SENTENCES), texts, atol=1e-5, rtol=1e-4)
    assert encoder.scale == pytest.approx(peer.logit_scale.detach().exp().item())


def test_a_released_coca_writes_as_by_the_library(
    tmp_path: Path, scenes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the real description, made small: greedily word by word as `generate` does, and by the command."""
    name, folder = "coca_ViT-B-32", tmp_path / "coca"
    described = shrunk(name, tmp_path)
    described["text_cfg"]["context_length"] = described["multimodal_cfg"]["context_length"] = 8
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": described}))
    torch.manual_seed(0)
    peer: Any = open_clip.create_model(f"local-dir:{folder}").eval()
    torch.nn.init.normal_(peer.text_decoder.text_projection)  # which the library leaves as memory has it
    for block in (*peer.text_decoder.cross_attn, *peer.text_decoder.resblocks):
        block.attn.out_proj.weight.data *= 20  # so that pictures and earlier words matter
    save_file(peer.state_dict(), folder / "open_clip_model.safetensors")
    loaded = load_any(str(folder))
    pictures = read_captioned(scenes).subset(range(3))
    found = written(loaded, torch.empty(3, 0), pictures, DecodingOptions(beam=1))
    inputs = torch.stack([loaded.transform(pictures.image(place)) for place in range(3)])
    for need in NEEDS:  # version 5 of transformers lacks one more, for beams alone, and so the library takes none
        monkeypatch.setattr(coca_model, need, getattr(transformers, need), raising=False)
    monkeypatch.setattr(coca_model, "_has_transformers", True)
    monkeypatch.setitem(coca_model.GENERATION_TYPES, "top_k", transformers.TopKLogitsWarper)
    words = peer.generate(inputs, seq_len=9, generation_type="top_k", top_k=1, min_seq_len=0)
    assert len({tuple(row) for row in words.tolist()}) > 1, "captions depend on the picture"
    begun = [open_clip.decode(row).split("<end_of_text>")[0] for row in words]
    expected = [one.removeprefix("<start_of_text>").strip() for one in begun]
    assert found == expected
    lab_commands.here("clip_lab.evaluate", "--checkpoint", folder, "--data", scenes, "--limit", "32", "--output",
                      tmp_path / "run")  # fmt: skip
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    said = json.loads((tmp_path / "run" / "captions.json").read_text())
    assert len(said) == results["pictures"]
    assert {"bleu-4", "cider"} <= results["written"]["metrics"].keys()
    assert "Captions that it writes" in (tmp_path / "run" / "report.html").read_text()


def test_a_tower_alone_has_features(tmp_path: Path) -> None:
    pictures = torch.randn(2, 3, 160, 160)
    peer = timm.create_model("test_vit", num_classes=0).eval()
    save_file(peer.state_dict(), tmp_path / "vit.safetensors")
    with torch.no_grad():
        found = load_encoder(f"timm:test_vit,{tmp_path / 'vit.safetensors'}").features(pictures)
        torch.testing.assert_close(found, peer(pictures))
    for name in ("test_vit", "resnet50", "dm_nfnet_f1"):  # the middle of a little, of a lot; squeezed
        known = resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
        theirs = create_transform(**known)
        image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 121, 3), dtype=np.uint8))
        torch.testing.assert_close(_timm_view(known, "")(image), theirs(image))
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


@pytest.mark.parametrize(
    ("processor", "refused"),
    [
        (transformers.CLIPImageProcessor(), False),
        (transformers.SiglipImageProcessor(), False),
        # As of DINOv2, in the dual encoders on it: the middle of a larger picture.
        (transformers.BitImageProcessor(size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}), False),
        # ALIGN's own numbers, by which levels go from -1 to 1; then with a mean of its own, and the middle of a square.
        (transformers.EfficientNetImageProcessor(rescale_factor=1 / 127.5, rescale_offset=True, do_normalize=False, resample=2, include_top=False), False),
        (transformers.ViTImageProcessor(do_normalize=False, image_mean=[0.4] * 3), True),
        (transformers.DeiTImageProcessor(), True),
        (transformers.ConvNextImageProcessor(size={"shortest_edge": 224}, crop_pct=0.875), True),
    ],
)  # fmt: skip
def test_a_processor_of_transformers_is_read_rightly_or_refused(processor: Any, refused: bool) -> None:
    levels = np.random.default_rng(0).integers(0, 255, (56, 84, 3), dtype=np.uint8)
    image = Image.fromarray(levels).resize((672, 448))
    if refused:
        with pytest.raises(LabError, match=f"its {type(processor).__name__} neither squeezes"):
            _processor_view(processor, "--checkpoint some")
        return
    found = _processor_view(processor, "--checkpoint some")(image)
    torch.testing.assert_close(found, processor(image, return_tensors="pt")["pixel_values"][0], atol=0.05, rtol=0)


def test_of_a_long_strip_only_the_middle_is_enlarged() -> None:
    """All of it would be 224 × 13,440,000 pixels."""
    view = View(224, (0.5,) * 3, (0.5,) * 3, "bicubic", squeezed=False)
    assert view(Image.new("RGB", (1, 60_000), "red")).unique().tolist() == [-1, 1]


def test_what_is_no_model_is_named(tmp_path: Path) -> None:
    for spec, said in ((str(tmp_path), "no trained model"), ("timm:test_vit,some", "FILE.safetensors"), ("timm:resnt50", "resnet50"), ("RN51:openai", "RN51"),
                       ("someone/something", "someone/something")):  # fmt: skip
        with pytest.raises(LabError, match=said):
            load_encoder(spec)
