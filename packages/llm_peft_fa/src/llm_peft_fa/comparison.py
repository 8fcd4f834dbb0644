"""The results of a comparison's runs: read from their directories, put in order, and judged by stated rules."""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sacrebleu
import torch

from labs_common.comparing import within_one_error
from labs_common.run import Run, write_atomically
from llm_peft_fa.config import TrainConfig

BASE = "base"


@dataclass(frozen=True)
class Entry:
    """One method of a comparison, over all seeds.

    Attributes:
        name: as --methods names it.
        results: results.json by seed.
        answers: answers.json by seed.
        curve: of the first seed, (step, training loss).
    """

    name: str
    results: dict[int, dict[str, Any]]
    answers: dict[int, list[dict[str, Any]]]
    curve: list[tuple[int, float]]

    def after(self, score: str) -> list[float]:
        """A score by seed; those seeds that have it."""
        return [result["after"][score] for result in self.results.values() if score in result["after"]]

    def before(self, score: str) -> list[float]:
        """A score of the base by seed, as the run measured it."""
        return [result["before"][score] for result in self.results.values() if score in result["before"]]

    def cost(self, name: str) -> list[float]:
        """A cost by seed."""
        return [result["cost"][name] for result in self.results.values()]


@dataclass(frozen=True)
class Results:
    """All methods, those without a finished run left out, and the base's scores and answers by seed."""

    entries: dict[str, Entry]
    base_scores: dict[int, dict[str, float]]
    base_answers: dict[int, list[dict[str, Any]]]


def check_plan(planned: Mapping[str, TrainConfig]) -> None:
    """Makes sure that every planned run can start, as far as can be told without its process; writes nothing.

    Raises:
        LabError: the machine, the data or the model does not allow one.
    """
    from accelerate import PartialState

    from llm_peft_fa.answers import collected_prompts
    from llm_peft_fa.data import training_and_validation
    from llm_peft_fa.forgetting import plain_paragraphs
    from llm_peft_fa.methods import check_quantization
    from llm_peft_fa.model import load_tokenizer

    if any(run.method.method == "qlora" for run in planned.values()):
        check_quantization()
    first = next(iter(planned.values()))
    collected_prompts(training_and_validation(first.data, first.run.seed)[1], first.generation, first.run.seed)
    plain_paragraphs(first)
    PartialState()
    load_tokenizer(first.model.model, first.model.template)


def steps_of(run: TrainConfig) -> int:
    """The optimizer steps of a planned run."""
    from labs_common.training import total_steps
    from llm_peft_fa.data import training_and_validation
    from llm_peft_fa.packing import PackedSteps

    training, _ = training_and_validation(run.data, run.run.seed)
    lengths = PackedSteps([None] * len(training.conversations), run.training.batch_size, 1, 0)  # type: ignore[list-item]
    return total_steps(run.training, lengths)


def save_base_answers(folder: Path, run: TrainConfig) -> None:
    """Answers the prompts of this seed with the base alone, unless that has been done."""
    from accelerate import Accelerator

    from llm_peft_fa.answers import answers, collected_prompts, scores
    from llm_peft_fa.data import training_and_validation
    from llm_peft_fa.model import device, device_precision, load_model, load_tokenizer

    if (folder / "scores.json").exists():
        return
    _, validation = training_and_validation(run.data, run.run.seed)
    prompts = collected_prompts(validation, run.generation, run.run.seed)
    tokenizer = load_tokenizer(run.model.model, run.model.template)
    base = load_model(run.model.model, device_precision())
    torch.nn.Module.to(base, device())
    said = answers(base, tokenizer, prompts, run.generation, Accelerator(), "answering, base")
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"prompt": prompt.messages[-1]["content"], "reference": prompt.reference, "after": answer}
        for prompt, answer in zip(prompts, said, strict=True)
    ]
    write_atomically(folder / "answers.json", json.dumps(rows, ensure_ascii=False, indent=1) + "\n")
    write_atomically(folder / "scores.json", json.dumps(scores(prompts, said), indent=1) + "\n")


