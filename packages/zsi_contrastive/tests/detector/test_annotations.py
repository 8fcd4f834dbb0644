"""Splits, the rule that makes zero-shot parts, and odd annotations and pictures."""

import json
import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faster_coco_eval.core import mask as rle
from PIL import Image

from labs_common.errors import LabError
from zsi_contrastive.detector import annotations
from zsi_contrastive.detector.annotations import (
    Instances,
    Split,
    check_parts,
    coco_groups,
    read_instances,
    read_split,
    scenes_split,
    zero_shot_parts,
)
from zsi_contrastive.detector.pictures import found_pictures, instance_pictures, mask_of
from zsi_contrastive.detector.prepare import write_part
from zsi_contrastive.detector.table import StoredRows, is_run_lengths

pytestmark = pytest.mark.quick

COCO = [name for names in coco_groups().values() for name in names]
SPLIT = Split("mine", ("cat", "dog"), ("elf",))
IDS = {"cat": 3, "dog": 17, "elf": 90, "tree": 44}  # with gaps
SQUARE = [2.0, 2.0, 10.0, 2.0, 10.0, 8.0, 2.0, 8.0]


def annotation(image: int, name: str, **more: Any) -> dict[str, Any]:
    usual = {"image_id": image, "category_id": IDS[name], "bbox": [2, 2, 8, 6], "segmentation": [SQUARE], "iscrowd": 0}
    return usual | more


def file_of(folder: Path, rows: list[dict[str, Any]], **more: Any) -> Path:
    content = {
        "images": [{"id": n, "file_name": f"{n}.jpg", "width": 20, "height": 16} for n in range(6)],
        "annotations": rows,
        "categories": [{"id": number, "name": name} for name, number in IDS.items()],
    } | more
    path = folder / "annotations.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(("name", "seen", "unseen"), [("48_17", 48, 17), ("65_15", 65, 15)])
def test_published_splits(name: str, seen: int, unseen: int) -> None:
    split = read_split(name)
    assert (len(split.seen), len(split.unseen)) == (seen, unseen)
    assert len(set(split.classes)) == seen + unseen
    assert set(split.classes) <= set(COCO)
    assert len(COCO) == len(set(COCO)) == 80


def test_every_texture_and_shape_of_an_unseen_pairing_is_seen() -> None:
    split = scenes_split()
    assert (len(split.seen), len(split.unseen)) == (24, 8)
    words = {word for name in split.seen for word in name.split()}
    assert all(set(name.split()) <= words for name in split.unseen)


def test_splits_from_files(tmp_path: Path) -> None:
    file = tmp_path / "my_72_8.json"
    file.write_text(json.dumps({"seen": COCO[:72], "unseen": COCO[72:]}))
    split = read_split(str(file))
    assert (split.name, len(split.seen), len(split.unseen)) == ("my_72_8", 72, 8)
    for content, said in (
        ("{", "is not JSON"),
        ('{"seen": ["a"]}', "unseen"),
        ('{"seen": ["a"], "unseen": []}', "none of them empty"),
        ('{"seen": ["a", "b"], "unseen": ["a"]}', "names a twice"),
        ('{"seen": [1], "unseen": ["a"]}', "names of classes"),
    ):
        file.write_text(content)
        with pytest.raises(LabError, match=said):
            read_split(str(file))
    with pytest.raises(LabError, match="no such file"):
        read_split("49_16")


