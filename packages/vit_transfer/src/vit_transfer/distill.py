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
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator

from labs_common.cache import path_name
from labs_common.data import LabelledPictures, record_splits
from labs_common.errors import LabError
from labs_common.features import ComputedRows, Rows, cached_rows
from labs_common.freezing import state_hash
from labs_common.report import Figure, Section, Table, curve_figure, save_figure
from labs_common.report.classes import Predictions, wilson_interval
from labs_common.run import Run, check_run_options
from labs_common.training import make_accelerator
from vit_transfer.config import TINY, DistillConfig, TrainConfig, complete
from vit_transfer.data import Batch, Tensors, Transform, read_splits, transform_of
from vit_transfer.evaluate import predictions_of
from vit_transfer.model import input_size
from vit_transfer.report import finish_report
from vit_transfer.saved import FOLDER, load_model, saved_model
from vit_transfer.train import Loss, check_network, fit, fit_beside, named_config


def distill(config: DistillConfig) -> None:
    """The road: pictures, teacher, student, the student without a teacher, evaluation of what was written, report."""
    clock = {"start": time.perf_counter()}
    config = complete_distillation(config)
    check_run_options(config.run)
    accelerator = make_accelerator(config.training)
    with accelerator.main_process_first():
        splits = read_splits(config.data, config.run.seed, accelerator.is_main_process)
    classes, cached = splits["train"].classes, config.cache.cache
    check_network(config.model, len(classes), cached, by_head=True)
    folder, named = saved_model("--teacher", config.teacher, classes), named_config(config.teacher, config)
    if folder is None:
        check_network(named.model, len(classes), cached)
    run = Run.start(config, config.run, f"distilled-{path_name(config.model.model)}", accelerator)
    record_splits(run, splits)
    if folder is None:
        (folder,) = fit_beside({f"teacher {config.teacher}": named}, run, accelerator, splits).values()
    teacher = read_teacher(folder, splits["train"], config, accelerator)
    clock["teacher"] = time.perf_counter()
    fitted = fit(config, run, accelerator, splits, distillation_loss(config, teacher.logits), by_head=True)
    clock |= fitted.clock
    folders = {"this run": run.path / FOLDER}
    if config.baselines == "yes":
        folders |= fit_beside({"without a teacher": alone(config)}, run, accelerator, splits)
    clock["baselines"] = time.perf_counter()

    test = Tensors(splits["test"], fitted.transform)
    scored = {
        name: predictions_of(load_model(path), test, accelerator, f"testing, {name}") for name, path in folders.items()
    }
    scored["the teacher"] = predictions_of(
        load_model(folder), Tensors(splits["test"], teacher.transform), accelerator, "testing, the teacher"
    )
    by_head = head_predictions(folders["this run"], test, accelerator)
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
}


def complete_distillation(config: DistillConfig) -> DistillConfig:
    """Fills in the defaults that depend on the model and the kind of distillation.

    Raises:
        LabError: options that contradict each other, or are out of range.
    """
    if not 0 <= config.weight <= 1 or config.temperature <= 0:
        raise LabError("--weight must lie between 0 and 1, --temperature above 0")
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
        targets, its = batch.targets, teacher.rows(batch.view, batch.places).to(by_teacher.device)
        own = F.cross_entropy(by_class, targets, label_smoothing=config.training.label_smoothing)
        loss = (1 - config.weight) * own + config.weight * its_loss(by_teacher, its, config.temperature)
        right, agreed = (by_class + by_teacher).argmax(1) == targets, by_teacher.argmax(1) == its.argmax(1)
        return loss, {"accuracy": right.float().mean(), "agreement": agreed.float().mean()}

    return loss_of


def alone(config: DistillConfig) -> TrainConfig:
    """Returns the student's training without a teacher."""
    own = {field.name: getattr(config, field.name) for field in dataclasses.fields(TrainConfig)}
    return TrainConfig(**own | {"baselines": "no"})


@dataclass(frozen=True)
class Teacher:
    """A fixed network's view of the training pictures.

    Attributes:
        logits: (classes,) of every view of every training picture.
        transform: how it sees a picture; what is sampled is the same as for the student.
    """

    logits: Rows
    transform: Transform


def read_teacher(folder: Path, pictures: LabelledPictures, config: DistillConfig, accelerator: Accelerator) -> Teacher:
    """Reads the teacher and computes its logits of the training pictures, unless they are kept from before.

    Raises:
        LabError: it cannot be read, or the disk is full.
    """
    model: Any = load_model(folder).to(accelerator.device)
    transform = transform_of(model, input_size(model), config.data.augment, config.run.seed)
    tensors, views = Tensors(pictures, transform), config.data.views

    def compute(view: int, places: Sequence[int]) -> torch.Tensor:
        with torch.no_grad():
            return model(tensors.batch(view, places).to(accelerator.device)).float()

    if not config.cache.cache:
        return Teacher(ComputedRows(compute, "fp32"), transform)
    recipe = {
        "weights": state_hash(model),
        "config": (folder / "config.json").read_text(encoding="utf-8"),
        "tensors": tensors.recipe(views),
        "torch": torch.__version__.split("+")[0],
    }
    shown = accelerator.is_main_process
    logits = cached_rows("teacher", recipe, len(tensors), views, model.num_classes, "fp32", compute, shown)
    return Teacher(logits, transform)


class OneHead(torch.nn.Module):
    """A network with a distillation token that answers with one of its heads, by number."""

    def __init__(self, model: torch.nn.Module, place: int) -> None:
        super().__init__()
        self.model, self.place = model, place

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Turns pictures into logits (batch, classes)."""
        self.model.training = True  # its own flag alone: it then gives the logits of both heads
        logits: torch.Tensor = self.model(images)[self.place]
        self.model.training = False
        return logits


def head_predictions(folder: Path, test: Tensors, accelerator: Accelerator) -> dict[str, Predictions]:
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
    lines = [line for line in run.lines("metrics.jsonl") if "agreement" in line]
    steps = ([line["step"] for line in lines], [line["agreement"] for line in lines])
    figure = save_figure(run, "agreement", curve_figure({"agreement": steps}, "optimizer step", "agreement"))
    caption = "Share of each batch of which the distillation head predicts what the teacher predicts."
    return Section("Student and teacher", [table, Figure(figure, caption)])
