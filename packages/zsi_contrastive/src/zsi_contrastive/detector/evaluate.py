"""Measures a detector or a file of results: `python -m zsi_contrastive.evaluate --checkpoint runs/NAME`."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from labs_common.cli import config_from_yaml
from labs_common.errors import LabError
from zsi_contrastive.detector.command_config import EvaluateConfig
from zsi_contrastive.detector.config import (
    FINISHED,
    TRAIN,
    DataOptions,
    DetectionOptions,
    TrainConfig,
    check_detection,
    complete,
    default_split,
)

if TYPE_CHECKING:  # the real imports wait until the command line has been read: --help is fast
    from zsi_contrastive.detector.evaluation import Evaluation
    from zsi_contrastive.detector.pictures import InstancePictures
    from zsi_contrastive.detector.splits import Split
    from zsi_contrastive.detector.stored import Loaded
    from zsi_contrastive.detector.vectors import ClassVectors


def evaluate(config: EvaluateConfig) -> None:
    """Writes scores, detections and a report.

    Raises:
        LabError: no detector is there, or no such pictures, words or results.
    """
    from labs_common.run import check_new

    check_new(config.output)
    check_detection(config.detection)
    if config.results is not None:
        score_file(config)
        return
    from accelerate import Accelerator

    from labs_common.data.splits import print_left_out
    from labs_common.run import new_folder, newest_run
    from zsi_contrastive.detector.data import read_pictures
    from zsi_contrastive.detector.evaluation import evaluated
    from zsi_contrastive.detector.stored import load_model

    checkpoint = config.checkpoint or newest_run(FINISHED, TRAIN)
    loaded = load_model(checkpoint)
    output = new_folder(config.output, checkpoint / "evaluation")
    data, seed = chosen_data(config, checkpoint)
    split, vectors = chosen_words(config, loaded, data)
    accelerator = Accelerator()
    pictures, _ = read_pictures(data, split, seed, accelerator.is_main_process, training=False)
    if accelerator.is_main_process:
        print_left_out({name: pictures[name] for name in ("test",)})
    detection = chosen_detection(config.detection, loaded.detection)
    found = evaluated(loaded.model, split, vectors, pictures, detection, accelerator, config.seed, config.at_once)
    if accelerator.is_main_process:
        finish(
            config,
            output,
            found,
            split,
            pictures["test"],
            f"Evaluation of {checkpoint.name}",
            dataclasses.asdict(detection),
        )


def score_file(config: EvaluateConfig) -> None:
    """Scores a JSON of COCO results on the test part of --data.

    Raises:
        LabError: the file or the data cannot be read, or do not fit.
    """
    from labs_common.run import new_folder
    from zsi_contrastive.detector.data import read_parts
    from zsi_contrastive.detector.evaluation import scores_of
    from zsi_contrastive.detector.pictures import InstancePictures
    from zsi_contrastive.detector.scoring import read_results
    from zsi_contrastive.detector.splits import read_split

    assert config.results is not None
    data = dataclasses.replace(config.data, split=default_split(config.data))
    split = read_split(data.split)
    output = new_folder(config.output, config.results.with_name(f"{config.results.stem}-scores"))
    rows = read_results(config.results)
    parts, _ = read_parts(data, split)
    pictures = InstancePictures(parts.both, (), split.classes)
    detection = config.detection
    found = scores_of(
        pictures, rows, split, detection.seen_bias, detection.kept, all("segmentation" in row for row in rows)
    )
    finish(config, output, found, split, pictures, f"Scores of {config.results.name}", None)


def finish(
    config: EvaluateConfig,
    output: Path,
    found: "Evaluation",
    split: "Split",
    test: "InstancePictures",
    title: str,
    detection: dict[str, object] | None,
) -> None:
    """Writes evaluation.json, detections.json and the report, and prints the main numbers."""
    from labs_common.cli import to_plain
    from labs_common.report import asked_section, write_report
    from labs_common.run import Run
    from zsi_contrastive.detector.evaluation import named_objects
    from zsi_contrastive.detector.galleries import confusion_section, finding_sections
    from zsi_contrastive.detector.results import measured_sections, print_scores, summary_of, write_findings

    (output / "figures").mkdir(parents=True, exist_ok=True)
    run = Run(output)
    said = {"config": to_plain(config), "detection": detection, "pictures": len(test.part.images), **found.plain()}
    run.save_json("evaluation.json", said)
    if config.results is None:
        write_findings(run, found)
    print_scores(found)
    if not config.report:
        return
    if test.files:
        shown = finding_sections(run, found, split, test)
    else:
        shown = [confusion_section(run, named_objects(test, found.results, split), split, found.bias)]
    sections = [asked_section(config), *measured_sections(run, found, split, test), *shown]
    path = write_report(run, title, summary_of(found), sections)
    print(f"report: {path}")


def chosen_data(config: EvaluateConfig, checkpoint: Path) -> tuple[DataOptions, int]:
    """The data options with what is left to the run, and the seed of its splits.

    Raises:
        LabError: the run does not say which pictures it had.
    """
    asked = config.data
    file = checkpoint / "config.yaml"
    if not file.is_file():
        if asked.data is None:
            raise LabError(f"--checkpoint {checkpoint}: holds no config.yaml that names its pictures; name --data")
        return dataclasses.replace(asked, split=default_split(asked)), 0
    trained = complete(config_from_yaml(TrainConfig, file))
    if asked.data is not None:
        return dataclasses.replace(asked, split=asked.split or trained.data.split), trained.run.seed
    usual = DataOptions()
    own = {name: value for name, value in dataclasses.asdict(asked).items() if value != getattr(usual, name)}
    return dataclasses.replace(trained.data, **own), trained.run.seed


def chosen_words(config: EvaluateConfig, loaded: "Loaded", data: DataOptions) -> "tuple[Split, ClassVectors]":
    """The classes to look for and their vectors: the run's own, or those of another split or source.

    Raises:
        LabError: they cannot be read, or are of another space than those that the model was trained with.
    """
    from labs_common.progress import console
    from zsi_contrastive.detector.data import read_vectors
    from zsi_contrastive.detector.splits import read_split
    from zsi_contrastive.detector.vectors import check_same_space, scaled_like

    split = read_split(data.split)
    if split.classes == loaded.split.classes and split.seen == loaded.split.seen and not config.words.word_vectors:
        return loaded.split, loaded.vectors
    words = config.words
    if not words.word_vectors:
        words = dataclasses.replace(words, word_vectors=loaded.vectors.source)
    vectors, notes = read_vectors(words, split)
    for note in notes:
        console.print(f"{words.word_vectors}: {note}")
    known = dict(zip(loaded.split.classes, loaded.vectors.classes, strict=True))
    check_same_space(known, split.classes, vectors.classes)
    return split, scaled_like(vectors, loaded.vectors)


def chosen_detection(asked: DetectionOptions, trained: DetectionOptions) -> DetectionOptions:
    """The run's options, but for those that are asked for here."""
    usual = DetectionOptions()
    own = {name: value for name, value in dataclasses.asdict(asked).items() if value != getattr(usual, name)}
    return dataclasses.replace(trained, **own)
