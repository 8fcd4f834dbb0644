"""Every option of the detector's commands, once, with its help text and default. Nothing heavy: `--help` is fast."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from labs_common.options import (
    CommandOptions,
    ComparisonOptions,
    Count,
    CountOrZero,
    NotNegative,
    OnBadData,
    PlanOptions,
    RunOptions,
    Share,
    TrainingOptions,
    names_in,
    number,
    one_of,
)
from zsi_contrastive import TINY
from zsi_contrastive.detector.options import DetectionOptions, WordOptions

PUBLISHED = ("48_17", "65_15")  # the splits of COCO in the literature (Zheng et al. 2021): seen_unseen
SCENES = "scenes"
HEADS = names_in("zsi_contrastive.detector.contrastive:CONTRASTIVE")
ContrastiveHead = Annotated[str, one_of("zsi_contrastive.detector.contrastive:CONTRASTIVE")]
# The first two heads have a switch each, of the same name, and an option for their weight: older than --contrastive.
OWN_SHARES = {"greedy_infomax": "greedy_share", "patch_infonce": "patch_share"}


@dataclass
class DataOptions:
    """The pictures with their instances, and the classes that are seen."""

    data: Path | None = None
    """Directory of COCO: annotations/instances_train….json and instances_val….json beside the folders of their
    pictures. Without it, drawn scenes."""
    train_annotations: Path | None = None
    """Take this file for training instead, such as one that prepare wrote."""
    test_annotations: Path | None = None
    """Take this file for the test instead."""
    split: str = ""
    """Seen and unseen classes: 48_17 or 65_15 of the literature, or a JSON file with the lists "seen" and "unseen". By
    default 48_17, and the pairings of drawn scenes without --data."""
    protocol: Literal["auto", "zsi", "ov-coco"] = "auto"
    """zsi, the paper's rule: no training picture shows an unseen object, every test picture does. ov-coco, that of
    open-vocabulary detection: unseen objects stay in training pictures without labels, and all pictures of the classes
    are the test. auto is zsi, and for a finished run its own."""
    validation_fraction: Annotated[float, number(float, "[0, 1)", -1)] = -1.0
    """Share of the test pictures set aside to choose --seen-bias on; the others give the figures. 0 is the paper's
    test: only then published figures stand beside. -1 takes 0.3, and for a finished run its own."""
    limit: CountOrZero = 0
    """Take at most this many pictures for training, and for validation and test each; 0 takes all."""
    on_bad_data: OnBadData = "error"
    """What to do with pictures and annotations that cannot be used (COCO 2017 has boxes without height): stop and name
    them, or leave them out and count them."""


@dataclass
class ModelOptions:
    """The network, and the paper's parts that it has."""

    backbone: str = TINY
    """tiny, a ResNet of torchvision (resnet101 is the paper's), or a network of timm with maps at strides 4 to 32."""
    backbone_pretrained: bool = True
    """Start from weights of ImageNet (downloaded on first use), or from random ones; tiny is always random."""
    backbone_weights: Path | None = None
    """Start from this .safetensors file of the same network."""
    frozen_stages: Annotated[int, number(int, "[0, 4]", -1)] = -1
    """Stages of the backbone, after its stem, that stay fixed; -1 takes the paper's 1, and 0 for tiny."""
    mask_head: bool = True
    """Outline things, or only box them."""
    decoders: bool = True
    """Reconstruct what was seen from the vectors: --no-decoders leaves out both of the next two."""
    box_decoder: bool = True
    """Reconstruct what the box head sees."""
    mask_decoder: bool = True
    """Reconstruct what the mask head sees."""
    background_rpn: bool = True
    """Learn background as a word vector where regions are proposed."""
    sync_background: bool = True
    """Use that vector for background in the detector as well."""
    sync_masks: bool = False
    """And, with --transfer code, where masks go through known classes, as the published 65/15 and its GZSI do."""
    contrastive: tuple[ContrastiveHead, ...] = ()
    """Add these contrastive heads, each with a loss of its own."""
    greedy_infomax: bool = False
    """Add greedy_infomax to --contrastive: three modules on the picture at 32 × 32 that each learn alone."""
    greedy_weights: Path | None = None
    """Start its modules from this .safetensors file, which `zsi_contrastive.pretrain --method gim` wrote."""
    patch_infonce: bool = False
    """Add patch_infonce to --contrastive: related patches against unrelated ones."""
    thumbnail: Annotated[int, number(int, "[16, 512]")] = 32
    """Side in pixels of what greedy_infomax sees, in seven rows of patches of a quarter; a multiple of 8."""
    patches_by: Literal["label", "place"] = "label"
    """Related patches of patch_infonce. label: two of one thing, by its mask, against other classes' and background's.
    place: neighbours anywhere in a picture, without any label, against all other patches of the batch."""
    patch_loss: Literal["infonce", "hadsell"] = "infonce"
    """Loss of patch_infonce: InfoNCE, or Hadsell's contrastive loss with a margin of 1."""
    patch_size: Count = 3
    """Side of a patch of patch_infonce, in places of the finest level (4 pixels each); odd."""
    patches: Count = 8
    """Patches that patch_infonce draws in each picture: of its background, or all with --patches-by place."""
    patch_temperature: Annotated[float, number(float, "(0, 10]")] = 0.1
    """By which patch_infonce divides cosines."""
    form: Literal["own", "official"] = "own"
    """Heads, first weights and box loss of our own, or those of the published code (docs/zsi_contrastive.md)."""
    similarity: Literal["auto", "product", "cosine"] = "auto"
    """How a region is compared with class vectors: by the paper's product, or by the cosine over a learnt temperature.
    auto is the product, and the cosine with --word-vectors clip:NAME."""
    min_side: CountOrZero = 0
    """Shorter side of the pictures that the network sees, in pixels; 0 takes 800, and 96 for tiny."""
    max_side: CountOrZero = 0
    """Longest side; 0 takes 1333, and 160 for tiny."""
    contrast: Annotated[float, number(float, "[0, 10]")] = 1.0
    """Contrast of the pictures that the network sees, in training and in use; 1 leaves it, 2 doubles differences."""
    sharpness: Annotated[float, number(float, "[0, 10]")] = 1.0
    """Sharpness of these pictures; 1 leaves it, 0 blurs, 2 sharpens."""


