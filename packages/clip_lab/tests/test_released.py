"""Released models that are hostile or damaged: no code of theirs runs, and one line says what is wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch
from labs_testing.damage import OWN_CODE, Damage, cut, edited, hostile, without
from safetensors.torch import save_file
from transformers import BertConfig, BertModel, CLIPConfig, CLIPImageProcessor, CLIPModel

from clip_lab.encoder import load_encoder
from clip_lab.text import pretrained_text
from clip_lab.tokens import Words, clip_bpe, load_words, make_words
from labs_common.errors import LabError

SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
OPEN_CLIP = {
    "embed_dim": 16, "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A CLIP of transformers, one of open_clip and a BERT with a tokenizer, all small and random."""
    root = tmp_path_factory.mktemp("released")
    folders = {name: root / name for name in ("clip", "open_clip", "bert")}
    CLIPModel(CLIPConfig(text_config=SMALL | {"vocab_size": 49408}, vision_config=SMALL | {"image_size": 32},
                         projection_dim=16)).save_pretrained(folders["clip"])  # fmt: skip
    BertModel(BertConfig(vocab_size=49408, **SMALL)).save_pretrained(folders["bert"])
    for name in ("clip", "bert"):
        Words(clip_bpe(), 77).save(folders[name])
    square = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessor(**square).save_pretrained(folders["clip"])
    folders["open_clip"].mkdir()
    (folders["open_clip"] / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPEN_CLIP}))
    model = open_clip.create_model(f"local-dir:{folders['open_clip']}")
    save_file(model.state_dict(), folders["open_clip"] / "open_clip_model.safetensors")
    return folders


def nested(folder: Path) -> None:
    """A type that the library knows, around one that it has no network for, with code of its own."""
    inner = {"model_type": "blip_text_model", "auto_map": {"AutoModel": "evil.Model"}, "_name_or_path": str(folder)}
    outer = {"model_type": "vision-text-dual-encoder", "text_config": inner,
             "vision_config": SMALL | {"model_type": "clip_vision_model"}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(outer))


def open_clip_tokenizer(folder: Path) -> None:
    """A tokenizer with code of its own, and a configuration that allows it."""
    text = OPEN_CLIP["text_cfg"] | {"hf_tokenizer_name": "here", "tokenizer_kwargs": {"trust_remote_code": True}}  # type: ignore[operator]
    edited("open_clip_config.json", model_cfg=OPEN_CLIP | {"text_cfg": text})(folder)
    own = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Model", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(own))


def open_clip_tower(folder: Path) -> None:
    """A text tower that is a model of the hub, here a directory, with code of its own."""
    (folder / "tower").mkdir()
    (folder / "tower" / "evil.py").write_text((folder / "evil.py").read_text())
    own = {"model_type": "mine", "auto_map": {"AutoConfig": "evil.Model", "AutoModel": "evil.Model"}}
    (folder / "tower" / "config.json").write_text(json.dumps(own))
    text = {"hf_model_name": str(folder / "tower"), "hf_proj_type": "mlp", "hf_pooler_type": "mean_pooler"}
    edited("open_clip_config.json", model_cfg=OPEN_CLIP | {"text_cfg": text})(folder)


READERS: dict[str, Callable[[Path], object]] = {
    "clip": lambda folder: load_encoder(str(folder)),
    "open_clip": lambda folder: load_encoder(str(folder)),
    "bert": lambda folder: pretrained_text(str(folder), True, 8, 1),
    "pooled bert": lambda folder: pretrained_text(str(folder), True, 8, 1, "pooler"),
    "random bert": lambda folder: pretrained_text(str(folder), False, 8, 1),
    "tower clip": lambda folder: pretrained_text(str(folder), True, 8, 1),
    "bert's words": lambda folder: make_words(str(folder), ["a dog"], 100, 8),
    "own words": lambda folder: load_words(folder, 8),
}


@pytest.mark.parametrize(
    ("kind", "damage", "said"),
    [
        ("clip", nested, "code of its own"),
        ("clip", edited("config.json", model_type="mine", auto_map=OWN_CODE), "code of its own"),
        ("clip", edited("preprocessor_config.json", image_processor_type="E", auto_map=OWN_CODE), "code of its own"),
        ("open_clip", open_clip_tokenizer, "code of its own"),
        ("open_clip", open_clip_tower, "code of its own"),
        ("bert", edited("config.json", model_type="mine", auto_map=OWN_CODE), "code of its own"),
        ("random bert", edited("config.json", model_type="mine", auto_map=OWN_CODE), "code of its own"),
        # The library's own classes read the others.
        ("clip", edited("config.json", auto_map=OWN_CODE), None),
        ("bert", edited("config.json", auto_map=OWN_CODE), None),
        ("bert's words", edited("tokenizer_config.json", tokenizer_class="E", auto_map=OWN_CODE), None),
        ("bert", without("model.safetensors", "pooler"), None),
        ("tower clip", lambda folder: None, "clip is no text encoder"),
        ("pooled bert", without("model.safetensors", "pooler"), "lack pooler.dense.bias, pooler.dense.weight"),
        ("bert", without("model.safetensors", "query.weight"), "lack encoder.layer.0.attention.self.query.weight"),
        ("clip", without("model.safetensors", "visual_projection"), "lack visual_projection.weight"),
        ("open_clip", without("open_clip_model.safetensors", "visual.proj"), "visual.proj"),
        ("open_clip", lambda folder: (folder / "open_clip_model.safetensors").unlink(), "weights"),
        ("clip", cut("model.safetensors"), "model.safetensors is truncated"),
        ("open_clip", cut("open_clip_model.safetensors"), "open_clip_model.safetensors is truncated"),
        ("open_clip", cut("open_clip_config.json"), "open_clip_config.json: is not JSON"),
        ("clip", cut("preprocessor_config.json"), "preprocessor_config.json: is not JSON"),
        ("bert's words", cut("tokenizer.json"), "tokenizer.json: is not JSON"),
        ("own words", cut("tokenizer.json"), "tokenizer.json: is not JSON"),
        ("bert", cut("config.json"), "config.json: is not JSON"),
    ],
)  # fmt: skip
def test_a_released_model_runs_no_code_and_has_all_its_weights(
    kind: str,
    damage: Damage,
    said: str | None,
    released: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "model"
    source = released["bert" if "words" in kind else kind.rpartition(" ")[2]]
    shutil.copytree(source, folder)
    ran = hostile(folder, monkeypatch)
    damage(folder)
    torch.manual_seed(0)
    if said is None:
        READERS[kind](folder)
    else:
        with pytest.raises(LabError, match=str(folder)) as caught:
            READERS[kind](folder)
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not ran.exists(), "code of the model ran"
