"""The options of `pretrain` and `compare`, each once. Nothing here imports torch, so `--help` stays fast."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from labs_common.options import (
    ClassDataOptions,
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
    number,
    one_of,
)
from zsi_contrastive import TINY

MethodName = Annotated[str, one_of("zsi_contrastive.ssl.methods:METHODS")]
Optimizer = Literal["auto", "sgd", "lars", "adamw"]
RESNETS = ("resnet", "resnext", "wide_resnet")  # what the names of torchvision's ResNets begin with
RESNET50_V2 = "resnet50v2"  # the network of Greedy InfoMax's paper


@dataclass
class PretrainDataOptions(ClassDataOptions):
    """Pictures to learn from. Labels, where there are any, only measure what was learnt."""

    data: str | None = None
    """CIFAR-10, a directory per class, .parquet files, a Hugging Face id, or a directory of pictures without classes
    (coco/train2017). Without it, drawn scenes."""
    validation_fraction: Annotated[float, number(float, "[0, 0.9)")] = 0.1
    """Share of the training pictures of every class set aside for validation, unless the data has its own; 0 trains on
    all of them, as benchmarks do."""


@dataclass
class EncoderOptions:
    """The network that learns."""

    backbone: str = TINY
    """tiny, a ResNet of torchvision (resnet18), or a network of timm (vit_tiny_patch16_224); gim and cpc have networks
    of their own: tiny and resnet50v2."""
    stem: Literal["usual", "small"] = "usual"
    """small gives a torchvision ResNet a 3 × 3 first convolution and no pooling, as is usual for CIFAR-10."""
    side: Annotated[int, number(int, "[8, inf)", 0)] = 0
    """Side of the views in pixels; 0 takes 32 for tiny networks and small stems, and 224."""
    drop_path: ShareBelowOne = 0.0
    """Stochastic depth of the network that learns, for networks of timm: 0.1 in DINO. A teacher has none."""


@dataclass
class ViewOptions:
    """Random changes of a picture, made twice or more, on the device."""

    crop_scale: Annotated[tuple[float, float], number(float, "[0, 1]", count=2)] = (0.0, 1.0)
    """Smallest and largest share of the picture's area that a view shows; 0 takes the method's: 0.08, and 0.14 or with
    local crops 0.4 for dino."""
    local_crops: Annotated[int, number(int, "[0, inf)", -1)] = -1
    """Further small views that only the student sees (multi-crop); -1 takes the method's: 4 for dino, 0 for others."""
    local_side: CountOrZero = 0
    """Their side in pixels; 0 takes half of the others'."""
    local_scale: Annotated[tuple[float, float], number(float, "[0, 1]", count=2)] = (0.05, 0.4)
    """Share of the area that they show."""
    flip: Share = 0.5
    """Share of views that are mirrored."""
    jitter: Share = 0.5
    """Strength of random brightness, contrast, saturation and hue, for four views of five; 0 turns it off."""
    saturation: NotNegative = 0.0
    """Change of saturation at strength 1, where that of brightness and contrast is 0.8; 0 takes the method's: 0.8, and
    0.4 for byol and dino."""
    grey: Share = 0.2
    """Share of views without colours."""
    blur: Annotated[tuple[float, float, float], number(float, "[0, 1]", count=3)] = (0.0, 0.0, 0.0)
    """Shares of first, second and small views that are blurred. For large pictures 0.5 0.5 0.5 is usual, and
    1.0 0.1 0.5 for byol and dino."""
    solarize: Annotated[tuple[float, float, float], number(float, "[0, 1]", -1, count=3)] = (-1.0, -1.0, -1.0)
    """Shares of first, second and small views with inverted highlights; -1 takes the method's: 0, and 0.2 of the
    second for byol and dino."""


