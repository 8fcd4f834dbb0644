"""Every method under one budget, and one report: `python -m llm_peft_fa.compare --methods lora,layers`."""

from llm_peft_fa import commands

if __name__ == "__main__":  # before the imports below: --help and a wrong option answer at once
    commands.compare()

import dataclasses
import itertools
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Any

import sacrebleu
import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

from labs_common.cache import path_name
from labs_common.cli import parse
from labs_common.compare.collect import (
    Entry,
    Measure,
    figure_text,
    mean_and_spread,
    recommend,
    rows_of,
    within_one_error,
)
from labs_common.compare.plan import comparison_folder, plan_runs, seeds_of, seeds_text, slug
from labs_common.compare.processes import compare_runs, finished_run, start_server
from labs_common.compare.report import (
    Findings,
    budget_section,
    curves_of,
    notes_on,
    pareto_section,
    recommendation_section,
    table_of,
)
from labs_common.device import mixed_precision
from labs_common.errors import LabError, reason_of
from labs_common.options import RunOptions
from labs_common.report.page import Section, Table, Text
from labs_common.run import Run
from labs_common.steps import ShuffledSteps
from labs_common.training import total_steps
from llm_peft_fa.answers import answers, collected_prompts, same, scores
from llm_peft_fa.base import check_quantization, device, load_model, load_tokenizer
from llm_peft_fa.config import CompareConfig, ComparedOptions, TrainConfig
from llm_peft_fa.data import plain_paragraphs, splits
from llm_peft_fa.methods import METHODS, complete
from llm_peft_fa.optimizers import check_optimizer
from llm_peft_fa.report import asked, folded_tables, shortened
from llm_peft_fa.table import encode_all

COMMAND = "llm_peft_fa.train"
BASE = "base"  # the directory of the base's answers, and its name in tables
HIGHER = ("exact match", "chrF", "tokens/s")  # is better
SCORES = ("exact match", "chrF", "validation loss", "plain text loss")
COSTS = {
    "training seconds": partial(Entry.cost, name="seconds"),
    "tokens/s": partial(Entry.cost, name="tokens per second"),
    "peak MiB": partial(Entry.cost, name="peak memory", scale=2**20),
    "trained parameters": partial(Entry.cost, name="trainable"),
    "optimizer KiB": partial(Entry.cost, name="optimizer bytes", scale=2**10),
    "on disk KiB": partial(Entry.cost, name="disk bytes", scale=2**10),
}
SHOWN = 15  # answers before the fold: with a column for each method the rows are high


def compare(config: CompareConfig) -> None:
    """Plans the runs, does those that are missing, and writes the report."""
    planned = plan(config)
    data = config.data
    mixed = [entry.rpartition(":")[0] for entry in data.mix]
    files = (data.data, data.validation_data, data.test_data, data.plain_text, *mixed)
    folder = comparison_folder(f"compare-{path_name(config.model.model)}", config, files)
    start_server(config.comparison.launch, [COMMAND])
    check_plan(planned, config.comparison.launch)
    compare_runs(folder, config, COMMAND, planned, partial(findings, config), partial(prepare, config))


def plan(config: CompareConfig) -> dict[str, TrainConfig]:
    """Makes the run of each entry of --methods: a method, and options of it after colons (`lora:rank=8`).

    Raises:
        LabError: the comparison cannot start, or there is no such method or option, or its value is wrong.
    """

    def run_of(method: str, flags: list[str]) -> TrainConfig:
        shared = ComparedOptions(learning_rate=config.training.learning_rate)
        own = parse(ComparedOptions, "--methods", [f"--method={method}", *flags], shared)
        return complete(
            TrainConfig(
                model=config.model, data=config.data, method=own.method,
                training=dataclasses.replace(config.training, learning_rate=own.learning_rate),
                generation=dataclasses.replace(config.generation, answer_base=False),
            )
        )  # fmt: skip

    return plan_runs(config.comparison, "--methods", config.methods, "method", run_of, [*METHODS])


