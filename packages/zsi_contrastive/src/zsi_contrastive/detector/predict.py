"""Finds things in pictures, writes COCO's results, and draws them: `python -m zsi_contrastive.predict FILE …`."""

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torchvision.ops import box_convert, box_iou

from labs_common.cli import given
from labs_common.data.images import decoding_threads, picture_files, readable
from labs_common.device import inference_accelerator
from labs_common.errors import LabError
from labs_common.lock import check_new, new_folder
from labs_common.progress import console, tracked
from labs_common.report.figures import COLOURS
from labs_common.report.page import shown
from labs_common.run import newest_run, write_atomically
from labs_common.steps import read_ahead
from zsi_contrastive.detector.annotations import CLASSES, read_split
from zsi_contrastive.detector.calibration import holding
from zsi_contrastive.detector.config import DataOptions, PredictConfig
from zsi_contrastive.detector.data import read_pictures
from zsi_contrastive.detector.heads import Samples
from zsi_contrastive.detector.options import DetectionOptions
from zsi_contrastive.detector.pictures import InstancePictures, Packed, levels_of, mask_of, packed, run_lengths
from zsi_contrastive.detector.regions import Detections, Query
from zsi_contrastive.detector.saved import FILE, Loaded, changed, chosen_data, load_detector
from zsi_contrastive.detector.vectors import ClassVectors, check_same_space, of_length, refined, word_vectors

OF_THE_TEST = 8  # pictures of the run's test that are taken where none is named
ON_IT = 0.5  # IoU from which a box is on an object
TINT = 120  # of 255: how much of its colour a mask gets
Result = dict[str, Any]  # a row of COCO's result JSON


def predict(config: PredictConfig) -> None:
    """Draws what is found into a copy of each picture, writes detections.json, and prints a line for each detection.

    Raises:
        LabError: no picture or no detector is there, a picture cannot be read, or a word has no vector.
    """
    check_new(config.output)
    checkpoint = config.checkpoint or newest_run(FILE, "zsi_contrastive.train")
    output = new_folder(config.output, checkpoint / "predictions")
    loaded = load_detector(checkpoint)
    asked = wanted_words(config, loaded)
    names = list(asked)
    said_options = given(config)
    detection = changed(loaded.detection, config.detection, said_options)
    thresholds = thresholds_of(config, loaded, detection, names)
    bias = detection.seen_bias
    if not bias and "seen_bias" not in said_options and (chosen := holding(loaded.calibration, detection)) is not None:
        bias = chosen.seen_bias or 0.0
    near = nearest_known(asked, loaded)
    images = chosen_pictures(config, checkpoint)
    accelerator = inference_accelerator()
    loaded.model.to(accelerator.device)
    loaded.model.regions.keep(detection.score_threshold, detection.nms_threshold, detection.kept)
    query = query_of(loaded.vectors, detection) if config.words is None else words_query(asked, loaded, detection)
    query = query.to(accelerator.device)
    output.mkdir(parents=True, exist_ok=True)
    everything: list[Result] = []
    starts = range(0, len(images), config.at_once)
    for first in tracked(starts, "detecting", len(starts), len(starts) > 1):
        part = images[first : first + config.at_once]
        levels = packed([levels_of(image) for _, image in part]).to(accelerator.device)
        with accelerator.autocast():
            (found,) = on_host(loaded.model.detect([one.float() / 255 for one in levels], [query]))
        for number, ((file, image), one) in enumerate(zip(part, found, strict=True), first + 1):
            row = {"id": file.name, "width": image.width, "height": image.height}
            results = sorted(as_results(one, row, names), key=lambda result: -result["score"])
            for result in results:
                result["there"] = result["score"] >= thresholds[result["category_id"]]
            best = {result["category_id"]: result["score"] for result in reversed(results)}
            drawn = chosen_results(results, config.most, loaded.split.seen, bias, config.words is not None)
            said = [f"{result['category_id']} {result['score']:.2f}" for result in drawn]
            drawn_on(image, drawn, said, max(320, *image.size)).save(output / f"{number:03d}-{file.stem}.png")
            for result in drawn:
                box = ", ".join(f"{value:.0f}" for value in result["bbox"])
                print(f"{file}\t{result['category_id']}\t{result['score']:.3f}\t{box}", flush=True)
            for name in names if config.words is not None else ():
                if best.get(name, -1.0) < thresholds[name]:
                    like = f"\tnearest known class: {near[name]}" if name in near else ""
                    print(f"{file}\t{name}\t{best.get(name, 0.0):.3f}\tnot there{like}", flush=True)
            for result in results:
                del result["image_id"]
                everything.append({"picture": str(file), "class": result.pop("category_id"), **result})
    write_atomically(output / "detections.json", json.dumps(everything) + "\n")
    print(f"drawn: {output}")


