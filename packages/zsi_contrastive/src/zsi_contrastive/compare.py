"""Several methods of pre-training under one budget, and one report: `python -m zsi_contrastive.compare`.

Each method and seed is a run of `zsi_contrastive.pretrain` in a process of its own, so its peak memory is its own.
What is finished is not run again: the same command goes on where it was stopped, and rebuilds the report when all is
there.
"""

from zsi_contrastive import commands

if __name__ == "__main__":  # before the imports below: --help and a wrong option answer at once
    commands.compare()

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from labs_common.cli import parse
from labs_common.comparing import check_compared, comparison_folder, entries_of, name_and_flags, reading_entry, seeds_of
from labs_common.errors import LabError
from labs_common.own_process import claimed, finished_runs, start_server
from zsi_contrastive.ssl.config import METHODS, CompareConfig, MethodOptions, PretrainConfig, complete

LIBRARIES = ["zsi_contrastive.pretrain", "zsi_contrastive.ssl.train", "zsi_contrastive.ssl.report",
             "labs_common.training", "sklearn.linear_model", "sklearn.manifold"]  # fmt: skip


def compare(config: CompareConfig) -> None:
    """Plans the runs, does those that are missing, and writes the report."""
    check_compared("method", config.comparison)
    planned = {spec: planned_run(config, spec) for spec in entries_of("--methods", config.methods)}
    folder = comparison_folder("compare-pretraining", config, [config.data.data])

    start_server(config.comparison.launch, LIBRARIES)
    from zsi_contrastive.ssl.compare import gathered, write_comparison
    from zsi_contrastive.ssl.data import read_splits

    read_splits(config.data, config.comparison.seed, shown=True)  # what is wrong with it is said before anything runs
    seeds = seeds_of(config.comparison)
    with claimed(folder, config):
        failed = finished_runs("zsi_contrastive.pretrain", planned, folder, config.comparison)
        write_comparison(folder, config, gathered(folder, planned, seeds), failed)


@dataclass
class ComparedOptions:
    """What may follow a method's name after colons."""

    own: MethodOptions = field(default_factory=MethodOptions)
    batch_size: int = 0
    """Pictures per optimizer step."""
    local_crops: int = -1
    """Small views that only dino's student sees."""
    learning_rate: float = 0.0
    """Highest learning rate."""
    optimizer: Literal["", "sgd", "lars", "adamw"] = ""
    """Instead of the method's own."""


def planned_run(config: CompareConfig, spec: str) -> PretrainConfig:
    """The run of one entry of --methods: a method, and options after colons (`moco:queue=256`).

    Raises:
        LabError: there is no such method or option, or its value is wrong.
    """
    name, flags = name_and_flags(spec)
    method = next((known for known in METHODS if known == name), None)
    if method is None:
        raise LabError(f"--methods {spec}: no such method; there are {', '.join(METHODS)}")
    with reading_entry("--methods", spec):
        asked = parse(ComparedOptions, "--methods", flags)
        own = MethodOptions()
        changed: dict[str, Any] = {name: value for name, value in vars(asked.own).items() if value != vars(own)[name]}
        names = ("batch_size", "learning_rate", "optimizer")
        given: dict[str, Any] = {name: getattr(asked, name) for name in names}
        training = dataclasses.replace(config.training, **{key: value for key, value in given.items() if value})
        views = config.views
        if asked.local_crops >= 0:
            views = dataclasses.replace(views, local_crops=asked.local_crops)
        return complete(
            PretrainConfig(
                method=method, data=config.data, encoder=config.encoder, views=views,
                own=dataclasses.replace(config.own, **changed), training=training, measure=config.measure,
            )
        )  # fmt: skip
