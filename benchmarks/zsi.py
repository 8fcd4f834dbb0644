"""Zero-shot instance segmentation, side by side: the training step against torchvision's, scoring against pycocotools.

    uv run python benchmarks/zsi.py                                   # all of it
    uv run python benchmarks/zsi.py --parts step --side 800 --data coco

`step` trains our detector and torchvision's Mask R-CNN with the same backbone, pictures, sizes and numbers of regions,
in turns. `scoring` measures faster-coco-eval as the lab uses it and pycocotools on the same detections, and compares
their values. `evaluation` measures all that an evaluation does beside the network, with masks. `precision` measures the
step in fp32, bf16 and channels-last on a GPU; without one it is left out.
"""

import contextlib
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from rich.console import Console
from rich.table import Table
from torchvision.models.detection import MaskRCNN
from torchvision.ops import box_convert

from labs_common.run import write_atomically
from labs_common.scenes.files import write_coco
from labs_common.steps import ShuffledSteps
from zsi_contrastive.detector.annotations import Instances, Split, read_instances, scenes_split
from zsi_contrastive.detector.backbone import make_backbone
from zsi_contrastive.detector.data import PictureBatches, category, instances_file, picture_folders
from zsi_contrastive.detector.heads import Samples
from zsi_contrastive.detector.model import Parts, Sizes, ZeroShotMaskRCNN
from zsi_contrastive.detector.pictures import instance_pictures
from zsi_contrastive.detector.predict import as_results
from zsi_contrastive.detector.protocol import scores_of, swept
from zsi_contrastive.detector.regions import Detections, Sampling
from zsi_contrastive.detector.scoring import THRESHOLDS, scored

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LENGTH = 300


@dataclass
class Options:
    """Compares zsi_contrastive side by side with what else there is."""

    parts: tuple[str, ...] = ("step", "scoring", "evaluation", "precision")
    """What to measure."""
    backbone: str = "resnet50"
    """Backbone of both detectors."""
    side: int = 400
    """Shorter side of the pictures."""
    batch: int = 2
    """Pictures of a step."""
    steps: int = 5
    """Steps of each that are timed, after one that is not."""
    data: Path | None = None
    """COCO, instead of drawn scenes."""
    pictures: int = 5000
    """Pictures of `scoring` and `evaluation`, each with 100 detections."""
    output: Path = Path("benchmarks/results/zsi.json")
    """Where the figures go."""


def main(options: Options) -> None:
    """Measures what is asked for, prints a table and writes JSON."""
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    for part in options.parts:
        measure = {"step": step_rows, "scoring": scoring_rows, "evaluation": evaluation_rows}
        rows += measure.get(part, precision_rows)(options)
    table = Table("", "ours, s", "other, s", "ratio", "note")
    for row in rows:
        table.add_row(row["what"], f"{row['ours']:.3f}", f"{row['other']:.3f}", f"{row['ratio']:.2f}", row["note"])
    Console().print(table)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(options.output, json.dumps(rows, indent=1) + "\n")


def step_rows(options: Options) -> list[dict[str, Any]]:
    """The time of a step, of each in turns; ratio: ours to torchvision's."""
    batches, classes = batches_of(options)
    ours, plain = detectors(options, classes)
    variants = {
        "all parts": ours,
        "detector and masks": detectors(options, classes, Parts(True, False, False, False))[0],
    }
    rows = []
    for name, model in variants.items():
        times: dict[str, list[float]] = {"ours": [], "plain": []}
        runs = {"ours": stepping(model), "plain": stepping(plain)}
        for number in range(options.steps + 1):
            for who, run in runs.items():
                start = time.perf_counter()
                run(batches[number % len(batches)])
                if number:
                    times[who].append(time.perf_counter() - start)
        one, two = (statistics.median(times[who]) for who in ("ours", "plain"))
        note = f"{options.backbone}, side {options.side}, {options.batch} pictures; other: torchvision's Mask R-CNN"
        rows.append({"what": f"training step, {name}", "ours": one, "other": two, "ratio": one / two, "note": note})
    return rows


