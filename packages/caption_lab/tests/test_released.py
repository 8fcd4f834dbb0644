"""Released captioners against transformers' own `generate`, and CLIPScore against its formula."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from labs_testing.commands import here
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    GitConfig,
    GitForCausalLM,
    GPT2Config,
    PreTrainedTokenizerFast,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessor,
)

from caption_lab.data import read_data
from caption_lab.released import ClipJudge, JudgedPictures, is_released, load_released
from labs_common.caption_metrics import captions_of_others
from labs_common.data.captions import CaptionedPictures
from labs_common.device import inference_accelerator
from labs_common.errors import LabError
from labs_common.options import CaptionDataOptions, DecodingOptions

WORDS = ["a", "red", "green", "circle", "square", "star", "left", "of", "and", "on", "above", "two", "photo", "depicts"]
SIDE, SMALL = 32, {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
WILD = {"initializer_range": 0.7}  # with the usual 0.02 all pictures would get the same caption
SQUARE = {"size": {"height": SIDE, "width": SIDE}}


def bert_tokenizer(folder: Path) -> Any:
    vocabulary = {
        word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *WORDS])
    }
    tokenizer = BertTokenizer(vocab=vocabulary)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.save_pretrained(folder)
    return tokenizer


def word_tokenizer(folder: Path, **more: Any) -> Any:
    """Words between <s> and </s>, as CLIP and GPT-2 have theirs in bytes."""
    backend = Tokenizer(
        WordLevel({word: number for number, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}, "<unk>")
    )
    backend.pre_tokenizer = Whitespace()
    backend.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                                        unk_token="<unk>", **more)  # fmt: skip
    tokenizer.save_pretrained(folder)
    return tokenizer


def blip(folder: Path) -> type:
    bert_tokenizer(folder)
    BlipImageProcessor(**SQUARE).save_pretrained(folder)
    text = {"vocab_size": 6 + len(WORDS), "encoder_hidden_size": 16, "bos_token_id": 5, "eos_token_id": 3, "sep_token_id": 3,
            "pad_token_id": 0, "max_position_embeddings": 40}  # fmt: skip
    config = BlipConfig(text_config=SMALL | WILD | text, vision_config=SMALL | WILD | {"image_size": SIDE, "patch_size": 16},
                        projection_dim=16)  # fmt: skip
    BlipForConditionalGeneration(config).save_pretrained(folder)
    return BlipForConditionalGeneration


def git(folder: Path) -> type:
    bert_tokenizer(folder)
    CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SQUARE["size"]).save_pretrained(folder)
    vision = SMALL | {"image_size": SIDE, "patch_size": 16}
    config = GitConfig(vision_config=vision, vocab_size=6 + len(WORDS), bos_token_id=2, eos_token_id=3, pad_token_id=0,
                       max_position_embeddings=64, **SMALL, **WILD)  # fmt: skip
    GitForCausalLM(config).save_pretrained(folder)
    return GitForCausalLM


def vit_gpt2(folder: Path) -> type:
    word_tokenizer(folder)
    ViTImageProcessor(**SQUARE).save_pretrained(folder)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        ViTConfig(image_size=SIDE, patch_size=16, **SMALL, **WILD),
        GPT2Config(vocab_size=4 + len(WORDS), n_embd=16, n_layer=2, n_head=2, n_positions=64, add_cross_attention=True,
                   bos_token_id=1, eos_token_id=2, **WILD),
    )  # fmt: skip
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 1, 0, 2
    model = VisionEncoderDecoderModel(config)
    model.generation_config.update(decoder_start_token_id=1, pad_token_id=0, eos_token_id=2)
    model.save_pretrained(folder)
    return VisionEncoderDecoderModel


@pytest.fixture(scope="module")
def unseen(scenes: Path) -> CaptionedPictures:
    return read_data(CaptionDataOptions(data=str(scenes)), 0, False).splits["test"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(4)  # cosines above and below zero
    word_tokenizer(folder, model_max_length=20)
    CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SQUARE["size"]).save_pretrained(folder)
    text = {
        "vocab_size": 4 + len(WORDS),
        "max_position_embeddings": 20,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    config = CLIPConfig(text_config=SMALL | text, vision_config=SMALL | {"image_size": SIDE, "patch_size": 16},
                        projection_dim=16, initializer_factor=5.0)  # fmt: skip
    CLIPModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", [blip, git])
def test_a_prompt_is_gone_on_from_and_cut_off(
    family: Any, unseen: CaptionedPictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    model = family(tmp_path).from_pretrained(tmp_path).eval()
    processor, tokenizer = AutoImageProcessor.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    few, options = unseen.subset([0, 2, 4]), DecodingOptions(beam=1, no_repeat=2)
    by_hand = {}
    for prompt in ("two red", "a"):
        begin = [
            model.config.text_config.bos_token_id if family is blip else 2,
            *tokenizer.convert_tokens_to_ids(prompt.split()),
        ]
        pixels = processor(images=[few.image(place) for place in range(3)], return_tensors="pt").pixel_values
        given = torch.tensor(
            [[*begin, 3] if family is blip else begin] * 3
        )  # transformers' BLIP takes the last one off
        written = model.generate(pixel_values=pixels, input_ids=given, max_new_tokens=30, no_repeat_ngram_size=2)
        by_hand[prompt] = [
            said.removeprefix(prompt).strip() for said in tokenizer.batch_decode(written, skip_special_tokens=True)
        ]
        assert all(said.startswith(prompt) for said in tokenizer.batch_decode(written, skip_special_tokens=True))
        assert load_released(tmp_path, prompt).captions(few, inference_accelerator(), 2, options, "") == by_hand[prompt]
    assert by_hand["a"] != by_hand["two red"]
    assert load_released(tmp_path).prompt == ("a picture of " if family is blip else "")
    assert load_released(tmp_path, "none").prompt == ""
    asked: list[dict[str, Any]] = []
    released = load_released(tmp_path)
    generate = released.network.generate
    monkeypatch.setattr(released.network, "generate", lambda **how: [asked.append(how), generate(**how)][1])
    released.captions(few, inference_accelerator(), 4, DecodingOptions(top_p=0.9), "")
    assert (asked[0]["top_p"], asked[0]["top_k"]) == (0.9, 0), "transformers' own is 50"
    assert ("input_ids" in asked[0]) == (family is blip)


@pytest.mark.parametrize("family", [blip, git, vit_gpt2])
def test_captions_are_those_of_generate(family: Any, unseen: CaptionedPictures, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = family(tmp_path).from_pretrained(tmp_path).eval()
    processor, tokenizer = AutoImageProcessor.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    released, accelerator = load_released(tmp_path, "none"), inference_accelerator()
    few = unseen.subset([0, 2, 4])
    different = set()
    for beam in (1, 3):
        options = DecodingOptions(beam=beam, no_repeat=2)
        more = {"length_penalty": 0.7} if beam > 1 else {}
        by_hand = []
        for place in range(len(few)):  # one by one
            pixels = processor(images=few.image(place), return_tensors="pt").pixel_values
            written = model.generate(
                pixel_values=pixels, num_beams=beam, max_new_tokens=30, no_repeat_ngram_size=2, **more
            )
            by_hand.append(tokenizer.decode(written[0], skip_special_tokens=True))
        assert released.captions(few, accelerator, 2, options, "") == by_hand
        assert set(" ".join(by_hand).split()) <= set(WORDS)
        different |= set(by_hand)
    assert len(different) > 2


def by_formula(folder: Path, pictures: CaptionedPictures, captions: list[str]) -> tuple[float, float]:
    """Hessel et al. 2021, section 3, and the code that they published, a picture at a time."""
    model, processor = CLIPModel.from_pretrained(folder).eval(), AutoImageProcessor.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def unit(output: Any) -> np.ndarray:
        vector = output.pooler_output[0].detach().double().numpy()
        return vector / np.sqrt((vector**2).sum())

    def text(caption: str) -> np.ndarray:
        words = tokenizer("A photo depicts " + caption, truncation=True, max_length=20, return_tensors="pt")
        return unit(model.get_text_features(**words))

    each = []
    for place, caption in enumerate(captions):
        image = unit(model.get_image_features(**processor(images=pictures.image(place), return_tensors="pt")))
        clip_s = 2.5 * max(float(text(caption) @ image), 0)
        nearest = max(max(float(text(caption) @ text(reference)), 0) for reference in pictures.captions[place])
        each.append((clip_s, 2 * clip_s * nearest / (clip_s + nearest) if clip_s + nearest else 0.0))
    assert len({score for score, _ in each}) > 2
    assert min(score for score, _ in each) == 0, "a cosine below zero counts nothing"
    return tuple(np.mean(each, 0))


def test_clip_score_is_the_papers(clip: Path, unseen: CaptionedPictures) -> None:
    captions = captions_of_others(unseen)
    captions[0] += " and a red star" * 9  # is cut to what the CLIP reads
    found = ClipJudge(str(clip)).look(unseen, torch.device("cpu")).scores(captions)
    assert (found["clip-score"], found["ref-clip-score"]) == pytest.approx(by_formula(clip, unseen, captions), abs=1e-5)


def test_the_nearest_reference_counts_and_nothing_below_zero() -> None:
    """The formula where embeddings point anywhere, as those of a random CLIP do not."""
    directions = np.random.default_rng(0).normal(size=(12, 7, 8))
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    pictures, captions, references = directions[:, 0], directions[:, 1], directions[:, 2:]
    judge: Any = SimpleNamespace(texts=lambda said: torch.from_numpy(captions))
    found = JudgedPictures(judge, torch.from_numpy(pictures), [*torch.from_numpy(references)]).scores([""] * 12)
    clip_s = 2.5 * np.maximum((captions * pictures).sum(1), 0)
    nearest = np.maximum((references @ captions[..., None]).max((1, 2)), 0)
    both = [2 * s * n / (s + n) if s + n else 0.0 for s, n in zip(clip_s, nearest, strict=True)]
    assert (found["clip-score"], found["ref-clip-score"]) == pytest.approx((np.mean(clip_s), np.mean(both)))


def test_a_released_captioner_is_evaluated_as_ours_are(
    clip: Path, scenes: Path, unseen: CaptionedPictures, tmp_path: Path
) -> None:
    git(tmp_path / "git")
    asked = ("--checkpoint", tmp_path / "git", "--beams", "1,2", "--clip-score", clip, "--output", tmp_path / "out")
    assert "name --data" in here("caption_lab.evaluate", *asked, code=2).errors[0]
    here("caption_lab.evaluate", *asked, "--data", scenes)
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    said = [row["caption"] for row in json.loads((tmp_path / "out" / "captions.json").read_text())]
    first = found["by beam"]["1"]  # --beam 3 is not among them
    judged = ClipJudge(str(clip)).look(unseen, torch.device("cpu")).scores(said)
    assert {key: first[key] for key in judged} == pytest.approx(judged)
    html = (tmp_path / "out" / "report.html").read_text()
    assert "RefCLIPScore" in html
    assert "favour captioners" in html


def test_what_is_no_captioner_and_no_clip(
    clip: Path, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for option, value, said in (("--checkpoint", clip, "of the kind clip, which writes no captions"),
                                ("--checkpoint", tmp_path / "none", "no such directory")):  # fmt: skip
        done = here("caption_lab.evaluate", option, value, "--data", scenes, code=2)
        assert len(done.errors) == 1
        assert said in done.errors[0]
    vit_gpt2(tmp_path / "vit_gpt2")
    with pytest.raises(LabError, match="--prompt: works with blip and git only"):
        load_released(tmp_path / "vit_gpt2", "a")
    git(tmp_path)
    with pytest.raises(LabError, match=r"--clip-score .* is no CLIP"):
        ClipJudge(str(tmp_path))
    assert is_released(Path("Salesforce/blip-image-captioning-base"))
    monkeypatch.chdir(tmp_path.parent)
    assert not is_released(Path(tmp_path.name) / "transformer-2"), "a directory that is not there yet"
    (tmp_path / "config.json").write_text("null")
    assert not is_released(tmp_path)
