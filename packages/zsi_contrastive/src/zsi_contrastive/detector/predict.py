"""Finds things in pictures, writes COCO's results, and draws them: `python -m zsi_contrastive.predict FILE …`."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from faster_coco_eval.core import mask as rle
from PIL import Image, ImageColor, ImageDraw, ImageFont

from labs_common.checkpoint import SHARDED
from labs_common.data.images import decoding_threads, picture_files, readable
from labs_common.errors import LabError
from labs_common.progress import tracked
from labs_common.report.figures import COLOURS
from labs_common.report.page import shown
from labs_common.run import check_new, new_folder, write_atomically
from zsi_contrastive.detector.annotations import read_split
from zsi_contrastive.detector.config import DataOptions, DetectionOptions, PredictConfig, check_detection
from zsi_contrastive.detector.data import read_pictures
from zsi_contrastive.detector.model import ZeroShotMaskRCNN, pasted
from zsi_contrastive.detector.pictures import InstancePictures, as_tensor, mask_of
from zsi_contrastive.detector.regions import Detections, Query
from zsi_contrastive.detector.saved import Loaded, changed, chosen_data, chosen_run, load_detector
from zsi_contrastive.detector.vectors import ClassVectors, check_same_space, of_length, refined, word_vectors

OF_THE_TEST = 8  # pictures of the run's test that are taken where none is named
SEEN, UNSEEN = 0, 1  # groups of a query
TINT = 120  # of 255: how much of its colour a mask gets
Result = dict[str, Any]  # a row of COCO's result JSON


def predict(config: PredictConfig) -> None:
    """Draws what is found into a copy of each picture, writes detections.json, and prints a line for each detection.

    Raises:
        LabError: no picture or no detector is there, a picture cannot be read, or a word has no vector.
    """
    check_detection(config.detection)
    if config.most < 1:
        raise LabError("--most: must be at least 1")
    check_new(config.output)
    checkpoint = chosen_run(config.checkpoint)
    output = new_folder(config.output, checkpoint / "predictions")
    loaded = load_detector(checkpoint)
    names, vectors = wanted_words(config, loaded)
    detection = changed(loaded.detection, config.detection)
    images = chosen_pictures(config, checkpoint)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded.model.to(device)
    loaded.model.regions.keep(detection.score_threshold, detection.nms_threshold, detection.kept)
    groups = torch.zeros(len(names), dtype=torch.int64, device=device)  # all words compete
    query = Query(vectors.to(device), groups, detection.temperature, detection.transfer == "paper")
    output.mkdir(parents=True, exist_ok=True)
    everything: list[Result] = []
    starts = range(0, len(images), config.at_once)
    for first in tracked(starts, "detecting", len(starts), len(starts) > 1):
        part = images[first : first + config.at_once]
        (found,) = loaded.model.detect([as_tensor(image).to(device) for _, image in part], [query])
        for number, ((file, image), one) in enumerate(zip(part, found, strict=True), first + 1):
            row = {"id": file.name, "width": image.width, "height": image.height}
            results = sorted(as_results(one, row, names), key=lambda result: -result["score"])
            drawn = [result for result in results if result["score"] >= config.score][: config.most]
            said = [f"{result['category_id']} {result['score']:.2f}" for result in drawn]
            drawn_on(image, drawn, said, max(320, *image.size)).save(output / f"{number:03d}-{file.stem}.png")
            for result in drawn:
                box = ", ".join(f"{value:.0f}" for value in result["bbox"])
                print(f"{file}\t{result['category_id']}\t{result['score']:.3f}\t{box}", flush=True)
            for result in results:
                del result["image_id"]
                everything.append({"picture": str(file), "class": result.pop("category_id"), **result})
    write_atomically(output / "detections.json", json.dumps(everything) + "\n")
    print(f"drawn: {output}")


def wanted_words(config: PredictConfig, loaded: Loaded) -> tuple[list[str], torch.Tensor]:
    """Returns the words to look for, and their vectors (words, d).

    Raises:
        LabError: a word has no vector, or --word-vectors is of another space.
    """
    known = dict(zip(loaded.split.classes, loaded.vectors.classes, strict=True))
    names = list(known) if config.words is None else [word.strip() for word in config.words.split(",") if word.strip()]
    if not names:
        raise LabError("--words: is empty; name what to look for, separated by commas")
    if twice := [name for name in names if names.count(name) > 1]:
        raise LabError(f"--words: {twice[0]} occurs twice")
    missing = [name for name in names if name not in known]
    if not missing:
        return names, torch.stack([known[name] for name in names])
    source = config.word_vectors or loaded.vectors.source
    if config.word_vectors is None and loaded.vectors.by_column:
        raise LabError(
            f"--words: the run knows no {', '.join(missing)}, and its vectors are a matrix without words; name the "
            "text file that the matrix was made from with --word-vectors"
        )
    if config.word_vectors is not None:
        some = loaded.split.seen[:3]
        check_same_space(known, some, word_vectors(source, some)[0])
    found, _ = word_vectors(source, missing)
    new = dict(zip(missing, of_length(found, loaded.vectors.seen), strict=True))
    return names, torch.stack([known[name] if name in known else new[name] for name in names])


def chosen_pictures(config: PredictConfig, checkpoint: Path) -> list[tuple[Path, Image.Image]]:
    """Decodes the pictures that are named, or some of the run's test pictures.

    Raises:
        LabError: one cannot be read and --on-bad-data says so, or none is left.
    """
    if config.pictures:
        files = picture_files(config.pictures)
    else:
        data, seed = chosen_data(DataOptions(), checkpoint)
        data = dataclasses.replace(data, limit=OF_THE_TEST)
        pictures, _ = read_pictures(data, read_split(data.split), seed, False, training=False)
        files = list(pictures["test"].contents)
    return readable(files, config.on_bad_data)


def query_of(vectors: ClassVectors, detection: DetectionOptions, masks: bool = True) -> Query:
    """Asks for all classes of a split, seen first, by the rules of `detection`; unseen ones refined if it says so."""
    unseen = vectors.unseen
    if detection.refine != "none":
        unseen = refined(unseen, vectors.seen, detection.refine, detection.neighbours, detection.refine_share)
    groups = torch.tensor([SEEN] * len(vectors.seen) + [UNSEEN] * len(unseen))
    everything = torch.cat([vectors.seen, unseen])
    return Query(everything, groups, detection.temperature, detection.transfer == "paper", masks)


def random_queries(vectors: ClassVectors, detection: DetectionOptions, seed: int) -> list[Query]:
    """Asks for random vectors of the same lengths in the place of the unseen classes: what chance gives."""
    queries = []
    for number in range(detection.controls):
        generator = torch.Generator().manual_seed(1000 * seed + number)
        drawn = torch.randn(vectors.unseen.shape, generator=generator)
        drawn = drawn / drawn.norm(dim=1, keepdim=True) * vectors.unseen.norm(dim=1, keepdim=True)
        groups = torch.full((len(drawn),), UNSEEN)
        queries.append(Query(drawn, groups, detection.temperature, detection.transfer == "paper", masks=False))
    return queries


def predictions(
    model: ZeroShotMaskRCNN,
    pictures: InstancePictures,
    queries: Sequence[Query],
    categories: Sequence[Sequence[int]],
    detection: DetectionOptions,
    accelerator: Accelerator,
    at_once: int,
    task: str,
) -> list[list[Result]]:
    """Returns COCO's results for each query, in every process; each process looks at its share of the pictures.

    `categories` are, for each query, the category ids of its rows; `task` names the progress line.
    """
    device = accelerator.device
    model.regions.keep(detection.score_threshold, detection.nms_threshold, detection.kept)
    queries = [
        dataclasses.replace(query, vectors=query.vectors.to(device), groups=query.groups.to(device))
        for query in queries
    ]
    mine = list(range(len(pictures)))[accelerator.process_index :: accelerator.num_processes]
    # Where weights are sharded all processes compute together: one without pictures left repeats one.
    together = accelerator.distributed_type in SHARDED
    longest = -(-len(pictures) // accelerator.num_processes) if together else len(mine)
    starts = range(0, longest, at_once)
    results: list[list[list[Result]]] = [[] for _ in queries]  # by query and picture
    for first in tracked(starts, task, len(starts), accelerator.is_main_process):
        places = mine[first : first + at_once]
        batch = [as_tensor(image).to(device) for image in decoding_threads().map(pictures.image, places or [0])]
        with accelerator.autocast():
            found = model(batch, queries=queries)
        rows = [pictures.part.images[place] for place in places]
        for number, of_query in enumerate(found):
            # Masks are drawn and encoded in C, outside Python's lock: threads help.
            ids = [categories[number]] * len(rows)
            results[number] += list(decoding_threads().map(as_results, of_query[: len(rows)], rows, ids))
    gathered = gather_object([results]) if accelerator.num_processes > 1 else [results]
    order = {row["id"]: place for place, row in enumerate(pictures.part.images)}
    everything = []
    for number in range(len(queries)):
        rows_of_query = [result for part in gathered for of_picture in part[number] for result in of_picture]
        everything.append(sorted(rows_of_query, key=lambda result: order[result["image_id"]]))
    return everything


def as_results(found: Detections, row: Mapping[str, Any], categories: Sequence[Any]) -> list[Result]:
    """Writes the detections of the picture `row` as COCO's results: boxes as left, top, width, height; masks as RLE."""
    boxes, scores, classes = found.boxes.float().cpu(), found.scores.float().cpu().tolist(), found.classes.tolist()
    sides = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).tolist()
    results: list[Result] = [
        {
            "image_id": row["id"],
            "category_id": categories[place],
            "bbox": [round(value, 2) for value in box],
            "score": round(score, 5),
        }
        for box, score, place in zip(sides, scores, classes, strict=True)
    ]
    if found.masks is not None and len(results):
        small = found._replace(boxes=boxes, masks=found.masks.float().cpu())
        for result, mask in zip(results, pasted(small, row["height"], row["width"]).numpy(), strict=True):
            code = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
            counts = code["counts"].decode("ascii") if isinstance(code["counts"], bytes) else code["counts"]
            result["segmentation"] = {"size": [int(side) for side in code["size"]], "counts": counts}
    return results


