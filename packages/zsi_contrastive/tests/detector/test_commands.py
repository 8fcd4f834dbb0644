"""Evaluation, prediction, preparation, word vectors and ablation: the commands on a detector that was trained here."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from labs_testing import commands as lab_commands
from PIL import Image

from labs_common.cli import config_to_yaml, given, parse
from zsi_contrastive.detector.annotations import scenes_split
from zsi_contrastive.detector.calibration import Calibration, rules_of
from zsi_contrastive.detector.compare import PARTS, VARIANTS, plan
from zsi_contrastive.detector.config import (
    AblateConfig,
    DataOptions,
    DetectorTrainingOptions,
    EvaluateConfig,
    ModelOptions,
    PredictConfig,
    TrainConfig,
)
from zsi_contrastive.detector.contrastive import CONTRASTIVE
from zsi_contrastive.detector.defaults import complete, contrastive_of
from zsi_contrastive.detector.evaluate import chosen_words, patient, seen_before
from zsi_contrastive.detector.options import DetectionOptions, WordOptions
from zsi_contrastive.detector.predict import chosen_results, query_of, thresholds_of, words_query
from zsi_contrastive.detector.protocol import nearest_seen_query, renamed
from zsi_contrastive.detector.saved import changed, chosen_data, load_detector
from zsi_contrastive.detector.train import contrastive_share

SMALL = ("--split", "scenes", "--min-side", "48", "--max-side", "64", "--batch-size", "4", "--controls", "1",
         "--track", "none")  # fmt: skip


def here(name: str, *arguments: object, code: int = 0) -> lab_commands.Done:
    return lab_commands.here(f"zsi_contrastive.{name}", *arguments, code=code)


@pytest.fixture(scope="module")
def run(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    here("train", "--data", scenes, *SMALL, "--epochs", "2", "--score-threshold", "0", "--output", path)
    return path


@pytest.mark.alone
def test_evaluate_says_what_training_said(run: Path, scenes: Path, tmp_path: Path) -> None:
    file = run / "model" / "calibration.json"
    saved = file.read_text()
    file.write_text(json.dumps(json.loads(saved) | {"seen_bias": 0.3}))
    here("evaluate", "--checkpoint", run, "--output", tmp_path / "again")
    file.write_text(saved)
    results = json.loads((run / "results.json").read_text())["test"]
    again = json.loads((tmp_path / "again" / "evaluation.json").read_text())
    for key in ("zsi", "gzsi", "one_list", "classes", "sweep", "proposals"):
        assert again[key] == results[key]
    lost = again["proposals"]["unseen"]
    assert sum(lost[name] for name in ("named", "misnamed", "dropped", "not proposed")) == pytest.approx(1)
    assert "Where objects are lost" in (tmp_path / "again" / "report.html").read_text()
    row = again["named"]["with validation's bias"]
    assert row == next(line for line in again["sweep"]["test"] if line["bias"] == 0.3), "the bias that the run has"
    assert (tmp_path / "again" / "report.html").is_file()
    # A file of results, scored without any model.
    test = json.loads((run / "splits.json").read_text())["test"]["pictures"]
    content = json.loads((scenes / "annotations" / "instances_val.json").read_text())
    content["images"] = [row for row in content["images"] if row["file_name"] in test]
    ids = {row["id"] for row in content["images"]}
    content["annotations"] = [row for row in content["annotations"] if row["image_id"] in ids]
    (tmp_path / "test.json").write_text(json.dumps(content))
    here("evaluate", "--results", run / "detections.json", "--data", scenes, "--split", "scenes", "--test-annotations",
         tmp_path / "test.json", "--output", tmp_path / "file")  # fmt: skip
    scored = json.loads((tmp_path / "file" / "evaluation.json").read_text())
    assert scored["zsi"] == results["zsi"]
    assert scored["gzsi"] == results["gzsi"]
    assert scored["one_list"] == results["one_list"]
    assert not scored["proposals"], "a file does not say what was proposed"


def test_results_that_are_none(scenes: Path, tmp_path: Path) -> None:
    shared = ("--data", scenes, "--split", "scenes", "--output", tmp_path / "never")
    for content, said in (
        ("{", "is not JSON"),
        ("{}", "is not a list"),
        ('[{"image_id": 1}]', r"[0] lacks"),
        ('[{"image_id": 1000, "category_id": 1, "score": 1}]', "neither a bbox nor a segmentation"),
        ('[{"image_id": 1000, "category_id": 1, "score": 1, "segmentation": [[1, 2]]}]', "compressed run lengths"),
        ('[{"image_id": 5, "category_id": 1, "score": 1, "bbox": [1, 1, 2, 2]}]', "picture 5"),
    ):
        (tmp_path / "results.json").write_text(content)
        done = here("evaluate", "--results", tmp_path / "results.json", *shared, code=2)
        assert len(done.errors) == 1
        assert said in done.errors[0]
    # A picture that the file has, but not the part: without an unseen object.
    val = json.loads((scenes / "annotations" / "instances_val.json").read_text())
    ids = {row["name"]: row["id"] for row in val["categories"]}
    unseen = {ids[name] for name in scenes_split().unseen}
    shown = {row["image_id"] for row in val["annotations"] if row["category_id"] in unseen}
    box = next(row for row in val["annotations"] if row["image_id"] not in shown)
    row = {"image_id": box["image_id"], "category_id": box["category_id"], "bbox": box["bbox"], "score": 1.0}
    (tmp_path / "results.json").write_text(json.dumps([row]))
    said = here("evaluate", "--results", tmp_path / "results.json", *shared, code=2).errors[0]
    assert f"not among the {len(shown)} of {len(val['images'])} test pictures" in said
    assert "--all-pictures" in said
    all_of = ("--results", tmp_path / "results.json", *shared[:-1], tmp_path / "all", "--all-pictures", "--no-report")
    here("evaluate", *all_of)
    found = json.loads((tmp_path / "all" / "evaluation.json").read_text())
    assert found["pictures"] == len(val["images"])
    assert found["gzsi"]["box"]["seen"]["recall@0.5"] > 0
    assert "--all-pictures" in here("evaluate", "--all-pictures", code=2).errors[0]
    assert "missing.json" in here("evaluate", "--results", "missing.json", *shared, code=2).stderr
    assert not (tmp_path / "never").exists()


@pytest.mark.alone
def test_options_of_detection_take_effect(run: Path, tmp_path: Path) -> None:
    found, said_of = {}, {}
    file = run / "model" / "calibration.json"
    saved = file.read_text()
    file.unlink()
    for name, options in {
        "paper": ("--transfer", "paper", "--temperature", "1"),
        "plain": (),
        "refined": ("--refine", "mean"),
        "few": ("--kept", "3", "--validation-fraction", "0"),
    }.items():
        done = here("evaluate", "--checkpoint", run, "--output", tmp_path / name, "--no-report", "--controls", "0",
                    *options)  # fmt: skip
        found[name] = json.loads((tmp_path / name / "detections.json").read_text())
        said_of[name] = " ".join((done.stdout + done.stderr).split())
        assert file.exists() == (name != "paper"), "other rules' thresholds are of no use to predict"
    assert json.loads(file.read_text()) == json.loads(saved), "what the training chose, chosen again"
    assert ["thresholds: " in said_of[name] for name in found] == [False, True, False, False]
    chosen_on = json.loads(saved)["pictures"]
    assert sorted(chosen_on) == sorted(json.loads((run / "splits.json").read_text())["validation"]["pictures"])
    assert f"{len(chosen_on)} of these pictures are the run's own validation pictures" in said_of["few"]
    whole = json.loads((tmp_path / "few" / "evaluation.json").read_text())
    assert whole["calibration"] is None
    assert set(whole["named"]) == {"without a bias"}
    scores = {name: [row["score"] for row in rows] for name, rows in found.items()}
    assert scores["plain"] != scores["paper"] != scores["refined"] != scores["plain"]
    said = json.loads((tmp_path / "refined" / "evaluation.json").read_text())["other rules"]
    assert list(said) == ["the published code's transfer", "without refinement"]
    by_picture: dict[int, int] = {}
    for row in found["few"]:
        by_picture[row["image_id"]] = by_picture.get(row["image_id"], 0) + 1
    assert max(by_picture.values()) <= 6, "three of the seen and three of the unseen classes"
    biased = tmp_path / "biased"
    here("evaluate", "--checkpoint", run, "--output", biased, "--no-report", "--seen-bias", "0.3", "--kept", "5")
    plain = tmp_path / "unbiased"
    here("evaluate", "--checkpoint", run, "--output", plain, "--no-report", "--kept", "5")
    one, two = (json.loads((path / "evaluation.json").read_text()) for path in (biased, plain))
    assert one["bias"] == 0.3
    assert one["zsi"] == two["zsi"], "no seen class competes there"
    assert one["gzsi"] == two["gzsi"], "nor in what is cut apart"
    sweep = two["sweep"]["test"]
    assert sweep[0]["bias"] == 0
    assert sweep[0]["unseen"] == pytest.approx(two["one_list"]["box"]["unseen"]["ap@0.5"])
    at = next(line for line in sweep if line["bias"] == 0.3)
    assert at["seen"] == pytest.approx(one["one_list"]["box"]["seen"]["ap@0.5"])
    assert at["named unseen"] >= sweep[0]["named unseen"]


@pytest.mark.alone
def test_a_split_of_ones_own(run: Path, scenes: Path, tmp_path: Path) -> None:
    split = scenes_split()
    swapped = {"seen": [*split.seen[1:], split.unseen[0]], "unseen": [split.seen[0], *split.unseen[1:]]}
    (tmp_path / "mine.json").write_text(json.dumps(swapped))
    done = here("evaluate", "--checkpoint", run, "--split", tmp_path / "mine.json", "--data", scenes, "--output",
                tmp_path / "mine", "--no-report")  # fmt: skip
    found = json.loads((tmp_path / "mine" / "evaluation.json").read_text())
    assert [line["class"] for line in found["classes"]] == swapped["seen"] + swapped["unseen"]
    assert found["note"] == f"1 of the 8 classes called unseen here were seen in training: {split.seen[0]}"
    assert "note: 1 of the 8 classes" in " ".join((done.stdout + done.stderr).split())


def test_what_training_saw_of_unseen_classes(run: Path) -> None:
    loaded, split = load_detector(run), scenes_split()
    assert seen_before(loaded, split) == ""
    assert seen_before(loaded, replace(split, unseen=split.unseen[:2])) == ""
    for one, other, said in (
        (loaded, replace(split, unseen=(*split.unseen, "elf")), "may show, without labels, elf"),
        (loaded, replace(split, seen=split.seen[1:]), "saw other classes"),
        (replace(loaded, protocol="ov-coco"), split, "in the training pictures, without labels"),
    ):
        assert said in seen_before(one, other)


def test_a_class_that_the_run_knows_keeps_its_vector(run: Path) -> None:
    """Word for word, whatever its length: the rules for known classes find it by that."""
    loaded = load_detector(run)
    loaded = replace(loaded, vectors=replace(loaded.vectors, seen=loaded.vectors.seen * torch.rand(24, 1)))
    config = EvaluateConfig(words=WordOptions("attributes"))
    split, vectors = chosen_words(config, loaded, DataOptions(split="scenes"))
    assert split.classes == loaded.split.classes
    assert torch.equal(vectors.classes, loaded.vectors.classes)


def test_other_pictures_are_taken_by_the_runs_rule(tmp_path: Path) -> None:
    """Unless another is asked for, be it the usual one."""
    own = DataOptions(Path("coco"), split="scenes", protocol="ov-coco", validation_fraction=0.0, limit=7)
    config = complete(TrainConfig(own))
    (tmp_path / "config.yaml").write_text(config_to_yaml(config))
    other = DataOptions(Path("other"))
    for asked, expected in (
        (other, replace(own, data=other.data, limit=0)),
        (DataOptions(), own),
        (replace(other, protocol="zsi"), replace(own, data=other.data, limit=0, protocol="zsi")),
        (DataOptions(protocol="zsi"), replace(own, protocol="zsi")),
        (DataOptions(validation_fraction=0.3), replace(own, validation_fraction=0.3)),
    ):
        assert chosen_data(asked, tmp_path)[0] == expected
    (tmp_path / "config.yaml").unlink()
    found, _ = chosen_data(other, tmp_path)
    assert (found.split, found.protocol, found.validation_fraction) == ("48_17", "zsi", 0.3)


def test_predict(run: Path, tmp_path: Path) -> None:
    done = here("predict", "--checkpoint", run, "--score", "0", "--output", tmp_path / "usual")
    pictures = sorted((tmp_path / "usual").glob("*.png"))
    assert pictures
    assert len(done.stdout.splitlines()) == 5 * len(pictures) + 1
    found = json.loads((tmp_path / "usual" / "detections.json").read_text())
    assert {"picture", "class", "score", "bbox", "segmentation", "there"} == found[0].keys()
    assert {row["class"] for row in found} <= set(scenes_split().classes)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70), dtype=np.uint8)).save(tmp_path / "grey.png")
    # Words that the model has never been given: a texture with a shape in another order, a shape alone.
    here("predict", tmp_path / "grey.png", "--checkpoint", run, "--words", "circle striped, hearts", "--output",
         tmp_path / "words", "--most", "2")  # fmt: skip
    found = json.loads((tmp_path / "words" / "detections.json").read_text())
    assert {row["class"] for row in found} <= {"circle striped", "hearts"}
    assert all(row["segmentation"]["size"] == [50, 70] for row in found)
    (tmp_path / "bad.png").write_bytes(b"\x89PNG no more")
    for arguments, said in (
        (("--words", "zebra"), "zebra"),
        (("--words", " , "), "--words"),
        (("--words", "circle,circle"), "occurs twice"),
        (("--words", "striped circle,Striped-Circle"), "occurs twice, also as Striped-Circle"),
        (("--words", "stripy circle"), "the run knows striped circle"),
        ((tmp_path / "bad.png",), "bad.png"),
        ((tmp_path / "none.png",), "none.png"),
        (("--checkpoint", tmp_path), "no trained model"),
        (("--most", "0"), "--most"),
    ):
        given = ("--checkpoint", run, *arguments) if "--checkpoint" not in arguments else arguments
        done = here("predict", *given, "--output", tmp_path / "never", code=2)
        assert len(done.errors) == 1
        assert said in done.errors[0]
    assert not (tmp_path / "never").exists()


def test_words_are_there_or_not(run: Path, tmp_path: Path) -> None:
    """By the thresholds of the run's validation pictures, which its own test pictures were measured with."""
    calibration = json.loads((run / "model" / "calibration.json").read_text())
    test = json.loads((run / "results.json").read_text())["test"]
    assert test["calibration"] == calibration | {"pictures": []}
    bias = calibration["seen_bias"]
    validation, swept = test["sweep"]["validation"], {line["bias"]: line for line in test["sweep"]["test"]}
    most = max(line["named harmonic mean"] for line in validation)
    assert next(line["bias"] for line in validation if line["named harmonic mean"] == most) == (bias or 0)
    assert test["named"]["without a bias"] == swept[0.0]
    assert bias is None or test["named"]["with validation's bias"] == swept[bias]
    file = run / "model" / "calibration.json"
    calibration["thresholds"] = {"seen": 0.1, "unseen": 1.0}
    kept = file.read_text()
    file.write_text(json.dumps(calibration))
    words = "STRIPED circle,hearts," + scenes_split().unseen[0]
    shared = ("predict", "--checkpoint", run, "--words", words, "--most", "2")
    try:
        done = here(*shared, "--output", tmp_path / "words")
        Image.new("RGB", (48, 48)).save(tmp_path / "grey.png")
        other = here(*shared, tmp_path / "grey.png", "--temperature", "2", "--output", tmp_path / "other")
    finally:
        file.write_text(kept)
    assert "no thresholds for these options" in other.stderr
    rows = json.loads((tmp_path / "words" / "detections.json").read_text())
    assert {row["class"] for row in rows} <= {"striped circle", "hearts", scenes_split().unseen[0]}, "the run's names"
    assert all(row["there"] == (row["class"] == "striped circle" and row["score"] >= 0.1) for row in rows)
    lines = [line.split("\t") for line in done.stdout.splitlines() if "\t" in line]
    absent = [line for line in lines if line[3] == "not there"]
    pictures = len(list((tmp_path / "words").glob("*.png")))
    assert sum(line[1] == "hearts" for line in absent) == sum(line[1] == scenes_split().unseen[0] for line in absent)
    assert sum(line[1] == "hearts" for line in absent) == pictures
    assert all(
        ("nearest known class: " in line[-1] and "heart (" in line[-1]) == (line[1] == "hearts") for line in absent
    )