def test_the_rule(tmp_path: Path) -> None:
    crowd = {"iscrowd": 1, "segmentation": {"size": [16, 20], "counts": [0, 20, 300]}}
    rows = [
        annotation(0, "cat"), annotation(0, "tree"),
        annotation(1, "cat"), annotation(1, "elf"),
        annotation(2, "dog"), annotation(2, "elf", **crowd),
        annotation(3, "dog", **crowd),
        annotation(4, "tree"),
        annotation(5, "cat"), annotation(5, "elf", bbox=[1, 1, 0, 5]),
    ]  # fmt: skip
    whole = read_instances(file_of(tmp_path, rows))
    other = Instances("other", whole.categories, [{**row, "file_name": f"t{row['id']}"} for row in whole.images],
                      whole.annotations)  # fmt: skip
    parts = zero_shot_parts(whole, other, SPLIT)
    # 1 has an elf, 2 a crowd of them, 5 one that cannot be used; 3 only a crowd of dogs, 4 nothing seen.
    assert [row["id"] for row in parts.train.images] == [0]
    assert [row["category_id"] for row in parts.train.annotations] == [3]
    assert [row["id"] for row in parts.both.images] == [1, 2]
    assert [row["id"] for row in parts.unseen.images] == [1, 2]
    assert Counter(row["category_id"] for row in parts.both.annotations) == {3: 1, 90: 2, 17: 1}
    assert {row["category_id"] for row in parts.unseen.annotations} == {90}
    assert parts.counts() == [("training, seen", 1, 1, 0), ("test, unseen", 2, 1, 1), ("test, both", 2, 3, 1)]
    assert whole.left_out == {"box without area": 1}
    # The check looks by itself: parts that broke the rule would be found out.
    bad = Instances("bad", whole.categories, whole.images[:2], whole.annotations)
    with pytest.raises(LabError, match=r"training picture 1\.jpg has an unseen object"):
        check_parts(type(parts)(SPLIT, bad, parts.unseen, parts.both), whole)
    with pytest.raises(LabError, match="is a training picture too"):
        check_parts(type(parts)(SPLIT, Instances("x", [], other.images[1:2], []), parts.unseen, parts.both),
                    Instances("x", whole.categories, other.images, []))  # fmt: skip


def test_the_rule_of_open_vocabulary_detection(tmp_path: Path) -> None:
    """Unseen objects stay in training pictures without labels; every picture with a known class is tested."""
    rows = [
        annotation(0, "cat"),
        annotation(0, "elf"),
        annotation(1, "elf"),
        annotation(2, "dog"),
        annotation(3, "tree"),
    ]
    whole = read_instances(file_of(tmp_path, rows))
    other = replace(whole, images=[{**row, "file_name": f"t{row['id']}"} for row in whole.images])
    parts = zero_shot_parts(whole, other, SPLIT, "ov-coco")
    assert [row["id"] for row in parts.train.images] == [0, 2], "the picture of an elf alone teaches nothing"
    assert {row["category_id"] for row in parts.train.annotations} == {IDS["cat"], IDS["dog"]}
    assert [row["id"] for row in parts.both.images] == [0, 1, 2]
    assert {row["category_id"] for row in parts.both.annotations} == {IDS["cat"], IDS["dog"], IDS["elf"]}
    assert [row["id"] for row in zero_shot_parts(whole, other, SPLIT).train.images] == [2]
    with pytest.raises(LabError, match="is a training picture too"):
        zero_shot_parts(whole, whole, SPLIT, "ov-coco")
    # The same picture in another year of COCO.
    old = replace(whole, images=[{**row, "file_name": f"COCO_val2014_{row['file_name']}"} for row in whole.images])
    for train, test in ((whole, old), (old, whole)):
        with pytest.raises(LabError, match=r"0\.jpg is a training picture too"):
            zero_shot_parts(train, test, SPLIT, "ov-coco")


@pytest.mark.parametrize("name", ["48_17", "65_15"])
def test_the_rule_on_real_pictures(name: str, coco: Path) -> None:
    split = read_split(name)
    train, test = (read_instances(coco / "annotations" / f"instances_{which}2017.json") for which in ("train", "val"))
    parts = zero_shot_parts(train, test, split)
    names = {row["id"]: row["name"] for row in train.categories}
    shown: dict[int, set[str]] = {row["id"]: set() for row in train.images}
    for row in train.annotations:
        shown[row["image_id"]].add(names[row["category_id"]])
    expected = {number for number, seen in shown.items() if seen & set(split.seen) and not seen & set(split.unseen)}
    assert {row["id"] for row in parts.train.images} == expected
    assert expected
    assert 0 < len(parts.unseen.images) < len(test.images)


