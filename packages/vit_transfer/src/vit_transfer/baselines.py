"""Trainings beside the run's own: what it is compared with, a teacher, or the networks to attack."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from labs_common.cache import path_name
from labs_common.data import LabelledPictures
from labs_common.errors import Interrupted
from labs_common.progress import console
from labs_common.run import Run
from vit_transfer.config import AttackConfig, DistillConfig, ModelOptions, TrainConfig, complete
from vit_transfer.export import FOLDER
from vit_transfer.train import fit


def baseline_configs(config: TrainConfig) -> dict[str, TrainConfig]:
    """By name: each with the learning rate that is usual for it, and all else as in `config`."""
    changes: dict[str, dict[str, Any]] = {
        "head only": {"unfreeze": "head", "block": None},
        "from scratch": {"unfreeze": "all", "block": None, "pretrained": False, "weights": None},
    }
    return {
        name: complete(
            dataclasses.replace(
                config,
                model=dataclasses.replace(config.model, **change),
                training=dataclasses.replace(config.training, learning_rate=0.0),
                baselines="no",
            )
        )
        for name, change in changes.items()
    }


def named_config(name: str, config: DistillConfig | AttackConfig) -> TrainConfig:
    """The training of a network that is only named: its last block, on the plain pictures, with the same budget."""
    return complete(
        TrainConfig(
            model=ModelOptions(model=name),
            data=dataclasses.replace(config.data, views=1),
            cache=config.cache,
            training=dataclasses.replace(config.training, learning_rate=0.0),
            run=config.run,
            baselines="no",
        )
    )


def trained_baselines(
    configs: Mapping[str, TrainConfig], run: Run, accelerator: Accelerator, splits: dict[str, LabelledPictures]
) -> dict[str, Path]:
    """Trains what is not there yet; returns each one's directory under the run.

    Raises:
        Interrupted: Ctrl-C; what was done is saved, and resuming the run goes on from there.
    """
    folders = {}
    for name, wanted in configs.items():
        folder = folders[name] = run.path / "baselines" / path_name(name).replace(" ", "-")
        if (folder / FOLDER).is_dir():
            continue
        if accelerator.is_main_process:
            console.print(f"training {name}")
            folder.mkdir(parents=True, exist_ok=True)
        accelerator.wait_for_everyone()
        try:
            fit(wanted, Run(folder, run.is_main, resumed=True), accelerator, splits)
        except Interrupted as error:
            raise Interrupted(
                f"{str(error).split(';')[0]}; everything is saved: go on with --resume {run.path}"
            ) from None
    return folders
