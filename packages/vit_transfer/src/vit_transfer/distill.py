"""Distils a CNN into a transformer through its distillation token: `python -m vit_transfer.distill --teacher runs/…`.

Touvron et al. 2021 (DeiT, arXiv 2012.12877), section 4. The teacher is fixed, so its predictions of every picture are
computed once and kept, as the output of a frozen front is.
"""

from vit_transfer import commands

if __name__ == "__main__":  # before the imports below: --help and a wrong option answer at once
    commands.distill()

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator

from labs_common.cache import path_name
from labs_common.data.classes import LabelledPictures
from labs_common.data.images import record_splits
from labs_common.device import to_device
from labs_common.errors import LabError
from labs_common.fitting import begin
from labs_common.frozen.cache import ComputedRows, Rows, front_rows
from labs_common.launch import main_process_first
from labs_common.report.classes import Predictions, wilson_interval
from labs_common.report.figures import curve_figure
from labs_common.report.page import Figure, Section, Table, save_figure
from labs_common.run import Run, keep
from vit_transfer.config import TINY, DistillConfig, TrainConfig, complete
from vit_transfer.data import Batch, Tensors, read_splits, saved_transform
from vit_transfer.evaluate import predictions_of
from vit_transfer.report import finish_report
from vit_transfer.saved import FOLDER, load_model, saved_model, weights_sums
from vit_transfer.train import Loss, check_network, fit, fit_beside, named_config, print_needs


def distill(config: DistillConfig) -> None:
    """Walks the road: pictures, teacher, student, the student without a teacher, evaluation, report."""
    clock = {"start": time.perf_counter()}
    config = complete_distillation(config)
    if config.plan.plan:
        print_needs(config, partial(distillation_on_shapes, config), by_head=True)
        return
    accelerator = begin(config.run, config.training)
    with main_process_first(accelerator):
        splits = read_splits(config.data, config.run.seed, accelerator.is_main_process)
    classes, cached = splits["train"].classes, config.cache.cache
    check_network(config.model, len(classes), cached, by_head=True)
    folder = saved_model("--teacher", config.teacher, classes)
    if folder is None:
        named = named_config(config.teacher, config)
        check_network(named.model, len(classes), cached)
    run = Run.start(config, config.run, f"distilled-{path_name(config.model.model)}", accelerator)
    record_splits(run, splits)
    if folder is None:
        (folder,) = fit_beside({f"teacher {config.teacher}": named}, run, accelerator, splits).values()
    keep(run, "teacher.json", weights_sums(folder), "the teacher")
    teacher = teacher_logits(folder, splits["train"], config, accelerator)
    clock["teacher"] = time.perf_counter()
    fitted = fit(config, run, accelerator, splits, distillation_loss(config, teacher), by_head=True)
    clock |= fitted.clock
    folders = {"this run": run.path / FOLDER}
    if config.baselines == "yes":
        folders |= fit_beside({"without a teacher": alone(config)}, run, accelerator, splits)
    clock["baselines"] = time.perf_counter()

    folders["the teacher"] = folder
    scored = {
        name: predictions_of(load_model(path), splits["test"], accelerator, f"testing, {name}")
        for name, path in folders.items()
    }
    by_head = head_predictions(folders["this run"], splits["test"], accelerator)
    clock["tested"] = time.perf_counter()
    if accelerator.is_main_process:
        heads = distillation_section(run, scored, by_head)
        title = f"{config.teacher} distilled into {config.model.model}"
        compared = "This run; the same network and budget without a teacher, if that was asked for; the teacher."
        finish_report(run, config, splits, fitted, scored, clock, title, compared, [heads])
    accelerator.end_training()


