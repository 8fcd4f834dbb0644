"""Training that starts from a finished model: of both libraries, whole, with a frozen image tower, and with adapters."""

import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import open_clip
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from labs_testing import commands as lab_commands
from labs_testing.commands import in_two_processes
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    RobertaConfig,
    RobertaModel,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from clip_lab.encoder import load_encoder
from clip_lab.released import ReleasedModel, merged
from clip_lab.saved import load_any, load_model
from clip_lab.text import pretrained_text, sentence_pool
from clip_lab.tokens import make_words
from labs_common.errors import LabError
from labs_common.scenes.captions import captions
from labs_common.scenes.world import random_scene, scene_generator

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
WORDS = SIZES | {"vocab_size": 120, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
LOOKS = SIZES | {"image_size": 32, "patch_size": 16}
SQUARE = {"height": 32, "width": 32}
TOWER = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
READER = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
WAYS = {"text_to_image", "image_to_text"}
SAID = [caption for number in range(60) for caption in captions(
    random_scene(scene_generator(3, number)), scene_generator(4, number))]  # fmt: skip
LIBRARIES = ["clip_lab.train"]
SENTENCES = ["a red circle to the left of a blue square", "one triangle"]


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small models as released ones are laid out, with random weights."""
    root = tmp_path_factory.mktemp("starts")
    folders = {name: root / name for name in ("clip", "siglip", "open_clip")}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=WORDS, vision_config=LOOKS, projection_dim=24)).save_pretrained(folders["clip"])
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE).save_pretrained(folders["clip"])
    siglip = SiglipModel(SiglipConfig(text_config=WORDS | {"max_position_embeddings": 64}, vision_config=LOOKS))
    siglip.logit_scale.data.fill_(4.8)  # above 100, as released ones are
    siglip.save_pretrained(folders["siglip"])
    SiglipImageProcessor(size=SQUARE).save_pretrained(folders["siglip"])
    for name in ("clip", "siglip"):
        make_words("sentencepiece", SAID, 120, 77).save(folders[name])
    file = folders["siglip"] / "tokenizer_config.json"  # the released ones give no mask
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_input_names": ["input_ids"]}))
    folders["open_clip"].mkdir()
    described = {"model_cfg": {"embed_dim": 16, "vision_cfg": TOWER, "text_cfg": READER}}
    (folders["open_clip"] / "open_clip_config.json").write_text(json.dumps(described))
    model = open_clip.create_model(f"local-dir:{folders['open_clip']}")
    save_file(model.state_dict(), folders["open_clip"] / "open_clip_model.safetensors")
    return folders


def peers(library: str, folder: Path, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of pictures and sentences by the library's own code, from what it reads itself."""
    with torch.no_grad():
        if library == "open_clip":
            model = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True).eval()
            read = open_clip.get_tokenizer(f"local-dir:{folder}")(SENTENCES)
            return model.encode_image(pictures, normalize=True), model.encode_text(read, normalize=True)
        network: Any = {"clip": CLIPModel, "siglip": SiglipModel}[library]
        model = network.from_pretrained(folder).eval()
        words = AutoTokenizer.from_pretrained(folder)
        filled = {"padding": "max_length", "max_length": 64} if library == "siglip" else {"padding": True}
        read = words(SENTENCES, return_tensors="pt", **filled)
        assert ("attention_mask" in read) == (library == "clip")
        found = model(pixel_values=pictures, input_ids=read.input_ids, attention_mask=read.get("attention_mask"))
        return F.normalize(found.image_embeds, dim=-1), F.normalize(found.text_embeds, dim=-1)


