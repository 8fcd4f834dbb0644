"""Every option of every command, once, with its help text and default. Imports nothing heavy: `--help` is fast."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from labs_common.options import (
    CacheOptions,
    CaptionDataOptions,
    ClassDataOptions,
    CommandOptions,
    ComparisonOptions,
    Count,
    CountOrZero,
    NotNegative,
    OnBadData,
    PageOptions,
    PlanOptions,
    Positive,
    RunOptions,
    Share,
    TrainingOptions,
    number,
    one_of,
)

Augment = Literal["none", "crop", "crop+colour"]
TINY, OWN = "tiny-cnn", "own"  # the names of the towers that are not a library's
REAL = "resnet50", "distilbert-base-uncased"  # those of photographs: a GPU trains both in minutes
TRAIN, FINISHED = "clip_lab.train", "clip.json"  # the command that writes a model, and the file that tells one
MOST_SCALE = 100.0  # Radford et al. 2021, section 2.5: above it, training becomes unstable


@dataclass
class StartOptions:
    """A model that training goes on from."""

    start: str = ""
    """Go on from this model, with its towers, tokenizer and temperature: openai/clip-vit-base-patch32, a SigLIP or a
    directory (transformers), RN50:openai (open_clip), or a finished run. With --freeze-image this is LiT."""
    lora: Literal["none", "image", "text", "both"] = "none"
    """With a released --start: leave this tower's weights as they are and train adapters of low rank beside its linear
    layers (LoRA). The model is written with them merged."""
    lora_rank: Count = 8
    """Rank of the adapters; what they add is scaled by 2."""


@dataclass
class ImageOptions:
    """The image tower."""

    image: str = ""
    """tiny-cnn (for a CPU) or any timm name: resnet50, vit_base_patch32_224, vit_small_patch16_224, convnext_tiny. By
    default tiny-cnn for drawn scenes, and resnet50 for photographs."""
    image_pretrained: bool = True
    """Start from timm's pre-trained weights (downloaded on first use), or from random ones, as tiny-cnn always does."""
    image_weights: Path | None = None
    """Start from this .safetensors file of the same architecture; a classifier in it is not used."""
    image_size: CountOrZero = 0
    """Side of the pictures that it sees, in pixels; 0 takes the network's own."""
    image_stages: CountOrZero = 0
    """Use only so many of a CNN's stages, as SimVLM does with the first three of a ResNet; 0 uses all."""
    freeze_image: bool = False
    """Leave it as it is and train only the rest (LiT). Its output for each picture is then computed once and kept."""
    views: Count = 1
    """With --freeze-image, how many augmented versions of each picture are kept; 1 keeps the plain picture."""


@dataclass
class TextOptions:
    """The text tower and its tokenizer."""

    text: str = ""
    """own (a causal transformer whose feature is at the end token) or a Hugging Face encoder by name or path:
    bert-base-uncased, xlm-roberta-base. By default own; for photographs distilbert-base-uncased, unless the own one's
    tokenizer or sizes are given or it has to write."""
    text_pretrained: bool = True
    """With a Hugging Face encoder: start from its weights."""
    text_width: CountOrZero = 0
    """Width of the own transformer; 0 takes 512, and 128 with the tiny image tower."""
    text_layers: CountOrZero = 0
    """Its layers; 0 takes 12 (CLIP's own), and 2 with the tiny image tower."""
    text_heads: CountOrZero = 0
    """Its heads; 0 takes 8, and 4 with the tiny image tower."""
    text_pool: Literal["auto", "pooler", "mean", "max", "cls", "eot"] = "auto"
    """With a Hugging Face encoder, the caption's feature: the pooler's output, the mean over the words, their largest
    values, the first token's state, or the end token's. auto is what a sentence-transformer says of itself; else the
    pooler where the weights have one, else the mean."""
    freeze_text: bool = False
    """Leave it as it is and train only the rest."""
    tokenizer: str = ""
    """sentencepiece (trained on the training captions), clip (CLIP's own BPE), or a Hugging Face one by name or path;
    by default that of --text, and sentencepiece for own."""
    vocabulary: CountOrZero = 0
    """Most pieces of the trained tokenizer; 0 takes 4000."""
    max_length: Annotated[int, number(int, "[4, inf)", 0)] = 0
    """Most pieces of a caption, longer ones are cut; 0 takes the length that 99 % of the training captions stay
    within, and 77 at most."""