def chosen_results(results: Sequence[Result], most: int, seen: Sequence[str], bias: float, each: bool) -> list[Result]:
    """Picks from a picture's results, best first, the best `most` that are there, and with `each` every class's best.

    Both kinds compete: `bias` is taken from the scores of `seen` classes.
    """
    there = [result for result in results if result["there"]]
    there.sort(key=lambda result: -(result["score"] - (bias if result["category_id"] in seen else 0.0)))
    firsts = {result["category_id"]: place for place, result in reversed(list(enumerate(there)))}
    return [result for n, result in enumerate(there) if n < most or (each and firsts[result["category_id"]] == n)]


def wanted_words(config: PredictConfig, loaded: Loaded) -> dict[str, torch.Tensor]:
    """Returns the words to look for and their vectors (d,): seen classes first, under the names that the run has.

    Raises:
        LabError: a word has no vector, or --word-vectors is of another space.
    """
    own = loaded.vectors
    known = dict(zip(loaded.split.classes, own.classes, strict=True))
    words = list(known) if config.words is None else [word.strip() for word in config.words.split(",") if word.strip()]
    if not words:
        raise LabError("--words: is empty; name what to look for, separated by commas")
    names: dict[str, str] = {}  # to the word that asked for it
    for word in words:
        name = class_of(word, loaded.split.classes) or word
        if name in names:
            raise LabError(f"--words: {name} occurs twice{'' if word == names[name] else f', also as {word}'}")
        names[name] = word
    found = {name: known[name] for name in known if name in names}
    if not (missing := [name for name in names if name not in known]):
        return found
    like = [near for word in missing for near in difflib.get_close_matches(word.lower(), known, 1)]
    hint = f" (the run knows {', '.join(dict.fromkeys(like))})" if like else ""
    if config.word_vectors is None and own.by_column:
        raise LabError(
            f"--words: the run knows no {', '.join(missing)}{hint}, and its vectors are a matrix without words; name "
            "the text file that the matrix was made from with --word-vectors"
        )
    source = config.word_vectors or own.source
    if config.word_vectors is not None:
        some = loaded.split.seen[:3]
        check_same_space(known, some, word_vectors(source, some, own.mean, own.prompts)[0])
    try:
        new, _ = word_vectors(source, missing, own.mean, own.prompts)
    except LabError as error:
        raise LabError(f"{error}{hint}") from error
    return found | dict(zip(missing, of_length(new, own.seen), strict=True))


def class_of(word: str, classes: Sequence[str]) -> str | None:
    """Finds the class that a word means, whatever its case, hyphens and underscores, also by a synonym; else None."""

    def plain(text: str) -> str:
        return " ".join(re.split(r"[\s_-]+", text.casefold()))

    known = {plain(name): name for name in classes}
    content = json.loads((CLASSES / "synonyms.json").read_text(encoding="utf-8"))["synonyms"]
    groups = [[name, *others] for name, others in content.items()]
    same = next((group for group in groups if plain(word) in group), [])
    return next((known[one] for one in (plain(word), *same) if one in known), None)


def thresholds_of(
    config: PredictConfig, loaded: Loaded, detection: DetectionOptions, names: Sequence[str]
) -> dict[str, float]:
    """Returns the score from which each word is there: --score, or what the run's validation pictures chose."""
    if config.score >= 0:
        return dict.fromkeys(names, config.score)
    chosen = holding(loaded.calibration, detection)
    found = {} if chosen is None else chosen.thresholds
    kinds = {name: "seen" if name in loaded.split.seen else "unseen" for name in names}
    if lacking := [kind for kind in ("seen", "unseen") if kind in kinds.values() and kind not in found]:
        console.print(
            f"the run has no thresholds for these options and {' and '.join(lacking)} words: their best detections are "
            "drawn, there or not"
        )
    return {name: found.get(kind, 0.0) for name, kind in kinds.items()}