def test_a_word_scores_what_it_does_in_an_evaluation(run: Path) -> None:
    """Whatever is asked for beside it, also where classes compete: a new word does with the run's unseen ones alone."""
    loaded = load_detector(run)
    asked = dict(zip(loaded.split.classes, loaded.vectors.classes, strict=True))
    new = {name: asked[like] * 0.9 for name, like in zip(("elf", "orc"), loaded.split.unseen, strict=False)}
    some = {name: asked[name] for name in (loaded.split.seen[3], loaded.split.unseen[2])} | new
    picture = torch.rand(3, 48, 60, generator=torch.Generator().manual_seed(0))
    detection = replace(loaded.detection, transfer="direct")
    loaded.model.regions.keep(0.0, 1.0, 10_000)
    queries = [query_of(loaded.vectors, detection, masks=False), words_query(some, loaded, detection)]
    queries.append(words_query({"elf": new["elf"]}, loaded, detection))
    more = replace(loaded.vectors, unseen=torch.cat([loaded.vectors.unseen, new["elf"][None]]))
    queries.append(query_of(more, detection, masks=False))
    (whole,), (part,), (alone,), (with_it,) = loaded.model.detect([picture], queries)
    elf = part.scores[part.classes == 2]
    assert len(elf)
    torch.testing.assert_close(elf, alone.scores)
    torch.testing.assert_close(elf, with_it.scores[with_it.classes == len(asked)])
    for place, name in list(enumerate(some))[:2]:
        expected = whole.scores[whole.classes == list(asked).index(name)].sort().values
        assert len(expected)
        torch.testing.assert_close(part.scores[part.classes == place].sort().values, expected)


