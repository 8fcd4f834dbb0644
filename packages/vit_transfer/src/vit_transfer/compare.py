"""Several networks under one budget, and one report: `python -m vit_transfer.compare --models resnet50,deit_small_…`.

Each network and seed is a run of `vit_transfer.train` in a process of its own, so its peak memory is its own. What is
finished is not run again: the same command goes on where it was stopped, and rebuilds the report when all is there.
"""

from vit_transfer import commands

if __name__ == "__main__":  # before the imports below: --help and a wrong option answer at once
    commands.compare()

import dataclasses
from dataclasses import dataclass

from labs_common.cli import parse
from labs_common.comparing import (
    check_compared,
    comparison_folder,
    entries_of,
    name_and_flags,
    reading_entry,
    seeds_of,
    slug,
)
from labs_common.own_process import claimed, finished_runs, start_server
from vit_transfer.compare_report import read_entries, write_comparison
from vit_transfer.config import TINY, CompareConfig, ModelOptions, TrainConfig, complete
from vit_transfer.data import read_splits
from vit_transfer.tiny import tiny_model
from vit_transfer.train import check_network

LIBRARIES = ["vit_transfer.train", "vit_transfer.compare"]


def compare(config: CompareConfig) -> None:
    """Plans the runs, does those that are missing, and writes the report."""
    check_compared("network", config.comparison)
    planned = {spec: planned_run(config, spec) for spec in entries_of("--models", config.models)}
    folder = comparison_folder("compare-networks", config, [config.data.data])

    start_server(config.comparison.launch, LIBRARIES)
    splits = read_splits(config.data, config.comparison.seed, shown=True)
    for run in planned.values():
        check_network(run.model, len(splits["train"].classes), run.cache.cache)
        if run.model.model in TINY and run.model.pretrained:
            tiny_model(run.model.model, 2, pretrained=True)  # here, so that no run's memory is that of making it
    with claimed(folder, config):
        failed = finished_runs("vit_transfer.train", planned, folder, config.comparison)
        entries = read_entries(folder, {spec: slug(spec) for spec in planned}, seeds_of(config.comparison))
        write_comparison(folder, config, entries, splits["test"], failed)


@dataclass
class ComparedOptions(ModelOptions):
    """The options that may follow a network's name after colons."""

    learning_rate: float = 0.0
    """Highest learning rate."""


def planned_run(config: CompareConfig, spec: str) -> TrainConfig:
    """Plans the run of one entry of --models: a network, and options of it after colons (`resnet50:unfreeze=head`).

    Raises:
        LabError: there is no such option, or its value is wrong.
    """
    name, flags = name_and_flags(spec)
    shared = [
        f"--{option}={getattr(config, option.replace('-', '_'))}" for option in ("head", "head-width", "image-size")
    ]
    with reading_entry("--models", spec):
        found = parse(ComparedOptions, "--models", [f"--model={name}", *shared, *flags])
        options = {field.name: getattr(found, field.name) for field in dataclasses.fields(ModelOptions)}
        rate = found.learning_rate or config.training.learning_rate
        training = dataclasses.replace(config.training, learning_rate=rate)
        return complete(TrainConfig(ModelOptions(**options), config.data, config.cache, training, baselines="no"))
