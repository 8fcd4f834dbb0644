"""Scores against pycocotools, and rankings of both kinds of classes."""

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from faster_coco_eval.core import mask as rle

from labs_common.errors import LabError
from labs_common.report.page import Table
from zsi_contrastive.detector.annotations import Instances, Split, read_split, zero_shot_parts
from zsi_contrastive.detector.pictures import instance_pictures
from zsi_contrastive.detector.predict import first_proposals
from zsi_contrastive.detector.protocol import fates, named_objects, scores_of
from zsi_contrastive.detector.regions import Detections
from zsi_contrastive.detector.report import measured_sections, unlike_published
from zsi_contrastive.detector.scoring import THRESHOLDS, harmonic_mean, iou, read_results, scored, together

pytestmark = pytest.mark.quick

SPLIT = Split("mine", ("cat", "dog", "cow"), ("elf", "orc"))
IDS = dict(zip(SPLIT.classes, (3, 17, 18, 44, 90), strict=True))
SIDE = 60


def mask(box: list[float]) -> dict[str, Any]:
    pixels = np.zeros((SIDE, SIDE), dtype=np.uint8, order="F")
    left, top, across, down = (int(value) for value in box)
    pixels[top : top + down, left : left + across] = 1
    counts = rle.encode(pixels)["counts"]
    return {"size": [SIDE, SIDE], "counts": counts.decode() if isinstance(counts, bytes) else counts}


@pytest.fixture(scope="module")
def case() -> tuple[Instances, list[dict[str, Any]]]:
    generator = np.random.default_rng(0)
    images = [{"id": n + 10, "file_name": f"{n}", "width": SIDE, "height": SIDE} for n in range(30)]
    annotations, results = [], []
    for image in images:
        for _ in range(generator.integers(0, 6)):
            box = [*generator.integers(0, 30, 2).tolist(), *generator.integers(6, 25, 2).tolist()]
            number = int(generator.choice([3, 17, 44, 90]))  # no cow is there
            crowd = int(generator.random() < 0.15)
            annotations.append({"id": len(annotations) + 1, "image_id": image["id"], "category_id": number, "bbox": box,
                                "area": box[2] * box[3], "iscrowd": crowd, "segmentation": mask(box)})  # fmt: skip
            for _ in range(generator.integers(0, 4)):
                near = [max(0, value + int(generator.integers(-4, 5))) for value in box]
                near[2:] = max(3, near[2]), max(3, near[3])
                said = number if generator.random() < 0.6 else int(generator.choice(list(IDS.values())))
                results.append({"image_id": image["id"], "category_id": said, "bbox": near, "segmentation": mask(near),
                                "score": round(float(generator.random()), 2)})  # fmt: skip
    categories = [{"id": number, "name": name} for name, number in IDS.items()]
    return Instances("case", categories, images, annotations), results


@pytest.mark.parametrize("kind", ["box", "mask"])
def test_equal_to_pycocotools(kind: str, case: tuple[Instances, list[dict[str, Any]]]) -> None:
    coco = pytest.importorskip("pycocotools.coco", reason="the independent scores of the comparison")
    cocoeval = pytest.importorskip("pycocotools.cocoeval")
    truth, results = case
    rows = [{key: value for key, value in row.items() if kind == "mask" or key != "segmentation"} for row in results]
    with contextlib.redirect_stdout(io.StringIO()):
        gold = coco.COCO()
        gold.dataset = {**truth.plain(), "annotations": [dict(row) for row in truth.annotations]}
        gold.createIndex()
        evaluation = cocoeval.COCOeval(
            gold, gold.loadRes([dict(row) for row in rows]), "segm" if kind == "mask" else "bbox"
        )
        evaluation.params.iouThrs = np.array(THRESHOLDS)
        evaluation.params.maxDets = [1, 10, 100]
        evaluation.evaluate()
        evaluation.accumulate()
    order = list(IDS.values())[::-1]  # not the order of the ids
    found = scored(truth, results, order, kind)
    for place, number in enumerate(order):
        column = evaluation.params.catIds.index(number)
        precision = evaluation.eval["precision"][:, :, column, 0, 2]
        recall = evaluation.eval["recall"][:, column, 0, 2]
        if number == IDS["cow"]:
            assert (precision == -1).all()
            assert np.isnan(found.precision[:, place]).all()
            continue
        np.testing.assert_allclose(found.precision[:, place], precision.mean(1), atol=1e-12)
        np.testing.assert_allclose(found.recall[:, place], recall, atol=1e-12)
    means = found.means(order)
    here = THRESHOLDS.index(0.5)
    kept = [place for place, number in enumerate(order) if number != IDS["cow"]]
    assert means["ap@0.5"] == pytest.approx(found.precision[here, kept].mean())
    assert 0.1 < means["ap@0.5"] < 0.9, "a case that says something"
    assert means["ap"] == pytest.approx(np.mean([found.precision[THRESHOLDS.index(t), kept] for t in THRESHOLDS[1:]]))


