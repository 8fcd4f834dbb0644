"""Finds things in pictures: `python -m zsi_contrastive.predict photo.jpg --words "zebra,umbrella"`."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labs_common.errors import LabError
from zsi_contrastive.detector.command_config import EvaluateConfig, PredictConfig
from zsi_contrastive.detector.config import FINISHED, TRAIN, check_detection

if TYPE_CHECKING:  # the real imports wait until the command line has been read: --help is fast
    import torch
    from PIL import Image

    from zsi_contrastive.detector.stored import Loaded

OF_THE_TEST = 8


def predict(config: PredictConfig) -> None:
    """Draws what is found into a copy of each picture, writes detections.json, and prints a line for each detection.

    Raises:
        LabError: no picture or no detector is there, a picture cannot be read, or a word has no vector.
    """
    check_detection(config.detection)
    if config.most < 1:
        raise LabError("--most: must be at least 1")
    from labs_common.run import check_new, new_folder, newest_run

    check_new(config.output)
    checkpoint = config.checkpoint or newest_run(FINISHED, TRAIN)
    output = new_folder(config.output, checkpoint / "predictions")

    import json

    import torch

    from labs_common.progress import tracked
    from labs_common.run import write_atomically
    from zsi_contrastive.detector.drawing import drawn_on
    from zsi_contrastive.detector.evaluate import chosen_detection
    from zsi_contrastive.detector.finding import as_results
    from zsi_contrastive.detector.pictures import as_tensor
    from zsi_contrastive.detector.regions import Asked
    from zsi_contrastive.detector.stored import load_model

    loaded = load_model(checkpoint)
    names, vectors = wanted_words(config, loaded)
    detection = chosen_detection(config.detection, loaded.detection)
    images = chosen_pictures(config, checkpoint)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded.model.to(device)
    loaded.model.regions.keep(detection.score_threshold, detection.nms_threshold, detection.kept)
    groups = torch.zeros(len(names), dtype=torch.int64, device=device)
    asked = Asked(vectors.to(device), groups, detection.temperature, detection.transfer == "paper")
    output.mkdir(parents=True, exist_ok=True)
    everything: list[dict[str, Any]] = []
    starts = range(0, len(images), config.at_once)
    for first in tracked(starts, "looking", len(starts), len(starts) > 1):
        part = images[first : first + config.at_once]
        (found,) = loaded.model.detect([as_tensor(image).to(device) for _, image in part], [asked])
        for number, ((file, image), one) in enumerate(zip(part, found, strict=True), first + 1):
            row = {"id": file.name, "width": image.width, "height": image.height}
            results = sorted(as_results(one, row, range(len(names))), key=lambda result: -result["score"])
            drawn = [result for result in results if result["score"] >= config.score][: config.most]
            said = [f"{names[result['category_id']]} {result['score']:.2f}" for result in drawn]
            drawn_on(image, drawn, said, max(320, *image.size)).save(output / f"{number:03d}-{file.stem}.png")
            for result in drawn:
                box = ", ".join(f"{value:.0f}" for value in result["bbox"])
                print(f"{file}\t{names[result['category_id']]}\t{result['score']:.3f}\t{box}", flush=True)
            everything += [
                {"picture": str(file), "class": names[result.pop("category_id")], **result} for result in results
            ]
    for result in everything:
        del result["image_id"]
    write_atomically(output / "detections.json", json.dumps(everything) + "\n")
    print(f"drawn: {output}")


def wanted_words(config: PredictConfig, loaded: "Loaded") -> "tuple[list[str], torch.Tensor]":
    """What to look for, and its vectors (words, d).

    Raises:
        LabError: a word has no vector, or --word-vectors is of another space.
    """
    import torch

    from zsi_contrastive.detector.vectors import check_same_space, of_length, word_vectors

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
        raise LabError(f"--words: the run knows no {', '.join(missing)}, and its vectors are a matrix without words; "
                       "name the text file that the matrix was made from with --word-vectors")  # fmt: skip
    if config.word_vectors is not None:
        some = loaded.split.seen[:3]
        check_same_space(known, some, word_vectors(source, some)[0])
    found, _ = word_vectors(source, missing)
    new = dict(zip(missing, of_length(found, loaded.vectors.seen), strict=True))
    return names, torch.stack([known[name] if name in known else new[name] for name in names])


def chosen_pictures(config: PredictConfig, checkpoint: Path) -> "list[tuple[Path, Image.Image]]":
    """The pictures that are named, or some of the run's test pictures.

    Raises:
        LabError: one cannot be read and --on-bad-data says so, or none is left.
    """
    from labs_common.data.images import BadPictureError, decoded, picture_files
    from labs_common.progress import console
    from zsi_contrastive.detector.data import read_pictures
    from zsi_contrastive.detector.evaluate import chosen_data
    from zsi_contrastive.detector.splits import read_split

    if config.pictures:
        files = picture_files(config.pictures)
    else:
        data, seed = chosen_data(EvaluateConfig(), checkpoint)
        data = dataclasses.replace(data, limit=OF_THE_TEST)
        pictures, _ = read_pictures(data, read_split(data.split), seed, False, training=False)
        files = list(pictures["test"].files)
    images, faults = [], []
    for file in files:
        try:
            images.append((file, decoded(file)))
        except BadPictureError as error:
            faults.append(f"{file}: {error}")
    if faults and (config.on_bad_data == "error" or not images):
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise LabError(f"{'; '.join(faults[:5])}{more}; add --on-bad-data skip to leave out what cannot be read")
    for fault in faults:
        console.print(f"left out {fault}")
    return images