@dataclass
class HeadOptions:
    """The layers between the towers and the objective."""

    embedding: CountOrZero = 0
    """Width of the space in which pictures and captions meet; 0 takes 512, and 128 with the tiny image tower."""
    scale: Annotated[float, number(float, f"(0, {MOST_SCALE}]")] = 1 / 0.07
    """Factor of the cosines at first (1 / temperature); it is learnt, and never above 100 but by SigLIP, whose own
    start is 10."""
    queries: CountOrZero = 0
    """CoCa: vectors of the picture that the decoder reads; 0 takes 256, and 16 with the tiny image tower."""
    decoder_layers: CountOrZero = 0
    """CoCa and SimVLM: layers that write words; 0 takes as many as the text tower has."""
    encoder_layers: CountOrZero = 0
    """SimVLM: layers of an encoder of picture and prefix, to which the layers that write attend, as in the paper; 0 has
    one transformer for both."""
    contrastive_weight: NotNegative = 1.0
    """CoCa: weight of the contrastive loss."""
    caption_weight: NotNegative = 2.0
    """CoCa: weight of the captioning loss."""


@dataclass
class BatchOptions:
    """The pictures and captions of a step."""

    captions_per_picture: Count = 2
    """Captions of each picture in a step, drawn by chance each epoch."""
    multi_positive: bool = True
    """Captions of one picture are not negatives of each other; else only the pair itself is positive."""
    augment: Augment | None = None
    """Change pictures in training: not at all; cut out 70 to 100 % of the area; also change brightness and contrast.
    Nothing is mirrored: captions say left and right. By default crop, and none for drawn scenes, of which captions say
    exactly where things are."""
    chunk: CountOrZero = 0
    """Pictures that go through the towers at once; a larger batch is then put together by gradient caching, with the
    same result. 0 takes the whole batch."""
    loss_chunk: Count = 1024
    """Rows of the similarity matrix at once."""


@dataclass
class ClipTrainingOptions(TrainingOptions):
    """The optimizer, its schedule, and when training stops."""

    epochs: CountOrZero = 0
    """Passes over the training pictures; 0 takes 8 for drawn scenes, 5 with --start, else 30."""
    batch_size: CountOrZero = 0
    """Pictures per optimizer step, over all processes together; 0 takes 128 with the tiny image tower and with
    --start, else 256. The rest of an epoch that fills no batch is left out."""
    learning_rate: NotNegative = 0.0
    """Highest learning rate, reached after the warm-up; 0 takes 4e-3 with the tiny image tower, 1e-4 with --start,
    1e-3 with a pre-trained --text, else 5e-4."""
    tower_learning_rate: NotNegative = 0.0
    """That of an image tower that started from pre-trained weights, and of all of --start; 0 takes a tenth of the
    other, and 1e-5 with --start."""
    text_learning_rate: NotNegative = 0.0
    """That of a Hugging Face --text that started from its weights; 0 takes a hundredth of --learning-rate."""
    warmup: Share = 0.1
    """Share of all steps over which the learning rate rises from zero."""
    weight_decay: NotNegative = 0.1
    """AdamW's decoupled weight decay, of matrices only."""
    watch: Literal["recall", "loss"] = "recall"
    """Score on the validation pictures for --keep-best and --patience: mean recall (1, 5 and 10, both ways), or the
    loss, which is the only one of SimVLM."""
    keep_best: bool = True
    """Save the weights of the best evaluation at the end; --no-keep-best saves those of the last step."""