def test_nothing_found_and_results_of_other_pictures(
    case: tuple[Instances, list[dict[str, Any]]], tmp_path: Path
) -> None:
    truth, results = case
    found = scored(truth, [], list(IDS.values()), "box")
    assert found.means(list(IDS.values()))["ap@0.5"] == 0.0
    with pytest.raises(LabError, match="of the picture 999"):
        scored(truth, [{**results[0], "image_id": 999}], list(IDS.values()), "box")
    with pytest.raises(LabError, match="no segmentation"):
        scored(truth, [{"image_id": 10, "category_id": 3, "bbox": [1, 1, 2, 2], "score": 1}], [3], "mask")
    outlines = [{key: value for key, value in row.items() if key != "bbox"} for row in results]
    (tmp_path / "segm.json").write_text(json.dumps(outlines))
    filled, outlined = read_results(tmp_path / "segm.json")
    assert outlined == ("mask",), "boxes around masks are nobody's result"
    assert scored(truth, filled, [3], "box").means([3]) == scored(truth, results, [3], "box").means([3])


def test_the_bias_reorders_and_cuts() -> None:
    rows = [{"image_id": 1, "category_id": 3 if n % 2 else 44, "score": 0.9 - 0.1 * n} for n in range(4)]
    assert [row["category_id"] for row in together(rows, [3, 17], 0.0, 3)] == [44, 3, 44]
    found = together(rows, [3, 17], 0.25, 3)
    assert [(row["category_id"], round(row["score"], 2)) for row in found] == [(44, 0.9), (44, 0.7), (3, 0.55)]
    assert rows[1]["score"] == 0.8, "what was given stays as it is"


def test_what_an_object_is_called() -> None:
    truth = Instances("x", [{"id": number, "name": name} for name, number in IDS.items()], [{"id": 1, "file_name": "1"}], [
        {"image_id": 1, "category_id": 44, "bbox": [0, 0, 10, 10], "iscrowd": 0},
        {"image_id": 1, "category_id": 3, "bbox": [30, 30, 10, 10], "iscrowd": 0},
        {"image_id": 1, "category_id": 3, "bbox": [50, 50, 10, 10], "iscrowd": 1},
    ])  # fmt: skip
    rows = [
        {"image_id": 1, "category_id": 3, "bbox": [0, 0, 10, 9], "score": 0.8},
        {"image_id": 1, "category_id": 44, "bbox": [1, 0, 10, 10], "score": 0.7},
        {"image_id": 1, "category_id": 90, "bbox": [9, 9, 10, 10], "score": 0.99},
    ]
    first, second = named_objects(instance_pictures(truth, (), SPLIT.classes), rows, SPLIT)
    assert (first.truth, first.said(), first.said(0.2)) == ("elf", "cat", "elf")
    assert (second.truth, second.said()) == ("cat", "nothing")
    assert iou([0, 0, 10, 10], [5, 0, 10, 10]) == pytest.approx(1 / 3)
    assert iou([0, 0, 10, 10], [10, 0, 10, 10]) == 0.0


