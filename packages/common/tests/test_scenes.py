import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from labs_common.scenes.captions import GRAMMAR, captions, claims_of
from labs_common.scenes.files import TASKS, captioned_scenes, read_truth, write_coco, write_flickr8k, write_parquet
from labs_common.scenes.world import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    TEXTURES,
    Scene,
    Thing,
    picture,
    random_scene,
    scene_generator,
)

NUMBERS = ["no", "one", "two", "three", "four", "five", "six"]
LOOK = (
    r"an? (?:(?P<size{0}>small|large) )?(?:(?P<texture{0}>striped|dotted|checked) )?(?P<colour{0}>"
    + "|".join(COLOURS) + r") (?P<shape{0}>" + "|".join(SHAPES) + ")"
)  # fmt: skip
PLACES = {
    "in the middle": (0, 0), "on the left": (-1, 0), "on the right": (1, 0), "at the top": (0, -1),
    "at the bottom": (0, 1), "in the upper left corner": (-1, -1), "in the upper right corner": (1, -1),
    "in the lower left corner": (-1, 1), "in the lower right corner": (1, 1),
}  # fmt: skip


def fitting(scene: Scene, match: re.Match[str], number: str = "") -> list[Thing]:
    """The things that a description in a sentence fits."""
    said = {name: match.groupdict().get(name + number) for name in ("size", "texture", "colour", "shape")}
    return [
        thing
        for thing in scene.things
        if all(value is None or getattr(thing, name) == value for name, value in said.items())
    ]


def third(value: float) -> int:
    return -1 if value < 0.38 else 1 if value > 0.62 else 0


def is_true(sentence: str, scene: Scene) -> bool:
    """Reads a sentence as a stranger would, and looks at the scene; a form it does not know is an error."""
    look = LOOK.format("")
    ground = f" on a (?P<ground>{'|'.join(BACKGROUNDS)}) background"
    if match := re.fullmatch(
        f"{LOOK.format(1)} (to the left of|to the right of|above|below) {LOOK.format(2)}", sentence
    ):
        word = next(word for word in (" left ", " right ", " above ", " below ") if word in sentence).strip()
        holds = {
            "left": lambda a, b: a.x < b.x, "right": lambda a, b: a.x > b.x,
            "above": lambda a, b: a.y < b.y, "below": lambda a, b: a.y > b.y,
        }[word]  # fmt: skip
        return any(holds(a, b) for a in fitting(scene, match, "1") for b in fitting(scene, match, "2"))
    if match := re.fullmatch(f"there is {look}{ground}", sentence):
        return bool(fitting(scene, match)) and match["ground"] == scene.background
    if match := re.fullmatch(f"{look} in the picture", sentence):
        return bool(fitting(scene, match))
    if match := re.fullmatch(rf"(?:a picture with )?{look} ({'|'.join(PLACES)})", sentence):
        where = PLACES[next(place for place in PLACES if sentence.endswith(place))]
        return any((third(thing.x), third(thing.y)) == where for thing in fitting(scene, match))
    if match := re.fullmatch(r"an? (?P<shape>\w+) that is (?P<colour>\w+) and (?P<texture>\w+)", sentence):
        assert match["texture"] in TEXTURES
        return bool(fitting(scene, match))
    parts = re.split(", | and ", re.sub(f"{ground}$", "", sentence))
    if all(re.fullmatch(rf"({'|'.join(NUMBERS)}) \w+", part) for part in parts):
        said = {re.sub("(?<=s)es$|(?<!s)s$", "", part.split()[1]): NUMBERS.index(part.split()[0]) for part in parts}
        return said == {shape: sum(t.shape == shape for t in scene.things) for shape in {t.shape for t in scene.things}}
    matches = [re.fullmatch(look, part) for part in parts]
    assert all(matches), f"a form that nobody knows: {sentence}"
    ending = re.search(ground, sentence)
    assert ending
    named = sorted((match["colour"], match["shape"]) for match in matches if match)
    return named == sorted((t.colour, t.shape) for t in scene.things) and ending["ground"] == scene.background


