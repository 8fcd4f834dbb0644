"""The results of a comparison, read from its runs' JSON alone, ordered by stated rules, and their report."""

import itertools
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sacrebleu

from labs_common.comparing import cell, figure_text, mean_and_spread, pareto, seeds_of, seeds_text, within_one_error
from labs_common.progress import console
from labs_common.report import (
    Figure,
    Section,
    Table,
    Text,
    asked_section,
    curve_figure,
    save_figure,
    scatter_figure,
    write_report,
)
from labs_common.run import Run
from llm_peft_fa.answers import same
from llm_peft_fa.config import CompareConfig
from llm_peft_fa.report import asked, folded_tables, shown

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
        """Lists a score by seed, of those seeds that have it."""
        return [result["after"][score] for result in self.results.values() if score in result["after"]]

    def before(self, score: str) -> list[float]:
        """Lists a score of the base by seed, as the run measured it."""
        return [result["before"][score] for result in self.results.values() if score in result["before"]]

    def cost(self, name: str) -> list[float]:
        """Lists a cost by seed."""
        return [result["cost"][name] for result in self.results.values()]


@dataclass(frozen=True)
class Results:
    """All methods, those without a finished run left out, and the base's scores and answers by seed."""

    entries: dict[str, Entry]
    base_scores: dict[int, dict[str, float]]
    base_answers: dict[int, list[dict[str, Any]]]


SCORES = ("exact match", "chrF", "validation loss", "plain text loss")
# The name in the report, and the values of an entry by seed.
COSTS: tuple[tuple[str, Callable[[Entry], list[float]]], ...] = (
    ("training seconds", lambda entry: entry.cost("seconds")),
    ("tokens/s", lambda entry: entry.cost("tokens per second")),
    ("peak MiB", lambda entry: [value / 2**20 for value in entry.cost("peak memory")]),
    ("trained parameters", lambda entry: entry.cost("trainable")),
    ("optimizer KiB", lambda entry: [value / 2**10 for value in entry.cost("optimizer bytes")]),
    ("on disk KiB", lambda entry: [value / 2**10 for value in entry.cost("disk bytes")]),
)
SHOWN = 15  # answers before the fold: with a column for each method the rows are high


def gathered(folder: Path, paths: Mapping[str, str], seeds: Iterable[int]) -> Results:
    """Reads the finished runs; `paths` are their directories by the methods' names."""
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
    """Scores each answer: 1 or 0 where it can be checked word for word, if any can; else by its chrF (0 to 1)."""
    checked = [row for row in answers if row["verifiable"] and row["reference"] is not None]
    if checked:
        return [float(same(row["after"], row["reference"])) for row in checked]
    return [
        sacrebleu.sentence_chrf(row["after"], [row["reference"]]).score / 100 for row in answers if row["reference"]
    ]


def quality(entry: Entry, seed: int | None = None) -> float:
    """Averages `prompt_scores`, over all seeds or of one; minus the validation loss if no prompt has a reference."""
    chosen = entry.answers if seed is None else {seed: entry.answers[seed]}
    found = [score for answers in chosen.values() for score in prompt_scores(answers)]
    if found:
        return statistics.fmean(found)
    losses = {number: result["after"]["validation loss"] for number, result in entry.results.items()}
    return -statistics.fmean(losses[number] for number in chosen)