def check_plan(planned: Mapping[str, TrainConfig], launch: Path | None = None) -> None:
    """Makes sure that every planned run can start, as far as can be told without its process; writes nothing.

    `launch` is the configuration of Accelerate that runs get, if any.

    Raises:
        LabError: the machine, the launch, the data or the model does not allow one.
    """
    kind = None
    if launch is not None:
        try:
            kind = load_config_from_file(str(launch)).distributed_type
        except Exception as error:  # written by anybody
            raise LabError(f"--launch {launch}: is no configuration of Accelerate ({reason_of(error)})") from error
    for run in planned.values():
        sharded = kind in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        check_optimizer(run, mixed_precision(run.training.precision), sharded)
    if any(METHODS[run.method.method].quantized for run in planned.values()):
        check_quantization()
    first = next(iter(planned.values()))
    collected_prompts(splits(first.data, first.run.seed)["test"], first.generation, first.run.seed)
    plain_paragraphs(first)
    load_tokenizer(first.model.model, first.model.template)


def prepare(config: CompareConfig, folder: Path, planned: Mapping[str, TrainConfig]) -> Mapping[str, TrainConfig]:
    """Answers the prompts with the base alone, and searches learning rates if they are asked for."""
    first = next(iter(planned.values()))
    for seed in seeds_of(config.comparison):
        save_base_answers(Run(folder / BASE / f"seed-{seed}"), _at(first, seed))
    if not config.search:
        return planned
    training = splits(first.data, first.run.seed)["training"]
    tokenizer = load_tokenizer(first.model.model, first.model.template, first.model.thinking)
    rows = encode_all(tokenizer, training, first.data.max_length, first.data.on_too_long)
    source = ShuffledSteps(len(rows), first.training.batch_size, 0, lambda *_: [])  # to be counted
    steps = max(1, round(config.search_share * total_steps(first.training, source)))
    return {spec: _searched(config, run, folder, slug(spec), steps) for spec, run in planned.items()}


def save_base_answers(kept: Run, run: TrainConfig) -> None:
    """Answers the prompts of this seed with the base alone, unless that has been done."""
    if kept.load_json("scores.json") is not None:
        return
    prompts = collected_prompts(splits(run.data, run.run.seed)["test"], run.generation, run.run.seed)
    tokenizer = load_tokenizer(run.model.model, run.model.template, run.model.thinking)
    base = load_model(run.model.model)
    torch.nn.Module.to(base, device())
    said = answers(base, tokenizer, prompts, run.generation, Accelerator(), "answering, base")
    kept.path.mkdir(parents=True, exist_ok=True)
    rows = [
        {"prompt": prompt.messages[-1]["content"], "reference": prompt.reference, "after": answer}
        for prompt, answer in zip(prompts, said, strict=True)
    ]
    kept.save_json("answers.json", rows)
    kept.save_json("scores.json", scores(prompts, said))


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
        if finished_run(COMMAND, wanted, path, config.comparison.launch) == 0:
            tried[rate] = float(Run(path).load_json("results.json")["after"]["validation loss"])
    if not tried:
        return run
    best = min(tried, key=lambda rate: tried[rate])
    return dataclasses.replace(run, training=dataclasses.replace(run.training, learning_rate=best))


def _at(run: TrainConfig, seed: int, path: Path | None = None) -> TrainConfig:
    return dataclasses.replace(run, run=RunOptions(output=path, seed=seed, track="none"))


def findings(config: CompareConfig, run: Run, entries: dict[str, Entry], failed: dict[str, int]) -> Findings:
    """Puts what finished side by side, and recommends a method."""
    options = config.comparison
    base = {seed: Run(run.path / BASE / f"seed-{seed}") for seed in seeds_of(options)}
    rows = table_rows(entries, [one.load_json("scores.json") for one in base.values()])
    best, equal = recommend(entries, quality, within_noise, "trainable")
    words = quality_name(next(iter(entries.values())))
    recommended = recommendation_section(
        "method", max(entries.values(), key=quality), best, equal, quality, words, "prompts", "trainable"
    )
    if forgot := {entry.name: loss for entry in equal if (loss := entry.values("after", "plain text loss"))}:
        least = min(forgot, key=lambda name: statistics.fmean(forgot[name]))
        recommended.blocks.append(Text(f"Of those, {least} forgot the least of what the base knew."))
    recommended.blocks.append(Text(stability_text(entries, seeds_of(options))))
    against: dict[str, tuple[Measure, bool]] = {
        "trained parameters": (COSTS["trained parameters"], True),
        "training seconds": (COSTS["training seconds"], False),
        "peak memory, MiB": (COSTS["peak MiB"], False),
    }
    if all(entry.values("after", "plain text loss") for entry in entries.values()):
        against["loss on plain text"] = (methodcaller("values", "after", "plain text loss"), False)
    curves = {name: entry.curve("loss") for name, entry in entries.items()}
    caption = "Training loss, averaged over a few steps; first seed."
    figure = curves_of(run, curves, "optimizer step", "training loss", caption, log_up=True)
    sections = [
        recommended,
        numbers_section(rows, config, failed),
        pareto_section(run, entries, quality, words, against),
        Section("Curves", [figure]),
        strengths_section(entries),
        answers_section(entries, *next(iter((seed, one.load_json("answers.json")) for seed, one in base.items()))),
        budget_section("method", entries, "tokens", "Each method had the same base, conversations, order and tokens."),
    ]
    summary = (
        f"{len(entries)} methods, {seeds_text(options)} each. Recommended by the rule below: {best.name}, {words} "
        f"{quality(best):.3f}."
    )
    printed = (*SCORES, "training seconds")
    return Findings(f"Fine-tuning methods on {config.model.model}", summary, rows, sections, printed, best.name)


