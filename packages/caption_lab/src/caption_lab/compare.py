"""Several captioners under one budget, and one report: `python -m caption_lab.compare --data flickr8k`.

Each model and seed is a run of `caption_lab.train` in a process of its own, so its peak memory is its own. What is
finished is not run again: the same command goes on where it was stopped, and rebuilds the report when all is there.
"""

from caption_lab import commands

if __name__ == "__main__":  # before the imports below: --help and a wrong option answer at once
    commands.compare()

import dataclasses
from dataclasses import dataclass, field

from caption_lab.config import (
    MODELS,
    TINY,
    CompareConfig,
    DecoderOptions,
    EncoderOptions,
    TrainConfig,
    complete,
)
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

LIBRARIES = ["caption_lab.train", "caption_lab.results", "caption_lab.fitting", "labs_common.training", "timm"]


def compare(config: CompareConfig) -> None:
    """Plans the runs, does those that are missing, and writes the report."""
    check_compared("model", config.comparison)
    planned = {spec: planned_run(config, spec) for spec in entries_of("--models", config.models)}
    folder = comparison_folder("compare-captioners", config, [config.data.data])

    start_server(config.comparison.launch, LIBRARIES)
    from caption_lab.comparison import gathered, write_comparison
    from caption_lab.data import read_data
    from caption_lab.encoder import make_encoder
    from caption_lab.tiny import tiny_weights

    if any(run.encoder.encoder == TINY and run.encoder.pretrained for run in planned.values()):
        tiny_weights()  # made here, so that no run's memory is that of making it
    data = read_data(config.data, config.comparison.seed, shown=True)
    for run in planned.values():
        make_encoder(dataclasses.replace(run.encoder, pretrained=False)).train_last(run.encoder.unfreeze, False)
    seeds = seeds_of(config.comparison)
    with claimed(folder, config):
        failed = finished_runs("caption_lab.train", planned, folder, config.comparison)
        entries = gathered(folder, {spec: slug(spec) for spec in planned}, seeds)
        write_comparison(folder, config, entries, data.splits["test"], data.truth, failed)


@dataclass
class ComparedOptions:
    """What may follow a model's name after colons."""

    encoder: EncoderOptions = field(default_factory=EncoderOptions)
    decoder: DecoderOptions = field(default_factory=DecoderOptions)
    learning_rate: float = 0.0
    """Highest learning rate."""
    label_smoothing: float = 0.0
    """Share of the target's weight that is spread over all words."""
    scheduled_sampling: float = 0.0
    """Share of the input words that the model's own guesses replace at the end of training."""


def planned_run(config: CompareConfig, spec: str) -> TrainConfig:
    """The run of one entry of --models: a model, and options of it after colons (`transformer:mask_words=0.1`).

    Raises:
        LabError: there is no such model or option, or its value is wrong.
    """
    name, flags = name_and_flags(spec)
    kind = next((model for model in MODELS if model == name), None)
    if kind is None:
        raise LabError(f"--models {spec}: no such model; there are {', '.join(MODELS)}")
    with reading_entry("--models", spec):
        own = parse(ComparedOptions, "--models", flags)
        options = ("learning_rate", "label_smoothing", "scheduled_sampling")
        given = {option: getattr(own, option) or getattr(config.training, option) for option in options}
        return complete(
            TrainConfig(
                model=kind, encoder=own.encoder, decoder=own.decoder, vocabulary=config.vocabulary, data=config.data,
                cache=config.cache, training=dataclasses.replace(config.training, **given), decoding=config.decoding,
            )
        )  # fmt: skip
