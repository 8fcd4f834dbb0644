"""The teacher of a distillation: a fixed network, and what it says of every training picture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from labs_common.data import LabelledPictures
from labs_common.features import ComputedRows, Rows, cached_rows
from labs_common.freezing import state_hash
from labs_common.report import Figure, Section, Table, curve_figure, save_figure
from labs_common.report.classes import Predictions, wilson_interval
from labs_common.run import Run
from vit_transfer.config import DistillConfig, ModelOptions
from vit_transfer.data import Tensors, Transform, transform_of
from vit_transfer.evaluate import predicted
from vit_transfer.export import load_exported
from vit_transfer.model import input_size


@dataclass(frozen=True)
class Teacher:
    """What a teacher says.

    Attributes:
        said: its logits (classes,) of every view of every training picture.
        transform: how it sees a picture; what is drawn by chance is the same as for the student.
    """

    said: Rows
    transform: Transform


def teacher_of(folder: Path, pictures: LabelledPictures, config: DistillConfig, accelerator: Accelerator) -> Teacher:
    """Reads the teacher and computes what it says of the training pictures, unless that is kept from before.

    Raises:
        LabError: it cannot be read, or the disk is full.
    """
    model: Any = load_exported(folder).to(accelerator.device)
    transform = transform_of(model, input_size(model, ModelOptions()), config.data, config.run.seed)
    tensors = Tensors(pictures, transform)

    def compute(view: int, places: Sequence[int]) -> torch.Tensor:
        with torch.no_grad():
            return model(tensors.batch(view, places).to(accelerator.device)).float()

    if not config.cache.cache:
        return Teacher(ComputedRows(compute, "fp32"), transform)
    config_text = (folder / "config.json").read_text(encoding="utf-8")
    recipe = {"weights": state_hash(model), "config": config_text, "tensors": tensors.recipe(config.data.views),
              "torch": torch.__version__.split("+")[0]}  # fmt: skip
    said = cached_rows("teacher", recipe, len(tensors), config.data.views, model.num_classes, "fp32", compute,
                       accelerator.is_main_process)  # fmt: skip
    return Teacher(said, transform)


def head_predictions(folder: Path, test: Tensors, accelerator: Accelerator) -> dict[str, Predictions]:
    """What each head of an exported student says of the test pictures; called by all processes."""
    model = load_exported(folder)
    model.set_distilled_training(True)
    heads = {"class head": 0, "distillation head": 1}
    return {
        name: predicted(OneHead(model, place), test, accelerator, f"testing, {name}") for name, place in heads.items()
    }


def distillation_section(run: Run, scored: Mapping[str, Predictions], by_head: Mapping[str, Predictions]) -> Section:
    """How right each head of the student is, and how often it says what the teacher says."""
    teacher, both = scored["the teacher"], scored["this run"]
    rows = [
        (name, said.accuracy, "{:.3f} to {:.3f}".format(*wilson_interval(said.accuracy, len(said.labels))),
         float((said.said == teacher.said).mean()))
        for name, said in {**by_head, "their mean (this run)": both, "the teacher": teacher}.items()
    ]  # fmt: skip
    lines = [line for line in run.lines("metrics.jsonl") if "agreement" in line]
    columns = ("", "test accuracy", "95 % interval", "says what the teacher says")
    caption = "The two heads by themselves; in use the mean of their logits is taken."
    steps = ([line["step"] for line in lines], [line["agreement"] for line in lines])
    figure = save_figure(run, "agreement", curve_figure({"agreement": steps}, "optimizer step", "agreement"))
    return Section(
        "Student and teacher",
        [
            Table(columns, rows, caption),
            Figure(figure, "Share of each batch of which the distillation head says what the teacher says."),
        ],
    )


class OneHead(torch.nn.Module):
    """A network with a distillation token that answers with one of its heads, by number."""

    def __init__(self, model: torch.nn.Module, place: int) -> None:
        super().__init__()
        self.model, self.place = model, place

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Pictures to logits (batch, classes)."""
        self.model.training = True  # its own flag alone: it then gives what both heads say
        logits: torch.Tensor = self.model(images)[self.place]
        self.model.training = False
        return logits
