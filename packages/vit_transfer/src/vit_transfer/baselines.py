"""What the block is compared with: the head alone, and the whole network from random weights, at the same budget."""

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
from vit_transfer.config import TrainConfig, complete
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
            console.print(f"for comparison: {name}")
            folder.mkdir(parents=True, exist_ok=True)
        accelerator.wait_for_everyone()
        try:
            fit(wanted, Run(folder, run.is_main, resumed=True), accelerator, splits)
        except Interrupted as error:
            raise Interrupted(
                f"{str(error).split(';')[0]}; everything is saved: go on with --resume {run.path}"
            ) from None
    return folders