@pytest.mark.parametrize(
    ("library", "options", "image", "text"),
    [
        ("clip", (), "moves", "moves"),
        ("clip", ("--freeze-image", "--lora", "text"), "stays", "adapted"),
        ("siglip", ("--objective", "siglip", "--lora", "both", "--lora-rank", "2"), "adapted", "adapted"),
        ("open_clip", ("--freeze-image",), "stays", "moves"),
        ("open_clip", ("--lora", "image", "--freeze-text"), "adapted", "stays"),
    ],
)
def test_a_released_model_is_trained_further(
    library: str,
    options: tuple[str, ...],
    image: str,
    text: str,
    starts: dict[str, Path],
    scenes: Path,
    tmp_path: Path,
) -> None:
    """Before and after are in one report; what the library then reads, and an export of it, gives our embeddings."""
    start, run, exported = starts[library], tmp_path / "run", tmp_path / "exported"
    lab_commands.here("clip_lab.train", "--start", start, "--data", scenes, "--limit", "32", "--batch-size", "16",
                      "--max-steps", "3", "--learning-rate", "0.02", "--tower-learning-rate", "0.002", "--track", "none",
                      "--output", run, *options, *([] if library == "siglip" else ["--no-report"]))  # fmt: skip
    before, after = ({**load_any(str(folder)).model.network.state_dict()} for folder in (start, run))
    assert before.keys() == after.keys()
    for tower, names, done in (("image", ("vision_model", "visual"), image), ("text", ("text_model", "transf"), text)):
        moved = [name for name in before if name.startswith(names) and not torch.equal(before[name], after[name])]
        assert bool(moved) == (done != "stays"), tower
        if done == "adapted":  # what was added has the adapters' rank, and nothing else moved
            rank = int(options[options.index("--lora-rank") + 1]) if "--lora-rank" in options else 8
            assert all(torch.linalg.matrix_rank(after[n] - before[n], atol=1e-6) <= rank for n in moved), moved
            assert all(before[name].ndim == 2 for name in moved)
    results = json.loads((run / "results.json").read_text())
    assert {name.split("/")[0] for name in results["before"]} == {*WAYS, "mean recall"}
    if library == "siglip":
        assert "before training" in (run / "report.html").read_text()
        lab_commands.here("clip_lab.evaluate", "--checkpoint", start, "--data", scenes, "--limit", "32", "--output",
                          tmp_path / "before")  # fmt: skip
        assert json.loads((tmp_path / "before" / "results.json").read_text())["metrics"] == results["before"]
    to = "open_clip" if library == "open_clip" else "transformers"
    lab_commands.here("clip_lab.export", "--checkpoint", run, "--to", to, "--output", exported)
    ours, pictures = load_encoder(str(run)), torch.randn(3, 3, 32, 32)
    for folder in (run / "model", exported):
        images, texts = peers(library, folder, pictures)
        torch.testing.assert_close(ours.embedded(pictures), images, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(ours.read(SENTENCES), texts, atol=1e-5, rtol=1e-4)
    if library == "siglip":
        assert ours.scale == pytest.approx(float(after["logit_scale"].exp()))
        assert ours.scale > 100, "SigLIP's factor has no bound"


def test_a_started_run_is_resumed_to_the_same_weights(starts: dict[str, Path], scenes: Path, tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    lab_commands.here("clip_lab.train", "--start", starts["clip"], "--lora", "text", "--data", scenes, "--limit", "32",
                      "--batch-size", "16", "--max-steps", "3", "--save-every", "1", "--keep", "3", "--track", "none",
                      "--learning-rate", "0.02", "--no-report", "--output", whole)  # fmt: skip
    shutil.copytree(whole, run)
    for name in ("model", "checkpoints/step-00000003", "checkpoints/step-00000002"):
        shutil.rmtree(run / name)
    for best in (run / "checkpoints").glob("best-*"):
        shutil.rmtree(best)
    (run / "results.json").unlink()
    lab_commands.here("clip_lab.train", "--resume", run)
    one, two = (load_file(folder / "model" / "model.safetensors") for folder in (whole, run))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    # Also of weights that train, and so are not audited, a change is noticed.
    record = json.loads((run / "start.json").read_text())
    (run / "start.json").write_text(json.dumps(record | {"weights": "0" * 32}))
    refused = lab_commands.here("clip_lab.train", "--resume", run, code=2)
    assert f"--start {starts['clip']} changed since the run began" in refused.errors[0]


@pytest.mark.long
def test_two_processes_adapt_a_released_model_as_one_does(
    starts: dict[str, Path], scenes: Path, tmp_path: Path
) -> None:
    options = ("--start", starts["clip"], "--lora", "both", "--data", scenes, "--limit", "16", "--batch-size", "8",
               "--max-steps", "2", "--track", "none", "--learning-rate", "0.02", "--no-report")  # fmt: skip
    lab_commands.here("clip_lab.train", *options, "--output", tmp_path / "one")
    in_two_processes("clip_lab.train", LIBRARIES, *options, "--output", tmp_path / "two", XDG_CACHE_HOME=str(tmp_path))
    before, one, two = (
        load_file(folder / "model.safetensors")
        for folder in (starts["clip"], tmp_path / "one" / "model", tmp_path / "two" / "model")
    )
    moved = {name for name in one if not torch.equal(one[name], before[name])}
    assert any("text_model" in name for name in moved)
    assert any("vision_model" in name for name in moved)
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=0)


def test_merged_adapters_are_pefts_own(starts: dict[str, Path]) -> None:
    """Against the library's merge, layer by layer."""
    model = load_any(str(starts["clip"])).model
    assert isinstance(model, ReleasedModel)
    model.train_towers("both", 4)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or name.startswith("scale") for name in trained)
    assert any("text_model" in name for name in trained)
    assert any("vision_model" in name for name in trained)
    state = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}  # the library's is in place
    own = merged(state, model.network)
    for name, module in model.network.named_modules():
        if hasattr(module, "base_layer"):
            module.merge()  # type: ignore[operator]
            torch.testing.assert_close(own[f"{name}.weight"], module.base_layer.weight)  # type: ignore[union-attr]


