"""CLIP, CoCa and SimVLM under one budget, and one report: `python -m clip_lab.compare --data flickr8k`.

Each objective and seed is a run of `clip_lab.train` in a process of its own, so its peak memory is its own. What is
finished is not run again: the same command goes on where it was stopped, and rebuilds the report when all is there.
"""

from clip_lab import commands

if __name__ == "__main__":  # before the imports below: --help and a wrong option answer at once
    commands.compare()

import dataclasses
from dataclasses import dataclass, field

from clip_lab.command_config import CompareConfig
from clip_lab.config import OBJECTIVES, HeadOptions, TrainConfig, complete
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
from labs_common.errors import LabError
from labs_common.own_process import claimed, finished_runs, start_server

LIBRARIES = ["clip_lab.train", "clip_lab.results", "clip_lab.scoring", "labs_common.training", "timm", "transformers"]


def compare(config: CompareConfig) -> None:
    """Plans the runs, does those that are missing, measures all of them alike, and writes the report."""
    check_compared("objective", config.comparison)
    if config.ranked < 2:
        raise LabError("--ranked: must be at least 2")
    planned = {spec: planned_run(config, spec) for spec in entries_of("--objectives", config.objectives)}
    folder = comparison_folder("compare-clip", config, [config.data.data, config.classes])

    start_server(config.comparison.launch, LIBRARIES)
    from clip_lab.comparison import gathered, write_comparison
    from clip_lab.data import read_data
    from clip_lab.image import make_image_tower

    data = read_data(config.data, config.comparison.seed, shown=True)
    make_image_tower(dataclasses.replace(config.image, image_pretrained=False, image_weights=None))
    seeds = seeds_of(config.comparison)
    with claimed(folder, config):
        failed = finished_runs("clip_lab.train", planned, folder, config.comparison)
        entries = gathered(folder, {spec: slug(spec) for spec in planned}, seeds, config, data)
        write_comparison(folder, config, entries, failed)


@dataclass
class ComparedOptions:
    """What may follow an objective's name after colons."""

    head: HeadOptions = field(default_factory=HeadOptions)
    learning_rate: float = 0.0
    """Highest learning rate."""


def planned_run(config: CompareConfig, spec: str) -> TrainConfig:
    """The run of one entry of --objectives: an objective, and options of it after colons (`coca:queries=64`).

    Raises:
        LabError: there is no such objective or option, or its value is wrong.
    """
    name, flags = name_and_flags(spec)
    kind = next((objective for objective in OBJECTIVES if objective == name), None)
    if kind is None:
        raise LabError(f"--objectives {spec}: no such objective; there are {', '.join(OBJECTIVES)}")
    with reading_entry("--objectives", spec):
        own = parse(ComparedOptions, "--objectives", flags)
        rate = own.learning_rate or config.training.learning_rate
        return complete(
            TrainConfig(
                objective=kind, image=config.image, text=config.text, head=own.head, data=config.data,
                batch=config.batch, cache=config.cache,
                training=dataclasses.replace(config.training, learning_rate=rate),
            )
        )  # fmt: skip
