"""Detectors of transformers beside ours: tiny ones of the real classes, against transformers' own post-processing."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from transformers import (
    BertTokenizer,
    CLIPTokenizer,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessor,
    GroundingDinoProcessor,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessor,
    Owlv2Processor,
    SwinConfig,
)

from labs_common.errors import LabError
from zsi_contrastive.detector.annotations import Instances, Split
from zsi_contrastive.detector.evaluate import peer_scores
from zsi_contrastive.detector.heads import Samples
from zsi_contrastive.detector.peer import Peer, beside
from zsi_contrastive.detector.pictures import instance_pictures
from zsi_contrastive.detector.protocol import Evaluation
from zsi_contrastive.detector.regions import Query

NAMES = ("cat", "hot dog", "tv", "teddy bear", "elf")
GROUPS = (3, 2)
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def owl(folder: Path) -> None:
    # As in CLIP's own: a name that begins with token 0 is taken for padding, and the end is the largest number.
    vocabulary = ["!", *LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: n for n, word in enumerate(vocabulary)}, merges=[], model_max_length=40)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Owlv2Config(
        text_config={**sizes, "vocab_size": len(vocabulary), "max_position_embeddings": 40, "bos_token_id": 53,
                     "eos_token_id": 54},
        vision_config={**sizes, "image_size": 32, "patch_size": 8}, projection_dim=16,
    )  # fmt: skip
    Owlv2ForObjectDetection(config).save_pretrained(folder)
    Owlv2Processor(Owlv2ImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)


def dino(folder: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "cat", "hot", "dog", "tv", "teddy", "bear", "elf", "?"]
    tokenizer = BertTokenizer(vocab={word: n for n, word in enumerate(words)})
    levels: dict[str, Any] = {"out_features": ["stage2", "stage3", "stage4"]}
    swin = SwinConfig(embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=2, image_size=64, **levels)
    text = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 16, "vocab_size": len(words)}  # fmt: skip
    config = GroundingDinoConfig(
        backbone_config=swin, text_config=text, d_model=32, num_queries=12, max_text_len=24, encoder_layers=1,
        decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
    )  # fmt: skip
    GroundingDinoForObjectDetection(config).save_pretrained(folder)
    pictures = GroundingDinoImageProcessor(size={"shortest_edge": 64, "longest_edge": 80})
    GroundingDinoProcessor(pictures, tokenizer).save_pretrained(folder)


@pytest.fixture(scope="module", params=[owl, dino], ids=["owlv2", "grounding-dino"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path: Path = tmp_path_factory.mktemp(request.param.__name__)
    request.param(path)
    return path


def test_boxes_and_scores_are_transformers_own(folder: Path) -> None:
    peer = Peer(str(folder), NAMES, 1000)
    levels = [
        torch.randint(0, 256, (3, 40, 56), dtype=torch.uint8),
        torch.randint(0, 256, (3, 50, 30), dtype=torch.uint8),
    ]
    asked = Query(torch.empty(5, 0), GROUPS, masks=False)
    with torch.no_grad():
        (found,) = peer(Samples([picture.float() / 255 for picture in levels]), [asked])
        inputs = peer.processor(images=levels, text=[peer.texts] * 2, return_tensors="pt")
        outputs = peer.network(**inputs)
    said = peer.processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0]) if peer.joined else []
    sizes = [(40, 56), (50, 30)]
    for number, name in enumerate(NAMES):
        # Their own rule on this name's logits alone: with all others away, the best of a box is this one's.
        columns = [n for n, word in enumerate(said) if word in name.split()] if said else [number]
        alone = torch.full_like(outputs.logits, -torch.inf)
        alone[..., columns] = outputs.logits[..., columns]
        one = type(outputs)(logits=alone, pred_boxes=outputs.pred_boxes)
        more: dict[str, Any] = {"input_ids": inputs["input_ids"]} if said else {}
        theirs = peer.processor.post_process_grounded_object_detection(one, threshold=0.0, target_sizes=sizes, **more)
        for ours, right in zip(found, theirs, strict=True):
            mine = ours.classes == number
            order = right["scores"].argsort(descending=True, stable=True)
            assert mine.sum() == len(order) > 5
            torch.testing.assert_close(ours.scores[mine], right["scores"][order])
            torch.testing.assert_close(ours.boxes[mine], right["boxes"][order])
    few = Peer(str(folder), NAMES, 4)
    with torch.no_grad():
        (less,) = few(Samples([picture.float() / 255 for picture in levels]), [asked])
    for one, whole in zip(less, found, strict=True):
        for low, high in ((0, 3), (3, 5)):
            here = (whole.classes >= low) & (whole.classes < high)
            mine = (one.classes >= low) & (one.classes < high)
            assert torch.equal(one.scores[mine], whole.scores[here][:4]), "the best four of each kind"


def test_a_peer_looks_at_the_same_pictures(folder: Path, tmp_path: Path) -> None:
    images = [{"id": 7 + n, "file_name": f"{n}.png", "width": 40, "height": 30} for n in range(3)]
    rows = [{"id": 1 + n, "image_id": 7 + n, "category_id": 9 - n, "bbox": [0, 0, 40, 30], "area": 1200, "iscrowd": 0}
            for n in range(3)]  # fmt: skip
    for row in images:
        Image.effect_noise((40, 30), 90).convert("RGB").save(tmp_path / str(row["file_name"]))
    split = Split("mine", ("cat", "tv"), ("elf",))
    categories = [{"id": number, "name": name} for number, name in zip((7, 8, 9), split.classes, strict=True)]
    part = Instances("x", categories, images, rows)
    test = instance_pictures(part, [tmp_path / str(row["file_name"]) for row in images], split.classes)
    peer = Peer(str(folder), split.classes, 4)
    found = peer_scores(peer, split, test, Accelerator(cpu=True), 2)
    assert [row["image_id"] for row in found.results] == [*[7] * 8, *[8] * 8, *[9] * 8]
    assert [row["category_id"] == 9 for row in found.results] == ([False] * 4 + [True] * 4) * 3, "four of each kind"
    assert set(found.zsi) == {"box"}


def test_peers_that_are_none(folder: Path, tmp_path: Path) -> None:
    if (folder / "config.json").read_text().count("grounding"):
        with pytest.raises(LabError, match="takes 24 tokens"):
            Peer(str(folder), NAMES * 4, 10)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(LabError, match="of the kind bert, not owlvit"):
        Peer(str(tmp_path), NAMES, 10)
    with pytest.raises(LabError, match="--peer"):
        Peer(str(tmp_path / "nowhere"), NAMES, 10)


def test_a_peers_scores_stand_beside_ours() -> None:
    def scored(value: float) -> Evaluation:
        table = {"box": {"seen": {"ap": value}, "unseen": {"ap": value}}}
        line = {"class": "cat", "box gzsi": {"ap": value}, "box one list": {"ap": value}}
        return Evaluation([], {"box": {"ap": value}}, table, table, [line])

    found = beside(scored(0.25), scored(0.5), "owl")
    assert found.zsi == {"box": {"ap": 0.25}, "box, owl": {"ap": 0.5}}
    assert found.one_list["box, owl"]["unseen"] == {"ap": 0.5}
    assert found.classes[0]["box, owl gzsi"] == {"ap": 0.5}
    assert found.classes[0]["box gzsi"] == {"ap": 0.25}
    assert "none of them is unseen" in found.peer
    assert replace(found, peer="").plain()["zsi"] == found.zsi