def test_every_word_asked_for_is_drawn_and_the_bias_ranks() -> None:
    rows = [{"category_id": name, "score": score, "there": score > 0.2}
            for name, score in (*(("person", 0.9 - place / 100) for place in range(6)), ("zebra", 0.3), ("elf", 0.1))]  # fmt: skip

    def drawn(most: int, bias: float, each: bool) -> list[str]:
        return [row["category_id"] for row in chosen_results(rows, most, ("person",), bias, each)]

    assert drawn(5, 0.0, each=True) == ["person"] * 5 + ["zebra"]
    assert drawn(5, 0.0, each=False) == ["person"] * 5
    assert drawn(2, 0.7, each=True) == ["zebra", "person"]


def test_thresholds_that_a_run_lacks_are_said(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = load_detector(run)
    names = (loaded.split.seen[0], "elf")
    chosen = Calibration(None, {"seen": 0.4}, rules_of(loaded.detection))
    loaded = replace(loaded, calibration=chosen)
    assert thresholds_of(PredictConfig(), loaded, loaded.detection, names) == {names[0]: 0.4, "elf": 0.0}
    assert "no thresholds for these options and unseen words" in " ".join("".join(capsys.readouterr()).split())
    assert thresholds_of(PredictConfig(), loaded, loaded.detection, names[:1]) == {names[0]: 0.4}
    assert "thresholds" not in "".join(capsys.readouterr())


def test_the_nearest_seen_class_scores_what_it_does_among_all(run: Path) -> None:
    """Also where two unseen classes are nearest to one, under a rule by which classes compete."""
    loaded = load_detector(run)
    seen = loaded.vectors.seen
    vectors = replace(loaded.vectors, unseen=torch.stack([seen[4], seen[4], seen[1]]) * 1.1)
    detection = replace(loaded.detection, transfer="direct")
    query, rows = nearest_seen_query(vectors, detection)
    assert rows == [1, 1, 0]
    loaded.model.regions.keep(0.0, 1.0, 10_000)
    picture = torch.rand(3, 48, 60, generator=torch.Generator().manual_seed(0))
    (whole,), (part,) = loaded.model.detect([picture], [query_of(loaded.vectors, detection, masks=False), query])
    for row, place in enumerate((1, 4)):
        expected = whole.scores[whole.classes == place]
        assert len(expected)
        torch.testing.assert_close(part.scores[part.classes == row], expected)
    found = [{"image_id": 1, "category_id": row, "score": score} for row, score in ((1, 0.9), (0, 0.8), (1, 0.7))]
    named = [(row["category_id"], row["score"]) for row in renamed(found, [70, 80, 90], rows, 4)]
    assert named == [(70, 0.9), (80, 0.9), (90, 0.8), (70, 0.7)]


def test_a_usual_value_that_is_given_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trained = DetectionOptions(transfer="things", temperature=4.0, refine="mean", kept=7, seen_bias=0.2)
    said: list[DetectionOptions] = []

    def evaluate(config: EvaluateConfig) -> None:
        said.append(changed(trained, config.detection, given(config)))
        said.append(changed(trained, EvaluateConfig().detection, given(EvaluateConfig())))

    monkeypatch.setattr("zsi_contrastive.detector.evaluate.evaluate", evaluate)
    here("evaluate", "--refine", "none", "--kept=100", "--transfer", "auto", "--temperature", "0")
    assert said == [replace(trained, refine="none", kept=100), trained]
    (tmp_path / "config.yaml").write_text(config_to_yaml(complete(TrainConfig(DataOptions(limit=7)))))
    assert chosen_data(DataOptions(), tmp_path, "", {"limit"})[0].limit == 0
    assert not patient(tmp_path)
    waiting = TrainConfig(training=DetectorTrainingOptions(patience=3))
    (tmp_path / "config.yaml").write_text(config_to_yaml(waiting))
    assert patient(tmp_path)


@pytest.mark.alone
def test_predict_with_words_of_a_file(scenes: Path, tmp_path: Path) -> None:
    """A model that knows a matrix takes new words from the file that the matrix was made of, and from no other."""
    split, generator = scenes_split(), np.random.default_rng(0)
    rows = {name.replace(" ", "_"): generator.normal(size=8) for name in (*split.classes, "zebra")}
    lines = "".join(f"{name} {' '.join(f'{value:.5f}' for value in row)}\n" for name, row in rows.items())
    (tmp_path / "glove.txt").write_text(lines)
    other = "".join(f"{name} {' '.join(f'{value:.5f}' for value in row[::-1])}\n" for name, row in rows.items())
    (tmp_path / "other.txt").write_text(other)
    written = here("words", "--split", "scenes", "--word-vectors", tmp_path / "glove.txt", "--write",
                   tmp_path / "matrix.txt")  # fmt: skip
    assert "1  striped circle: like" in written.stdout
    assert np.loadtxt(tmp_path / "matrix.txt", delimiter=",").shape == (8, 33)
    tags = tmp_path / "tags.txt"
    np.savetxt(tags, generator.normal(size=(8, 20)), delimiter=",")
    run = tmp_path / "run"
    here("train", "--data", scenes, *SMALL, "--word-vectors", tmp_path / "matrix.txt", "--vocabulary", tags,
         "--max-steps", "2", "--no-report", "--output", run)  # fmt: skip
    assert load_detector(run).model.regions.box_head.words.shape == (20, 8)
    shared = ("predict", "--checkpoint", run, "--output", tmp_path / "out", "--words", "zebra")
    assert "matrix without words" in here(*shared, code=2).stderr
    assert "another vector" in here(*shared, "--word-vectors", tmp_path / "other.txt", code=2).stderr
    here(*shared, "--word-vectors", tmp_path / "glove.txt")
    assert list((tmp_path / "out").glob("*.png"))


@pytest.mark.alone
def test_prepare(scenes: Path, tmp_path: Path) -> None:
    done = here("prepare", "--data", scenes, "--split", "scenes", "--output", tmp_path / "parts")
    assert "no training picture has an unseen object" in done.stdout
    counts = json.loads((tmp_path / "parts" / "counts.json").read_text())["counts"]
    train = json.loads((tmp_path / "parts" / "train_seen.json").read_text())
    assert counts["training, seen"] == {"pictures": len(train["images"]), "objects": len(train["annotations"]),
                                        "crowds": 0}  # fmt: skip
    assert [row["name"] for row in train["categories"]] == list(scenes_split().seen)
    whole = json.loads((scenes / "annotations" / "instances_train.json").read_text())
    names = {row["id"]: row["name"] for row in whole["categories"]}
    shown: dict[int, set[str]] = {}
    for row in whole["annotations"]:
        shown.setdefault(row["image_id"], set()).add(names[row["category_id"]])
    kept = {row["id"] for row in train["images"]}
    assert kept == {number for number, seen in shown.items() if not seen & set(scenes_split().unseen)}
    assert len(kept) < len(shown), "the rule had something to do"
    assert "exists already" in here("prepare", "--data", scenes, "--output", tmp_path / "parts", code=2).stderr
    # What was written trains as the whole file does.
    for name, more in {"whole": (), "part": ("--train-annotations", tmp_path / "parts" / "train_seen.json")}.items():
        here("train", "--data", scenes, *SMALL, "--max-steps", "1", "--no-report", "--output", tmp_path / name, *more)
    one, two = (load_detector(tmp_path / name).model.state_dict() for name in ("whole", "part"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_words_says_which_column_is_which(coco_vectors: Path) -> None:
    done = here("words", "--split", "48_17", "--word-vectors", coco_vectors / "word_w2v_withbg_48_17.txt")
    lines = done.stdout.splitlines()
    assert "    64  cat (unseen): like dog 0.76" in done.stdout
    assert len(lines) == 1 + 66 + 1
    assert "fit the names" in lines[-1]
    done = here("words", "--split", "65_15", "--word-vectors", coco_vectors / "word_w2v_withbg_48_17.txt", code=2)
    assert "needs 81" in done.errors[0]


def test_variants_add_one_part_each() -> None:
    rows = list(VARIANTS)[: len(PARTS) + 1]
    models = [plan(AblateConfig(rows=row))[row].model for row in rows]
    parts = [[getattr(one, name) for name in PARTS] for one in models]
    assert [sum(row) for row in parts] == [0, 1, 2, 3, 4, 5]
    assert all(after[place] or not before[place] for before, after in pairwise(parts) for place in range(5))
    assert all(one.decoders for one in models), "the switch for both decoders switches none off"


def test_contrastive_heads_by_either_name(tmp_path: Path) -> None:
    """The switches of before, alone or in a file, ask for what --contrastive asks for."""
    (tmp_path / "before.yaml").write_text("model: {greedy_infomax: true, patch_infonce: false}\n")
    new, old, file = (
        complete(parse(TrainConfig, "train", arguments))
        for arguments in (
            ["--contrastive", "greedy_infomax"],
            ["--greedy-infomax"],
            ["--config", str(tmp_path / "before.yaml")],
        )
    )
    assert new.model == old.model == file.model == complete(new).model
    assert contrastive_of(new.model) == ("greedy_infomax",)
    saved = tmp_path / "saved.yaml"
    saved.write_text(config_to_yaml(new))
    out = complete(parse(TrainConfig, "train", ["--config", str(saved), "--no-greedy-infomax"]))
    assert contrastive_of(out.model) == (), "a flag takes the head out of a run's own config"
    assert plan(AblateConfig(rows="greedy-infomax"))["greedy-infomax"].model == new.model
    assert set(contrastive_of(plan(AblateConfig(rows="both"))["both"].model)) == set(CONTRASTIVE)
    given = AblateConfig(
        "patch-infonce", model=ModelOptions(greedy_infomax=True, greedy_weights=Path("weights.safetensors"))
    )
    without = plan(given)["patch-infonce"].model
    assert contrastive_of(without) == ("patch_infonce",)
    assert without.greedy_weights is None
    assert {row.replace("-", "_") for row in AblateConfig().rows.split(",")} >= set(CONTRASTIVE)


def test_weights_of_contrastive_losses() -> None:
    training = DetectorTrainingOptions(contrastive_share=0.3, greedy_share=0.0)
    assert contrastive_share(training, "greedy_infomax", 0.2) == 0, "it has an option of its own"
    assert contrastive_share(training, "patch_infonce", 0.2) == 0.1
    assert contrastive_share(training, "another", 0.2) == 0.3
    assert contrastive_share(DetectorTrainingOptions(), "another", 0.2) == 0.2


@pytest.mark.long
def test_ablate(scenes: Path, tmp_path: Path) -> None:
    shared = ("--data", scenes, *SMALL[:-2], "--max-steps", "1", "--limit", "4", "--output", tmp_path / "rows")
    here("ablate", *shared, "--rows", "detector,sync-background")
    rows = json.loads((tmp_path / "rows" / "comparison.json").read_text())["rows"]
    assert [row["variant"] for row in rows] == ["detector", "sync-background"]
    assert "ZSI mask AP 0.5" not in rows[0]
    assert "ZSI mask AP 0.5" in rows[1]
    assert "+ synchronised background" in (tmp_path / "rows" / "report.html").read_text(encoding="utf-8")
    stamp = (tmp_path / "rows" / "detector" / "seed-0" / "results.json").stat().st_mtime_ns
    here("ablate", *shared, "--rows", "detector,sync-background")
    assert (tmp_path / "rows" / "detector" / "seed-0" / "results.json").stat().st_mtime_ns == stamp
    assert "no such variant" in here("ablate", *shared, "--rows", "everything", code=2).stderr