@dataclass
class TrainConfig:
    """Trains CLIP on pictures with captions, and reports how well each finds the other.

    `python -m clip_lab.train` alone works offline on drawn scenes. The real thing is the same command:
    `accelerate launch -m clip_lab.train --data flickr8k`, with a pre-trained resnet50 and DistilBERT.
    Then `python -m clip_lab.retrieve "a dog on the beach" --data photos`.
    """

    objective: Annotated[str, one_of("clip_lab.losses:OBJECTIVES")] = "clip"
    """clip: softmax over all pairs of a batch (Radford et al. 2021). siglip: every pair for itself (Zhai et al. 2023).
    coca: contrast and captions (Yu et al. 2022). simvlm: captions from their beginnings (Wang et al. 2022)."""
    start: StartOptions = field(default_factory=StartOptions)
    image: ImageOptions = field(default_factory=ImageOptions)
    text: TextOptions = field(default_factory=TextOptions)
    head: HeadOptions = field(default_factory=HeadOptions)
    data: CaptionDataOptions = field(default_factory=CaptionDataOptions)
    batch: BatchOptions = field(default_factory=BatchOptions)
    cache: CacheOptions = field(default_factory=CacheOptions)
    training: ClipTrainingOptions = field(default_factory=ClipTrainingOptions)
    run: RunOptions = field(default_factory=RunOptions)
    plan: PlanOptions = field(default_factory=PlanOptions)


@dataclass
class EvaluateConfig:
    """Measures how well captions and pictures find each other: R@1, R@5, R@10 and median rank, both ways.

    `python -m clip_lab.evaluate` measures the newest run on its own test pictures. Any model on any captioned pictures:
    `python -m clip_lab.evaluate --checkpoint openai/clip-vit-base-patch32 --data flickr8k`.
    """

    checkpoint: str = ""
    """A finished run, or released weights as in probe (openai/clip-vit-base-patch32, RN50:openai); by default the
    newest run under runs/."""
    data: CaptionDataOptions = field(default_factory=CaptionDataOptions)
    split: Literal["train", "validation", "test", "all"] = "test"
    """The pictures to search among; without --data, of the run's own."""
    output: Path | None = None
    """Directory of the results and the report; by default a new one under runs/."""
    seed: CountOrZero = 0
    """Seed of the splits and of the intervals' draws."""
    command: CommandOptions = field(default_factory=CommandOptions)


@dataclass
class SearchOptions:
    """The model and the pictures of a search."""

    checkpoint: str = ""
    """A finished run, or released weights as in probe (openai/clip-vit-base-patch32, RN50:openai); by default the
    newest run under runs/."""
    data: Path | None = None
    """Folder of pictures, with its folders; captions in it are those that pictures look for. Without it, the test
    pictures of the run."""
    captions: Path | None = None
    """Text file with a caption per line, instead of those of the data."""
    index: Path | None = None
    """Directory of the pictures' embeddings, so that only new and changed pictures are computed; by default in the
    user's cache."""
    top: Count = 12
    """Results to show."""
    search: Literal["exact", "faiss"] = "exact"
    """exact: one matrix product. faiss (extra clip-lab[faiss]): an inverted file, for millions of pictures."""
    command: CommandOptions = field(default_factory=CommandOptions)


@dataclass
class RetrieveConfig(SearchOptions):
    """Finds pictures for sentences, and captions for pictures.

    `python -m clip_lab.retrieve "a dog on the beach" "two children" --data photos`, or
    `python -m clip_lab.retrieve --picture dog.jpg --data flickr8k`. `--data` is any folder of pictures; without it,
    the test pictures of the run are searched.
    """

    sentences: tyro.conf.Positional[tuple[str, ...]] = ()
    """Sentences whose pictures are searched."""
    picture: tuple[str, ...] = ()
    """Picture files, for which captions are searched (and similar pictures)."""
    output: Path | None = None
    """Directory of the grid (PNG) and the page (HTML); by default a new one under runs/."""
    batch_size: Count = 64
    """Pictures at once."""
    on_bad_data: OnBadData = "skip"
    """What to do with pictures that cannot be read: leave them out and count them, or stop and name them."""


@dataclass
class DemoConfig(SearchOptions):
    """Serves a page that searches: `python -m clip_lab.demo --data photos` (extra `demo`)."""

    page: PageOptions = field(default_factory=PageOptions)


@dataclass
class FrozenOptions:
    """A frozen model and pictures with classes, for a probe and for zero-shot."""

    checkpoint: str = ""
    """openai/clip-vit-base-patch32 or a directory (transformers), RN50:openai (open_clip), timm:resnet50_clip.openai
    (timm:NAME,FILE.safetensors for weights of a file, timm:NAME,random for none), or a finished run; by default the
    newest under runs/."""
    data: ClassDataOptions = field(default_factory=ClassDataOptions)
    batch_size: Count = 256
    """Pictures at once, in the tower and in a probe's --solver sgd."""
    cache: bool = True
    """Keep the features on disk."""
    output: Path | None = None
    """Directory of the results and the report; by default a new one under runs/."""
    seed: CountOrZero = 0
    """Seed of the splits, and of a probe's draws and --solver sgd."""
    command: CommandOptions = field(default_factory=CommandOptions)