def test_where_objects_are_lost() -> None:
    boxes = [[0, 0, 10, 10], [30, 30, 10, 10], [50, 0, 8, 8], [20, 50, 6, 6], [40, 40, 5, 5]]
    kinds = [44, 44, 90, 44, 3]  # elf, elf, orc, elf, cat
    truth = Instances("x", [{"id": number, "name": name} for name, number in IDS.items()], [{"id": 1, "file_name": "1"}],
                      [{"id": n, "image_id": 1, "category_id": kind, "bbox": box, "iscrowd": 0}
                       for n, (box, kind) in enumerate(zip(boxes, kinds, strict=True), 1)]
                      + [{"id": 9, "image_id": 1, "category_id": 44, "bbox": [0, 0, 60, 60], "iscrowd": 1}])  # fmt: skip
    # Of 350 proposals, whose corners stand in a row, the 120th is on the first object, the 2nd and the 340th on others.
    proposals = torch.tensor([[100.0 + n, 100, 110 + n, 110] for n in range(350)])
    for rank, (left, top, across, down) in {120: boxes[0], 121: boxes[0], 2: boxes[1], 340: boxes[2]}.items():
        proposals[rank - 1] = torch.tensor([left, top, left + across, top + down + 4])
    first = first_proposals(Detections(proposals, proposals[:, 0], proposals[:, 0], None), truth.annotations)
    expected = {1: 120, 2: 2, 3: 340, 4: 0, 5: 0}
    assert {row["id"]: row["rank"] for row in first} == expected, "crowds are nobody's object"
    nothing = Detections(proposals[:0], proposals[:0, 0], proposals[:0, 0], None)
    assert {row["rank"] for row in first_proposals(nothing, truth.annotations)} == {0}
    rows = [
        {"image_id": 1, "category_id": kind, "bbox": box, "score": 0.5}
        for kind, box in ((3, boxes[0]), (44, boxes[0]), (90, boxes[1]), (44, boxes[2]), (44, [0, 40, 6, 6]))
    ]
    found = fates(instance_pictures(truth, (), SPLIT.classes), rows, first, SPLIT)
    assert found["unseen"] == {
        "objects": 4, "recall@100": 0.25, "recall@300": 0.5, "recall@1000": 0.75,
        "named": 0.25, "misnamed": 0.5, "dropped": 0.0, "not proposed": 0.25,
    }  # fmt: skip
    assert found["seen"] == {
        "objects": 1, "recall@100": 0.0, "recall@300": 0.0, "recall@1000": 0.0,
        "named": 0.0, "misnamed": 0.0, "dropped": 0.0, "not proposed": 1.0,
    }  # fmt: skip
    lost = fates(instance_pictures(truth, (), SPLIT.classes), rows[:1], first, SPLIT)["unseen"]
    assert (lost["misnamed"], lost["dropped"]) == (0.25, 0.5)


