"""Search, probe, zero-shot, export, comparison and page: the commands on a model that was trained here."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from labs_testing import commands as lab_commands
from PIL import Image

from clip_lab.command_config import CompareConfig, DemoConfig
from clip_lab.compare import planned_run
from clip_lab.config import BatchOptions, ClipTrainingOptions
from clip_lab.encoder import load_encoder
from clip_lab.stored import load_model
from clip_lab.templates import filled, templates_of
from clip_lab.writing import likelihood_matrix, log_likelihoods
from clip_lab.zero_shot import class_embeddings
from labs_common.errors import LabError

SMALL = ("--text-width", "32", "--text-layers", "1", "--embedding", "32", "--batch-size", "16", "--epochs", "2",
         "--queries", "4", "--track", "none", "--no-report")  # fmt: skip
SENTENCES = ["a red circle to the left of a blue square", "one triangle"]


def trained(folder: Path, *options: object) -> Path:
    lab_commands.here("clip_lab.train", *SMALL, "--output", folder, *options)
    return folder


@pytest.fixture(scope="module")
def run(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("runs") / "clip", "--data", scenes)


@pytest.fixture(scope="module")
def coca(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("runs") / "coca", "--data", scenes, "--objective", "coca")


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three classes, easy to tell apart."""
    folder = tmp_path_factory.mktemp("things")
    generator = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 6)):
        for name, colour in (("red thing", (200, 30, 30)), ("green thing", (30, 180, 40)), ("apple", (40, 60, 200))):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                levels = np.clip(np.array(colour) + generator.normal(0, 30, (32, 32, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(levels).save(folder / split / name / f"{number}.png")
    return folder


def test_sentences_find_pictures_and_pictures_captions(run: Path, scenes: Path, tmp_path: Path) -> None:
    picture = sorted((scenes / "Images").iterdir())[0]
    done = lab_commands.here(
        "clip_lab.retrieve", *SENTENCES, "--picture", picture, "--checkpoint", run, "--data", scenes, "--top", "3",
        "--output", tmp_path / "found",
    )  # fmt: skip
    found = json.loads((tmp_path / "found" / "results.json").read_text())
    assert [one["asked"] for one in found[:2]] == SENTENCES
    assert all(len(one["results"]) == 3 for one in found)
    for one in found:
        scores = [result["score"] for result in one["results"]]
        assert scores == sorted(scores, reverse=True)
    assert found[3]["results"][0]["found"] == str(picture), "nothing is more like a picture than itself"
    assert found[3]["results"][0]["score"] == pytest.approx(1, abs=1e-4)
    assert done.stdout.count("\n  ") == 12
    with Image.open(tmp_path / "found" / "grid.png") as grid:
        assert min(grid.size) > 300
    html = (tmp_path / "found" / "report.html").read_text()
    assert html.count("data:image/png") == 3 * 3 + 2
    # The scores are those of the model itself.
    encoder = load_encoder(str(run))
    best = Path(found[0]["results"][0]["found"])
    with Image.open(best) as image:
        vector = encoder.embedded(encoder.view(image.convert("RGB"))[None])
    cosine = float((encoder.read(SENTENCES[:1]) @ vector.T).squeeze())
    assert found[0]["results"][0]["score"] == pytest.approx(cosine, abs=1e-5)


def test_without_data_the_runs_own_test_pictures_are_searched(run: Path, tmp_path: Path) -> None:
    test = json.loads((run / "splits.json").read_text())["test"]["pictures"]
    done = lab_commands.here("clip_lab.retrieve", "one circle", "--checkpoint", run, "--output", tmp_path / "found")
    assert all(name in done.stdout for name in test)
    captions = tmp_path / "captions.txt"
    captions.write_text("one circle\n\ntwo squares\none circle\n")
    again = lab_commands.here("clip_lab.retrieve", "--picture", run / "missing.png", "--checkpoint", run, code=2)
    assert "missing.png" in again.errors[0]
    picture = tmp_path / "picture.png"
    Image.new("RGB", (40, 30), "red").save(picture)
    done = lab_commands.here("clip_lab.retrieve", "--picture", picture, "--captions", captions, "--checkpoint", run,
                             "--output", tmp_path / "more")  # fmt: skip
    found = json.loads((tmp_path / "more" / "results.json").read_text())
    assert {result["found"] for result in found[0]["results"]} == {"one circle", "two squares"}


def test_the_probe_is_measured_on_what_it_wrote(run: Path, things: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    lab_commands.here("clip_lab.probe", "--checkpoint", run, "--data", things, "--shots", "1,4,all", "--draws", "2",
                      "--output", tmp_path / "probe")  # fmt: skip
    results = json.loads((tmp_path / "probe" / "results.json").read_text())
    assert results["accuracy"] > 0.8, "three colours"
    assert {name: len(values) for name, values in results["few-shot"].items()} == {"1": 2, "4": 2, "all": 1}
    layer, encoder = load_file(tmp_path / "probe" / "layer.safetensors"), load_encoder(str(run))
    right = 0
    for label, name in enumerate(sorted(path.name for path in (things / "test").iterdir())):
        for file in (things / "test" / name).iterdir():
            with Image.open(file) as image, torch.no_grad():
                feature = encoder.features(encoder.view(image.convert("RGB"))[None]).bfloat16().float()
            right += int((feature @ layer["weight"].T + layer["bias"]).argmax()) == label
    assert results["accuracy"] == pytest.approx(right / 18)
    html = (tmp_path / "probe" / "report.html").read_text()
    for heading in ("Data", "What trained", "Numbers", "Few pictures", "Penalty", "Classes", "Mistakes",
                    "Beside published figures"):  # fmt: skip
        assert f">{heading}<" in html
    assert "ViT-L/14" in html
    lab_commands.here("clip_lab.probe", "--checkpoint", run, "--data", things, "--solver", "sgd", "--features",
                      "embedding", "--epochs", "20", "--shots", "", "--no-cache", "--output", tmp_path / "sgd")  # fmt: skip
    assert json.loads((tmp_path / "sgd" / "results.json").read_text())["accuracy"] > 0.8


def test_classes_are_named_by_their_sentences(run: Path, things: Path, tmp_path: Path) -> None:
    names, templates = tmp_path / "names.txt", tmp_path / "templates.txt"
    names.write_text("blue circle\ngreen circle\nred circle\n")
    templates.write_text("a {} in the picture\nthere is a {}\n")
    lab_commands.here("clip_lab.zero_shot", "--checkpoint", run, "--data", things, "--names", names, "--templates",
                      templates, "--output", tmp_path / "named")  # fmt: skip
    results = json.loads((tmp_path / "named" / "results.json").read_text())
    assert results["chance"] == pytest.approx(1 / 3)
    assert list(results["by template"]) == ["a {} in the picture", "there is a {}"]
    encoder = load_encoder(str(run))
    classes = class_embeddings(encoder, ["blue circle", "green circle"], ["a {}", "one {}"])
    torch.testing.assert_close(classes.norm(dim=1), torch.ones(2))
    both = encoder.read(["a green circle", "one green circle"])
    torch.testing.assert_close(classes[1], torch.nn.functional.normalize(both.mean(0), dim=0))
    assert "Sentences" in (tmp_path / "named" / "report.html").read_text()


def test_templates() -> None:
    assert filled("a {} in the picture", "aeroplane") == "an aeroplane in the picture"
    assert filled("a {}", "fire_truck") == "a fire truck"
    openai = templates_of("openai")
    assert len(openai) == 80
    assert all(template.count("{}") == 1 for template in openai)
    assert all(template.count("{}") == 1 for kind in ("plain", "short") for template in templates_of(kind))


def test_probabilities_of_captions(coca: Path) -> None:
    """A caption's log-likelihood is that of its words one by one; the matrix compares pictures for each caption."""
    loaded = load_model(coca)
    model: Any = loaded.model
    rows = torch.randn(3, model.image.count * model.image.width)
    words = loaded.words(SENTENCES)
    sums, counts = log_likelihoods(loaded, rows, words, torch.tensor([2, 0]))
    for place, picture in enumerate((2, 0)):
        numbers = loaded.words.numbers(SENTENCES[place])
        total = 0.0
        for at in range(1, len(numbers)):
            logits = model.next_words(rows[picture][None], torch.tensor([numbers[: at + 1]]))[0, -1]
            total += float(logits.log_softmax(0)[numbers[at]])
        assert float(sums[place]) == pytest.approx(total, abs=1e-3)
        assert int(counts[place]) == len(numbers) - 1
    found = likelihood_matrix(loaded, rows, SENTENCES)
    assert found.shape == (2, 3)
    torch.testing.assert_close(found.exp().mean(1), torch.ones(2))


def test_exports_have_the_same_features(run: Path, scenes: Path, tmp_path: Path) -> None:
    other = trained(tmp_path / "vit", "--data", scenes, "--image", "test_vit", "--objective", "siglip", "--tokenizer",
                    "clip", "--limit", "16", "--max-steps", "1")  # fmt: skip
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
    from transformers import VisionTextDualEncoderModel

    model = VisionTextDualEncoderModel.from_pretrained(tmp_path / "clip-transformers")
    ours = load_encoder(str(run))
    with torch.no_grad():
        found = model(input_ids=ours.ours.words(SENTENCES), pixel_values=ours.view(picture)[None])  # type: ignore[union-attr]
    torch.testing.assert_close(found.text_embeds, ours.read(SENTENCES), atol=1e-5, rtol=1e-4)


def test_released_formats_are_read(tmp_path: Path) -> None:
    """A CLIP of transformers with random weights, from a real configuration made small; a timm tower."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    from clip_lab.tokens import Words, clip_bpe

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
    from open_clip.transform import image_transform

    from clip_lab.encoder import View

    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8))
    mean, std = (0.48, 0.45, 0.4), (0.26, 0.25, 0.27)
    found = View(32, mean, std, "bicubic", squeezed=False)(image)
    torch.testing.assert_close(found, image_transform(32, is_train=False, mean=mean, std=std)(image))
    squeezed = View(32, mean, std, "bicubic", squeezed=True)(image)
    torch.testing.assert_close(
        squeezed,
        image_transform(32, is_train=False, mean=mean, std=std, resize_mode="squash", interpolation="bicubic")(image),
    )


def test_an_entry_of_the_comparison_becomes_a_run() -> None:
    config = CompareConfig(training=ClipTrainingOptions(epochs=5), batch=BatchOptions(chunk=7))
    run = planned_run(config, "coca:queries=9:caption_weight=1:learning_rate=0.5")
    assert (run.objective, run.head.queries, run.head.caption_weight) == ("coca", 9, 1.0)
    assert (run.training.learning_rate, run.training.epochs, run.batch.chunk) == (0.5, 5, 7)
    for wrong in ("blip", "clip:depth=3", "clip:caption_weight=1"):
        with pytest.raises(LabError, match=f"--objectives {wrong}"):
            planned_run(config, wrong)


def test_the_comparison_goes_on_where_it_was_stopped(scenes: Path, things: Path, tmp_path: Path) -> None:
    folder = tmp_path / "comparison"
    options = ("--data", scenes, "--classes", things, "--epochs", "1", "--batch-size", "16", "--text-width", "32",
               "--text-layers", "1", "--ranked", "6", "--output", folder)  # fmt: skip
    lab_commands.here("clip_lab.compare", *options)
    rows = {row["objective"]: row for row in json.loads((folder / "comparison.json").read_text())["rows"]}
    assert list(rows) == ["clip", "coca", "simvlm"]
    assert "perplexity" not in rows["clip"]
    assert "R@1 by embedding" not in rows["simvlm"]
    assert {"R@1 by embedding", "R@1 by likelihood", "perplexity", "linear probe"} <= rows["coca"].keys()
    html = (folder / "report.html").read_text()
    for heading in ("Differences", "Numbers", "Curves", "Cost"):
        assert f">{heading}<" in html
    results = folder / "clip" / "seed-0" / "results.json"
    before = results.stat().st_mtime_ns
    (folder / "report.html").unlink()
    (folder / "simvlm" / "seed-0" / "results.json").unlink()
    lab_commands.here("clip_lab.compare", *options)
    assert results.stat().st_mtime_ns == before, "what was finished is not run again"
    assert (folder / "report.html").exists()
    assert "--epochs" in lab_commands.here("clip_lab.compare", *options, "--epochs", "3", code=2).stderr


def test_the_page_searches_both_ways(run: Path) -> None:
    pytest.importorskip("gradio", reason="needs the extra clip-lab[demo]")
    from clip_lab.demo import search_page

    functions = {
        function.name: function.fn for function in search_page(DemoConfig(checkpoint=str(run), top=3)).fns.values()
    }
    assert len(functions["by_sentence"]("one circle")) == 3
    assert functions["by_sentence"]("  ") == []
    rows, tiles = functions["by_picture"](Image.new("RGB", (50, 30), "red"))
    assert (len(rows), len(tiles)) == (3, 3)
    assert functions["by_picture"](None) == ([], [])


def test_real_classes_are_probed_and_named(run: Path, real_classes: Path, tmp_path: Path) -> None:
    shared = ("--checkpoint", run, "--data", real_classes, "--limit", "300")
    lab_commands.here("clip_lab.probe", *shared, "--shots", "4,all", "--draws", "1", "--output", tmp_path / "probe")
    assert json.loads((tmp_path / "probe" / "results.json").read_text())["accuracy"] > 0.12
    lab_commands.here("clip_lab.zero_shot", *shared, "--templates", "plain", "--output", tmp_path / "named")
    assert json.loads((tmp_path / "named" / "results.json").read_text())["chance"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("module", "arguments", "names"),
    [
        ("retrieve", (), "say what to look for"),
        ("retrieve", ("a dog", "--checkpoint", "missing"), "missing"),
        ("retrieve", ("a dog", "--top", "0"), "--top"),
        ("probe", ("--shots", "1,some"), "--shots"),
        ("probe", ("--penalty", "-1"), "--penalty"),
        ("zero_shot", ("--templates", "missing.txt"), "missing.txt"),
        ("export", ("--checkpoint", "missing"), "missing"),
        ("compare", ("--objectives", "clip,clip"), "occurs twice"),
        ("compare", ("--ranked", "1"), "--ranked"),
        ("demo", ("--top", "0"), "--top"),
    ],
)
def test_bad_input_is_one_line(
    module: str, arguments: tuple[str, ...], names: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = lab_commands.here(f"clip_lab.{module}", *arguments, code=2)
    assert len(done.errors) == 1, done.stderr
    assert names in done.errors[0]
    assert not list(tmp_path.iterdir())