def test_faults_of_files(tmp_path: Path) -> None:
    for rows, more, said in (
        ([], {"images": "none"}, "no list of images"),
        ([{"image_id": 0}], {}, r"annotations\[0\] lacks bbox, category_id"),
        ([annotation(9, "cat")], {}, "unknown picture 9"),
        ([annotation(0, "cat", category_id=4)], {}, "unknown category 4"),
        ([], {"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}, "two categories have the id 1"),
        ([], {"categories": [{"id": 1, "name": "a"}, {"id": 9, "name": "a"}]}, "two categories have the name a"),
    ):
        with pytest.raises(LabError, match=said):
            read_instances(file_of(tmp_path, rows, **more))
    (tmp_path / "annotations.json").write_text("[]")
    with pytest.raises(LabError, match="no list of categories"):
        read_instances(tmp_path / "annotations.json")
    with pytest.raises(LabError, match="cannot be read"):
        read_instances(tmp_path / "nowhere.json")
    whole = read_instances(file_of(tmp_path, [annotation(0, "cat")]))
    with pytest.raises(LabError, match="no category unicorn"):
        zero_shot_parts(whole, whole, Split("x", ("unicorn",), ("elf",)))
    with pytest.raises(LabError, match="no picture has an unseen object"):
        zero_shot_parts(whole, whole, SPLIT)


def test_what_cannot_be_used_is_counted(tmp_path: Path) -> None:
    rows = [
        annotation(0, "cat"),
        annotation(0, "cat", bbox=[1, 1, float("inf"), 2]),
        annotation(0, "cat", bbox=[1, 1, 5]),
        annotation(0, "cat", segmentation=[[1, 1, 2, 2]]),
        annotation(0, "cat", segmentation=None),
        annotation(0, "cat", segmentation={"size": [16, 20]}),
    ]
    found = read_instances(file_of(tmp_path, rows))
    assert len(found.annotations) == 1
    assert found.left_out == {"box that is not four numbers": 2, "outline of fewer than three points": 1,
                              "no outline": 1, "run lengths that are not COCO's": 1}  # fmt: skip
    assert found.annotations[0]["id"] == 1, "ids that are missing are made"
    kept = read_instances(file_of(tmp_path, [annotation(0, "cat", id=7, area=3.5), annotation(1, "cat", id=9)]))
    assert [(row["id"], row["area"]) for row in kept.annotations] == [(7, 3.5), (9, 48)]


def test_large_files_are_read_from_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = [annotation(2, "cat", note="ö"), annotation(0, "elf"), annotation(1, "dog", bbox=[1, 1, 0, 5]),
            annotation(0, "cat", iscrowd=1, segmentation={"size": [16, 20], "counts": [0, 20, 300]}),
            annotation(4, "dog", bbox=[1.25, 2, 3, 4]), annotation(2, "tree")]  # fmt: skip
    file = file_of(tmp_path, rows)
    small = read_instances(file)
    monkeypatch.setattr(annotations, "LARGE", 1)
    first = read_instances(file)
    with monkeypatch.context() as patched:
        patched.setattr(annotations, "_checked", None)  # it is not read again, neither here nor by another process
        found = read_instances(file)
        pickled = pickle.dumps(found)
        other = pickle.loads(pickled)
        with pytest.raises(LabError, match=r"annotations\[2\]: box without area; mend them"):
            read_instances(file, "error")
        with pytest.raises(TypeError):
            read_instances(file_of(tmp_path, rows[1:]))
    assert b"note" not in pickled, "rows stay on disk"
    for one in (first, found, other):
        assert isinstance(one.rows.source, StoredRows)
        assert {**vars(one), "annotations": list(one.annotations), "rows": None} == {
            **vars(small), "annotations": list(small.annotations), "rows": None
        }  # fmt: skip
        assert [row["category_id"] for row in one.of_image(0)] == [90, 3]
        assert one.of_image(3) == []
    # The parts, as they are written and as training takes them.
    for one, two in zip(*(vars(zero_shot_parts(w, w, SPLIT)).items() for w in (small, found)), strict=True):
        assert one[0] == two[0]
        if isinstance(one[1], Instances):
            assert two[1].plain() == one[1].plain()
            write_part(two[1], tmp_path / "part.json")
            assert (tmp_path / "part.json").read_text() == json.dumps(one[1].plain())
    part = zero_shot_parts(
        found, replace(small, images=[{**r, "file_name": f"t{r['id']}"} for r in small.images]), SPLIT
    )
    pictures = instance_pictures(part.train, [Path("x")] * len(part.train.images), SPLIT.seen)
    plain = instance_pictures(part.train.in_memory(), pictures.contents, SPLIT.seen)
    for place in range(len(pictures)):
        one, two = pictures.subset([place]), plain.subset([place])
        assert one.fingerprint() == two.fingerprint() != pictures.fingerprint()
        assert torch.equal(one.target(0)["masks"], two.target(0)["masks"])
        assert one.target(0)["boxes"].tolist() == plain.target(place)["boxes"].tolist()


def test_masks_of_polygons_and_run_lengths() -> None:
    coco_mask = pytest.importorskip("pycocotools.mask", reason="the independent masks of the comparison")
    polygons = [SQUARE, [12.0, 9.0, 18.0, 9.0, 15.0, 15.0]]
    rle = coco_mask.merge(coco_mask.frPyObjects(polygons, 16, 20))
    expected = coco_mask.decode(rle)
    np.testing.assert_array_equal(mask_of(polygons, 16, 20), expected)
    np.testing.assert_array_equal(mask_of([*polygons, [1.0, 1.0]], 16, 20), expected)
    text = {"size": [16, 20], "counts": rle["counts"].decode()}
    np.testing.assert_array_equal(mask_of(text, 16, 20), expected)
    runs = np.flatnonzero(np.diff(np.concatenate([[2], expected.T.ravel(), [2]])))
    lengths = np.diff(runs).tolist()
    plain = {"size": [16, 20], "counts": [0, *lengths] if expected[0, 0] else lengths}
    np.testing.assert_array_equal(mask_of(plain, 16, 20), expected)
    with pytest.raises(LabError, match=r"in a picture of \[17, 20\]"):
        mask_of(text, 17, 20)
    with pytest.raises(LabError, match="do not add up"):
        mask_of({"size": [16, 20], "counts": [5, 5]}, 16, 20)


def test_targets(tmp_path: Path) -> None:
    far = annotation(0, "dog", bbox=[15, 10, 20, 20], segmentation=[[15, 10, 35, 10, 35, 30, 15, 30]])
    outside = annotation(0, "cat", bbox=[30, 30, 5, 5], segmentation=[[30, 30, 35, 30, 35, 35]])
    crowd = annotation(0, "cat", iscrowd=1, segmentation={"size": [16, 20], "counts": [0, 320]})
    whole = read_instances(file_of(tmp_path, [annotation(0, "cat"), far, outside, crowd]))
    pictures = instance_pictures(whole, (Path("x"),) * 6, ("dog", "cat"))
    target = pictures.target(0)
    assert target["labels"].tolist() == [2, 1], "in the order of the classes, whatever the ids"
    assert target["boxes"].tolist() == [[2, 2, 10, 8], [15, 10, 20, 16]], "cut at the picture's edge"
    assert target["masks"].shape == (2, 16, 20)
    assert target["masks"].sum((1, 2)).tolist() == [48, 30]
    empty = pictures.target(3)
    assert [tuple(value.shape) for value in empty.values()] == [(0, 4), (0,), (0, 16, 20)]


def test_pictures_as_they_are_on_disk(tmp_path: Path) -> None:
    levels = (np.arange(16 * 20) % 256).astype(np.uint8).reshape(16, 20)
    Image.fromarray(levels).save(tmp_path / "0.jpg", quality=95)
    Image.fromarray(np.stack([levels] * 4, -1), "CMYK").save(tmp_path / "1.jpg")
    turned = Image.new("RGB", (20, 16), "red")
    exif = turned.getexif()
    exif[0x0112] = 6  # the camera was held on its side; the annotations are for the picture as it is stored
    turned.save(tmp_path / "2.jpg", exif=exif)
    upright = Image.new("RGB", (16, 20), "red")
    upright.save(tmp_path / "3.jpg", exif=exif)  # here for the picture as it is to be looked at
    Image.new("RGB", (21, 16)).save(tmp_path / "4.jpg")
    (tmp_path / "5.jpg").write_bytes((tmp_path / "0.jpg").read_bytes()[:200])
    whole = read_instances(file_of(tmp_path, [annotation(n, "cat") for n in range(6)]))
    with pytest.raises(LabError, match=r"4\.jpg: is 21 × 16; its annotations are for 20 × 16; 5\.jpg: truncated"):
        found_pictures(whole, [tmp_path], SPLIT.seen, "error", False)
    kept = found_pictures(whole, [tmp_path], SPLIT.seen, "skip", False)
    assert [row["file_name"] for row in kept.part.images] == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]
    assert all(kept.image(place).size == (20, 16) and kept.image(place).mode == "RGB" for place in range(4))
    assert sum(kept.left_out.values()) == 2
    assert kept.examples[0].startswith("4.jpg")
    (tmp_path / "0.jpg").unlink()
    with pytest.raises(LabError, match=r"0\.jpg: .*(No such file|no such file)"):
        found_pictures(whole, [tmp_path], SPLIT.seen, "error", False)


def test_drawn_scenes_are_cocos_format(scenes: Path) -> None:
    split = scenes_split()
    train, test = (read_instances(scenes / "annotations" / f"instances_{which}.json") for which in ("train", "val"))
    parts = zero_shot_parts(train, test, split)
    assert 5 < len(parts.train.images) < 40
    assert not train.left_out
    pictures = found_pictures(parts.train, [scenes / "train"], split.seen, "error", False)
    target = pictures.target(0)
    assert len(target["labels"]) == len(parts.train.by_image()[parts.train.images[0]["id"]])


@pytest.mark.parametrize(
    "more",
    [{"bbox": [1, 1, 0, 5]}, {"bbox": ["1", 1, 1, 1]}, {"bbox": [1, 1, 10**400, 1]}, {"bbox": [1, 1, 1e300, 1]},
     {"segmentation": [["a"] * 6]}, {"segmentation": [[float("nan")] * 6]}, {"segmentation": [[0, 0, 1e9, 0, 9, 9]]},
     {"segmentation": {"size": [16, 20], "counts": [5, 5]}}, {"segmentation": {"size": [16, 20], "counts": [-5, 325]}},
     {"segmentation": {"size": [20, 16], "counts": [320]}}, {"segmentation": {"size": [16, 20], "counts": "zz\\"}},
     {"segmentation": {"size": None, "counts": "0"}}, {"area": "x"}, {"iscrowd": []}],
)  # fmt: skip
def test_what_a_training_would_stumble_over_is_named_before(tmp_path: Path, more: dict[str, Any]) -> None:
    """By default it is an error, as a picture that cannot be read is."""
    file = file_of(tmp_path, [annotation(0, "cat"), annotation(0, "cat", **more)])
    with pytest.raises(LabError, match=r"annotations\[1\]: .*--on-bad-data skip"):
        read_instances(file, "error")
    found = read_instances(file, "skip")
    assert (len(found.annotations), found.left_out.total()) == (1, 1)


@pytest.mark.parametrize(
    ("key", "more"),
    [("annotations", {"image_id": [1]}), ("annotations", {"category_id": "3"}), ("images", {"id": {}}),
     ("images", {"width": "20"}), ("images", {"width": -1}), ("images", {"width": 10**8, "height": 10**8}),
     ("images", {"file_name": None}), ("categories", {"id": 2**70}), ("categories", {"name": 5})],
)  # fmt: skip
def test_values_of_another_kind_are_named(tmp_path: Path, key: str, more: dict[str, Any]) -> None:
    file = file_of(tmp_path, [annotation(0, "cat", id=[1])])
    assert [row["id"] for row in read_instances(file).annotations] == [1], "an id that is none is made anew"
    content = json.loads(file.read_text())
    content[key][0] |= more
    file.write_text(json.dumps(content))
    with pytest.raises(LabError, match=rf"{key}\[0\](: | has )"):
        read_instances(file)


def test_run_lengths_are_known_from_others() -> None:
    """Compressed ones as COCO's library writes them, of pictures that it drew."""
    chance = np.random.default_rng(0)
    for height, width in ((1, 1), (7, 300), (64, 48)):
        for share in (0.0, 0.02, 0.5, 1.0):
            drawn = np.asfortranarray(chance.random((height, width)) < share, dtype=np.uint8)
            drawn[:, width // 3 :] *= int(share != 0.5)  # long runs too
            text = rle.encode(drawn)["counts"]
            text = text.decode() if isinstance(text, bytes) else text
            assert is_run_lengths({"size": [height, width], "counts": text}, height, width)
            assert not is_run_lengths({"size": [height, width], "counts": text + "1"}, height, width)
            assert not is_run_lengths({"size": [height, width + 1], "counts": text}, height, width + 1)