def within_noise(best: Entry, other: Entry) -> bool:
    """Tells whether `other` is at most one standard error worse than `best` (Breiman et al. 1984, section 3.4.3).

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
    """Returns the method with the fewest trained parameters among those within noise of the best, and all of those."""
    best = max(entries.values(), key=quality)
    equal = [entry for entry in entries.values() if within_noise(best, entry)]
    return min(equal, key=lambda entry: entry.cost("trainable")[0]), equal


def order_of(entries: Mapping[str, Entry], seed: int) -> list[str]:
    """Lists the methods that have this seed, best first."""
    there = [entry for entry in entries.values() if seed in entry.answers]
    return [entry.name for entry in sorted(there, key=lambda entry: -quality(entry, seed))]


def changing_pairs(entries: Mapping[str, Entry], seeds: Sequence[int]) -> list[tuple[str, str]]:
    """Lists the pairs of methods whose order by quality is not the same in all seeds."""
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


def write_comparison(folder: Path, config: CompareConfig, results: Results, failed: Mapping[str, int]) -> None:
    """Writes comparison.json and report.html, prints the table's main columns and the report's path."""
    run = Run(folder)
    if not results.entries:
        console.print("no run finished: there is nothing to report")
        return
    rows = table_rows(results)
    best, equal = recommended(results.entries)
    run.save_json("comparison.json", {"rows": rows, "recommended": best.name})
    words = quality_name(results)
    summary = (
        f"{len(results.entries)} methods, {seeds_text(config.comparison)} each. Recommended by the rule "
        f"below: {best.name}, {words} {quality(best):.3f}."
    )
    sections = [
        recommendation_section(results, best, equal, config),
        numbers_section(rows, results, config, failed),
        pareto_section(run, results),
        curves_section(run, results),
        strengths_section(results),
        answers_section(results),
        asked_section(config),
        budget_section(results),
    ]
    path = write_report(run, f"Fine-tuning methods on {config.model.model}", summary, sections)
    for row in rows:
        said = "  ".join(f"{name} {figure_text(row[name])}" for name in (*SCORES, "training seconds") if name in row)
        console.print(f"{row['method']}: {said}")
    console.print(f"recommended: {best.name}")
    print(f"report: {path}")


def table_rows(results: Results) -> list[dict[str, Any]]:
    """Lists a row per method, best first, and the base: scores and costs as means over seeds, `NAME ±` their spread."""
    rows = []
    for entry in sorted(results.entries.values(), key=lambda entry: -quality(entry)):
        row: dict[str, Any] = {"method": entry.name, "learning rate": _first(entry)["training"]["learning_rate"]}
        for name in SCORES:
            row |= mean_and_spread(name, entry.after(name))
        for name, cost in COSTS:
            row |= mean_and_spread(name, cost(entry))
        rows.append(row)
    base: dict[str, Any] = {"method": "base"}
    first = next(iter(results.entries.values()))
    for name in SCORES:
        values = [scores[name] for scores in results.base_scores.values() if name in scores] or first.before(name)
        base |= mean_and_spread(name, values)
    return [*rows, base]


def recommendation_section(results: Results, best: Entry, equal: Sequence[Entry], config: CompareConfig) -> Section:
    """States the rule, its verdict, and how sure the order is."""
    words, names = quality_name(results), ", ".join(entry.name for entry in equal)
    top = max(results.entries.values(), key=quality)
    remembers = min(equal, key=lambda entry: statistics.fmean(entry.after("plain text loss") or [0]))
    blocks: list[Text | Table | Figure] = [
        Text(
            f"Rule (Breiman's one standard error): of the methods whose {words} is within one standard error of the "
            "best, taken of the mean difference on the same prompts, take the one that trains the fewest parameters: "
            "it needs the smallest optimizer state and the smallest file."
        ),
        Text(
            f"Best {words}: {top.name} ({quality(top):.3f}). Within noise of it: {names}. Of these {best.name} trains "
            f"the fewest parameters ({best.cost('trainable')[0]:,}): recommended."
        ),
    ]
    if remembers.after("plain text loss"):
        blocks.append(Text(f"Of those, {remembers.name} forgot the least of what the base knew."))
    blocks.append(Text(stability_text(results, config)))
    return Section("Which method", list(blocks))


def stability_text(results: Results, config: CompareConfig) -> str:
    """Tells whether the order of the methods can be relied on."""
    entries = results.entries
    seeds = seeds_of(config.comparison)
    orders = [order_of(entries, seed) for seed in seeds]
    if config.comparison.seeds > 1:
        pairs = changing_pairs(entries, list(seeds))
        if not pairs:
            return f"The order is the same with all {config.comparison.seeds} seeds: {' > '.join(orders[0])}."
        changing = "; ".join(f"{one} and {two}" for one, two in pairs)
        said = "; ".join(f"seed {seed}: {' > '.join(order)}" for seed, order in zip(seeds, orders, strict=True))
        return f"The order is not stable over seeds: {changing} change places. {said}."
    order = orders[0]
    close = [f"{one} and {two}" for one, two in itertools.pairwise(order) if within_noise(entries[one], entries[two])]
    near = f" Neighbours within noise of each other: {'; '.join(close)}." if close else ""
    return (
        f"One seed was run, so whether this order is stable over seeds is not known (--seeds 3 tells): "
        f"{' > '.join(order)}.{near}"
    )


def numbers_section(
    rows: Sequence[Mapping[str, Any]], results: Results, config: CompareConfig, failed: Mapping[str, int]
) -> Section:
    """Tabulates quality and cost."""
    present = [name for name in SCORES if any(name in row for row in rows)]
    quality_rows = [(row["method"], *(cell(row, name) for name in present)) for row in rows]
    costs = [name for name, _ in COSTS]
    cost_rows = [(row["method"], row["learning rate"], *(cell(row, name) for name in costs)) for row in rows[:-1]]
    blocks: list[Text | Table | Figure] = [
        Table(("method", *present), quality_rows, "Quality after training, best first."),
        Table(("method", "learning rate", *costs), cost_rows, "Cost of training; each method in a process of its own."),
        Text(
            "Exact match counts answers that equal the reference word for word, chrF runs from 0 to 100, losses are in "
            "nats per token. Plain text is of the base's world and is not trained on: what its loss rises above the "
            "base's was forgotten. Peak memory is of the whole process, libraries included, on a CPU."
        ),
    ]
    if config.comparison.seeds > 1:
        blocks.append(Text(f"Mean ± standard deviation over {config.comparison.seeds} seeds."))
    if config.search:
        blocks.append(
            Text(
                f"Learning rates: the best of {config.search} for each method by validation loss, each tried for "
                f"{config.search_share:.0%} of the steps. The validation data are those that are reported."
            )
        )
    if failed:
        said = ", ".join(f"{name} (exit code {code})" for name, code in failed.items())
        blocks.append(Text(f"Not finished, and not in the tables: {said}."))
    return Section("Numbers", list(blocks))


def pareto_section(run: Run, results: Results) -> Section:
    """Draws quality against parameters, time, memory and forgetting."""
    words, blocks = quality_name(results), []
    entries = results.entries
    against: list[tuple[str, str, Callable[[Entry], float], bool]] = [
        ("parameters", "trained parameters", lambda entry: entry.cost("trainable")[0], True),
        ("time", "training seconds", lambda entry: statistics.fmean(entry.cost("seconds")), False),
        ("memory", "peak memory, MiB", lambda entry: statistics.fmean(entry.cost("peak memory")) / 2**20, False),
    ]
    if all(entry.after("plain text loss") for entry in entries.values()):
        against.append(
            ("forgetting", "loss on plain text", lambda entry: statistics.fmean(entry.after("plain text loss")), False)
        )
    for name, across, cost, log in against:
        points = {entry.name: (cost(entry), quality(entry)) for entry in entries.values()}
        front = pareto(points)
        svg = save_figure(run, f"pareto-{name}", scatter_figure(points, across, words, log, front))
        blocks.append(Figure(svg, f"{words} against {across}; orange: no other is better in both."))
    return Section("Quality against cost", list(blocks))


def curves_section(run: Run, results: Results) -> Section:
    """Draws the training losses on one axis."""
    curves = {}
    for entry in results.entries.values():
        width = max(1, len(entry.curve) // 40)
        parts = [entry.curve[at : at + width] for at in range(0, len(entry.curve), width)]
        curves[entry.name] = (
            [part[-1][0] for part in parts],
            [statistics.fmean(loss for _, loss in part) for part in parts],
        )
    svg = save_figure(run, "losses", curve_figure(curves, "optimizer step", "training loss", log_up=True))
    return Section("Curves", [Figure(svg, "Training loss, averaged over a few steps; first seed.")])


def strengths_section(results: Results) -> Section:
    """Lists what each method is best and worst at, from the numbers alone."""
    entries = list(results.entries.values())
    measures: list[tuple[str, dict[str, float], bool]] = []
    for name in SCORES:
        values = {entry.name: statistics.fmean(entry.after(name)) for entry in entries if entry.after(name)}
        measures.append((name, values, name in ("exact match", "chrF")))
    for name, of in COSTS:
        measures.append((name, {entry.name: statistics.fmean(of(entry)) for entry in entries}, name == "tokens/s"))
    rows = []
    for entry in entries:
        good, bad = [], []
        for name, values, higher in measures:
            if len(values) < 2 or entry.name not in values:
                continue
            ordered = sorted(values.values(), reverse=higher)
            text = f"{name} {figure_text(values[entry.name])}"
            if values[entry.name] == ordered[0] != ordered[-1]:
                good.append(f"best {text}")
            elif values[entry.name] == ordered[-1] != ordered[0]:
                bad.append(f"worst {text} (best {figure_text(ordered[0])})")
        share = entry.cost("trainable")[0] / entry.cost("parameters")[0]
        rows.append((entry.name, f"{share:.2%}", "; ".join(good) or "–", "; ".join(bad) or "–"))
    columns = ("method", "trains", "strengths", "weaknesses")
    return Section("Strengths and weaknesses", [Table(columns, rows, "Only what the figures above say.")])


def answers_section(results: Results) -> Section:
    """Shows the same prompts answered by the base and by every method, first seed."""
    seed = next(iter(results.base_answers))
    there = {name: entry.answers[seed] for name, entry in results.entries.items() if seed in entry.answers}
    rows = []
    for number, row in enumerate(results.base_answers[seed]):
        said = [shown(answers[number]["after"]) for answers in there.values()]
        rows.append((asked(row["prompt"]), row["reference"], shown(row["after"]), *said))
    tables = folded_tables(("prompt", "reference", "base", *there), rows, SHOWN)
    return Section("The same prompts, answered by all", [*tables])


def budget_section(results: Results) -> Section:
    """Tells what was the same for all, as the runs recorded it, and on what machine."""
    rows = []
    for entry in results.entries.values():
        steps, tokens = entry.cost("steps"), entry.cost("tokens")
        rows.append((entry.name, int(steps[0]), int(tokens[0])))
    environment = next(iter(next(iter(results.entries.values())).results.values()))["environment"]
    machine = [(name.replace("_", " "), str(value)) for name, value in environment.items() if name != "packages"]
    machine += [(name, version) for name, version in environment["packages"].items()]
    same = len({(steps, tokens) for _, steps, tokens in rows}) == 1
    verdict = (
        "Each method had the same base, conversations, order and number of tokens."
        if same
        else "The methods did not have the same number of steps or tokens: the table says which."
    )
    return Section(
        "Budget and machine",
        [Text(verdict), Table(("method", "optimizer steps", "tokens"), rows), Table(("", ""), machine)],
    )


def quality_name(results: Results) -> str:
    """Names what `quality` measures in this comparison."""
    answers = next(iter(next(iter(results.entries.values())).answers.values()))
    if any(row["verifiable"] and row["reference"] is not None for row in answers):
        return "exact match"
    return "chrF (0 to 1)" if any(row["reference"] for row in answers) else "minus validation loss"


def _first(entry: Entry) -> dict[str, Any]:
    config: dict[str, Any] = next(iter(entry.results.values()))["config"]
    return config
