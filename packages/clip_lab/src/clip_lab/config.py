"""Every option of the lab, once, with its help text and default. Imports nothing heavy: `--help` is fast."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from labs_common.errors import LabError
from labs_common.options import (
    CaptionDataOptions,
    RunOptions,
    TrainingOptions,
)

Objective = Literal["clip", "siglip", "coca", "simvlm"]
OBJECTIVES: tuple[Objective, ...] = ("clip", "siglip", "coca", "simvlm")
Augment = Literal["none", "crop", "crop+colour"]
RowPrecision = Literal["bf16", "fp16", "fp32"]
Watch = Literal["recall", "loss"]
TINY, OWN = "tiny-cnn", "own"
TRAIN, FINISHED = "clip_lab.train", "clip.json"  # what writes a model, and how one is known
MOST_SCALE = 100.0


@dataclass
class ImageOptions:
    """What looks at the picture."""

    image: str = TINY
    """tiny-cnn (for a CPU) or any timm name: resnet50, vit_base_patch32_224, vit_small_patch16_224, convnext_tiny."""
    image_pretrained: bool = False
    """Start from timm's pre-trained weights (downloaded on first use); else from scratch."""
    image_weights: Path | None = None
    """Start from this .safetensors file of the same architecture; a classifier in it is not used."""
    image_size: int = 0
    """Side of the pictures that it sees, in pixels; 0 takes the network's own."""
    image_stages: int = 0
    """Use only so many of a CNN's stages, as SimVLM does with the first three of a ResNet; 0 uses all."""
    freeze_image: bool = False
    """Leave it as it is and train only the rest (LiT). What it makes of each picture is then computed once and kept."""
    views: int = 1
    """With --freeze-image, how many augmented versions of each picture are kept; 1 keeps the plain picture."""


@dataclass
class TextOptions:
    """What reads the captions."""

    text: str = OWN
    """own (a causal transformer whose feature is at the end token) or a Hugging Face encoder by name or path:
    bert-base-uncased, xlm-roberta-base."""
    text_pretrained: bool = True
    """With a Hugging Face encoder: start from its weights."""
    text_width: int = 0
    """Width of the own transformer; 0 takes 512, and 128 with the tiny image tower."""
    text_layers: int = 0
    """Its layers; 0 takes 12 (CLIP's own), and 2 with the tiny image tower."""
    text_heads: int = 0
    """Its heads; 0 takes 8, and 4 with the tiny image tower."""
    freeze_text: bool = False
    """Leave it as it is and train only the rest."""
    tokenizer: str = ""
    """sentencepiece (trained on the training captions), clip (CLIP's own BPE), or a Hugging Face one by name or path;
    by default that of --text, and sentencepiece for own."""
    vocabulary: int = 0
    """Most pieces of the trained tokenizer; 0 takes 4000."""
    max_length: int = 0
    """Most pieces of a caption, longer ones are cut; 0 takes the length that 99 % of the training captions stay
    within, and 77 at most."""


@dataclass
class HeadOptions:
    """What is between the towers and the objective."""

    embedding: int = 0
    """Width of the space in which pictures and captions meet; 0 takes 512, and 128 with the tiny image tower."""
    scale: float = 1 / 0.07
    """What cosines are multiplied by at first (1 / temperature); it is learnt, and never above 100. SigLIP's own start
    is 10."""
    queries: int = 0
    """CoCa: how many vectors of the picture the decoder reads; 0 takes 256, and 16 with the tiny image tower."""
    decoder_layers: int = 0
    """CoCa and SimVLM: layers that write words; 0 takes as many as the text tower has."""
    contrastive_weight: float = 1.0
    """CoCa: weight of the contrastive loss."""
    caption_weight: float = 2.0
    """CoCa: weight of the captioning loss."""