def nearest_known(asked: Mapping[str, torch.Tensor], loaded: Loaded) -> dict[str, str]:
    """Names for each word that is new the class of the run that is most like it, with the cosine."""
    classes = loaded.split.classes
    cosines = {
        word: torch.cosine_similarity(vector[None], loaded.vectors.classes)
        for word, vector in asked.items()
        if word not in classes
    }
    return {word: f"{classes[int(one.argmax())]} ({float(one.max()):.2f})" for word, one in cosines.items()}


def words_query(asked: Mapping[str, torch.Tensor], loaded: Loaded, detection: DetectionOptions) -> Query:
    """Asks for each word by itself: it scores what it does in `query_of`, whatever is asked for besides.

    A new word competes with the run's unseen classes, as their thresholds are its own.
    """
    split, whole = loaded.split, query_of(loaded.vectors, detection)
    known = dict(zip(split.classes, whole.vectors, strict=True))  # refined
    rows = [known.get(name, vector) for name, vector in asked.items()]
    rivals, places = [], []
    for name in asked:
        kind = split.seen if name in split.seen else split.unseen
        others = [known[other] for other in kind if other != name]
        rivals.append(torch.stack(others) if others else whole.vectors[:0])
        places.append(kind.index(name) if name in kind else len(kind))
    return replace(
        whole, vectors=torch.stack(rows), groups=(1,) * len(rows), rivals=tuple(rivals), places=tuple(places)
    )


def chosen_pictures(config: PredictConfig, checkpoint: Path) -> list[tuple[Path, Image.Image]]:
    """Decodes the pictures that are named, or some of the run's test pictures.

    Raises:
        LabError: one cannot be read and --on-bad-data says so, or none is left.
    """
    if config.pictures:
        files = picture_files(config.pictures)
    else:
        data, seed = chosen_data(DataOptions(), checkpoint)
        data = replace(data, limit=OF_THE_TEST)
        pictures, _ = read_pictures(data, read_split(data.split), seed, False, training=False)
        files = list(pictures["test"].contents)
    return readable(files, config.on_bad_data)


def query_of(vectors: ClassVectors, detection: DetectionOptions, masks: bool = True) -> Query:
    """Asks for all classes of a split, seen first, by the rules of `detection`; unseen ones refined if it says so."""
    unseen = vectors.unseen
    if detection.refine != "none":
        unseen = refined(unseen, vectors.seen, detection.refine, detection.neighbours, detection.refine_share)
    groups = len(vectors.seen), len(unseen)
    everything = torch.cat([vectors.seen, unseen])
    return Query(everything, groups, detection.temperature, detection.transfer, masks)