@dataclass
class MethodOptions:
    """Options of single methods. 0 or -1 takes the method's own value."""

    loss: Literal["nt-xent", "debiased", "hard-negative", "nce", "hadsell", "supervised"] = "nt-xent"
    """The loss of simclr. nce tells data from noise, hadsell draws pairs together and pushes others a margin of 1
    apart, supervised draws pictures of one class together and is the only one that learns from labels."""
    prior: ShareBelowOne = 0.1
    """Share of negatives that are of the same class, for debiased and hard-negative."""
    hardness: NotNegative = 1.0
    """Weight of near negatives over far ones, for hard-negative; 0 weighs all alike."""
    temperature: NotNegative = 0.0
    """By which cosines are divided: 0.5 for simclr (0.2 with tiny; 0.1 is the paper's of supervised), 0.1 for moco and
    dino's student."""
    momentum: Annotated[float, number(float, "[0, 1]", -1)] = -1.0
    """Share of the teacher's weights kept at every step: 0.99 for moco, byol and dino. 0 copies the student."""
    momentum_end: Annotated[float, number(float, "[0, 1]", -1)] = -1.0
    """Its value at the end, reached along half a cosine: moco's stays, byol's and dino's become 1; 0 stays 0."""
    queue: CountOrZero = 0
    """Keys of earlier steps that moco compares with; 4096."""
    hidden: CountOrZero = 0
    """Width of the heads inside: 512, byol 1024, dino, barlow and vicreg 2048; a quarter of that for tiny."""
    outputs: CountOrZero = 0
    """Width of their outputs: 128, byol 256, dino 2048 prototypes, barlow and vicreg 2048; 512 of these for tiny."""
    head_norm: Literal["auto", "batch", "layer", "none"] = "auto"
    """Normalisation in the heads; auto is none for dino, but batch with tiny, and batch for others. With layer, and an
    encoder without batch norms, several processes equal one."""
    head_layers: CountOrZero = 0
    """Layers of the projection; 2, and 3 for barlow, vicreg and, before its prototypes, dino."""
    norm_splits: CountOrZero = 0
    """Parts of each view's batch that go through the network apart, so that batch norms see no other: 1 keeps the two
    views apart, 8 is moco's in lightly's benchmark, with shuffled keys. 0 takes all views together."""
    predictor: Literal["mlp", "none"] = "mlp"
    """byol's prediction of the teacher's output; without it features collapse."""
    teacher_temperature: NotNegative = 0.0
    """dino's, after centring, when it is warm; 0 takes 0.07, and 0.04 with tiny."""
    teacher_temperature_start: Positive = 0.04
    """From which it rises evenly."""
    teacher_warmup: CountOrZero = 30
    """Epochs in which it does."""
    centring: Literal["mean", "sinkhorn", "none"] = "mean"
    """Keeps dino's teacher from one answer for all: the mean of its answers is subtracted, or Sinkhorn-Knopp. With none
    features collapse."""
    koleo: NotNegative = 0.0
    """Weight of the KoLeo regulariser on dino's student, as in DINOv2 (there 0.1)."""
    freeze_last: CountOrZero = 1
    """Epochs in which dino's prototypes stay."""
    ahead: Count = 5
    """Rows of patches below that gim and cpc predict."""
    negatives: Count = 16
    """Patches drawn from the batch that the right one is told from, for gim and cpc."""


# The methods of options that the others would ignore; sizes of heads and of the queue are taken where there are any.
OF_METHODS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("loss", "prior", "hardness"), ("simclr",)),
    "temperature": ("simclr", "moco", "dino"),
    **dict.fromkeys(("momentum", "momentum_end"), ("moco", "byol", "dino")),
    "norm_splits": ("simclr", "moco", "byol", "barlow", "vicreg", "dino"),
    "predictor": ("byol",),
    **dict.fromkeys(("teacher_temperature", "teacher_temperature_start", "teacher_warmup"), ("dino",)),
    **dict.fromkeys(("centring", "koleo", "freeze_last"), ("dino",)),
    **dict.fromkeys(("ahead", "negatives"), ("gim", "cpc")),
}


@dataclass
class PretrainTrainingOptions(TrainingOptions):
    """Optimizer and schedule."""

    epochs: CountOrZero = 0
    """Passes over the training pictures; 0 takes 200, and 15 for tiny."""
    batch_size: CountOrZero = 0
    """Pictures per optimizer step, over all processes together; 0 takes 512, and 256 for tiny."""
    optimizer: Optimizer = "auto"
    """SGD or LARS with momentum 0.9, or AdamW; auto is SGD for convolutional networks, AdamW for tiny, gim, cpc and
    transformers, and LARS for byol with tiny."""
    learning_rate: NotNegative = 0.0
    """Highest learning rate, reached after the warm-up; 0 takes 0.06 per 128 pictures for SGD, 0.3 per 256 for LARS (2
    with tiny), 2e-3 for AdamW and 2e-4 for gim and cpc (2e-3 with tiny)."""
    warmup: Share = 0.05
    """Share of all steps over which the learning rate rises from zero."""
    weight_decay: Annotated[float, number(float, "[0, inf)", -1)] = -1.0
    """AdamW's decoupled weight decay, or that of SGD and LARS; -1 takes 5e-4 for SGD, 1e-6 for LARS and 0.04 for AdamW,
    0 for gim and cpc."""
    weight_decay_end: Annotated[float, number(float, "[0, inf)", -1)] = -1.0
    """Its value at the end, reached along half a cosine (0.4 in DINO); -1 leaves it."""
    clip_norm: Annotated[float, number(float, "[0, inf)", -1)] = -1.0
    """Gradients with a larger L2 norm are scaled down to it; 0 turns clipping off, -1 takes 3 for dino and 0 for
    others."""
    evaluate_every: CountOrZero = 0
    """Optimizer steps between evaluations; 0 makes about twelve of them."""


