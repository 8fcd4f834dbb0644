"""The methods: the loss of a step, what each remembers between steps, and its defaults, all in the table `METHODS`."""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from timm.layers import DropPath

from labs_common.errors import LabError, RunStopped
from labs_common.gathering import gathered
from zsi_contrastive import TINY
from zsi_contrastive.losses import own_places
from zsi_contrastive.ssl.config import OF_METHODS, RESNET50_V2, RESNETS, MethodOptions, PretrainConfig
from zsi_contrastive.ssl.losses import (
    barlow_twins_loss,
    byol_loss,
    debiased_loss,
    dino_loss,
    hadsell_loss,
    koleo_loss,
    moco_loss,
    moved_centre,
    nce_of_views,
    nt_xent_loss,
    sharpened,
    sinkhorn_knopp,
    supervised_loss,
    vicreg_loss,
)
from zsi_contrastive.ssl.model import Learner, on_patches, with_projection, with_prototypes


@dataclass(frozen=True)
class Method:
    """A way to learn without labels.

    Attributes:
        loss: from a step to its loss. It runs the prepared network once, as DistributedDataParallel needs it.
        network: makes the untrained network of a completed config.
        about: in a few words, what keeps its features from collapsing.
        remembers: the parts of `Memory` that it needs.
        measured: whose features count, and are saved.
        full_views: views of a picture at full size.
        small_views: whether it can use further small ones (--local-crops).
        on_patches: whether it needs networks of its own that see a picture as patches.
        defaults: its values of options that the user left open (0, -1 or auto), where they are not `DEFAULTS`. A
            learning rate or weight decay is that of its own optimizer.
        tiny: the same for the tiny encoder.
    """

    loss: Callable[["Step"], torch.Tensor]
    network: Callable[[PretrainConfig], torch.nn.Module]
    about: str
    remembers: tuple[Literal["teacher", "queue", "centre"], ...] = ()
    measured: Literal["learner", "teacher"] = "learner"
    full_views: int = 2
    small_views: bool = False
    on_patches: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    tiny: Mapping[str, Any] = field(default_factory=dict)