@dataclass
class BatchOptions:
    """How pictures and captions come together."""

    captions_per_picture: int = 2
    """How many of a picture's captions a step holds, drawn by chance each epoch."""
    multi_positive: bool = True
    """Captions of one picture are not negatives of each other; else only the pair itself is positive."""
    augment: Augment | None = None
    """What training does to pictures: nothing; cut out 70 to 100 % of the area; also change brightness and contrast.
    Nothing is mirrored: captions say left and right. By default crop, and none for drawn scenes, of which captions say
    exactly where things are."""
    chunk: int = 0
    """Pictures that go through the towers at once; a larger batch is then put together by gradient caching, with the
    same result. 0 takes the whole batch."""
    loss_chunk: int = 1024
    """Rows of the similarity matrix at once."""


@dataclass
class CacheOptions:
    """What is kept on disk."""

    cache: bool = True
    """Keep decoded pictures, and what frozen towers make of them; --no-cache decodes and computes every epoch."""
    boundary_precision: RowPrecision = "bf16"
    """Precision of what frozen towers hand over, kept or not."""


@dataclass
class ClipTrainingOptions(TrainingOptions):
    """How the weights are moved."""

    epochs: int = 0
    """Passes over the training pictures; 0 takes 8 for drawn scenes, else 30."""
    batch_size: int = 0
    """Pictures per optimizer step, over all processes together; 0 takes 128 with the tiny image tower, else 256. The
    rest of an epoch that fills no batch is left out."""
    learning_rate: float = 0.0
    """Highest learning rate, reached after the warm-up; 0 takes 4e-3 with the tiny image tower, else 5e-4."""
    tower_learning_rate: float = 0.0
    """That of towers that started from pre-trained weights; 0 takes a tenth of the other."""
    warmup: float = 0.1
    """Share of all steps over which the learning rate rises from zero."""
    weight_decay: float = 0.1
    """AdamW's decoupled weight decay, of matrices only."""
    watch: Watch = "recall"
    """What --patience looks at, on the validation pictures: mean recall (1, 5 and 10, both ways), or the loss."""


@dataclass
class TrainConfig:
    """Trains CLIP on pictures with captions, and reports how well each finds the other.

    `python -m clip_lab.train` alone works offline on drawn scenes. The real thing is the same command:
    `accelerate launch -m clip_lab.train --image resnet50 --image-pretrained --data flickr8k`.
    Then `python -m clip_lab.retrieve "a dog on the beach" --data photos`.
    """

    objective: Objective = "clip"
    """clip: softmax over all pairs of a batch (Radford et al. 2021). siglip: every pair for itself (Zhai et al. 2023).
    coca: contrast and captions (Yu et al. 2022). simvlm: captions from their beginnings (Wang et al. 2022)."""
    image: ImageOptions = field(default_factory=ImageOptions)
    text: TextOptions = field(default_factory=TextOptions)
    head: HeadOptions = field(default_factory=HeadOptions)
    data: CaptionDataOptions = field(default_factory=CaptionDataOptions)
    batch: BatchOptions = field(default_factory=BatchOptions)
    cache: CacheOptions = field(default_factory=CacheOptions)
    training: ClipTrainingOptions = field(default_factory=ClipTrainingOptions)
    run: RunOptions = field(default_factory=RunOptions)


def complete(config: TrainConfig) -> TrainConfig:
    """The config with a default in the place of what was left to the towers and the data.

    Raises:
        LabError: options that contradict each other, or are out of range.
    """
    _check(config)
    image, text, head, training = config.image, config.text, config.head, config.training
    tiny, drawn = image.image == TINY, config.data.data is None
    layers = text.text_layers or (2 if tiny else 12)
    rate = training.learning_rate or (4e-3 if tiny else 5e-4)
    return dataclasses.replace(
        config,
        text=dataclasses.replace(
            text,
            text_width=text.text_width or (128 if tiny else 512),
            text_layers=layers,
            text_heads=text.text_heads or (4 if tiny else 8),
            tokenizer=text.tokenizer or ("sentencepiece" if text.text == OWN else text.text),
            vocabulary=text.vocabulary or 4000,
        ),
        head=dataclasses.replace(
            head,
            embedding=head.embedding or (128 if tiny else 512),
            queries=head.queries or (16 if tiny else 256),
            decoder_layers=head.decoder_layers or layers,
        ),
        batch=dataclasses.replace(config.batch, augment=config.batch.augment or ("none" if drawn else "crop")),
        training=dataclasses.replace(
            training,
            epochs=training.epochs or (8 if drawn else 30),
            batch_size=training.batch_size or (128 if tiny else 256),
            learning_rate=rate,
            tower_learning_rate=training.tower_learning_rate or rate / 10,
        ),
    )