def batches_of(options: Options) -> tuple[list[Samples], int]:
    """Steps of pictures, and how many classes there are."""
    with tempfile.TemporaryDirectory() as folder:
        if options.data is None:
            write_coco(Path(folder), {"train": range(12)}, 0, 320, category, scenes_split().classes)
        data = options.data or Path(folder)
        part = read_instances(instances_file(data, "train"))
        chosen = Instances(part.source, part.categories, part.images[:12], part.annotations)
        names = [row["name"] for row in part.categories]
        found = {path.name: path for place in picture_folders(data) for path in place.glob("*.jpg")}
        files = tuple(found[row["file_name"]] for row in chosen.images)
        batches = PictureBatches(instance_pictures(chosen, files, names), 0, False, 0)
        steps = ShuffledSteps(len(files), options.batch, 0, batches)
        return [parts[0].to(DEVICE) for parts in steps.steps(0, 0)], len(names)


def detectors(options: Options, classes: int, parts: Parts | None = None) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Ours with all parts by default, and torchvision's, on the device."""
    longest = round(options.side * 1333 / 800)
    vectors = torch.nn.functional.normalize(torch.randn(classes + 1, LENGTH), dim=1)
    sizes = Sizes(min_side=options.side, max_side=longest)
    ours = ZeroShotMaskRCNN(
        make_backbone(options.backbone, False, None, 1, 256),
        vectors[0],
        vectors[1:],
        parts or Parts(),
        sizes,
        Sampling(),
    )
    backbone = make_backbone(options.backbone, False, None, 1, 256)
    before, before_in_use, after, after_in_use = sizes.proposals
    plain = MaskRCNN(
        backbone, classes + 1, min_size=options.side, max_size=longest, rpn_pre_nms_top_n_train=before,
        rpn_pre_nms_top_n_test=before_in_use, rpn_post_nms_top_n_train=after, rpn_post_nms_top_n_test=after_in_use,
    )  # fmt: skip
    # As the lab trains it: in channels-last.
    return ours.to(DEVICE).to(memory_format=torch.channels_last).train(), plain.to(DEVICE).train()