@pytest.mark.parametrize("kind", ["box", "mask"])
def test_gzsi_is_the_published_codes(kind: str, case: tuple[Instances, list[dict[str, Any]]], tmp_path: Path) -> None:
    """200 detections a picture, 100 of each kind and those of seen classes with the higher scores, as they come out.

    The published code hands all of them to pycocotools, at IoU 0.4, 0.5 and 0.6 with its 1, 10 and 100 detections, and
    averages the second threshold over the first (seen) and the other categories that have objects.
    """
    coco = pytest.importorskip("pycocotools.coco", reason="the independent scores of the comparison")
    cocoeval = pytest.importorskip("pycocotools.cocoeval")
    whole, _ = case
    ids = {row["id"] for row in whole.images[:8]}
    truth = replace(whole, images=whole.images[:8],
                    annotations=[row for row in whole.annotations if row["image_id"] in ids])  # fmt: skip
    generator = np.random.default_rng(1)
    results = []
    for image in truth.images:
        objects = [row for row in truth.annotations if row["image_id"] == image["id"]]
        for number in [*generator.choice([3, 17, 18], 100), *generator.choice([44, 90], 100)]:
            own = [row["bbox"] for row in objects if row["category_id"] == number]
            box = own[generator.integers(len(own))] if own and generator.random() < 0.1 else [5, 5, 20, 20]
            near = [max(3, value + int(generator.integers(-4, 5))) for value in box]
            score = float(generator.random()) + (number < 44)
            results.append({"image_id": image["id"], "category_id": int(number), "bbox": near, "score": score,
                            "segmentation": mask(near)})  # fmt: skip
    (tmp_path / "gzsi.json").write_text(json.dumps(results))
    rows = [{key: value for key, value in row.items() if kind == "mask" or key != "segmentation"} for row in results]
    with contextlib.redirect_stdout(io.StringIO()):
        gold = coco.COCO()
        gold.dataset = {**truth.plain(), "annotations": [dict(row) for row in truth.annotations]}
        gold.createIndex()
        evaluation = cocoeval.COCOeval(gold, gold.loadRes(rows), "segm" if kind == "mask" else "bbox")
        evaluation.params.iouThrs = np.linspace(0.4, 0.6, 3)
        evaluation.evaluate()
        evaluation.accumulate()
    assert evaluation.params.maxDets == [1, 10, 100]
    precision, recall = (evaluation.eval[name] for name in ("precision", "recall"))
    pictures = instance_pictures(truth, (), SPLIT.classes)
    found = scores_of(pictures, read_results(tmp_path / "gzsi.json")[0], SPLIT, 0.0, 100, ("box", "mask"))
    for name, places in (("seen", (0, 1)), ("unseen", (3, 4))):  # of the categories; there is no cow
        ours = found.gzsi[kind][name]
        assert ours["ap@0.5"] == pytest.approx(np.mean([precision[1, :, place, 0, 2].mean() for place in places]))
        assert ours["recall@0.5"] == pytest.approx(np.mean([recall[1, place, 0, 2] for place in places]))
    # ZSI is of the pictures that show an unseen object.
    evaluation.params.imgIds = sorted({row["image_id"] for row in truth.annotations if row["category_id"] > 18})
    assert len(evaluation.params.imgIds) < len(truth.images)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
    alone = np.mean([evaluation.eval["precision"][1, :, place, 0, 2].mean() for place in (3, 4)])
    assert found.zsi[kind]["ap@0.5"] == pytest.approx(alone) != found.gzsi[kind]["unseen"]["ap@0.5"]
    assert found.one_list[kind]["seen"]["recall@0.5"] == found.gzsi[kind]["seen"]["recall@0.5"]
    assert found.gzsi[kind]["unseen"]["recall@0.5"] > 0.5
    assert found.one_list[kind]["unseen"]["recall@0.5"] == 0, "100 of seen classes stand before them"


def test_both_tasks(case: tuple[Instances, list[dict[str, Any]]]) -> None:
    truth, results = case
    found = scores_of(instance_pictures(truth, (), SPLIT.classes), results, SPLIT, 0.0, 100, ("box", "mask"))
    seen, unseen = [3, 17, 18], [44, 90]
    everything = scored(truth, results, seen + unseen, "mask")
    assert found.gzsi["mask"]["seen"] == everything.means(seen)
    assert found.gzsi["mask"]["unseen"] == everything.means(unseen)
    assert found.zsi["mask"] == everything.means(unseen)
    parts = {kind: {**parts, "all": scored(truth, results, [*seen, *unseen], kind).means([*seen, *unseen])}
             for kind, parts in found.gzsi.items()}  # fmt: skip
    assert found.one_list == parts, "fewer than 100 a picture: nothing was cut"
    both = found.gzsi["mask"]
    expected = harmonic_mean(both["seen"]["ap@0.5"], both["unseen"]["ap@0.5"])
    assert both["harmonic mean"]["ap@0.5"] == expected
    assert harmonic_mean(0.5, 0.25) == pytest.approx(1 / 3)
    assert harmonic_mean(0.0, 0.0) == 0.0
    by_name = {line["class"]: line for line in found.classes}
    assert by_name["elf"]["objects"] == sum(
        row["category_id"] == 44 and not row["iscrowd"] for row in truth.annotations
    )
    assert found.plain()["classes"][2]["box gzsi"]["ap@0.5"] is None, "no cow is there"


