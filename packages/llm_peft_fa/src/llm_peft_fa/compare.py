"""Every method under one budget, and one report: `python -m llm_peft_fa.compare --methods lora,prefix_tuning,layers`.

Each method and seed is a run of `llm_peft_fa.train` in a process of its own, so its peak memory is its own. Finished
runs are not run again: the same command goes on where it was stopped, and rebuilds the report when all are there.
"""

from llm_peft_fa import commands

if __name__ == "__main__":  # before the imports below: --help and a wrong option answer at once
    commands.compare()

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState

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
from labs_common.run import Run, write_atomically
from labs_common.training import total_steps
from llm_peft_fa.answers import answers, collected_prompts, scores
from llm_peft_fa.base import check_quantization, device, load_model, load_tokenizer
from llm_peft_fa.compare_report import gathered, write_comparison
from llm_peft_fa.config import CompareConfig, MethodOptions, TrainConfig
from llm_peft_fa.data import plain_paragraphs, training_and_validation
from llm_peft_fa.methods import complete
from llm_peft_fa.packing import PackedSteps

LIBRARIES = ["llm_peft_fa.train"]


def compare(config: CompareConfig) -> None:
    """Plans the runs, does those that are missing, and writes the report."""
    check_compared("method", config.comparison)
    if config.search < 0 or not 0 < config.search_share <= 1:
        raise LabError("--search must be at least 0, --search-share above 0 and at most 1")
    planned = {spec: planned_run(config, spec) for spec in entries_of("--methods", config.methods)}
    files = (config.data.data, config.data.validation_data, config.data.plain_text)
    folder = comparison_folder(f"compare-{path_name(config.model.model)}", config, files)

    start_server(config.comparison.launch, LIBRARIES)
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
    """Plans the run of an entry of --methods: a method, and its options after colons (`lora:rank=8:learning_rate=0.1`).

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
    """Gives the run the best of --search learning rates: threefold steps around its own, `steps` steps each."""
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
            tried[rate] = float(Run(path).load_json("results.json")["after"]["validation loss"])
    if not tried:
        return run
    best = min(tried, key=lambda rate: tried[rate])
    return dataclasses.replace(run, training=dataclasses.replace(run.training, learning_rate=best))


def _at(run: TrainConfig, seed: int, path: Path | None = None) -> TrainConfig:
    return dataclasses.replace(run, run=RunOptions(output=path, seed=seed, track="none"))


def check_plan(planned: Mapping[str, TrainConfig]) -> None:
    """Makes sure that every planned run can start, as far as can be told without its process; writes nothing.

    Raises:
        LabError: the machine, the data or the model does not allow one.
    """
    if any(run.method.method == "qlora" for run in planned.values()):
        check_quantization()
    first = next(iter(planned.values()))
    collected_prompts(training_and_validation(first.data, first.run.seed)[1], first.generation, first.run.seed)
    plain_paragraphs(first)
    PartialState()
    load_tokenizer(first.model.model, first.model.template)


def steps_of(run: TrainConfig) -> int:
    """Counts the optimizer steps of a planned run."""
    training, _ = training_and_validation(run.data, run.run.seed)
    lengths = PackedSteps([None] * len(training.conversations), run.training.batch_size, 1, 0)  # type: ignore[list-item]
    return total_steps(run.training, lengths)


def save_base_answers(folder: Path, run: TrainConfig) -> None:
    """Answers the prompts of this seed with the base alone, unless that has been done."""
    if (folder / "scores.json").exists():
        return
    _, validation = training_and_validation(run.data, run.run.seed)
    prompts = collected_prompts(validation, run.generation, run.run.seed)
    tokenizer = load_tokenizer(run.model.model, run.model.template)
    base = load_model(run.model.model)
    torch.nn.Module.to(base, device())
    said = answers(base, tokenizer, prompts, run.generation, Accelerator(), "answering, base")
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"prompt": prompt.messages[-1]["content"], "reference": prompt.reference, "after": answer}
        for prompt, answer in zip(prompts, said, strict=True)
    ]
    write_atomically(folder / "answers.json", json.dumps(rows, ensure_ascii=False, indent=1) + "\n")
    write_atomically(folder / "scores.json", json.dumps(scores(prompts, said), indent=1) + "\n")