def validation_loss_of(path: Path) -> float:
    """The validation loss at the end of a finished run."""
    return float(Run(path).load_json("results.json")["after"]["validation loss"])


def gathered(folder: Path, paths: Mapping[str, str], seeds: Iterable[int]) -> Results:
    """Reads what is finished; `paths` are the runs' directories by the methods' names."""
    entries = {}
    seeds = list(seeds)
    for name, path in paths.items():
        runs = {seed: Run(folder / path / f"seed-{seed}") for seed in seeds}
        done = {seed: run for seed, run in runs.items() if (run.path / "results.json").exists()}
        if done:
            lines = next(iter(done.values())).lines("metrics.jsonl")
            entries[name] = Entry(
                name,
                {seed: run.load_json("results.json") for seed, run in done.items()},
                {seed: run.load_json("answers.json") for seed, run in done.items()},
                [(line["step"], line["loss"]) for line in lines if "loss" in line],
            )
    base = {seed: Run(folder / BASE / f"seed-{seed}") for seed in seeds}
    return Results(
        entries,
        {seed: run.load_json("scores.json") for seed, run in base.items()},
        {seed: run.load_json("answers.json") for seed, run in base.items()},
    )


def prompt_scores(answers: Sequence[Mapping[str, Any]]) -> list[float]:
    """How right each answer is: 1 or 0 where it can be checked word for word, if any can; else its chrF (0 to 1)."""
    from llm_peft_fa.answers import same

    checked = [row for row in answers if row["verifiable"] and row["reference"] is not None]
    if checked:
        return [float(same(row["after"], row["reference"])) for row in checked]
    return [
        sacrebleu.sentence_chrf(row["after"], [row["reference"]]).score / 100 for row in answers if row["reference"]
    ]


def quality(entry: Entry, seed: int | None = None) -> float:
    """Mean of `prompt_scores`, over all seeds or of one; minus the validation loss if no prompt has a reference."""
    chosen = entry.answers if seed is None else {seed: entry.answers[seed]}
    found = [score for answers in chosen.values() for score in prompt_scores(answers)]
    if found:
        return statistics.fmean(found)
    losses = {number: result["after"]["validation loss"] for number, result in entry.results.items()}
    return -statistics.fmean(losses[number] for number in chosen)


def within_noise(best: Entry, other: Entry) -> bool:
    """Whether `other` is no more than one standard error worse than `best` (Breiman et al. 1984, section 3.4.3).

    The standard error is that of the mean difference on the same prompts of the same seeds.
    """
    differences = [
        one - two
        for seed in best.answers.keys() & other.answers.keys()
        for one, two in zip(prompt_scores(best.answers[seed]), prompt_scores(other.answers[seed]), strict=True)
    ]
    if len(differences) < 2:
        return best.name == other.name
    return within_one_error(differences)


def recommended(entries: Mapping[str, Entry]) -> tuple[Entry, list[Entry]]:
    """The method with the fewest trained parameters among those within noise of the best, and all of those."""
    best = max(entries.values(), key=quality)
    equal = [entry for entry in entries.values() if within_noise(best, entry)]
    return min(equal, key=lambda entry: entry.cost("trainable")[0]), equal


def order_of(entries: Mapping[str, Entry], seed: int) -> list[str]:
    """The methods that have this seed, best first."""
    there = [entry for entry in entries.values() if seed in entry.answers]
    return [entry.name for entry in sorted(there, key=lambda entry: -quality(entry, seed))]


def changing_pairs(entries: Mapping[str, Entry], seeds: Sequence[int]) -> list[tuple[str, str]]:
    """The pairs of methods whose order by quality is not the same in all seeds."""
    names = list(entries)
    found = []
    for place, one in enumerate(names):
        for two in names[place + 1 :]:
            signs = {
                (first > second) - (first < second)
                for seed in seeds
                if seed in entries[one].answers and seed in entries[two].answers
                for first, second in [(quality(entries[one], seed), quality(entries[two], seed))]
            }
            if len(signs) > 1:
                found.append((one, two))
    return found
