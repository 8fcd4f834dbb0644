"""Every option of the lab, once, with its help text and default. Imports nothing heavy: `--help` is fast."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal, TypeVar

from labs_common.errors import LabError
from labs_common.options import (
    CacheOptions,
    ClassDataOptions,
    CommandOptions,
    ComparisonOptions,
    Count,
    CountOrZero,
    NotNegative,
    PlanOptions,
    Positive,
    RunOptions,
    Share,
    ShareBelowOne,
    TrainingOptions,
    names_in,
    number,
    one_of,
)

Unfreeze = Literal["block", "head", "all"]
Head = Annotated[str, one_of("vit_transfer.model:HEADS")]
Augment = Literal["flip", "crop", "mirror", "deit"]
Asked = Literal["auto", "yes", "no"]
Interpolation = Literal["auto", "bilinear", "bicubic"]
Recipe = Literal["own", "paper"]
Distillation = Annotated[str, one_of("vit_transfer.distill:DISTILLATIONS")]
Norm = Annotated[str, one_of("vit_transfer.perturbations:NORMS")]
TINY = names_in("vit_transfer.tiny:RECIPES")
# The training of arXiv 2110.05270, section 3. Without decay AdamW is Adam, which its notebooks have.
PAPER = (
    "--head=paper", "--head-width=256", "--image-size=224", "--interpolation=bilinear", "--views=2", "--augment=mirror",
    "--epochs=20", "--learning-rate=1e-4", "--schedule=plateau", "--warmup=0", "--weight-decay=0", "--clip-norm=0",
)  # fmt: skip


@dataclass
class ModelOptions:
    """The network, and what of it trains."""

    model: str = "tiny-vit"
    """tiny-vit, tiny-cnn or tiny-deit (pre-trained here on first use, offline), or any timm name; see python -m
    vit_transfer.models."""
    pretrained: bool = True
    """Start from timm's pre-trained weights (downloaded on first use), or from random ones."""
    weights: Path | None = None
    """Start from this .safetensors file of the same architecture; its head may have other classes."""
    image_size: CountOrZero = 0
    """Side of the pictures that the network sees, in pixels; 0 takes the network's own."""
    unfreeze: Unfreeze = "block"
    """What trains: the last block with all that follows it, the head alone, or everything."""
    block: str | None = None
    """The block from which on everything trains (layer4.2); by default the last one of the model's family. Several
    names, with commas between, train by themselves, with the head."""
    head: Head = "linear"
    """New head: one linear layer, an MLP with one hidden layer and a ReLU, or the paper's: hidden layer, ELU,
    dropout."""
    head_width: Count = 512
    """Hidden width of the MLP and of the paper's head."""


@dataclass
class DataOptions(ClassDataOptions):
    """The pictures, and what training does to them."""

    views: Count = 1
    """Versions of each training picture, one per epoch in turn: the first is the picture itself, the others are
    augmented. Each takes its own room in the cache."""
    augment: Augment = "flip"
    """How, with two or more --views: mirrored by chance, a random crop that is mirrored by chance, mirrored in every
    other view (of such views there are two), or the crop with DeiT's RandAugment and random erasing."""
    interpolation: Interpolation = "auto"
    """How pictures are brought to the network's size; auto takes what timm says that it was trained with."""
    label_fraction: Annotated[float, number(float, "(0, 1]")] = 1.0
    """Train on this share of the training pictures of every class, at least one each: 0.01 and 0.1 are usual for few
    labels. The same seed takes a part of what a larger share takes."""


@dataclass
class PictureTrainingOptions(TrainingOptions):
    """The optimizer's budget and settings."""

    epochs: Count = 16
    """Passes over the training pictures."""
    batch_size: CountOrZero = 0
    """Pictures per optimizer step, over all processes together; 0 takes 32, and with --recipe paper 512, 256 for a
    Swin."""
    learning_rate: NotNegative = 0.0
    """Highest learning rate, reached after the warm-up; 0 takes 3e-3 for a block or head of a tiny model, 2e-3 for
    all of it, and 1e-3, 1e-3 and 1e-4 for a real one."""
    weight_decay: NotNegative = 0.01
    """AdamW's decoupled weight decay."""
    label_smoothing: ShareBelowOne = 0.0
    """Share of the target's weight that is spread over all classes."""
    ema: ShareBelowOne = 0.0
    """With --unfreeze all: evaluate and save a moving average of the weights that keeps this share of itself in each
    step (DeiT: 0.99996, over 300 epochs of ImageNet); 0 takes the weights themselves."""


