"""Measures a detector or a file of results: `python -m zsi_contrastive.evaluate --checkpoint runs/NAME`."""

import dataclasses
import json
from pathlib import Path

import torch
from accelerate import Accelerator

from labs_common.cli import config_from_yaml, given, to_plain
from labs_common.data.images import print_refused
from labs_common.device import inference_accelerator
from labs_common.errors import LabError, reason_of
from labs_common.launch import main_process_first
from labs_common.lock import check_new, new_folder
from labs_common.progress import console
from labs_common.report.page import making_report, write_report
from labs_common.report.sections import asked_section
from labs_common.run import Run, newest_run, write_atomically
from zsi_contrastive.detector.annotations import Split, all_of, read_split
from zsi_contrastive.detector.calibration import CALIBRATION, holding
from zsi_contrastive.detector.config import DataOptions, EvaluateConfig, TrainConfig
from zsi_contrastive.detector.data import from_main_process, read_file, read_parts, read_pictures, read_vectors
from zsi_contrastive.detector.defaults import complete_data
from zsi_contrastive.detector.findings import finding_sections
from zsi_contrastive.detector.peer import Peer, beside
from zsi_contrastive.detector.pictures import InstancePictures, instance_pictures
from zsi_contrastive.detector.predict import predictions
from zsi_contrastive.detector.protocol import Evaluation, evaluated, scores_of
from zsi_contrastive.detector.regions import Query
from zsi_contrastive.detector.report import measured_sections, print_scores, summary_of
from zsi_contrastive.detector.saved import FILE, Loaded, changed, chosen_data, load_detector
from zsi_contrastive.detector.scoring import read_results
from zsi_contrastive.detector.vectors import ClassVectors, check_same_space, scaled_like


def evaluate(config: EvaluateConfig) -> None:
    """Writes scores, detections and a report.

    Raises:
        LabError: no detector is there, or no such pictures, words or results.
    """
    check_new(config.output)
    if config.all_pictures and config.results is None:
        raise LabError("--all-pictures: goes with --results alone; a detector looks at the test pictures of --protocol")
    if config.peer and config.results is not None:
        raise LabError("--peer: looks at the pictures of a run, beside it; leave out --results")
    if config.results is not None:
        score_file(config, config.results)
    else:
        evaluate_run(config)


def evaluate_run(config: EvaluateConfig) -> None:
    """Looks for all classes in the test pictures of --data, or of the run, and scores what is found.

    Raises:
        LabError: no detector is there, or no such pictures or words.
    """
    checkpoint = config.checkpoint or newest_run(FILE, "zsi_contrastive.train")
    loaded = load_detector(checkpoint)
    output = new_folder(config.output, checkpoint / "evaluation")
    said_options = given(config)
    data, seed = chosen_data(config.data, checkpoint, loaded.split.name, said_options)
    split, vectors = chosen_words(config, loaded, data)
    accelerator = inference_accelerator()
    pictures, _ = from_main_process(accelerator, lambda: read_pictures(data, split, seed, shown=True, training=False))
    if accelerator.is_main_process:
        print_refused({"test": pictures["test"]})
    detection = changed(loaded.detection, config.detection, said_options)
    peer: Peer | None = None
    if config.peer:
        with main_process_first(accelerator):  # it is downloaded on its first use
            peer = Peer(config.peer, split.classes, detection.kept)
    known = loaded.calibration if vectors is loaded.vectors else None  # the same classes
    note = seen_before(loaded, split)
    names = set(() if loaded.calibration is None else loaded.calibration.pictures)
    if chose := sum(row["file_name"] in names for row in pictures["test"].part.images):
        known = None
        said = f"{chose} of these pictures are the run's own validation pictures"
        if accelerator.is_main_process:
            console.print(f"{said}: the bias and the thresholds that they chose are left out")
        if patient(checkpoint):
            note = "; ".join(filter(None, (note, f"{said}, which chose its weights (--patience)")))
    found = evaluated(
        loaded.model, split, vectors, pictures, detection, accelerator, config.seed, config.at_once, known
    )
    theirs = None if peer is None else peer_scores(peer, split, pictures["test"], accelerator, config.at_once)
    if found is not None:
        if theirs is not None:
            found = beside(found, theirs, config.peer)
        found = dataclasses.replace(found, note=note)
        options = dataclasses.asdict(detection)
        finish(config, output, found, split, pictures["test"], f"Evaluation of {checkpoint.name}", options)
        chosen = holding(found.calibration, loaded.detection)  # predict's own rules
        if vectors is loaded.vectors and loaded.calibration is None and chosen is not None:
            file = loaded.folder / CALIBRATION
            try:
                write_atomically(file, json.dumps(dataclasses.asdict(chosen)) + "\n")
                print(f"thresholds: {file} (the model had none; predict takes them)")
            except OSError as error:  # somebody else's model
                console.print(f"thresholds: not kept with the model ({reason_of(error)})")