def test_captions_are_five_and_true() -> None:
    forms = set()
    for _, scene, sentences in captioned_scenes(seed=3, numbers=range(400)):
        assert len(set(sentences)) == 5
        for sentence in sentences:
            assert is_true(sentence, scene), (sentence, scene)
            forms.add(re.sub("|".join([*COLOURS, *SHAPES, *TEXTURES, "small ", "large "]), "", sentence))
    assert len(forms) > 100


def test_the_reader_of_sentences_refuses_false_ones() -> None:
    thing = Thing("star", "red", "striped", 0.2, 0.2, 0.1, 0.0)
    scene = Scene((thing, Thing("moon", "blue", "plain", 0.8, 0.3, 0.1, 0.0)), "teal", (1, 1, 1, 1), 5, 0, 3)
    assert is_true("a striped red star to the left of a blue moon", scene)
    for wrong in (
        "a striped red star to the right of a blue moon", "a red moon in the picture", "two stars and one moon",
        "a blue moon and a red star on a grey background", "a star that is red and plain",
    ):  # fmt: skip
        assert not is_true(wrong, scene), wrong


def test_same_seed_and_index_same_picture_and_words() -> None:
    def made(index: int) -> tuple[bytes, list[str]]:
        generator = scene_generator(7, index)
        scene = random_scene(generator)
        return picture(scene).tobytes(), captions(scene, generator)

    forward, backward = [made(index) for index in range(6)], [made(index) for index in reversed(range(6))]
    assert forward == backward[::-1]
    assert len({content for content, _ in forward}) == 6
    assert random_scene(scene_generator(8, 0)) != random_scene(scene_generator(7, 0))


@pytest.mark.alone
def test_labels_are_true_and_every_class_occurs() -> None:
    def answer(task: str, scene: Scene) -> str:
        largest = max(scene.things, key=lambda thing: thing.radius)
        return {
            "shape": lambda: largest.shape,
            "texture": lambda: largest.texture,
            "count": lambda: str(len(scene.things)),
            "look": lambda: "".join({f"{thing.texture} {thing.colour}" for thing in scene.things}),
            "striped-colour": lambda: next(thing.colour for thing in scene.things if thing.texture == "striped"),
        }[task]()

    for name, task in TASKS.items():
        drawn = [task.sample(scene_generator(1, index)) for index in range(50 * len(task.classes))]
        assert all(task.classes[label] == answer(name, scene) for scene, label in drawn)
        counts = np.bincount([label for _, label in drawn], minlength=len(task.classes))
        assert counts.min() > 25


def test_flickr8k_in_both_published_forms(tmp_path: Path) -> None:
    write_flickr8k(tmp_path, range(10, 14), seed=2)
    rows = list(csv.DictReader((tmp_path / "captions.txt").open(encoding="utf-8")))
    tokens = (tmp_path / "Flickr8k.token.txt").read_text("utf-8").splitlines()
    assert [f"{row['image']}#{place % 5}\t{row['caption']}" for place, row in enumerate(rows)] == tokens
    assert len(tokens) == 20
    assert {row["image"] for row in rows} == {file.name for file in (tmp_path / "Images").iterdir()}
    assert Image.open(tmp_path / "Images" / rows[0]["image"]).size == (64, 64)
    drawn = {f"scene_{number:06d}.jpg": scene for number, scene, _ in captioned_scenes(2, range(10, 14))}
    assert read_truth(tmp_path) == drawn
    assert read_truth(tmp_path / "Images") == {}


def test_parquet_is_read_by_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    write_parquet(tmp_path / "set", "texture", {"train": range(5), "test": range(5, 8)}, side=32)
    read = datasets.load_dataset("parquet", data_dir=str(tmp_path / "set"), cache_dir=str(tmp_path / "cache"))
    assert {name: len(split) for name, split in read.items()} == {"train": 5, "test": 3}
    assert read["train"].features["label"].names == list(TEXTURES)
    scene, label = TASKS["texture"].sample(scene_generator(0, 6))
    assert read["test"][1]["label"] == label
    assert read["test"][1]["img"].tobytes() == picture(scene, 32).tobytes()