@dataclass
class TrainConfig:
    """Trains one block of a pre-trained network on pictures, and reports what that gave.

    `python -m vit_transfer.train` alone works offline in three minutes: it pre-trains a small vision transformer on
    drawn shapes, then trains its last block to count things, beside its head alone and the same network from scratch.
    The real thing is the same command:
    `accelerate launch -m vit_transfer.train --model vit_small_patch16_224 --data cifar-10-batches-py`.
    """

    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    cache: CacheOptions = field(default_factory=CacheOptions)
    training: PictureTrainingOptions = field(default_factory=PictureTrainingOptions)
    run: RunOptions = field(default_factory=RunOptions)
    plan: PlanOptions = field(default_factory=PlanOptions)
    recipe: Recipe = "own"
    """paper: the training of arXiv 2110.05270 (its head of 256, pictures of 224 by bilinear interpolation and mirrored,
    20 epochs of batches of 512, of 256 for a Swin, Adam at 1e-4, times 0.6 on a plateau); further flags change it."""
    recipes: ClassVar[dict[str, tuple[str, ...]]] = {"paper": PAPER}
    baselines: Asked = "auto"
    """Also train the head alone, and the whole network from scratch, on the same pictures for as many epochs; auto does
    for a tiny model."""


@dataclass
class DistillConfig(TrainConfig):
    """Trains a transformer with a distillation token to say what a CNN says, and reports what that gave (DeiT).

    `python -m vit_transfer.distill` alone works offline: it trains the last block of a small CNN to count things, then
    a small transformer with it as teacher, and without. The real thing is the same command:
    `accelerate launch -m vit_transfer.distill --model deit_tiny_distilled_patch16_224 --teacher runs/block-resnet50-…
    --data cifar-10-batches-py --views 10 --augment crop`.
    """

    model: ModelOptions = field(default_factory=lambda: ModelOptions(model="tiny-deit", unfreeze="all"))
    data: DataOptions = field(default_factory=lambda: DataOptions(views=16, augment="crop"))
    training: PictureTrainingOptions = field(default_factory=lambda: PictureTrainingOptions(epochs=32))
    teacher: str = "tiny-cnn"
    """A finished run's directory, or a network's name: its last block is then trained on the same pictures first."""
    distillation: Distillation = "hard"
    """What the distillation head learns: the teacher's class, or its probabilities at --temperature; soft_mean divides
    the loss of the latter by the number of classes, as DeiT's repository does and its equation 2 does not."""
    weight: Share = 0.0
    """Share of the loss that is the teacher's; 0 takes the paper's, 0.5 for hard and 0.1 for soft."""
    temperature: Positive = 3.0
    """By which soft distillation divides both sides' logits."""
    baselines: Asked = "auto"
    """Also train the same network without a teacher, on the same pictures for as many epochs; auto does for a tiny
    model."""


@dataclass
class AttackConfig:
    """Finds for each network one perturbation that changes what it says of most pictures, and shows what it fools.

    `python -m vit_transfer.attack` alone works offline: it trains the last blocks of a small CNN and a small
    transformer to count things, then attacks both. For real:
    `python -m vit_transfer.attack --models runs/block-resnet50-…,runs/block-deit_small-… --data cifar-10-batches-py`
    """

    models: str = "tiny-cnn,tiny-vit"
    """Networks, separated by commas: directories of finished runs, or names: their last block is then trained on the
    pictures first."""
    norm: Norm = "linf"
    """What is bounded: the largest change of a level, or the square root of the summed squares of all."""
    radius: NotNegative = 0.0
    """The bound, on levels of 0 to 255; 0 takes the paper's: 10 for linf, and for l2 2000 at 224 pixels, in proportion
    to the side at other sizes."""
    wanted: Annotated[float, number(float, "(0, 1]")] = 0.8
    """Fooling rate on the pictures used at which the search ends."""
    passes: Count = 10
    """Most passes over the pictures used."""
    used: str = "50,100,200"
    """Numbers of training pictures that a perturbation is made from, separated by commas."""
    data: DataOptions = field(default_factory=DataOptions)
    cache: CacheOptions = field(default_factory=CacheOptions)
    training: PictureTrainingOptions = field(default_factory=PictureTrainingOptions)
    run: RunOptions = field(default_factory=RunOptions)