@dataclass
class DetectorTrainingOptions(TrainingOptions):
    """Steps, learning rate and schedule of training."""

    epochs: CountOrZero = 0
    """Passes over the training pictures; 0 takes the paper's 12, and 6 for tiny."""
    batch_size: CountOrZero = 0
    """Pictures per optimizer step, over all processes together; 0 takes the paper's 8, and 16 for tiny."""
    at_once: CountOrZero = 0
    """Pictures that a process holds at the same time: a step is done in parts; 0 takes a whole step at once."""
    optimizer: Literal["auto", "sgd", "adamw"] = "auto"
    """SGD with momentum 0.9, or AdamW; auto is the paper's SGD, and AdamW for tiny."""
    learning_rate: NotNegative = 0.0
    """Highest learning rate, reached after the warm-up; 0 takes the paper's 0.01 (0.0075 for 65_15), and 3e-3 for
    tiny."""
    schedule: Literal["auto", "cosine", "linear", "constant", "steps"] = "auto"  # type: ignore[assignment]
    """How the learning rate falls after the warm-up: cosine or linear to zero, not at all, or in steps to a tenth after
    two thirds and a hundredth after eleven twelfths of all steps. auto is the paper's steps, and cosine for tiny."""
    warmup_steps: CountOrZero = 0
    """Optimizer steps over which the learning rate rises, in place of --warmup; 0 takes that share."""
    warmup_from: Share = 0.0  # type: ignore[misc]
    """Share of the learning rate from which it rises."""
    weight_decay: NotNegative = 1e-4
    """AdamW's decoupled weight decay, or that of SGD."""
    clip_norm: Annotated[float, number(float, "[0, inf)", -1)] = -1.0
    """Gradients with a larger L2 norm are scaled down to it; 0 turns clipping off, -1 takes the paper's 35, and 5 for
    tiny."""
    reconstruction: NotNegative = 0.0
    """Weight of the decoders' losses; 0 takes the paper's 0.5, and 0.05 for tiny."""
    contrastive_share: Annotated[float, number(float, "[0, inf)", -1)] = -1.0
    """Weight of the loss of each contrastive head without an option of its own; -1 takes the head's own."""
    greedy_share: NotNegative = 0.1
    """Weight of the Greedy InfoMax head's losses."""
    patch_share: NotNegative = 0.1
    """Weight of the patch InfoNCE head's loss."""
    flip: bool = True
    """Mirror training pictures by chance."""
    save_every: Annotated[int, number(int, "[1, inf)", -1)] = -1
    """Optimizer steps between checkpoints. Ctrl-C writes one as well. -1: once per epoch (0.5 GB each), tiny 200."""
    validation_pictures: Count = 200
    """Pictures that evaluations during training look at."""