def test_coco_masks_are_what_is_seen(tmp_path: Path) -> None:
    tools = pytest.importorskip("pycocotools.coco")
    write_coco(tmp_path, {"train2017": range(60)}, side=96)
    coco = tools.COCO(str(tmp_path / "annotations" / "instances_train2017.json"))
    assert [kind["name"] for kind in coco.loadCats(coco.getCatIds())] == list(SHAPES)
    partly = 0
    for image in coco.dataset["images"]:
        scene = random_scene(scene_generator(0, image["id"]))
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=image["id"]))
        assert len(annotations) == len(scene.things)
        masks = np.stack([coco.annToMask(annotation) for annotation in annotations])
        for thing, annotation, mask in zip(scene.things, annotations, masks, strict=True):
            assert annotation["area"] == pytest.approx(mask.sum(), rel=0.12, abs=8)
            ys, xs = np.nonzero(mask)
            left, top, width, height = annotation["bbox"]
            box = [left, top, left + width, top + height]  # a sharp tip covers less than a pixel
            assert np.abs(np.subtract(box, [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])).max() < 4
            assert annotation["attributes"]["colour"] == thing.colour
            # What a thing shows is mostly of its colour: the mask lies where the drawing put it.
            drawn = np.asarray(picture(scene, 96), dtype=float)[mask.astype(bool)].mean(0)
            distance = {name: float(np.linalg.norm(_hue(drawn) - _hue(rgb))) for name, rgb in COLOURS.items()}
            assert distance[thing.colour] <= sorted(distance.values())[2]
            outline = thing.outline(96)
            partly += annotation["area"] < 0.97 * _area(outline)
        assert (masks.sum(0) > 1).mean() < 0.01  # nothing is seen twice, edges apart
    assert partly > 5
    sentences = json.loads((tmp_path / "annotations" / "captions_train2017.json").read_text())["annotations"]
    assert len(sentences) == 300


def test_every_caption_is_right_of_its_own_scene() -> None:
    for _, scene, sentences in captioned_scenes(3, range(300)):
        for sentence in sentences:
            for said in (sentence, sentence.replace(",", ""), sentence.capitalize() + "."):
                claims = claims_of(said, scene)
                assert claims
                assert all(claim.right for claim in claims), (said, claims)


def test_of_other_scenes_it_agrees_with_an_independent_reader() -> None:
    scenes = [(scene, sentences) for _, scene, sentences in captioned_scenes(4, range(300))]
    agreed = {True: 0, False: 0}
    for (scene, _), (_, sentences) in zip(scenes, [*scenes[1:], scenes[0]], strict=True):
        for sentence in sentences:
            claims = claims_of(sentence, scene)
            true = is_true(sentence, scene)
            if true:  # there, "to the left" need not be clearly so
                assert all(claim.right for claim in claims if claim.kind != "relations"), (sentence, claims)
            elif sentence.startswith("there is") or " that is " in sentence or sentence.endswith(" picture"):
                # Lists and counts that leave something out are wrong there, and not here.
                assert not all(claim.right for claim in claims), (sentence, claims)
            agreed[true] += 1
    assert min(agreed.values()) > 5


@pytest.mark.parametrize("sentence", ["", "a red", "red star a", "a dog on a beach", "one stars", "a star and a moon"])
def test_what_is_no_sentence_of_the_grammar(sentence: str) -> None:
    _, scene, _ = next(captioned_scenes(0, [0]))
    (claim,) = claims_of(sentence, scene)
    assert (claim.kind, claim.right) == (GRAMMAR, False)


def test_each_claim_stands_for_itself() -> None:
    _, scene, _ = next(captioned_scenes(0, [0]))
    thing = scene.things[0]
    colour = next(c for c in ("red", "green", "blue", "white") if c not in {t.colour for t in scene.things})
    claims = claims_of(f"there is a {colour} {thing.shape} on a {scene.background} background", scene)
    assert [(claim.kind, claim.right) for claim in claims] == [
        ("objects", True), ("colours", False), ("background", True),
    ]  # fmt: skip


def _hue(rgb: object) -> np.ndarray:
    values = np.asarray(rgb, dtype=float)
    return values / np.linalg.norm(values)


def _area(corners: np.ndarray) -> float:
    x, y = corners.T
    return abs(float(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1)))) / 2