@dataclass
class MeasureOptions:
    """Measures of what was learnt."""

    neighbours: CountOrZero = 0
    """Training pictures that vote on a picture's class; 0 takes 200, and 20 of fewer than 10,000."""
    knn_temperature: Positive = 0.1
    """By which a voter's cosine is divided before it counts as exp of that: 0.1 in lightly's benchmark, 0.07 in Wu et
    al. 2018 and DINO."""
    bank: Count = 50_000
    """Training pictures that are asked at most."""
    measured: Literal["auto", "learner", "teacher"] = "auto"
    """Whose features are measured and saved; auto is the learner's, and the teacher's for dino."""
    probe: bool = True
    """Fit a linear layer on the features at the end."""
    probe_epochs: CountOrZero = 0
    """Epochs of a second probe by the papers' protocol: SGD on features of pictures that are cropped and mirrored by
    chance; 100 is usual, 0 leaves it out."""
    projected: bool = False
    """Measure kNN accuracy after the projection too, where the loss is; features are taken before it."""
    map: Literal["tsne", "pca", "none"] = "tsne"
    """Method that draws the features in two dimensions."""


@dataclass
class PretrainConfig:
    """Learns features from pictures without labels, and says how good they are.

    `python -m zsi_contrastive.pretrain` alone works offline in under three minutes: SimCLR on drawn scenes. Other
    methods: `--method byol`. Pictures of your own: `--data coco/train2017 --backbone resnet50`. The CIFAR-10 benchmark:
    `accelerate launch -m zsi_contrastive.pretrain --config configs/cifar10_simclr.yaml --data cifar-10-batches-py`.
    `model/encoder.safetensors` then starts a detector (`zsi_contrastive.train --backbone-weights`).
    """

    method: MethodName = "simclr"
    """simclr: negatives in the batch; moco: in a queue; byol: none, but a teacher; dino: a teacher's distributions;
    barlow, vicreg: outputs that do not correlate;
    gim: patches, three modules that learn alone; cpc: the same in one with a context."""
    data: PretrainDataOptions = field(default_factory=PretrainDataOptions)
    encoder: EncoderOptions = field(default_factory=EncoderOptions)
    views: ViewOptions = field(default_factory=ViewOptions)
    own: MethodOptions = field(default_factory=MethodOptions)
    training: PretrainTrainingOptions = field(default_factory=PretrainTrainingOptions)
    measure: MeasureOptions = field(default_factory=MeasureOptions)
    run: RunOptions = field(default_factory=RunOptions)
    plan: PlanOptions = field(default_factory=PlanOptions)


@dataclass
class CompareConfig:
    """Pre-trains with several methods under one budget and reports on them in one table.

    `python -m zsi_contrastive.compare` alone takes drawn scenes and shows what negatives, a teacher's momentum,
    multi-crop and the batch size do. The same command started again goes on where it was stopped.
    """

    methods: str = (
        "simclr,simclr:batch_size=64,moco,moco:queue=256,byol,byol:momentum=0,byol:predictor=none,"
        "dino,dino:local_crops=0,dino:centring=none,gim,cpc"
    )
    """Methods to compare, each with options of pretrain after colons."""
    data: PretrainDataOptions = field(default_factory=PretrainDataOptions)
    encoder: EncoderOptions = field(default_factory=EncoderOptions)
    views: ViewOptions = field(default_factory=ViewOptions)
    own: MethodOptions = field(default_factory=MethodOptions)
    training: PretrainTrainingOptions = field(default_factory=PretrainTrainingOptions)
    measure: MeasureOptions = field(default_factory=MeasureOptions)
    comparison: ComparisonOptions = field(default_factory=ComparisonOptions)


@dataclass
class ComparedOptions:
    """Options that may follow a method's name after colons; the rest is one budget for all."""

    own: MethodOptions = field(default_factory=MethodOptions)
    batch_size: CountOrZero = 0
    """Pictures per optimizer step."""
    local_crops: Annotated[int, number(int, "[0, inf)", -1)] = -1
    """Small views that only dino's student sees."""
    learning_rate: NotNegative = 0.0
    """Highest learning rate."""
    optimizer: Optimizer = "auto"
    """auto is the method's own."""