def _check(config: TrainConfig) -> None:
    image, text, head, batch = config.image, config.text, config.head, config.batch
    if image.image_weights is not None and image.image_weights.suffix != ".safetensors":
        raise LabError(f"--image-weights {image.image_weights}: must be a .safetensors file; convert it with "
                       "safetensors.torch")  # fmt: skip
    if image.image_weights is not None and not image.image_weights.is_file():
        raise LabError(f"--image-weights {image.image_weights}: no such file")
    if image.image_weights is not None and image.image_pretrained:
        raise LabError("--image-pretrained and --image-weights: give one of them")
    numbers = (image.image_size, image.image_stages, text.text_width, text.text_layers, text.text_heads,
               text.vocabulary, text.max_length, head.embedding, head.queries, head.decoder_layers, batch.chunk,
               config.data.limit, config.training.batch_size)  # fmt: skip
    if min(numbers) < 0:
        raise LabError("sizes, counts, layers, --chunk, --limit and --batch-size must not be negative")
    if 0 < text.max_length < 4:
        raise LabError("--max-length: must be at least 4")
    if text.text_width % (text.text_heads or 4):
        raise LabError(f"--text-width {text.text_width}: must be a multiple of --text-heads {text.text_heads or 4}")
    if batch.captions_per_picture < 1 or batch.loss_chunk < 1 or image.views < 1:
        raise LabError("--captions-per-picture, --loss-chunk and --views must be at least 1")
    if image.views > 1 and not image.freeze_image:
        raise LabError("--views: is of --freeze-image; other towers see a new version every epoch")
    if not 0 < head.scale <= MOST_SCALE:
        raise LabError(f"--scale {head.scale}: must lie between 0 and {MOST_SCALE:g}")
    if min(head.contrastive_weight, head.caption_weight) < 0 or not head.contrastive_weight + head.caption_weight:
        raise LabError("--contrastive-weight and --caption-weight must not be negative, nor both 0")
    if head.contrastive_weight != 1.0 and config.objective != "coca":
        raise LabError("--contrastive-weight: is of --objective coca")
    if head.caption_weight != 2.0 and config.objective != "coca":
        raise LabError("--caption-weight: is of --objective coca")
    if text.text != OWN and config.objective in ("coca", "simvlm"):
        raise LabError(f"--text {text.text}: sees a whole caption at once; --objective {config.objective} needs a "
                       f"causal tower: --text {OWN}")  # fmt: skip
    if text.text != OWN and text.tokenizer not in ("", text.text):
        raise LabError(f"--tokenizer {text.tokenizer}: --text {text.text} has its own")
    if text.freeze_text and text.text == OWN:
        raise LabError(f"--freeze-text: --text {OWN} is trained from scratch; name a Hugging Face encoder in --text")
    if image.freeze_image and not (image.image_pretrained or image.image_weights):
        raise LabError("--freeze-image: the tower has random weights; add --image-pretrained or --image-weights FILE")
    if config.objective == "simvlm" and config.training.watch == "recall" and config.training.patience:
        raise LabError("--watch recall: --objective simvlm has no embeddings; take --watch loss")
    if config.data.splits is not None and not config.data.splits.is_dir():
        raise LabError(f"--splits {config.data.splits}: no such directory")