def patient(checkpoint: Path) -> bool:
    """Says whether validation pictures chose when a run's training ended."""
    file = checkpoint / "config.yaml"
    return file.is_file() and config_from_yaml(TrainConfig, file).training.patience > 0


def peer_scores(peer: Peer, split: Split, test: InstancePictures, accelerator: Accelerator, at_once: int) -> Evaluation:
    """Lets a peer look for all classes in the test pictures; called by all processes, the main one gets the scores."""
    asked = Query(torch.empty(len(split.classes), 0), (len(split.seen), len(split.unseen)), masks=False)
    ids, network = test.part.ids(split.classes), peer.to(accelerator.device)
    (rows,) = predictions(network, test, [asked], [ids], accelerator, at_once, "testing the peer")
    return scores_of(test, rows, split, 0.0, peer.kept, ("box",))


def score_file(config: EvaluateConfig, results: Path) -> None:
    """Scores a JSON of COCO results on the test part of --data, or on all its test pictures.

    Raises:
        LabError: the file or the data cannot be read, or do not fit.
    """
    data = complete_data(config.data)
    split = read_split(data.split)
    output = new_folder(config.output, results.with_name(f"{results.stem}-scores"))
    rows, outlined = read_results(results)
    part = all_of(read_file(data, "val"), split) if config.all_pictures else read_parts(data, split)[0].both
    pictures = instance_pictures(part.in_memory(), (), split.classes)
    found = scores_of(pictures, rows, split, config.detection.seen_bias, config.detection.kept, outlined)
    finish(config, output, found, split, pictures, f"Scores of {results.name}", None)


def finish(
    config: EvaluateConfig,
    output: Path,
    found: Evaluation,
    split: Split,
    test: InstancePictures,
    title: str,
    detection: dict[str, object] | None,
) -> None:
    """Writes evaluation.json, detections.json (unless they were given) and the report, and prints the main numbers."""
    (output / "figures").mkdir(parents=True, exist_ok=True)
    run = Run(output)
    said = {"config": to_plain(config), "detection": detection, "pictures": len(test), **found.plain()}
    run.save_json("evaluation.json", said)
    if config.results is None:
        run.save_json("detections.json", found.results)
    print_scores(found)
    if config.report:
        with making_report():
            measured = measured_sections(run, found, split, test)
            sections = [asked_section(config), *measured, *finding_sections(run, found, split, test)]
            print(f"report: {write_report(run, title, summary_of(found), sections)}")


def chosen_words(config: EvaluateConfig, loaded: Loaded, data: DataOptions) -> tuple[Split, ClassVectors]:
    """Returns the classes to look for and their vectors: the run's own, or those of another split or source.

    Raises:
        LabError: they cannot be read, or are of another space than those that the model was trained with.
    """
    split = read_split(data.split)
    if split.classes == loaded.split.classes and split.seen == loaded.split.seen and not config.words.word_vectors:
        return loaded.split, loaded.vectors
    words = dataclasses.replace(config.words, word_vectors=config.words.word_vectors or loaded.vectors.source)
    vectors = read_vectors(words, split, shown=True, like=loaded.vectors)
    known = dict(zip(loaded.split.classes, loaded.vectors.classes, strict=True))
    check_same_space(known, split.classes, vectors.classes)
    vectors = scaled_like(vectors, loaded.vectors)
    # A class that the model knows keeps its very vector: by it, its rules for scores, boxes and masks know it.
    own = [known.get(name, vector) for name, vector in zip(split.classes, vectors.classes, strict=True)]
    seen = len(split.seen)
    return split, dataclasses.replace(vectors, seen=torch.stack(own[:seen]), unseen=torch.stack(own[seen:]))


def seen_before(loaded: Loaded, split: Split) -> str:
    """Says what training saw of the classes that `split` calls unseen; empty if it is nothing."""
    if taught := [name for name in split.unseen if name in loaded.split.seen]:
        return (
            f"{len(taught)} of the {len(split.unseen)} classes called unseen here were seen in training: "
            f"{', '.join(taught)}"
        )
    if loaded.protocol == "ov-coco":
        return "objects of unseen classes were in the training pictures, without labels (ov-coco)"
    if other := [name for name in split.unseen if name not in loaded.split.unseen]:
        return f"training pictures of {loaded.split.name} may show, without labels, {', '.join(other)}"
    if set(split.seen) != set(loaded.split.seen):
        return f"training saw other classes, those of {loaded.split.name}"
    return ""


if __name__ == "__main__":
    raise SystemExit("the command is python -m zsi_contrastive.evaluate")