VAL = "COCO_val2014_{:012}.jpg"


@pytest.mark.parametrize(
    ("number", "name", "left_out", "how", "reason"),
    [
        (40_504, VAL, 0, "zsi", ""),
        (40_504, VAL, 1, "zsi", "all 3 test pictures, of which 2 were looked at"),
        (40_503, VAL, 0, "zsi", "is not its file"),
        (40_504, "{:012}.jpg", 0, "zsi", "is not its file"),
        (40_504, VAL, 0, "swapped", "not those of the published split"),
        (40_504, VAL, 0, "ov-coco", "an unseen object alone"),
    ],
)
def test_published_figures_stand_beside_the_same_pictures_alone(
    number: int, name: str, left_out: int, how: str, reason: str
) -> None:
    split = read_split("48_17")
    if how == "swapped":
        split = replace(split, seen=(*split.seen[1:], split.unseen[0]), unseen=(split.seen[0], *split.unseen[1:]))
    categories = [{"id": place, "name": one} for place, one in enumerate(split.classes, 1)]
    images = [{"id": n, "file_name": name.format(n), "width": 9, "height": 9} for n in range(number)]
    rows = [{"id": 1 + n, "image_id": n, "category_id": 65 - n % 3 // 2, "bbox": [1, 1, 5, 5], "iscrowd": 0, "area": 25}
            for n in range(3)]  # fmt: skip
    seen = [{**rows[0], "image_id": 4, "category_id": 1}]
    train = Instances("train", categories, [{**images[4], "file_name": "other"}], seen)
    val = Instances("val", categories, images, [*rows, {**rows[0], "id": 9, "image_id": 7, "category_id": 1}])
    part = zero_shot_parts(train, val, split, "ov-coco" if how == "ov-coco" else "zsi").both
    files = [Path(row["file_name"]) for row in part.images]
    test = replace(instance_pictures(part, (), split.classes), contents=files, digests=(b"",) * len(files))
    test = test.subset(range(len(files) - left_out))
    found = scores_of(test, [], split, 0.0, 100, ("box",))
    sections = {section.title: section for section in measured_sections(cast(Any, None), found, split, test)}
    numbers = next(block for block in sections["Numbers"].blocks if isinstance(block, Table))
    assert any(row[0] == "published (ZSI)" for row in numbers.rows) == (not reason)
    apart = sections.get("Published, not to be compared")
    assert (apart is None) == (not reason)
    assert reason in unlike_published(split, test)
    noted = measured_sections(cast(Any, None), replace(found, note="it saw an elf"), split, test)
    said = [str(block) for section in noted for block in section.blocks if section.title.startswith("Published")]
    assert "it saw an elf" in said[0]
    kinds = [row[1] for table in [numbers, *(apart.blocks if apart else [])] if isinstance(table, Table)
             for row in table.rows if row[0] == "published (ZSI)"]  # fmt: skip
    assert kinds == ["box", "mask, unverified"]


@pytest.mark.parametrize(
    "more",
    [{"score": "x"}, {"score": float("nan")}, {"image_id": [1]}, {"category_id": 1.5}, {"bbox": [1, 2, 3]},
     {"segmentation": {"size": [60, 60], "counts": "zzzz"}}, {"segmentation": {"size": [10**9, 10**9], "counts": "0"}},
     {"segmentation": {"size": None, "counts": "0"}}],
)  # fmt: skip
def test_results_that_are_broken_are_named(tmp_path: Path, more: dict[str, Any]) -> None:
    row = {"image_id": 10, "category_id": 3, "bbox": [1, 1, 2, 2], "score": 1}
    (tmp_path / "results.json").write_text(json.dumps([row, row | more]))
    with pytest.raises(LabError, match=r"--results .*\[1\]"):
        read_results(tmp_path / "results.json")