def hard(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Computes the cross-entropy of the student's logits (batch, classes) with the teacher's class: DeiT, eq. 3."""
    return F.cross_entropy(student, teacher.argmax(1))


def soft(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Computes the KL divergence from the teacher at a temperature, times its square: DeiT, eq. 2.

    The square keeps the gradient's size whatever the temperature (Hinton et al. 2015, section 2).
    """
    its, own = ((logits / temperature).log_softmax(1) for logits in (teacher, student))
    return temperature**2 * F.kl_div(own, its, reduction="batchmean", log_target=True)


def soft_mean(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Computes `soft` divided by the number of classes: DeiT's repository divides by all logits of a batch."""
    return soft(student, teacher, temperature) / student.shape[1]


@dataclass(frozen=True)
class Distillation:
    """A way to learn from a teacher.

    Attributes:
        loss: of the distillation head's logits, the teacher's and a temperature.
        weight: the teacher's share of the whole loss by default, the paper's.
        has_temperature: whether --temperature changes anything.
    """

    loss: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
    weight: float
    has_temperature: bool


DISTILLATIONS: dict[str, Distillation] = {
    "hard": Distillation(hard, weight=0.5, has_temperature=False),
    "soft": Distillation(soft, weight=0.1, has_temperature=True),
    "soft_mean": Distillation(soft_mean, weight=0.1, has_temperature=True),
}


def complete_distillation(config: DistillConfig) -> DistillConfig:
    """Fills in the defaults that depend on the model and the kind of distillation.

    Raises:
        LabError: options that contradict each other.
    """
    chosen = DISTILLATIONS[config.distillation]
    if not chosen.has_temperature and config.temperature != DistillConfig().temperature:
        able = " or ".join(name for name, kind in DISTILLATIONS.items() if kind.has_temperature)
        raise LabError(f"--temperature: is of --distillation {able}; drop it, or add --distillation {able}")
    wanted = config.baselines
    if wanted == "auto":
        wanted = "yes" if config.model.model in TINY else "no"
    found = complete(dataclasses.replace(config, baselines="no"))  # whose baselines are others
    return dataclasses.replace(found, baselines=wanted, weight=config.weight or chosen.weight)


def distillation_loss(config: DistillConfig, teacher: Rows) -> Loss:
    """Returns the loss that takes labels and, by --weight, the teacher's logits of each picture."""
    its_loss = DISTILLATIONS[config.distillation].loss

    def loss_of(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        by_class, by_teacher = (logits.float() for logits in model(batch.inputs))  # of the two heads
        targets, its = batch.targets, to_device(teacher.rows(batch.view, batch.places), by_teacher.device)
        own = F.cross_entropy(by_class, targets, label_smoothing=config.training.label_smoothing)
        loss = (1 - config.weight) * own + config.weight * its_loss(by_teacher, its, config.temperature)
        right, agreed = (by_class + by_teacher).argmax(1) == targets, by_teacher.argmax(1) == its.argmax(1)
        return loss, {"accuracy": right.float().mean(), "agreement": agreed.float().mean()}

    return loss_of


def distillation_on_shapes(config: DistillConfig, classes: int) -> Loss:
    """Returns the loss of the distillation from a teacher of so many classes that says nothing: for `--plan`."""
    return distillation_loss(config, ComputedRows(lambda _, places: torch.empty(len(places), classes), "fp32"))


def alone(config: DistillConfig) -> TrainConfig:
    """Returns the student's training without a teacher."""
    own = {field.name: getattr(config, field.name) for field in dataclasses.fields(TrainConfig)}
    return TrainConfig(**own | {"baselines": "no"})


def teacher_logits(folder: Path, pictures: LabelledPictures, config: DistillConfig, accelerator: Accelerator) -> Rows:
    """Computes the teacher's logits of every view of the training pictures, unless they are kept from before.

    It sees the pictures at its own size; what is sampled is the same as for the student.

    Raises:
        LabError: the teacher cannot be read, or the disk is full.
    """
    model: Any = load_model(folder).to(accelerator.device)
    tensors = Tensors(pictures, saved_transform(model, config.data.augment, config.run.seed))
    views, device = config.data.views, accelerator.device

    def compute(view: int, places: Sequence[int]) -> torch.Tensor:
        with torch.autocast(device.type, enabled=False):  # in float32, as it is tested
            logits: torch.Tensor = model(tensors.batch(view, places).to(device))
        return logits

    return front_rows("teacher", model, compute, len(tensors), model.num_classes, tensors.recipe(views), config.cache,
                      accelerator, views, precision="fp32")  # fmt: skip


class OneHead(torch.nn.Module):
    """A network with a distillation token that answers with one of its heads, by number."""

    def __init__(self, model: Any, place: int) -> None:
        super().__init__()
        self.model, self.place, self.pretrained_cfg = model, place, model.pretrained_cfg

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Turns pictures into logits (batch, classes)."""
        self.model.training = True  # its own flag alone: it then gives the logits of both heads
        logits: torch.Tensor = self.model(images)[self.place]
        self.model.training = False
        return logits


def head_predictions(folder: Path, test: LabelledPictures, accelerator: Accelerator) -> dict[str, Predictions]:
    """Computes each head's predictions of the test pictures for a saved student; called by all processes."""
    model = load_model(folder)
    model.set_distilled_training(True)
    return {
        name: predictions_of(OneHead(model, place), test, accelerator, f"testing, {name}")
        for place, name in enumerate(("class head", "distillation head"))
    }


def distillation_section(run: Run, scored: Mapping[str, Predictions], by_head: Mapping[str, Predictions]) -> Section:
    """Shows how right each head of the student is, and how often it predicts what the teacher predicts."""
    teacher, both = scored["the teacher"], scored["this run"]
    rows = []
    for name, found in {**by_head, "their mean (this run)": both, "the teacher": teacher}.items():
        interval = "{:.3f} to {:.3f}".format(*wilson_interval(found.accuracy, len(found.labels)))
        rows.append((name, found.accuracy, interval, float((found.said == teacher.said).mean())))
    columns = ("", "test accuracy", "95 % interval", "predicts what the teacher predicts")
    table = Table(columns, rows, "The two heads by themselves; in use the mean of their logits is taken.")
    curves = {"agreement": run.curve("agreement")}
    figure = save_figure(run, "agreement", curve_figure(curves, "optimizer step", "agreement"))
    caption = "Share of each batch of which the distillation head predicts what the teacher predicts."
    return Section("Student and teacher", [table, Figure(figure, caption)])