def drawn_on(image: Image.Image, results: Sequence[Result], names: Sequence[str], side: int = 320) -> Image.Image:
    """Draws each result's mask, box and name into a copy of the picture, whose longer side gets `side` pixels.

    Results have a `bbox` and perhaps a `segmentation` of the whole picture, as COCO's results or annotations.
    """
    scale = side / max(image.size)
    canvas = shown(image, side).convert("RGB")
    for place, result in enumerate(results):
        if "segmentation" in result:
            inside = mask_of(result["segmentation"], image.height, image.width) * TINT
            mask = Image.fromarray(inside.astype(np.uint8)).resize(canvas.size, Image.Resampling.BILINEAR)
            tint = Image.new("RGB", canvas.size, ImageColor.getrgb(COLOURS[place % len(COLOURS)]))
            canvas = Image.composite(tint, canvas, mask)
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(12)
    for place, (result, name) in enumerate(zip(results, names, strict=True)):
        colour = COLOURS[place % len(COLOURS)]
        left, top, across, down = (value * scale for value in result["bbox"])
        draw.rectangle((left, top, left + across, top + down), outline=colour, width=2)
        # The name stands above its box, or in it at the picture's edge.
        x0, y0, x1, y1 = draw.textbbox((0, 0), name, font=font)
        x = min(max(0.0, left), max(0.0, canvas.width - (x1 - x0) - 4))
        y = top - (y1 - y0) - 6 if top > y1 - y0 + 6 else top
        draw.rectangle((x, y, x + x1 - x0 + 4, y + y1 - y0 + 5), fill=colour)
        draw.text((x + 2 - x0, y + 2 - y0), name, fill="white", font=font)
    return canvas


if __name__ == "__main__":
    raise SystemExit("the command is python -m zsi_contrastive.predict")