@dataclass
class TrainConfig:
    """Trains a detector that knows words, then finds, boxes and outlines things of classes it never saw.

    `python -m zsi_contrastive.train` alone works offline in five minutes: it draws scenes of textured shapes, in which
    a quarter of the pairings of texture and shape never occurs in training. The real thing is the same command:
    `accelerate launch -m zsi_contrastive.train --backbone resnet101 --data coco --split 48_17
    --word-vectors word_w2v_withbg_48_17.txt`.
    """

    data: DataOptions = field(default_factory=DataOptions)
    words: WordOptions = field(default_factory=WordOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    detection: DetectionOptions = field(default_factory=DetectionOptions)
    training: DetectorTrainingOptions = field(default_factory=DetectorTrainingOptions)
    plan: PlanOptions = field(default_factory=PlanOptions)
    run: RunOptions = field(default_factory=RunOptions)


@dataclass
class EvaluateConfig:
    """Measures a finished detector, or a file of COCO results: unseen classes alone, and all together.

    `python -m zsi_contrastive.evaluate` alone takes the newest run and the pictures it had. Another split: `--split
    my_72_8.json --word-vectors glove.txt --data coco`. A file: `--results results.bbox.json --data coco --split 48_17`.
    """

    checkpoint: Path | None = None
    """Directory of a finished run; by default the newest under runs/."""
    results: Path | None = None
    """Score this JSON of COCO results instead of looking for anything; those without boxes by their masks alone."""
    peer: str = ""
    """Released detector of transformers beside the run, such as google/owlv2-base-patch16-ensemble: its boxes."""
    all_pictures: bool = False
    """With --results: score all pictures of the test annotations, not only those that the protocol takes."""
    data: DataOptions = field(default_factory=DataOptions)
    words: WordOptions = field(default_factory=WordOptions)
    detection: DetectionOptions = field(default_factory=DetectionOptions)
    at_once: Count = 8
    """Pictures that the network sees at once."""
    output: Path | None = None
    """Directory for results and report; by default evaluation/ under the run."""
    seed: CountOrZero = 0
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
    """Words to look for, separated by commas, in any case, also synonyms such as television; by default all classes of
    the run's split."""
    word_vectors: str | None = None
    """Source of vectors of words that the run does not know: the file that its own are from, or the same clip:NAME."""
    score: Annotated[float, number(float, "[0, 1]", -1)] = -1.0
    """Draw detections that score at least this; 0 draws the best ones of each picture. -1 takes the thresholds that the
    run chose on its validation pictures: below them a word is not there."""
    most: Count = 5
    """Most detections that are drawn into a picture, beside the best one of each of --words."""
    output: Path | None = None
    """Directory for the pictures and detections.json; by default predictions/ under the run."""
    detection: DetectionOptions = field(default_factory=DetectionOptions)
    at_once: Count = 8
    """Pictures that the network sees at once."""
    on_bad_data: OnBadData = "error"
    """What to do with pictures that cannot be read: stop and name them, or leave them out."""
    command: CommandOptions = field(default_factory=CommandOptions)


@dataclass
class AblateConfig:
    """Trains the paper's variants under one budget and reports on them: what does each part add?

    `python -m zsi_contrastive.ablate` alone trains all of them on drawn scenes. The same command started again goes on
    where it was stopped. For real: `python -m zsi_contrastive.ablate --backbone resnet101 --data coco --split 48_17
    --word-vectors word_w2v_withbg_48_17.txt --launch launch/multi_gpu.yaml`.
    """

    rows: str = (
        f"detector,mask-head,mask-decoder,box-decoder,background-rpn,sync-background,{','.join(HEADS)},both"
    ).replace("_", "-")
    """Variants: up to sync-background each has what those before it have, and what it is called; the others add a
    contrastive head to all of that, and both all there are. none is another name of sync-background. Not by default:
    thumbnail, patch-place, -hadsell, -size, -number and -temperature change a head, contrast and sharpness pictures."""
    data: DataOptions = field(default_factory=DataOptions)
    words: WordOptions = field(default_factory=WordOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    detection: DetectionOptions = field(default_factory=DetectionOptions)
    training: DetectorTrainingOptions = field(default_factory=DetectorTrainingOptions)
    comparison: ComparisonOptions = field(default_factory=ComparisonOptions)


@dataclass
class PrepareConfig:
    """Writes the zero-shot parts of COCO as annotation files, for other tools and --train-annotations; checks them.

    `python -m zsi_contrastive.prepare --data coco --split 48_17 --output coco-48-17` gives train_seen.json (pictures
    with a seen object and no unseen one), test_unseen.json (ZSI), test_both.json (GZSI) and counts.json.
    """

    data: DataOptions = field(default_factory=DataOptions)
    output: Path | None = None
    """Directory of the files; it must not exist yet. By default zero-shot-SPLIT."""
    command: CommandOptions = field(default_factory=CommandOptions)


@dataclass
class ConvertConfig:
    """Turns a checkpoint of others into one of ours; which of its tensors are not used is said.

    `python -m zsi_contrastive.convert ZSI_48_17.pth --split 48_17 --word-vectors word_w2v_withbg_48_17.txt --vocabulary
    vocabulary_w2v.txt --output zsi-48-17` makes a detector for evaluate and predict of the one published with Zheng et
    al. 2021. Of torchvision's and Detectron2's detectors, and of MoCo, it takes the ResNet and its pyramid:
    `--backbone-weights` of train reads them.
    """

    file: tyro.conf.Positional[Path | None] = None
    """Checkpoint: .pth, .pt, .pth.tar or .safetensors. Only tensors are read of it, its code is never run."""
    output: Path | None = None
    """Directory to write; it must not hold anything yet. By default the checkpoint's name."""
    split: str = "48_17"
    """Classes that the published detector was trained on: 48_17 or 65_15."""
    words: WordOptions = field(default_factory=WordOptions)
    command: CommandOptions = field(default_factory=CommandOptions)


@dataclass
class WordsConfig:
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