def predictions(
    model: torch.nn.Module,
    pictures: InstancePictures,
    queries: Sequence[Query],
    categories: Sequence[Sequence[int]],
    accelerator: Accelerator,
    at_once: int,
    task: str,
) -> list[list[Result]]:
    """Returns COCO's results for each query in the main process; each process looks at its share of the pictures.

    Of a query for the proposals it returns a row for each object instead: see `first_proposals`.

    Others return empty lists: half a million masks need not be sent to all. `model` is a `ZeroShotMaskRCNN` in
    evaluation mode, or what `Accelerator.prepare` made of it; `categories` are, for each query, the category ids of its
    rows; `task` names the progress line.
    """
    device = accelerator.device
    queries = [query.to(device) for query in queries]
    # Weights that are sharded are brought together in each batch, by all: no process may have fewer than another.
    steps = range(-(-len(pictures) // (accelerator.num_processes * at_once)))
    mine = list(range(len(pictures)))[accelerator.process_index :: accelerator.num_processes]

    def read(step: int) -> Packed:
        places = mine[step * at_once : (step + 1) * at_once] or [0]
        return packed([levels_of(image) for image in decoding_threads().map(pictures.image, places)])

    coming: list[Iterator[list[Result]]] = []  # of the batch before
    results: list[list[Result]] = [[] for _ in queries]
    for step, content in tracked(enumerate(read_ahead(read, steps)), task, len(steps), accelerator.is_main_process):
        with accelerator.autocast(), torch.no_grad():
            found = model(Samples([levels.float() / 255 for levels in content.to(device)]), queries)
        _take(coming, results)
        rows = [pictures.part.images[place] for place in mine[step * at_once : (step + 1) * at_once]]
        # Masks are drawn in C, outside Python's lock: threads do it while the next batch is computed.
        coming = [
            decoding_threads().map(as_results, of_query[: len(rows)], rows, [ids] * len(rows))
            if query.groups
            else decoding_threads().map(
                first_proposals, of_query[: len(rows)], [pictures.part.of_image(row["id"]) for row in rows]
            )
            for query, of_query, ids in zip(queries, on_host(found), categories, strict=True)
        ]
    _take(coming, results)
    if accelerator.num_processes > 1:
        gathered: list[Any] | None = [None] * accelerator.num_processes if accelerator.is_main_process else None
        torch.distributed.gather_object(results, gathered)
        results = [
            [row for part in gathered for row in part[number]] if gathered else [] for number in range(len(queries))
        ]
    order = {row["id"]: place for place, row in enumerate(pictures.part.images)}
    return [sorted(of_query, key=lambda result: order[result["image_id"]]) for of_query in results]


def _take(coming: Sequence[Iterator[list[Result]]], results: Sequence[list[Result]]) -> None:
    for of_query, wanted in zip(coming, results, strict=False):
        for of_picture in of_query:
            wanted += of_picture


def on_host(found: Sequence[Sequence[Detections]]) -> list[list[Detections]]:
    """Copies each query's answers for every picture to the host, all numbers at once and all masks at once."""
    parts = [part for of_query in found for part in of_query]
    counts = [len(part.scores) for part in parts]
    numbers = [torch.cat([part.boxes, part.scores[:, None], part.classes[:, None]], 1) for part in parts]
    drawn = [part.masks for part in parts if part.masks is not None]
    rows = iter(torch.cat(numbers).float().cpu().split(counts))
    masks = iter(torch.cat(drawn).float().cpu().split([len(part) for part in drawn]) if drawn else ())
    return [
        [
            Detections(row[:, :4], row[:, 4], row[:, 5].long(), None if part.masks is None else next(masks))
            for part, row in zip(of_query, rows, strict=False)
        ]
        for of_query in found
    ]


def first_proposals(found: Detections, objects: Sequence[Mapping[str, Any]]) -> list[Result]:
    """Says of a picture's `objects`, crowds left out, which proposal is the first on it: its `rank` from 1, 0 if none.

    `found` are the proposals, best first; one is on an object from an IoU of `ON_IT` on.
    """
    things = [row for row in objects if not row["iscrowd"]]
    if not things or not len(found.boxes):
        return [{"image_id": row["image_id"], "id": row["id"], "rank": 0} for row in things]
    boxes = box_convert(torch.tensor([row["bbox"] for row in things], dtype=torch.float32), "xywh", "xyxy")
    on = box_iou(boxes, found.boxes) >= ON_IT  # (objects, proposals)
    ranks = torch.where(on.any(1), on.int().argmax(1) + 1, 0).tolist()  # argmax: the first of the largest
    return [{"image_id": row["image_id"], "id": row["id"], "rank": n} for row, n in zip(things, ranks, strict=True)]


def as_results(found: Detections, row: Mapping[str, Any], categories: Sequence[Any]) -> list[Result]:
    """Writes the detections of the picture `row` as COCO's results: boxes as left, top, width, height; masks as RLE.

    They are on the host; see `on_host`.
    """
    sides = torch.cat([found.boxes[:, :2], found.boxes[:, 2:] - found.boxes[:, :2]], 1).tolist()
    results: list[Result] = [
        {
            "image_id": row["id"],
            "category_id": categories[place],
            "bbox": [round(value, 2) for value in box],
            "score": round(score, 5),
        }
        for box, score, place in zip(sides, found.scores.tolist(), found.classes.tolist(), strict=True)
    ]
    if found.masks is not None:
        codes = run_lengths(found.masks, found.boxes, row["height"], row["width"])
        for result, code in zip(results, codes, strict=True):
            result["segmentation"] = code
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
