"""Distils a CNN into a transformer through its distillation token: `python -m vit_transfer.distill --teacher runs/…`.

Touvron et al. 2021 (DeiT, arXiv 2012.12877), section 4. The teacher is fixed, so what it says of every picture is
computed once and kept, as the front of a network is.
"""

from vit_transfer import commands

if __name__ == "__main__":  # before the imports below: --help and a wrong option answer at once
    commands.distill()

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING

from vit_transfer.config import DistillConfig, TrainConfig, complete_distillation

if TYPE_CHECKING:  # the real imports wait until the command line has been read: --help is fast
    import torch
    from accelerate import Accelerator

    from labs_common.data import LabelledPictures
    from labs_common.features import Rows
    from labs_common.run import Run
    from vit_transfer.fitting import Fitted


def distill(config: DistillConfig) -> None:
    """The road: pictures, teacher, student, the student without a teacher, evaluation of what was written, report."""
    from labs_common.cache import path_name
    from labs_common.data import record_splits
    from labs_common.run import Run, check_run_options
    from labs_common.training import make_accelerator
    from vit_transfer.baselines import named_config, trained_baselines
    from vit_transfer.data import Tensors, read_splits
    from vit_transfer.evaluate import predicted
    from vit_transfer.export import FOLDER, finished_network, load_exported
    from vit_transfer.results import finish_report
    from vit_transfer.teacher import distillation_section, head_predictions, teacher_of
    from vit_transfer.train import check_network

    clock = {"start": time.perf_counter()}
    config = complete_distillation(config)
    check_run_options(config.run)
    accelerator = make_accelerator(config.training)
    with accelerator.main_process_first():
        splits = read_splits(config.data, config.run.seed, accelerator.is_main_process)
    check_network(config, splits, by_head=True)
    folder = finished_network("--teacher", config.teacher, splits["train"].classes)
    if folder is None:
        check_network(named_config(config.teacher, config), splits)
    run = Run.start(config, config.run, f"distilled-{path_name(config.model.model)}", accelerator)
    record_splits(run, splits)
    if folder is None:
        name = f"teacher {config.teacher}"
        folder = (
            trained_baselines({name: named_config(config.teacher, config)}, run, accelerator, splits)[name] / FOLDER
        )
    teacher = teacher_of(folder, splits["train"], config, accelerator)
    clock["teacher"] = time.perf_counter()
    fitted = fit_distilled(config, run, accelerator, splits, teacher.said)
    clock |= fitted.clock
    alone = {"without a teacher": alone_config(config)} if config.baselines == "yes" else {}
    others = trained_baselines(alone, run, accelerator, splits)
    clock["baselines"] = time.perf_counter()

    folders: dict[str, Path] = {"this run": run.path / FOLDER}
    folders |= {name: path / FOLDER for name, path in others.items()} | {"the teacher": folder}
    scored = {}
    for name, path in folders.items():
        model = load_exported(path)
        test = Tensors(splits["test"], teacher.transform if name == "the teacher" else fitted.transform)
        scored[name] = predicted(model, test, accelerator, f"testing, {name}")
    by_head = head_predictions(folders["this run"], Tensors(splits["test"], fitted.transform), accelerator)
    clock["tested"] = time.perf_counter()
    if accelerator.is_main_process:
        heads = distillation_section(run, scored, by_head)
        title = f"{config.teacher} distilled into {config.model.model}"
        compared = "This run; the same network and budget without a teacher, if that was asked for; the teacher."
        finish_report(run, config, splits, fitted, scored, clock, title, compared, [heads])
    accelerator.end_training()


def fit_distilled(
    config: DistillConfig,
    run: "Run",
    accelerator: "Accelerator",
    splits: "dict[str, LabelledPictures]",
    said: "Rows",
) -> "Fitted":
    """Trains the student on labels and on what the teacher `said` of each picture, its logits.

    Raises:
        RunStopped: the loss is not a number, or something fixed has moved.
        Interrupted: Ctrl-C; the run can be resumed.
    """
    import torch.nn.functional as F

    from vit_transfer.fitting import finished, scores, set_up

    fitting = set_up(config, run, accelerator, splits, by_head=True)
    loop, model, device = fitting.loop, fitting.model, accelerator.device
    for batch in loop.batches():
        by_class, by_teacher = (logits.float() for logits in model(batch.inputs.to(device)))
        targets, teacher = batch.targets.to(device), said.rows(batch.view, batch.places).to(device)
        own = F.cross_entropy(by_class, targets, label_smoothing=config.training.label_smoothing)
        its = teacher_loss(by_teacher, teacher, config)
        loss = ((1 - config.weight) * own + config.weight * its) * batch.share
        right = float(((by_class + by_teacher).argmax(1) == targets).float().mean()) * batch.share
        agreed = float((by_teacher.argmax(1) == teacher.argmax(1)).float().mean()) * batch.share
        loop.step(loss, len(targets) if batch.share else 0, accuracy=right, agreement=agreed)
        if loop.evaluation_due:
            loop.evaluated(scores(fitting), watch="validation/loss")
    return finished(fitting, splits)


def teacher_loss(student: "torch.Tensor", teacher: "torch.Tensor", config: DistillConfig) -> "torch.Tensor":
    """What the distillation head's logits (batch, classes) cost, given the teacher's: DeiT, eq. 3 (hard) or 2 (soft).

    Soft is the KL divergence of the student from the teacher at a temperature, times its square.
    """
    import torch.nn.functional as F

    if config.distillation == "hard":
        return F.cross_entropy(student, teacher.argmax(1))
    t = config.temperature
    return t * t * F.kl_div(
        (student / t).log_softmax(1), (teacher / t).log_softmax(1), reduction="batchmean", log_target=True
    )  # fmt: skip


def alone_config(config: DistillConfig) -> TrainConfig:
    """The student's training without a teacher."""
    own = {field.name: getattr(config, field.name) for field in dataclasses.fields(TrainConfig)}
    return TrainConfig(**own | {"baselines": "no"})
