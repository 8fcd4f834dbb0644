"""The report of a comparison, made from its runs' JSON alone."""

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from labs_common.comparing import cell, figure_text, mean_and_spread, pareto, seeds_of, seeds_text
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
from llm_peft_fa.comparison import (
    Entry,
    Results,
    changing_pairs,
    order_of,
    quality,
    recommended,
    within_noise,
)
from llm_peft_fa.config import CompareConfig
from llm_peft_fa.results import asked, shown

SCORES = ("exact match", "chrF", "validation loss", "plain text loss")
# name in the report, how to get it of an entry by seed, whether less is better
COSTS: tuple[tuple[str, Callable[[Entry], list[float]]], ...] = (
    ("training seconds", lambda entry: entry.cost("seconds")),
    ("tokens/s", lambda entry: entry.cost("tokens per second")),
    ("peak MiB", lambda entry: [value / 2**20 for value in entry.cost("peak memory")]),
    ("trained parameters", lambda entry: entry.cost("trainable")),
    ("optimizer KiB", lambda entry: [value / 2**10 for value in entry.cost("optimizer bytes")]),
    ("on disk KiB", lambda entry: [value / 2**10 for value in entry.cost("disk bytes")]),
)
SHOWN = 15


def write_comparison(folder: Path, config: CompareConfig, results: Results, failed: Mapping[str, int]) -> None:
    """Writes comparison.json and report.html, prints the table's main columns and where they are."""
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
    """One row per method, best first, and the base: scores and costs as means over seeds, `NAME ±` their spread."""
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
    """The rule, what it gives, and how sure the order is."""
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
    """Whether the order of the methods can be relied on."""
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
    """The tables of quality and of cost."""
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
    """Quality against parameters, time, memory and forgetting."""
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
    """The training losses on one axis."""
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
    """What each method is best and worst at, from the figures alone."""
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
    """The same prompts answered by the base and by every method, first seed."""
    seed = next(iter(results.base_answers))
    there = {name: entry.answers[seed] for name, entry in results.entries.items() if seed in entry.answers}
    rows = []
    for number, row in enumerate(results.base_answers[seed]):
        said = [shown(answers[number]["after"]) for answers in there.values()]
        rows.append((asked(row["prompt"]), row["reference"], shown(row["after"]), *said))
    columns = ("prompt", "reference", "base", *there)
    blocks: list[Text | Table] = [Table(columns, rows[:SHOWN])]
    if len(rows) > SHOWN:
        blocks.append(Table(columns, rows[SHOWN:], f"{len(rows) - SHOWN} more", folded=True))
    return Section("The same prompts, answered by all", list(blocks))


def budget_section(results: Results) -> Section:
    """What was the same for all, as the runs recorded it, and on what machine."""
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
    """What `quality` measures in this comparison."""
    answers = next(iter(next(iter(results.entries.values())).answers.values()))
    if any(row["verifiable"] and row["reference"] is not None for row in answers):
        return "exact match"
    return "chrF (0 to 1)" if any(row["reference"] for row in answers) else "minus validation loss"


def _first(entry: Entry) -> dict[str, Any]:
    config: dict[str, Any] = next(iter(entry.results.values()))["config"]
    return config