@dataclass
class ProbeConfig(FrozenOptions):
    """One fully connected layer on a frozen image tower: how much do its features tell?

    `python -m clip_lab.probe` probes the newest run of clip_lab.train. Released weights:
    `python -m clip_lab.probe --checkpoint openai/clip-vit-base-patch32 --data cifar-10-batches-py`.
    """

    features: Literal["tower", "embedding"] = "tower"
    """Input of the layer: the tower's feature before the projection, as in the paper, or the embedding."""
    solver: Literal["lbfgs", "sgd"] = "lbfgs"
    """lbfgs: logistic regression on all features at once, its L2 penalty found on the validation pictures. sgd: in
    batches."""
    penalty: NotNegative = 0.0
    """L2 penalty (the paper's lambda, of the mean loss) instead of the search; 0 searches."""
    shots: str = "1,2,4,8,16,all"
    """Training pictures per class for the few-shot curve, separated by commas."""
    draws: Count = 3
    """Draws of training pictures for each of the few-shot counts."""
    epochs: Count = 100
    """Passes over the training pictures, with --solver sgd."""
    learning_rate: Positive = 0.1
    """Highest learning rate, with --solver sgd."""


@dataclass
class ZeroShotConfig(FrozenOptions):
    """Names pictures without having seen one of their classes: by the sentence that fits best.

    `python -m clip_lab.zero_shot` takes the newest run of clip_lab.train. Released weights:
    `python -m clip_lab.zero_shot --checkpoint RN50:openai --data folder-of-classes --templates openai`.
    """

    templates: str = "short"
    """Sentences into which a class's name is put: plain (a single one), short (seven), openai (the eighty that CLIP
    used for ImageNet), or a text file with one per line and {} for the name."""
    names: Path | None = None
    """Text file with a name per class and line, in the data's order, instead of the data's own names."""
    probe: bool = True
    """Compare with a linear probe on the same features."""


@dataclass
class ExportConfig:
    """Writes a model in another library's format: `python -m clip_lab.export --checkpoint runs/… --output exported`."""

    checkpoint: Path | None = None
    """A finished run with --objective clip or siglip; by default the newest under runs/."""
    to: Annotated[str, one_of("clip_lab.saved:FORMATS")] = "transformers"
    """transformers: a VisionTextDualEncoderModel. open_clip: a directory for `create_model("local-dir:DIRECTORY")`, of
    image towers with timm's own arguments and the own text tower."""
    output: Path = Path("exported")
    """Directory to write; it must not exist yet."""
    command: CommandOptions = field(default_factory=CommandOptions)


@dataclass
class CompareConfig:
    """Trains CLIP, CoCa and SimVLM with one budget and reports what each can do.

    `python -m clip_lab.compare` alone compares them offline. The same command started again goes on where it was
    stopped. For real: `python -m clip_lab.compare --data flickr8k --image resnet50 --epochs 20`
    """

    objectives: str = "clip,coca,simvlm"
    """Objectives, separated by commas; options of one follow after colons: coca:caption_weight=1:queries=64."""
    image: ImageOptions = field(default_factory=ImageOptions)
    text: TextOptions = field(default_factory=TextOptions)
    data: CaptionDataOptions = field(default_factory=CaptionDataOptions)
    batch: BatchOptions = field(default_factory=BatchOptions)
    cache: CacheOptions = field(default_factory=CacheOptions)
    training: ClipTrainingOptions = field(default_factory=ClipTrainingOptions)
    ranked: Annotated[int, number(int, "[2, inf)")] = 60
    """Test pictures among which every model finds captions: SimVLM has to read each caption with each picture."""
    classes: str | None = None
    """Pictures with classes to be named, as --data of zero_shot; by default drawn things."""
    comparison: ComparisonOptions = field(default_factory=ComparisonOptions)


@dataclass
class ComparedOptions:
    """The options that may follow an objective's name after colons."""

    head: HeadOptions = field(default_factory=HeadOptions)
    learning_rate: NotNegative = 0.0
    """Highest learning rate."""