@dataclass
class CompareConfig:
    """Trains several networks on the same pictures with one budget and reports on them: CNNs beside transformers.

    `python -m vit_transfer.compare` alone compares a small CNN and a small transformer offline, each with its last
    block, its head alone and from scratch. The same command started again goes on where it was stopped. For real:
    `python -m vit_transfer.compare --models resnet50,densenet121,deit_small_patch16_224,swin_tiny_patch4_window7_224
    --data cifar-10-batches-py --head mlp --seeds 3`
    """

    models: str = (
        "tiny-vit,tiny-cnn,tiny-vit:unfreeze=head,tiny-cnn:unfreeze=head,"
        "tiny-vit:unfreeze=all:no-pretrained,tiny-cnn:unfreeze=all:no-pretrained"
    )
    """Networks, separated by commas; options of one follow after colons: resnet50:unfreeze=head:learning_rate=1e-3."""
    recipe: Recipe = "own"
    """paper: all train as in arXiv 2110.05270 (see vit_transfer.train); further flags change it."""
    recipes: ClassVar[dict[str, tuple[str, ...]]] = {"paper": PAPER}
    head: Head = "linear"
    """New head of all: one linear layer, an MLP with one hidden layer and a ReLU, or the paper's: hidden layer, ELU,
    dropout."""
    head_width: Count = 512
    """Hidden width of the MLP and of the paper's head."""
    image_size: CountOrZero = 0
    """Side of the pictures that the networks see, in pixels; 0 takes each one's own."""
    data: DataOptions = field(default_factory=DataOptions)
    cache: CacheOptions = field(default_factory=CacheOptions)
    training: PictureTrainingOptions = field(default_factory=PictureTrainingOptions)
    comparison: ComparisonOptions = field(default_factory=ComparisonOptions)


@dataclass
class ComparedOptions(ModelOptions):
    """The options that may follow a network's name after colons."""

    learning_rate: NotNegative = 0.0
    """Highest learning rate."""


@dataclass
class ModelsConfig:
    """Lists the families that the lab compares: for each network its last block and what that block holds.

    `python -m vit_transfer.models` lists the catalogue, `python -m vit_transfer.models --names resnet50,convnext_tiny`
    those networks, with the names of the parameters that `--unfreeze block` trains.
    """

    names: str | None = None
    """Networks, separated by commas, instead of the whole catalogue; of a network that is not in it, its parts."""
    command: CommandOptions = field(default_factory=CommandOptions)


Config = TypeVar("Config", bound=TrainConfig)


def complete(config: Config) -> Config:
    """Fills in the defaults that depend on the model: learning rate, batch size and baselines.

    Raises:
        LabError: options that contradict each other.
    """
    model, training = config.model, config.training
    if model.weights is not None and not model.weights.is_file():
        raise LabError(f"--weights {model.weights}: no such file")
    if model.weights is not None and model.weights.suffix != ".safetensors":
        raise LabError(f"--weights {model.weights}: must be a .safetensors file; convert it with safetensors.torch")
    if model.block is not None and model.unfreeze != "block":
        raise LabError(f"--block: is what --unfreeze block trains; drop it, or --unfreeze {model.unfreeze}")
    if config.data.views == 1 and config.data.augment != type(config)().data.augment:
        raise LabError(f"--augment {config.data.augment}: changes the views after the first alone; add --views "
                       f"{training.epochs}, another one for each epoch")  # fmt: skip
    if training.ema and model.unfreeze != "all":
        raise LabError(f"--ema: is of --unfreeze all; drop it, or --unfreeze {model.unfreeze}")
    tiny = model.model in TINY
    usual = {"block": 3e-3, "head": 3e-3, "all": 2e-3} if tiny else {"block": 1e-3, "head": 1e-3, "all": 1e-4}
    # Head alone and from scratch are other things than this run only if it trains a block of a pre-trained network.
    comparable = model.unfreeze == "block" and (model.pretrained or model.weights is not None)
    baselines: Asked = config.baselines
    if baselines == "auto":
        baselines = "yes" if tiny and comparable else "no"
    if baselines == "yes" and not comparable:
        raise LabError("--baselines yes: compares with --unfreeze block of a pre-trained model; drop one of them")
    rate = training.learning_rate or usual[model.unfreeze]
    usual_size = 32 if config.recipe == "own" else 256 if "swin" in model.model else 512
    training = dataclasses.replace(training, learning_rate=rate, batch_size=training.batch_size or usual_size)
    return dataclasses.replace(config, training=training, baselines=baselines)