class Memory:
    """The state of a method between steps, besides the weights that learn; saved and resumed with the run.

    Parts that the method has no use for are None.

    Attributes:
        teacher: a moving average of the learner, without its prediction; no gradient ever reaches it. It stays in
            training mode: its batch norms take the batch's statistics, as the learner's do.
        queue: normalised keys of earlier steps (keys, outputs), the oldest from `place` on.
        centre: mean of the teacher's logits (prototypes,).
    """

    def __init__(self, config: PretrainConfig, learner: torch.nn.Module, device: torch.device) -> None:
        own, parts = config.own, METHODS[config.method].remembers
        self.teacher: Learner | None = None
        self.queue = self.centre = None
        self.place = 0
        if "teacher" in parts:
            assert isinstance(learner, Learner)
            parts_of = copy.deepcopy((learner.encoder, learner.projection))
            self.teacher = Learner(*parts_of, splits=learner.splits)
            for module in self.teacher.modules():
                if isinstance(module, DropPath):
                    module.drop_prob = 0.0
            self.teacher.requires_grad_(False).to(device)
        if "queue" in parts:  # random directions until there are keys, as in MoCo's own code
            generator = torch.Generator().manual_seed(config.run.seed)
            self.queue = F.normalize(torch.randn(own.queue, own.outputs, generator=generator), dim=1).to(device)
        if "centre" in parts:
            self.centre = torch.zeros(own.outputs, device=device)

    @torch.no_grad()
    def update_teacher(self, learner: torch.nn.Module, momentum: float) -> None:
        """Moves the teacher's parameters to the learner's: a share `momentum` stays. Its buffers are its own."""
        if self.teacher is None:
            return
        assert isinstance(learner, Learner)
        own: list[torch.Tensor] = list(self.teacher.parameters())
        fresh: list[torch.Tensor] = [*learner.encoder.parameters(), *learner.projection.parameters()]
        torch._foreach_lerp_(own, fresh, 1 - momentum)  # one kernel for all on a GPU

    @torch.no_grad()
    def enqueue(self, keys: torch.Tensor) -> None:
        """Puts the keys (n, outputs) of all processes into the queue, in the place of the oldest."""
        assert self.queue is not None
        keys = F.normalize(gathered(keys.detach()).to(self.queue), dim=1)[-len(self.queue) :]
        places = (self.place + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue[places] = keys
        self.place = (self.place + len(keys)) % len(self.queue)

    def check_teacher(self, optimizer: torch.optim.Optimizer) -> int:
        """Counts the teacher's tensors, after making sure that only `update_teacher` can have moved them.

        Raises:
            RunStopped: one has a gradient, or is the optimizer's.
        """
        if self.teacher is None:
            return 0
        optimized = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for name, parameter in self.teacher.named_parameters():
            if parameter.requires_grad or parameter.grad is not None or id(parameter) in optimized:
                raise RunStopped(f"the teacher's {name} was given a gradient")
        return len(list(self.teacher.parameters()))

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that the next step depends on."""
        teacher = None if self.teacher is None else self.teacher.state_dict()
        return {"teacher": teacher, "queue": self.queue, "place": self.place, "centre": self.centre}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        if self.teacher is not None:
            self.teacher.load_state_dict(state["teacher"])
        if self.queue is not None:
            self.queue.copy_(state["queue"])
        if self.centre is not None:
            self.centre = state["centre"].to(self.centre.device)
        self.place = int(state["place"])


class Step(NamedTuple):
    """Everything that the loss of a step is computed from.

    Attributes:
        network: the prepared network.
        views: of this process's pictures, each (own, 3, side, side).
        teacher_temperature: dino's, as warm as it is now.
        labels: of this process's pictures (own,), where the loss learns from them.
    """

    network: torch.nn.Module
    memory: Memory
    own: MethodOptions
    accelerator: Accelerator
    views: list[torch.Tensor]
    teacher_temperature: float
    labels: torch.Tensor | None = None

    def learner_outputs(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Computes the learner's output for every view, and its encoder's features for full ones, in float32."""
        outputs, features = self.network(self.views)
        return [out.float() for out in outputs], [part.float() for part in features]

    @torch.no_grad()
    def teacher_outputs(self) -> list[torch.Tensor]:
        """Computes the teacher's output for the two full views, in float32.

        In split batches its pictures are shuffled, so that no part holds those of a part of the learner: their common
        statistics would tell which are which (MoCo, section 3.3).
        """
        teacher, views = self.memory.teacher, self.views[:2]
        assert teacher is not None
        order = None
        if teacher.splits > 1:
            order = torch.randperm(len(views[0]), device=views[0].device)
            views = [view[order] for view in views]
        with self.accelerator.autocast():
            outputs, _ = teacher(views)
        return [out.float() if order is None else out.float()[order.argsort()] for out in outputs]


def simclr(step: Step) -> torch.Tensor:
    """Tells both views from all others of the batch (Chen et al. 2020), by one of several losses."""
    (first, second), _ = step.learner_outputs()
    own = step.own
    if own.loss == "nt-xent":
        return nt_xent_loss(first, second, own.temperature)
    if own.loss == "nce":
        return nce_of_views(first, second, own.temperature)
    if own.loss == "hadsell":  # a picture's two views are of one class, which is theirs alone
        return hadsell_loss(F.normalize(torch.cat([first, second]), dim=1), own_places(first).repeat(2))
    if own.loss == "supervised":
        assert step.labels is not None
        return supervised_loss(first, second, step.labels, own.temperature)
    return debiased_loss(first, second, own.temperature, own.prior, own.hardness if own.loss == "hard-negative" else 0)


def moco(step: Step) -> torch.Tensor:
    """Finds the teacher's other view among the queue, for each view in turn (He et al. 2020)."""
    (queries, _), keys = step.learner_outputs(), step.teacher_outputs()
    queue = step.memory.queue
    assert queue is not None
    pairs = zip(queries, reversed(keys), strict=True)
    loss = torch.stack([moco_loss(query, key, queue, step.own.temperature) for query, key in pairs]).mean()
    step.memory.enqueue(torch.cat(keys))
    return loss


def byol(step: Step) -> torch.Tensor:
    """Predicts the teacher's other view from each view in turn (Grill et al. 2020).

    The loss is 1 − cos, as in lightly's benchmark; the paper's sum of both directions is four times that. Where the
    optimizer is LARS or AdamW such a factor does nothing; with SGD it belongs to the learning rate.
    """
    (predicted, _), targets = step.learner_outputs(), step.teacher_outputs()
    pairs = zip(predicted, reversed(targets), strict=True)
    return torch.stack([byol_loss(one, other) for one, other in pairs]).mean() / 2


def decorrelated(loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], step: Step) -> torch.Tensor:
    """Compares the outputs of both views by a loss that looks at correlations over the batch."""
    (first, second), _ = step.learner_outputs()
    return loss(first, second)