def stepping(model: torch.nn.Module, half: bool = False) -> Callable[[Samples], None]:
    """A function that does one step of SGD."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, 1e-4, 0.9)

    def step(batch: Samples) -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=half):
            ours = isinstance(model, ZeroShotMaskRCNN)
            loss = sum((model(batch) if ours else model(batch.pictures, batch.targets)).values())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    return step


def precision_rows(options: Options) -> list[dict[str, Any]]:
    """What bf16 and channels-last gain on a GPU; ratio: to fp32."""
    if DEVICE.type != "cuda":
        Console().print("precision: needs a GPU; left out")
        return []
    batches, classes = batches_of(options)
    medians = {}
    for name, half, last in (("fp32", False, False), ("bf16", True, False), ("bf16, channels-last", True, True)):
        model = detectors(options, classes)[0]
        memory = torch.channels_last if last else torch.contiguous_format
        run = stepping(model.to(memory_format=memory), half)
        times = []
        for number in range(options.steps + 3):
            start = time.perf_counter()
            run(batches[number % len(batches)])
            times.append(time.perf_counter() - start)
        medians[name] = statistics.median(times[3:])
    usual = medians.pop("fp32")
    return [
        {"what": f"step, {name}", "ours": value, "other": usual, "ratio": value / usual, "note": "other: fp32"}
        for name, value in medians.items()
    ]


def scoring_rows(options: Options) -> list[dict[str, Any]]:
    """Seconds for boxes at all the lab's thresholds; ratio: pycocotools' time to ours."""
    truth, results = drawn_detections(options.pictures)
    ids = [row["id"] for row in truth.categories]
    start = time.perf_counter()
    found = scored(truth, results, ids, "box")
    ours = time.perf_counter() - start
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        gold = COCO()
        gold.dataset = {**truth.plain(), "annotations": [dict(row) for row in truth.annotations]}
        gold.createIndex()
        evaluation = COCOeval(gold, gold.loadRes([dict(row) for row in results]), "bbox")
        evaluation.params.iouThrs = np.array(THRESHOLDS)
        evaluation.params.maxDets, evaluation.params.areaRng = [100], [[0, 1e10]]
        evaluation.params.areaRngLbl = ["all"]
        evaluation.evaluate()
        evaluation.accumulate()
    other = time.perf_counter() - start
    precision = evaluation.eval["precision"][:, :, :, 0, 0].mean(1)
    difference = float(np.abs(np.nan_to_num(found.precision) - np.where(precision < 0, 0, precision)).max())
    note = f"{options.pictures} pictures × 100 boxes, 11 thresholds; largest difference in AP {difference:.1e}"
    return [{"what": "scoring", "ours": ours, "other": other, "ratio": other / ours, "note": note}]


def evaluation_rows(options: Options) -> list[dict[str, Any]]:
    """CPU seconds of a picture: masks and boxes written as results, both tasks scored, every bias; other: the limit."""
    truth, results = drawn_detections(options.pictures)
    for row in truth.annotations:
        left, top, across, down = row["bbox"]
        row["segmentation"] = [[left, top, left + across, top, left + across, top + down, left, top + down]]
    boxes = box_convert(torch.tensor([row["bbox"] for row in results]), "xywh", "xyxy")
    boxes = boxes.clamp(max=torch.tensor([640.0, 480, 640, 480])).split(100)
    scores, classes = (torch.tensor([row[key] for row in results]).split(100) for key in ("score", "category_id"))
    grid = torch.linspace(-1, 1, 28)
    discs = (torch.linspace(0.5, 1.2, 100)[:, None, None] - grid[:, None] ** 2 - grid**2).mul(8).sigmoid()
    names = [row["name"] for row in truth.categories]
    pictures, split = instance_pictures(truth, (), names), Split("drawn", tuple(names[:48]), tuple(names[48:]))
    start = time.process_time()
    rows = [
        result
        for image, box, score, kind in zip(truth.images, boxes, scores, classes, strict=True)
        for result in as_results(Detections(box, score, kind - 1, discs), image, truth.ids(names))
    ]
    scores_of(pictures, rows, split, 0.0, 100, ("box", "mask"))
    swept(pictures, rows, split, 100)
    spent = (time.process_time() - start) / options.pictures
    note = f"{options.pictures} pictures of 640 × 480 × 100 masks; CPU seconds a picture; other: what it may take"
    return [{"what": "evaluation beside the network", "ours": spent, "other": 0.1, "ratio": 0.1 / spent, "note": note}]


def drawn_detections(count: int) -> tuple[Instances, list[dict[str, Any]]]:
    """Objects of 65 classes, about seven a picture as in COCO, and 100 detections of each picture, many near them."""
    generator = np.random.default_rng(0)
    images = [{"id": number, "file_name": str(number), "width": 640, "height": 480} for number in range(1, count + 1)]
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for image in images:
        boxes = np.concatenate([generator.uniform(0, 400, (7, 2)), generator.uniform(10, 200, (7, 2))], 1)
        kinds = generator.integers(1, 66, 7)
        for box, kind in zip(boxes.tolist(), kinds.tolist(), strict=True):
            annotations.append({"id": len(annotations) + 1, "image_id": image["id"], "category_id": kind, "bbox": box,
                                "area": box[2] * box[3], "iscrowd": 0})  # fmt: skip
        places = generator.integers(0, 7, 100)
        near = np.abs(boxes[places] + generator.normal(0, 12, (100, 4)))
        said = np.where(generator.random(100) < 0.5, kinds[places], generator.integers(1, 66, 100))
        scores = generator.random(100)
        results += [
            {"image_id": image["id"], "category_id": kind, "bbox": box, "score": score}
            for box, kind, score in zip(near.tolist(), said.tolist(), scores.tolist(), strict=True)
        ]
    categories = [{"id": number, "name": str(number)} for number in range(1, 66)]
    return Instances("drawn", categories, images, annotations), results


if __name__ == "__main__":
    main(tyro.cli(Options))
