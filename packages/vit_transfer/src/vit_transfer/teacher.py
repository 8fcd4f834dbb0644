"""The teacher of a distillation: a fixed network, and what it says of every training picture."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from labs_common.data import LabelledPictures
from labs_common.features import ComputedRows, Rows, cached_rows
from labs_common.freezing import tensor_hash
from labs_common.report import Section, Table, Text
from labs_common.run import Run
from vit_transfer.config import DistillConfig, ModelOptions
from vit_transfer.data import Tensors, Transform, transform_of
from vit_transfer.evaluate import Predictions, predicted, wilson_interval
from vit_transfer.export import FOLDER, load_exported
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
    weights = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        weights.update(f"{name} {tensor_hash(tensor)}".encode())
    config_text = (folder / "config.json").read_text(encoding="utf-8")
    recipe = {"weights": weights.hexdigest(), "config": config_text, "tensors": tensors.recipe(config.data.views),
              "torch": torch.__version__.split("+")[0]}  # fmt: skip
    said = cached_rows("teacher", recipe, len(tensors), config.data.views, model.num_classes, "fp32", compute,
                       accelerator.is_main_process)  # fmt: skip
    return Teacher(said, transform)


def distillation_section(
    run: Run, test: Tensors, scored: Mapping[str, Predictions], accelerator: Accelerator
) -> Section:
    """What each head of the student says of the test pictures, and how often it is what the teacher says."""
    model = load_exported(run.path / FOLDER)
    model.set_distilled_training(True)
    teacher, both = scored["the teacher"], scored["this run"]
    heads = {"class head": 0, "distillation head": 1}
    found = {
        name: predicted(OneHead(model, place), test, accelerator, f"testing, {name}") for name, place in heads.items()
    }
    rows = [
        (name, said.accuracy, "{:.3f} to {:.3f}".format(*wilson_interval(said.accuracy, len(test))),
         float((said.said == teacher.said).mean()))
        for name, said in {**found, "their mean (this run)": both, "the teacher": teacher}.items()
    ]  # fmt: skip
    lines = [line for line in run.lines("metrics.jsonl") if "agreement" in line]
    text = (
        f"At the end of training the distillation head said what the teacher said for {lines[-1]['agreement']:.1%} of "
        "the last batch." if lines else ""
    )  # fmt: skip
    columns = ("", "test accuracy", "95 % interval", "says what the teacher says")
    caption = "The two heads by themselves; in use the mean of their logits is taken."
    return Section("Student and teacher", [Table(columns, rows, caption), Text(text)])


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