def test_a_run_is_trained_further(run: Path, scenes: Path, tmp_path: Path) -> None:
    lab_commands.here("clip_lab.train", "--start", run, "--data", scenes, "--batch-size", "16", "--max-steps", "1",
                      "--tower-learning-rate", "1e-3", "--track", "none", "--no-report", "--output", tmp_path / "run")  # fmt: skip
    before, after = (load_file(folder / "model" / "model.safetensors") for folder in (run, tmp_path / "run"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert {name.partition(".")[0] for name in moved} >= {"image", "text", "image_projection", "text_projection"}
    assert max(float((after[name] - before[name]).abs().max()) for name in moved if "running" not in name
               and "num_batches" not in name) < 0.01, "it went on from there"  # fmt: skip
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    first = json.loads((run / "results.json").read_text())
    assert results["before"] == first["test"]["metrics"]
    assert load_model(tmp_path / "run").words.length == load_model(run).words.length


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--start", "clip", "--objective", "siglip"), "take clip"),
        (("--start", "clip", "--objective", "coca"), "--objective coca"),
        (("--start", "clip", "--text-width", "64"), "drop their options"),
        (("--start", "clip", "--lora", "image", "--freeze-image"), "--lora image"),
        (("--start", "clip", "--plan"), "--plan"),
        (("--start", "missing"), "--start missing"),
        (("--start", "run", "--objective", "siglip"), "--objective clip"),
        (("--start", "run", "--lora", "text"), "drop --lora text"),
        (("--lora", "text"), "--start"),
        (("--text-pool", "mean", "--text", "own"), "--text-pool"),
    ],
)
def test_what_cannot_start_is_one_line(
    options: tuple[str, ...], said: str, starts: dict[str, Path], run: Path, scenes: Path, tmp_path: Path
) -> None:
    known = {"clip": starts["clip"], "run": run}
    done = lab_commands.here("clip_lab.train", "--data", scenes, "--output", tmp_path / "run", "--track", "none",
                             *(known.get(option, option) for option in options), code=2)  # fmt: skip
    assert len(done.errors) == 1, done.stderr
    assert said in done.errors[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("side", "says"),
    [(0, "neither squeezes"), (10**6, "pictures of 1,000,000 pixels"), (48, r"image size \(48\*48\) doesn't match")],
)
def test_pictures_that_a_released_model_cannot_read_are_one_line(
    side: int, says: str, starts: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(starts["clip"], tmp_path / "clip")
    (file,) = (tmp_path / "clip").glob("*processor_config.json")
    size = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    file.write_text(json.dumps(json.loads(file.read_text()) | size))
    with pytest.raises(LabError, match=f"--start .*{says}"):
        load_any(str(tmp_path / "clip"), "--start")
    with pytest.raises(LabError, match=r"--start .*/gone: no such directory"):
        load_any(str(tmp_path / "gone"), "--start")


@pytest.mark.parametrize("pool", ["auto", "pooler", "mean", "max", "cls", "eot"])
def test_a_captions_feature_is_pooled_as_asked(pool: str, tmp_path: Path) -> None:
    small = {"vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 16}  # fmt: skip
    torch.manual_seed(0)
    model = BertModel(BertConfig(**small)).eval()
    model.save_pretrained(tmp_path)
    words = torch.tensor([[7, 8, 9, 1], [7, 1, 0, 0]])  # 1 is the end
    with torch.no_grad():
        found = model(input_ids=words, attention_mask=torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]))
        reader = pretrained_text(str(tmp_path), True, 4, 1, pool).eval()
        feature = reader(words).feature
    states = found.last_hidden_state
    expected = {
        "pooler": found.pooler_output, "mean": torch.stack([states[0].mean(0), states[1, :2].mean(0)]),
        "max": torch.stack([states[0].amax(0), states[1, :2].amax(0)]), "cls": states[:, 0], "eot": torch.stack([states[0, 3], states[1, 1]]),
    }  # fmt: skip
    torch.testing.assert_close(feature, expected["pooler" if pool == "auto" else pool])
    assert (reader.network.pooler is None) == (pool not in ("auto", "pooler")), "what nothing reads does not train"


