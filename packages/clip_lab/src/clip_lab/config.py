"""Every option of every command, once, with its help text and default. Imports nothing heavy: `--help` is fast."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from labs_common.errors import LabError
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

Options = TypeVar("Options")
Augment = Literal["none", "crop", "crop+colour"]
TINY, OWN = "tiny-cnn", "own"  # the names of the towers that are not a library's
TRAIN, FINISHED = "clip_lab.train", "clip.json"  # the command that writes a model, and the file that tells one
MOST_SCALE = 100.0  # Radford et al. 2021, section 2.5: above it, training becomes unstable


@dataclass
class ImageOptions:
    """The image tower."""

    image: str = TINY
    """tiny-cnn (for a CPU) or any timm name: resnet50, vit_base_patch32_224, vit_small_patch16_224, convnext_tiny."""
    image_pretrained: bool = False
    """Start from timm's pre-trained weights (downloaded on first use); else from scratch."""
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

    text: str = OWN
    """own (a causal transformer whose feature is at the end token) or a Hugging Face encoder by name or path:
    bert-base-uncased, xlm-roberta-base."""
    text_pretrained: bool = True
    """With a Hugging Face encoder: start from its weights."""
    text_width: CountOrZero = 0
    """Width of the own transformer; 0 takes 512, and 128 with the tiny image tower."""
    text_layers: CountOrZero = 0
    """Its layers; 0 takes 12 (CLIP's own), and 2 with the tiny image tower."""
    text_heads: CountOrZero = 0
    """Its heads; 0 takes 8, and 4 with the tiny image tower."""
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
    """Factor of the cosines at first (1 / temperature); it is learnt, and never above 100. SigLIP's own start is 10."""
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
    """Passes over the training pictures; 0 takes 8 for drawn scenes, else 30."""
    batch_size: CountOrZero = 0
    """Pictures per optimizer step, over all processes together; 0 takes 128 with the tiny image tower, else 256. The
    rest of an epoch that fills no batch is left out."""
    learning_rate: NotNegative = 0.0
    """Highest learning rate, reached after the warm-up; 0 takes 4e-3 with the tiny image tower, else 5e-4."""
    tower_learning_rate: NotNegative = 0.0
    """That of towers that started from pre-trained weights; 0 takes a tenth of the other."""
    warmup: Share = 0.1
    """Share of all steps over which the learning rate rises from zero."""
    weight_decay: NotNegative = 0.1
    """AdamW's decoupled weight decay, of matrices only."""
    watch: Literal["recall", "loss"] = "recall"
    """Score on the validation pictures for --patience: mean recall (1, 5 and 10, both ways), or the loss."""


@dataclass
class TrainConfig:
    """Trains CLIP on pictures with captions, and reports how well each finds the other.

    `python -m clip_lab.train` alone works offline on drawn scenes. The real thing is the same command:
    `accelerate launch -m clip_lab.train --image resnet50 --image-pretrained --data flickr8k`.
    Then `python -m clip_lab.retrieve "a dog on the beach" --data photos`.
    """

    objective: Annotated[str, one_of("clip_lab.losses:OBJECTIVES")] = "clip"
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
    plan: PlanOptions = field(default_factory=PlanOptions)


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
    (timm:NAME,random for weights that were never trained), or a finished run; by default the newest under runs/."""
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
    stopped. For real: `python -m clip_lab.compare --data flickr8k --image resnet50 --image-pretrained --epochs 20`
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


def complete(config: TrainConfig) -> TrainConfig:
    """Puts a default in the place of every option that was left to the towers and the data.

    Raises:
        LabError: options contradict each other.
    """
    _check(config)
    text, training = config.text, config.training
    tiny, drawn = config.image.image == TINY, config.data.data is None
    layers = text.text_layers or (2 if tiny else 12)
    rate = training.learning_rate or (4e-3 if tiny else 5e-4)
    return dataclasses.replace(
        config,
        text=_filled(
            text,
            text_width=128 if tiny else 512,
            text_layers=layers,
            text_heads=4 if tiny else 8,
            tokenizer="sentencepiece" if text.text == OWN else text.text,
            vocabulary=4000,
        ),
        head=_filled(config.head, embedding=128 if tiny else 512, queries=16 if tiny else 256, decoder_layers=layers),
        batch=_filled(config.batch, augment="none" if drawn else "crop"),
        training=_filled(
            training,
            epochs=8 if drawn else 30,
            batch_size=128 if tiny else 256,
            learning_rate=rate,
            tower_learning_rate=rate / 10,
        ),
    )


def _filled(options: Options, **defaults: Any) -> Options:
    """Puts the defaults in the place of options that are 0, empty or None."""
    given = {name: getattr(options, name) or value for name, value in defaults.items()}
    return dataclasses.replace(options, **given)  # type: ignore[type-var]


def _check(config: TrainConfig) -> None:
    """Refuses what no training can do; `losses.check_objective` refuses what an objective cannot."""
    image, text, head = config.image, config.text, config.head
    weights = image.image_weights
    heads = text.text_heads or 4
    refusals = (
        (weights is not None and weights.suffix != ".safetensors",
         f"--image-weights {weights}: must be a .safetensors file; convert it with safetensors.torch"),
        (weights is not None and not weights.is_file(), f"--image-weights {weights}: no such file"),
        (weights is not None and image.image_pretrained, "--image-pretrained and --image-weights: give one of them"),
        (text.text_width % heads, f"--text-width {text.text_width}: must be a multiple of --text-heads {heads}"),
        (image.views > 1 and not image.freeze_image,
         "--views: is of --freeze-image; other towers see a new version every epoch"),
        (not head.contrastive_weight + head.caption_weight,
         "--contrastive-weight and --caption-weight must not both be 0"),
        (text.text != OWN and text.tokenizer not in ("", text.text),
         f"--tokenizer {text.tokenizer}: --text {text.text} has its own"),
        (text.freeze_text and text.text == OWN,
         f"--freeze-text: --text {OWN} is trained from scratch; name a Hugging Face encoder in --text"),
        (image.freeze_image and not (image.image_pretrained or weights),
         "--freeze-image: the tower has random weights; add --image-pretrained or --image-weights FILE"),
        (config.data.splits is not None and not config.data.splits.is_dir(),
         f"--splits {config.data.splits}: no such directory"),
    )  # fmt: skip
    for wrong, message in refusals:
        if wrong:
            raise LabError(message)
