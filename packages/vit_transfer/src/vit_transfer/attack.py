"""Universal adversarial perturbations: `python -m vit_transfer.attack --models runs/NAME,runs/OTHER`.

One small change that, added to any picture, changes what a network says of most (Moosavi-Dezfooli et al. 2017).
"""

from vit_transfer import commands

if __name__ == "__main__":  # before the imports below: --help and a wrong option answer at once
    commands.attack()

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from labs_common.cache import path_name
from labs_common.comparing import entries_of
from labs_common.errors import Interrupted, LabError
from vit_transfer.config import AttackConfig

if TYPE_CHECKING:  # the real imports wait until the command line has been read: --help is fast
    import torch

    from labs_common.run import Run
    from vit_transfer.attack_report import Victim


def attack(config: AttackConfig) -> None:
    """The road: pictures, networks, a perturbation for each network and number of pictures, measurement, report."""
    from labs_common.data import record_splits
    from labs_common.run import Run, check_run_options
    from labs_common.training import make_accelerator
    from vit_transfer.attack_report import Victim, finish_attack_report
    from vit_transfer.baselines import named_config, trained_baselines
    from vit_transfer.data import read_splits
    from vit_transfer.export import FOLDER, finished_network
    from vit_transfer.train import check_network

    clock = {"start": time.perf_counter()}
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise LabError("attack works in one process, picture after picture: run it with python -m")
    counts = counts_of(config.used)
    if config.radius < 0 or not 0 < config.wanted <= 1 or config.passes < 1:
        raise LabError("--radius must not be negative, --wanted above 0 and at most 1, --passes at least 1")
    names = entries_of("--models", config.models)
    check_run_options(config.run)
    accelerator = make_accelerator(config.training)
    splits = read_splits(config.data, config.run.seed, shown=True)
    if max(counts) > len(splits["train"]):
        raise LabError(f"--used {max(counts)}: there are only {len(splits['train'])} training pictures")
    folders = {name: finished_network("--models", name, splits["train"].classes) for name in names}
    wanted = {name: named_config(name, config) for name, folder in folders.items() if folder is None}
    for training in wanted.values():
        check_network(training, splits)
    run = Run.start(config, config.run, "attack", accelerator)
    record_splits(run, splits)
    trained = {name: path / FOLDER for name, path in trained_baselines(wanted, run, accelerator, splits).items()}
    clock["trained"] = time.perf_counter()
    try:
        victims = {
            name: Victim.of(folder or trained[name], splits, config, max(counts), accelerator.device)
            for name, folder in folders.items()
        }
        for name, victim in victims.items():
            for count in counts:
                victim.perturbations[count] = perturbation(run, config, name, victim, count)
        clock["perturbed"] = time.perf_counter()
        finish_attack_report(run, config, splits, victims, clock)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; what was found is saved: go on with --resume {run.path}") from None
    accelerator.end_training()


def counts_of(used: str) -> list[int]:
    """The numbers of pictures in --used, each once, growing.

    Raises:
        LabError: one is no number above 0.
    """
    parts = [part.strip() for part in used.split(",") if part.strip()]
    if not parts or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise LabError(f"--used {used!r}: must be numbers above 0 with commas between, such as 50,100,200")
    return sorted({int(part) for part in parts})


def perturbation(run: "Run", config: AttackConfig, name: str, victim: "Victim", count: int) -> "torch.Tensor":
    """The perturbation (3, size, size) made from the first `count` pictures: as it lies in the run, or made now."""
    from safetensors.torch import load_file, save_file

    from labs_common.progress import ProgressLine
    from vit_transfer.attacks import universal_perturbation

    file = run.path / "perturbations" / f"{path_name(name)}-{count}.safetensors"
    if file.exists():
        return load_file(file)["perturbation"].to(victim.used.device)

    with ProgressLine(f"{name}, {count} pictures", config.passes * count) as line:

        def each(order: Sequence[int]) -> Iterator[int]:
            for place in order:
                yield place
                line.advance()

        found = universal_perturbation(
            victim.model, victim.used[:count], config.norm, victim.radius, config.wanted, config.passes,
            config.run.seed, each,
        )  # fmt: skip
    file.parent.mkdir(exist_ok=True)
    part = Path(f"{file}.part")
    save_file({"perturbation": found.cpu().contiguous()}, part)
    part.replace(file)
    return found