def dino(step: Step) -> torch.Tensor:
    """Matches every view of the learner to the teacher's distributions of the other views (Caron et al. 2021)."""
    own, memory = step.own, step.memory
    (outputs, features), logits = step.learner_outputs(), torch.stack(step.teacher_outputs())
    assert memory.centre is not None
    if own.centring == "sinkhorn":
        targets = torch.stack([sinkhorn_knopp(of_view, step.teacher_temperature) for of_view in logits])
    else:
        centre = memory.centre if own.centring == "mean" else torch.zeros_like(memory.centre)
        targets = sharpened(logits, centre, step.teacher_temperature)
    memory.centre = moved_centre(memory.centre, logits)
    loss = dino_loss(torch.stack(outputs), targets, own.temperature)
    if own.koleo:
        loss = loss + own.koleo * torch.stack([koleo_loss(of_view) for of_view in features]).mean()
    return loss


def patches(step: Step) -> torch.Tensor:
    """Sums the modules' own losses (Löwe et al. 2019), or takes the one of all (van den Oord et al. 2018)."""
    (pictures,) = step.views
    losses, _ = step.network(pictures)
    return torch.sum(losses)


# The values of options that are left open, where the method has none of its own.
DEFAULTS: dict[str, Any] = {
    "side": 224, "crop_scale": (0.08, 1.0), "local_crops": 0,
    "saturation": 0.8, "solarize": (0.0, 0.0, 0.0),
    "temperature": 0.1, "momentum": 0.99, "queue": 4096, "hidden": 512, "outputs": 128, "head_norm": "batch",
    "head_layers": 2, "teacher_temperature": 0.07,
    "epochs": 200, "batch_size": 512, "clip_norm": 0.0,
}  # fmt: skip
TINY_DEFAULTS = {"side": 32, "epochs": 15, "batch_size": 256}  # under three minutes on two cores
OF_BYOL = {"saturation": 0.4, "solarize": (0.0, 0.2, 0.0)}  # its colours, which DINO took over
# A head of three layers that all are as wide, and BYOL's views; the papers have 8,192 on ImageNet.
OF_CORRELATIONS = {**OF_BYOL, "hidden": 2048, "outputs": 2048, "head_layers": 3}
# As in Löwe et al. 2019: crops of 64 pixels, Adam without decay.
OF_PATCHES = {"side": 64, "optimizer": "adamw", "learning_rate": 2e-4, "weight_decay": 0.0}

METHODS: dict[str, Method] = {
    "simclr": Method(
        simclr, partial(with_projection, closed=True), "negatives: the batch's other pictures",
        defaults={"temperature": 0.5}, tiny={"temperature": 0.2},
    ),
    "moco": Method(
        moco, partial(with_projection, norm=False), "negatives: keys of earlier steps in a queue",
        remembers=("teacher", "queue"),
    ),
    "byol": Method(
        byol, partial(with_projection, prediction=True), "no negatives: a prediction of a teacher's output",
        remembers=("teacher",), defaults={**OF_BYOL, "hidden": 1024, "outputs": 256, "momentum_end": 1.0},
        tiny={"optimizer": "lars"},  # with AdamW it nearly collapses before it learns
    ),
    "barlow": Method(
        partial(decorrelated, barlow_twins_loss), with_projection, "no negatives: outputs that do not correlate",
        defaults=OF_CORRELATIONS, tiny={"outputs": 512},
    ),
    "vicreg": Method(
        partial(decorrelated, vicreg_loss), with_projection, "no negatives: outputs that vary and do not correlate",
        defaults=OF_CORRELATIONS, tiny={"outputs": 512},
    ),
    "dino": Method(
        dino, with_prototypes, "no negatives: a teacher's distributions, centred and sharpened",
        remembers=("teacher", "centre"), measured="teacher", small_views=True,
        defaults={**OF_BYOL, "crop_scale": (0.14, 1.0), "local_crops": 4, "hidden": 2048, "outputs": 2048,
                  "momentum_end": 1.0, "clip_norm": 3.0, "head_norm": "none", "head_layers": 3},
        tiny={"outputs": 512, "head_norm": "batch", "teacher_temperature": 0.04},
    ),
    "gim": Method(
        patches, partial(on_patches, isolated=True), "negatives: other patches, for three modules with a loss each",
        full_views=1, on_patches=True, defaults=OF_PATCHES, tiny={"learning_rate": 2e-3},
    ),
    "cpc": Method(
        patches, partial(on_patches, isolated=False), "negatives: other patches, for one network under a context",
        full_views=1, on_patches=True, defaults=OF_PATCHES, tiny={"learning_rate": 2e-3},
    ),
}  # fmt: skip