@pytest.mark.parametrize(
    ("said", "pool"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_mean_tokens": True, "word_embedding_dimension": 16}, "mean"),
        ({"pooling_mode": "lasttoken"}, "eot"),
        ({"pooling_mode": "weightedmean"}, "pooled by weightedmean, which is not here; take another --text-pool"),
        ({"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True}, "pooled by cls_token and max_tokens"),
        ({"pooling_mode": ["mean", "max"]}, "pooled by mean and max, which"),
        ({"pooling_mode": ["mean"]}, "mean"),
        ({}, "pooled in no way that it says; take another --text-pool"),
    ],
)
def test_a_sentence_transformers_own_pooling_is_the_default(said: dict[str, Any], pool: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertConfig(vocab_size=9, **sizes).save_pretrained(tmp_path)
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(said))
    if pool.startswith("pooled"):
        with pytest.raises(LabError, match=f"--text {tmp_path}: its sentences are {pool}"):
            pretrained_text(str(tmp_path), False, 4, 1)
    else:
        assert pretrained_text(str(tmp_path), False, 4, 1).pool == pool
    assert pretrained_text(str(tmp_path), False, 4, 1, "max").pool == "max", "what is asked for comes first"


def test_a_hub_that_does_not_say_the_pooling_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gone = OSError("We couldn't connect\nto the hub")
    gone.__cause__ = LocalEntryNotFoundError("no route")
    busy = OSError("503")
    busy.__cause__ = HfHubHTTPError("503", response=Mock(status_code=503, headers={}))
    raised: list[Exception] = [gone]

    def asked(name: str, file: str) -> str:
        raise raised[-1]

    monkeypatch.setattr("clip_lab.text.cached_file", asked)
    for error in (gone, busy, ConnectionError("no route")):
        raised.append(error)
        monkeypatch.setattr("clip_lab.text.is_offline_mode", lambda: False)
        with pytest.raises(LabError, match=r"--text a/b: the hub does not say .* or say it with --text-pool") as stop:
            sentence_pool("a/b")
        assert "\n" not in str(stop.value)
        monkeypatch.setattr("clip_lab.text.is_offline_mode", lambda: True)
        if error is gone:
            assert not sentence_pool("a/b"), "whoever works without the hub has all files that there are"
    monkeypatch.undo()
    assert not sentence_pool(str(tmp_path)), "a directory without the file"


def test_weights_without_a_pooler_are_the_same_in_two_loads(tmp_path: Path) -> None:
    """RoBERTa's have none: the library would draw one at random."""
    small = {"vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 16}  # fmt: skip
    RobertaModel(RobertaConfig(**small), add_pooling_layer=False).save_pretrained(tmp_path)
    words = torch.tensor([[7, 8, 9, 2]])
    with torch.no_grad():
        one, two = (pretrained_text(str(tmp_path), True, 4, 2).eval()(words).feature for _ in range(2))
    torch.testing.assert_close(one, two)
