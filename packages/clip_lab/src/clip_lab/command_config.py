"""Every option of the commands besides `train`, with its help text and default."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from clip_lab.config import BatchOptions, CacheOptions, ClipTrainingOptions, ImageOptions, TextOptions
from labs_common.options import (
    CaptionDataOptions,
    ClassDataOptions,
    CommandOptions,
    ComparisonOptions,
    OnBadData,
    PageOptions,
)


@dataclass
class RetrieveConfig:
    """Finds pictures for sentences, and captions for pictures.

    `python -m clip_lab.retrieve "a dog on the beach" "two children" --data photos`, or
    `python -m clip_lab.retrieve --picture dog.jpg --data flickr8k`. `--data` is any folder of pictures; without it,
    the test pictures of the run are searched.
    """

    sentences: tyro.conf.Positional[tuple[str, ...]] = ()
    """What to look for."""
    picture: tuple[str, ...] = ()
    """Picture files, for which captions are looked for (and similar pictures)."""
    checkpoint: str = ""
    """A finished run, or released weights as in probe (openai/clip-vit-base-patch32, RN50:openai); by default the
    newest run under runs/."""
    data: Path | None = None
    """Folder of pictures, with its folders; captions in it are those that pictures look for."""
    captions: Path | None = None
    """Text file with a caption per line, instead of those of the data."""
    index: Path | None = None
    """Where the pictures' embeddings are kept, so that only new and changed pictures are computed; by default in the
    user's cache."""
    search: Literal["exact", "faiss"] = "exact"
    """exact: one matrix product. faiss (extra clip-lab[faiss]): an inverted file, for millions of pictures."""
    top: int = 12
    """How many to show."""
    output: Path | None = None
    """Directory of the grid (PNG) and the page (HTML); by default a new one under runs/."""
    batch_size: int = 64
    """Pictures at once."""
    on_bad_data: OnBadData = "skip"
    """What to do with pictures that cannot be read: leave them out and count them, or stop and name them."""
    command: CommandOptions = field(default_factory=CommandOptions)


@dataclass
class ProbeConfig:
    """One fully connected layer on a frozen image tower: how much do its features tell?

    `python -m clip_lab.probe` probes the newest run of clip_lab.train. Released weights:
    `python -m clip_lab.probe --checkpoint openai/clip-vit-base-patch32 --data cifar-10-batches-py`.
    """

    checkpoint: str = ""
    """openai/clip-vit-base-patch32 or a directory (transformers), RN50:openai (open_clip), timm:resnet50_clip.openai
    (timm:NAME,random for weights that were never trained), or a finished run; by default the newest under runs/."""
    data: ClassDataOptions = field(default_factory=ClassDataOptions)
    features: Literal["tower", "embedding"] = "tower"
    """What the layer reads: the tower's feature before the projection, as the paper does, or the embedding."""
    solver: Literal["lbfgs", "sgd"] = "lbfgs"
    """lbfgs: logistic regression on all features at once, its L2 penalty found on the validation pictures. sgd: in
    batches."""
    penalty: float = 0.0
    """L2 penalty (the paper's lambda, of the mean loss) instead of the search; 0 searches."""
    shots: str = "1,2,4,8,16,all"
    """Training pictures per class for the few-shot curve, separated by commas."""
    draws: int = 3
    """How often pictures are drawn for each of the few-shot counts."""
    epochs: int = 100
    """Passes over the training pictures, with --solver sgd."""
    batch_size: int = 256
    """Pictures at once, in the tower and in --solver sgd."""
    learning_rate: float = 0.1
    """Highest learning rate, with --solver sgd."""
    cache: bool = True
    """Keep the features on disk."""
    output: Path | None = None
    """Directory of what is written; by default a new one under runs/."""
    seed: int = 0
    """Seed of splits, draws and --solver sgd."""
    command: CommandOptions = field(default_factory=CommandOptions)


@dataclass
class ZeroShotConfig:
    """Names pictures without having seen one of their classes: by the sentence that fits best.

    `python -m clip_lab.zero_shot` takes the newest run of clip_lab.train. Released weights:
    `python -m clip_lab.zero_shot --checkpoint RN50:openai --data folder-of-classes --templates openai`.
    """

    checkpoint: str = ""
    """As in probe: openai/clip-vit-base-patch32, RN50:openai, a directory, or a finished run; by default the newest
    under runs/."""
    data: ClassDataOptions = field(default_factory=ClassDataOptions)
    templates: str = "short"
    """Sentences into which a class's name is put: plain (a single one), short (seven), openai (the eighty that CLIP
    used for ImageNet), or a text file with one per line and {} for the name."""
    names: Path | None = None
    """Text file with a name per class and line, in the data's order, instead of the data's own names."""
    probe: bool = True
    """Compare with a linear probe on the same features."""
    batch_size: int = 256
    """Pictures at once."""
    cache: bool = True
    """Keep the features on disk."""
    output: Path | None = None
    """Directory of what is written; by default a new one under runs/."""
    seed: int = 0
    """Seed of the splits."""
    command: CommandOptions = field(default_factory=CommandOptions)


@dataclass
class DemoConfig:
    """Serves a page that searches: `python -m clip_lab.demo --data photos` (extra `demo`)."""

    checkpoint: str = ""
    """A finished run, or released weights; by default the newest under runs/."""
    data: Path | None = None
    """Folder of pictures; without it, the test pictures of the run."""
    captions: Path | None = None
    """Text file with a caption per line, instead of those of the data."""
    index: Path | None = None
    """Where the pictures' embeddings are kept; by default in the user's cache."""
    top: int = 12
    """How many to show."""
    page: PageOptions = field(default_factory=PageOptions)
    command: CommandOptions = field(default_factory=CommandOptions)


@dataclass
class ExportConfig:
    """Writes a model in another library's format: `python -m clip_lab.export --checkpoint runs/… --output exported`."""

    checkpoint: Path | None = None
    """A finished run with --objective clip or siglip; by default the newest under runs/."""
    to: Literal["transformers", "open_clip"] = "transformers"
    """transformers: a VisionTextDualEncoderModel. open_clip: what `create_model("local-dir:DIRECTORY")` reads, of image
    towers with timm's own arguments and the own text tower."""
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
    ranked: int = 60
    """Test pictures among which every model finds captions: SimVLM has to read each caption with each picture."""
    classes: str | None = None
    """Pictures with classes to be named, as --data of zero_shot; by default drawn things."""
    comparison: ComparisonOptions = field(default_factory=ComparisonOptions)