def complete(config: PretrainConfig) -> PretrainConfig:
    """Returns the config with a default for every option that was left to the method and the encoder.

    Raises:
        LabError: options contradict each other, or are out of range.
    """
    _check(config)
    method, tiny = METHODS[config.method], config.encoder.backbone == TINY
    convolutional = config.encoder.backbone.startswith(RESNETS)
    defaults = {"optimizer": "sgd" if convolutional else "adamw", **DEFAULTS, **method.defaults}
    if tiny:
        defaults |= {**TINY_DEFAULTS, "hidden": defaults["hidden"] // 4, **method.tiny}
    if config.encoder.stem == "small":
        defaults["side"] = 32  # CIFAR-10's
    encoder = _filled(config.encoder, defaults)

    low, high = config.views.crop_scale
    views = _filled(config.views, {**defaults, "local_side": encoder.side // 2})
    # With small views the full ones show more of the picture, as in DINO's code.
    low = low or (0.4 if views.local_crops else defaults["crop_scale"][0])
    views = dataclasses.replace(views, crop_scale=(low, high))

    if config.own.momentum == 0:  # the teacher is the learner at every step, and stays it
        defaults["momentum_end"] = 0.0
    own = _filled(config.own, defaults)
    own = _filled(own, {"momentum_end": own.momentum})
    usual_own = _filled(_filled(MethodOptions(), defaults), {"momentum_end": own.momentum})
    for name, able in OF_METHODS.items():
        if config.method not in able and getattr(own, name) != getattr(usual_own, name):
            raise LabError(f"--{name.replace('_', '-')}: is of {', '.join(able)}; {config.method} does nothing with it")

    training = _filled(config.training, {"optimizer": defaults["optimizer"]})
    if training.optimizer != defaults["optimizer"]:  # the method's rate and decay are of its own optimizer
        defaults = {name: value for name, value in defaults.items() if name not in ("learning_rate", "weight_decay")}
    training = _filled(training, defaults)
    rates = {"sgd": 0.06 * training.batch_size / 128, "adamw": 2e-3,
             "lars": 2.0 if tiny else 0.3 * training.batch_size / 256}  # fmt: skip
    decays = {"sgd": 5e-4, "lars": 1e-6, "adamw": 0.04}
    usual = {"learning_rate": rates[training.optimizer], "weight_decay": decays[training.optimizer]}
    training = _filled(training, usual)
    training = _filled(training, {"weight_decay_end": training.weight_decay})
    return dataclasses.replace(config, encoder=encoder, views=views, own=own, training=training)


def measured(config: PretrainConfig) -> str:
    """Says whose features count, and are saved: the learner's or the teacher's."""
    asked = config.measure.measured
    return METHODS[config.method].measured if asked == "auto" else asked


def _filled(options: Any, defaults: Mapping[str, Any]) -> Any:
    """Returns the options with a default for each that was left open: 0, auto, or below 0 where -1 is the mark."""
    values = {option.name: (getattr(options, option.name), option.default) for option in dataclasses.fields(options)}
    left = [name for name, (value, mark) in values.items() if value == mark or (mark == -1 and value < 0)]
    return dataclasses.replace(options, **{name: defaults[name] for name in left if name in defaults})


def _check(config: PretrainConfig) -> None:
    """Refuses an encoder or views that make no sense, or are not for the method."""
    method, backbone, side = METHODS[config.method], config.encoder.backbone, config.encoder.side
    if config.encoder.stem == "small" and not backbone.startswith(RESNETS):
        raise LabError("--stem small: is for ResNets of torchvision")
    for name, (low, high) in (("crop-scale", config.views.crop_scale), ("local-scale", config.views.local_scale)):
        if not low <= high or not high:
            raise LabError(f"--{name}: must be two shares of the area, the smaller first, not both 0")
    if config.encoder.drop_path and (backbone in (TINY, RESNET50_V2) or backbone.startswith(RESNETS)):
        raise LabError(f"--drop-path: {backbone} has no stochastic depth; networks of timm have")
    if method.on_patches and backbone not in (TINY, RESNET50_V2):
        raise LabError(f"--backbone {backbone}: {config.method} has networks of its own: take {TINY} or {RESNET50_V2}")
    if not method.on_patches and backbone == RESNET50_V2:
        raise LabError(f"--backbone {RESNET50_V2}: is for gim and cpc alone; take resnet50")
    if method.on_patches and side % 8:
        raise LabError(f"--side {side}: {config.method} cuts pictures into patches: take a multiple of 8")
    if config.measure.measured == "teacher" and "teacher" not in method.remembers:
        raise LabError(f"--measured teacher: {config.method} has none")
    if config.measure.projected and method.on_patches:
        raise LabError(f"--projected: {config.method} has no projection")
    if config.views.local_crops > 0 and not method.small_views:
        raise LabError(f"--local-crops: only dino's student sees more views than two; {config.method} does not")