def table_rows(entries: Mapping[str, Entry], base: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    """Lists a row per method, best first, and the base: scores and costs as means over seeds, `NAME ±` their spread.

    `base` has the scores of the base's answers by seed; its losses are those that the runs measured before training.
    """
    rates = {"learning rate": lambda entry: entry.values("config", "training", "learning_rate")[:1]}
    measures = {name: methodcaller("values", "after", name) for name in SCORES}
    rows = rows_of("method", sorted(entries.values(), key=quality, reverse=True), rates | measures | COSTS)
    last: dict[str, Any] = {"method": BASE}
    for name in SCORES:
        values = [scores[name] for scores in base if name in scores]
        last |= mean_and_spread(name, values or next(iter(entries.values())).values("before", name))
    return [*rows, last]


def prompt_scores(answers: Sequence[Mapping[str, Any]]) -> list[float]:
    """Scores each answer: 1 or 0 where it can be checked word for word, if any can; else by its chrF (0 to 1)."""
    checked = [row for row in answers if row["verifiable"] and row["reference"] is not None]
    if checked:
        return [float(same(row["after"], row["reference"])) for row in checked]
    return [
        sacrebleu.sentence_chrf(row["after"], [row["reference"]]).score / 100 for row in answers if row["reference"]
    ]


def quality_name(entry: Entry) -> str:
    """Names what `quality` measures in this comparison."""
    answers = next(iter(entry.read("answers.json").values()))
    if any(row["verifiable"] and row["reference"] is not None for row in answers):
        return "exact match"
    return "chrF (0 to 1)" if any(row["reference"] for row in answers) else "minus validation loss"


def quality(entry: Entry, seed: int | None = None) -> float:
    """Averages `prompt_scores`, over all seeds or of one; minus the validation loss if no prompt has a reference."""
    answers = {key: rows for key, rows in entry.read("answers.json").items() if seed in (None, key)}
    found = [score for rows in answers.values() for score in prompt_scores(rows)]
    if found:
        return statistics.fmean(found)
    return -statistics.fmean(entry.results[key]["after"]["validation loss"] for key in answers)


def within_noise(best: Entry, other: Entry) -> bool:
    """Tells whether `other` is at most one standard error worse than `best` (Breiman et al. 1984, section 3.4.3).

    The standard error is that of the mean difference on the same prompts of the same seeds.
    """
    one, two = best.read("answers.json"), other.read("answers.json")
    differences = [
        first - second
        for seed in one.keys() & two.keys()
        for first, second in zip(prompt_scores(one[seed]), prompt_scores(two[seed]), strict=True)
    ]
    return within_one_error(differences) if len(differences) > 1 else best.name == other.name


def order_of(entries: Mapping[str, Entry], seed: int) -> list[str]:
    """Lists the methods that have this seed, best first."""
    there = [entry for entry in entries.values() if seed in entry.results]
    return [entry.name for entry in sorted(there, key=lambda entry: -quality(entry, seed))]


def changing_pairs(entries: Mapping[str, Entry], seeds: Sequence[int]) -> list[tuple[str, str]]:
    """Lists the pairs of methods whose order by quality is not the same in all seeds."""
    found = []
    for one, two in itertools.combinations(entries.values(), 2):
        both = [seed for seed in seeds if seed in one.results and seed in two.results]
        differences = [quality(one, seed) - quality(two, seed) for seed in both]
        if len({(difference > 0) - (difference < 0) for difference in differences}) > 1:
            found.append((one.name, two.name))
    return found


def stability_text(entries: Mapping[str, Entry], seeds: Sequence[int]) -> str:
    """Tells whether the order of the methods can be relied on."""
    orders = {seed: " > ".join(order_of(entries, seed)) for seed in seeds}
    first = orders[seeds[0]]
    if len(seeds) > 1:
        pairs = changing_pairs(entries, seeds)
        if not pairs:
            return f"The order is the same with all {len(seeds)} seeds: {first}."
        changing = "; ".join(f"{one} and {two}" for one, two in pairs)
        said = "; ".join(f"seed {seed}: {order}" for seed, order in orders.items())
        return f"The order is not stable over seeds: {changing} change places. {said}."
    neighbours = itertools.pairwise(order_of(entries, seeds[0]))
    close = [f"{one} and {two}" for one, two in neighbours if within_noise(entries[one], entries[two])]
    near = f" Neighbours within noise of each other: {'; '.join(close)}." if close else ""
    return (
        f"One seed was run, so whether this order is stable over seeds is not known (--seeds 3 tells): {first}.{near}"
    )


def numbers_section(rows: Sequence[Mapping[str, Any]], config: CompareConfig, failed: Mapping[str, int]) -> Section:
    """Tabulates quality and cost."""
    present = [name for name in SCORES if any(name in row for row in rows)]
    costs = ("method", "learning rate", *COSTS)
    blocks: list[Table | Text] = [
        table_of(rows, ("method", *present), "Quality after training, best first."),
        table_of(rows[:-1], costs, "Cost of training; each method in a process of its own."),
        Text(
            "Exact match counts answers that equal the reference word for word, chrF runs from 0 to 100, losses are in "
            "nats per token. Plain text is of the base's world and is not trained on: what its loss rises above the "
            "base's was forgotten. Peak memory is of the whole process, libraries included, on a CPU."
        ),
        *notes_on(config.comparison, failed),
    ]
    if config.search:
        blocks.append(
            Text(
                f"Learning rates: the best of {config.search} for each method by validation loss, each tried for "
                f"{config.search_share:.0%} of the steps. The validation data are those that are reported."
            )
        )
    return Section("Numbers", [*blocks])


def strengths_section(entries: Mapping[str, Entry]) -> Section:
    """Lists what each method is best and worst at, from the numbers alone."""
    measures = {name: methodcaller("values", "after", name) for name in SCORES} | COSTS
    means = {
        measure: {name: statistics.fmean(values) for name, entry in entries.items() if (values := of(entry))}
        for measure, of in measures.items()
    }
    rows = []
    for name, entry in entries.items():
        good, bad = [], []
        for measure, found in means.items():
            if len(found) < 2 or name not in found:
                continue
            ordered = sorted(found.values(), reverse=measure in HIGHER)
            text = f"{measure} {figure_text(found[name])}"
            if found[name] == ordered[0] != ordered[-1]:
                good.append(f"best {text}")
            elif found[name] == ordered[-1] != ordered[0]:
                bad.append(f"worst {text} (best {figure_text(ordered[0])})")
        share = entry.cost("trainable")[0] / entry.cost("parameters")[0]
        rows.append((name, f"{share:.2%}", "; ".join(good) or "–", "; ".join(bad) or "–"))
    columns = ("method", "trains", "strengths", "weaknesses")
    return Section("Strengths and weaknesses", [Table(columns, rows, "Only what the figures above say.")])


def answers_section(entries: Mapping[str, Entry], seed: int, base: Sequence[Mapping[str, Any]]) -> Section:
    """Shows the same prompts of one seed answered by the base and by every method."""
    there = {name: entry.read("answers.json")[seed] for name, entry in entries.items() if seed in entry.runs}
    rows = []
    for number, row in enumerate(base):
        said = [shortened(answers[number]["after"]) for answers in there.values()]
        rows.append((asked(row["prompt"]), row["reference"], shortened(row["after"]), *said))
    tables = folded_tables(("prompt", "reference", BASE, *there), rows, SHOWN)
    return Section("The same prompts, answered by all", [*tables])
