"""The options of the commands that do not train: each once, with its help text and default. Nothing heavy here."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from labs_common.options import CommandOptions, ComparisonOptions
from zsi_contrastive.detector.config import (
    DataOptions,
    DetectionOptions,
    DetectorTrainingOptions,
    ModelOptions,
    WordOptions,
)


@dataclass
class EvaluateConfig:
    """Measures a finished detector, or a file of COCO results: unseen classes alone, and all together.

    `python -m zsi_contrastive.evaluate` alone takes the newest run and the pictures that it had. Another split or other
    words: `--split my_72_8.json --word-vectors glove.txt --data coco`. A published file: `--results results.bbox.json
    --data coco --split 48_17`.
    """

    checkpoint: Path | None = None
    """Directory of a finished run; by default the newest under runs/."""
    results: Path | None = None
    """Score this JSON of COCO results instead of looking for anything."""
    data: DataOptions = field(default_factory=DataOptions)
    words: WordOptions = field(default_factory=WordOptions)
    detection: DetectionOptions = field(default_factory=DetectionOptions)
    at_once: int = 8
    """Pictures that the network sees at once."""
    output: Path | None = None
    """Directory for results and report; by default evaluation/ under the run."""
    seed: int = 0
    """Seed of the random vectors."""
    report: bool = True
    """Write report.html at the end."""
    command: CommandOptions = field(default_factory=CommandOptions)


@dataclass
class PredictConfig:
    """Finds, boxes and outlines things in pictures, also things of classes that it never saw.

    `python -m zsi_contrastive.predict photo.jpg holiday/ --words "zebra,umbrella" --checkpoint runs/…`. Without
    pictures it takes some of the run's test pictures.
    """

    pictures: tyro.conf.Positional[tuple[str, ...]] = ()
    """Picture files, directories of them, or patterns with *."""
    checkpoint: Path | None = None
    """Directory of a finished run; by default the newest under runs/."""
    words: str | None = None
    """What to look for, separated by commas; by default all classes of the run's split."""
    word_vectors: str | None = None
    """Where words that the run does not know have their vectors: the file or encoder that its own are from."""
    score: float = 0.0
    """Draw detections that score at least this; 0 draws the best ones of each picture."""
    most: int = 5
    """Most detections that are drawn into a picture."""
    output: Path | None = None
    """Directory for the pictures and detections.json; by default predictions/ under the run."""
    detection: DetectionOptions = field(default_factory=DetectionOptions)
    at_once: int = 8
    """Pictures that the network sees at once."""
    on_bad_data: Literal["error", "skip"] = "error"
    """What to do with pictures that cannot be read: stop and name them, or leave them out."""
    command: CommandOptions = field(default_factory=CommandOptions)


@dataclass
class AblateConfig:
    """Trains the paper's variants under one budget and reports on them: what does each part add?

    `python -m zsi_contrastive.ablate` alone trains all eight on drawn scenes. The same command started again goes on
    where it was stopped. For real: `python -m zsi_contrastive.ablate --backbone resnet101 --data coco --split 48_17
    --word-vectors word_w2v_withbg_48_17.txt --launch launch/multi_gpu.yaml`.
    """

    rows: str = "detector,mask-head,decoders,background-rpn,sync-background,greedy-infomax,patch-infonce,both"
    """Which: up to sync-background each has what those before it have, and what it is called; the last three add
    contrastive heads to all of that. none is another name of sync-background."""
    data: DataOptions = field(default_factory=DataOptions)
    words: WordOptions = field(default_factory=WordOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    detection: DetectionOptions = field(default_factory=DetectionOptions)
    training: DetectorTrainingOptions = field(default_factory=DetectorTrainingOptions)
    comparison: ComparisonOptions = field(default_factory=ComparisonOptions)


@dataclass
class PrepareConfig:
    """Writes the zero-shot parts of COCO as annotation files, and checks them.

    `python -m zsi_contrastive.prepare --data coco --split 48_17 --output coco-48-17` gives train_seen.json (pictures
    with a seen object and no unseen one), test_unseen.json (ZSI), test_both.json (GZSI) and counts.json. Training
    makes the same parts by itself; the files are for other tools, and for --train-annotations.
    """

    data: DataOptions = field(default_factory=DataOptions)
    output: Path | None = None
    """Directory of the files; it must not exist yet. By default zero-shot-SPLIT."""
    command: CommandOptions = field(default_factory=CommandOptions)


@dataclass
class VectorsConfig:
    """Shows which vector is which class and checks the order, or writes a matrix from any source of word vectors.

    `python -m zsi_contrastive.words --split 48_17 --word-vectors word_w2v_withbg_48_17.txt` lists the columns with
    their nearest classes. `--split my_72_8.json --word-vectors glove.6B.300d.txt --write my_72_8.txt` makes a matrix in
    the reference's format: a column for the background (the mean of all classes), then seen, then unseen classes.
    """

    split: str = "48_17"
    """Seen and unseen classes: 48_17, 65_15, scenes, or a JSON file with the lists "seen" and "unseen"."""
    words: WordOptions = field(default_factory=WordOptions)
    write: Path | None = None
    """Write the vectors as a matrix to this file."""
    command: CommandOptions = field(default_factory=CommandOptions)
