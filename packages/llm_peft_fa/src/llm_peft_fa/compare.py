"""Every method under one budget, and one report: `python -m llm_peft_fa.compare --methods lora,prefix_tuning,layers`.

Each method and seed is a run of `llm_peft_fa.train` in a process of its own, so its peak memory is its own. What is
finished is not run again: the same command goes on where it was stopped, and rebuilds the report when all is there.
"""

from llm_peft_fa import commands

if __name__ == "__main__":  # before the imports below: --help and a wrong option answer at once
    commands.compare()

import dataclasses
from pathlib import Path

from labs_common.cache import path_name
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
from labs_common.options import RunOptions
from labs_common.own_process import claimed, finished_run, finished_runs, start_server
from llm_peft_fa.config import CompareConfig, TrainConfig, complete
from llm_peft_fa.method_options import MethodOptions

LIBRARIES = ["llm_peft_fa.train", "llm_peft_fa.results", "llm_peft_fa.adapters", "labs_common.training", "sacrebleu"]


def compare(config: CompareConfig) -> None:
    """Plans the runs, does those that are missing, and writes the report."""
    check_compared("method", config.comparison)
    if config.search < 0 or not 0 < config.search_share <= 1:
        raise LabError("--search must be at least 0, --search-share above 0 and at most 1")
    planned = {spec: planned_run(config, spec) for spec in entries_of("--methods", config.methods)}
    files = (config.data.data, config.data.validation_data, config.data.plain_text)
    folder = comparison_folder(f"compare-{path_name(config.model.model)}", config, files)

    start_server(config.comparison.launch, LIBRARIES)
    from llm_peft_fa.comparison import check_plan, gathered, save_base_answers, steps_of
    from llm_peft_fa.comparison_report import write_comparison

    check_plan(planned)
    seeds = seeds_of(config.comparison)
    with claimed(folder, config):
        for seed in seeds:
            save_base_answers(folder / "base" / f"seed-{seed}", _at(next(iter(planned.values())), seed))
        if config.search:
            steps = steps_of(next(iter(planned.values())))
            budget = max(1, round(config.search_share * steps))
            planned = {spec: _searched(config, run, folder, slug(spec), budget)
                       for spec, run in planned.items()}  # fmt: skip
        failed = finished_runs("llm_peft_fa.train", planned, folder, config.comparison)
        results = gathered(folder, {spec: slug(spec) for spec in planned}, seeds)
        write_comparison(folder, config, results, failed)


def planned_run(config: CompareConfig, spec: str) -> TrainConfig:
    """The run of one entry of --methods: a method, and options of it after colons (`lora:rank=8:learning_rate=0.001`).

    Raises:
        LabError: there is no such method or option.
    """
    name, options = name_and_flags(spec)
    rate = config.training.learning_rate
    flags = [f"--method={name}"]
    for option in options:
        if option.startswith("--learning-rate"):
            value = option.partition("=")[2]
            try:
                rate = float(value)
            except ValueError:
                raise LabError(f"--methods {spec}: learning_rate is a number, not {value!r}") from None
        else:
            flags.append(option)
    with reading_entry("--methods", spec):
        method = parse(MethodOptions, "--methods", flags)
        return complete(
            TrainConfig(
                model=config.model, data=config.data, method=method,
                training=dataclasses.replace(config.training, learning_rate=rate),
                generation=dataclasses.replace(config.generation, answer_base=False),
            )
        )  # fmt: skip


def _searched(config: CompareConfig, run: TrainConfig, folder: Path, name: str, steps: int) -> TrainConfig:
    """The run with the best of --search learning rates: threefold steps around its own, `steps` steps each."""
    from llm_peft_fa.comparison import validation_loss_of

    middle = config.search // 2
    tried = {}
    for place in range(config.search):
        rate = run.training.learning_rate * 3.0 ** (place - middle)
        short = dataclasses.replace(
            run,
            training=dataclasses.replace(run.training, learning_rate=rate, max_steps=steps),
            generation=dataclasses.replace(run.generation, test_prompts=0, prompts=None),
        )
        path = folder / "search" / name / f"rate-{rate:.2g}"
        wanted = _at(short, config.comparison.seed, path)
        if finished_run("llm_peft_fa.train", wanted, path, folder, config.comparison.launch) == 0:
            tried[rate] = validation_loss_of(path)
    if not tried:
        return run
    best = min(tried, key=lambda rate: tried[rate])
    return dataclasses.replace(run, training=dataclasses.replace(run.training, learning_rate=best))


def _at(run: TrainConfig, seed: int, path: Path | None = None) -> TrainConfig:
    return dataclasses.replace(run, run=RunOptions(output=path, seed=seed, track="none"))
