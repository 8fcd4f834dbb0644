"""The sections of the reports that only this lab has."""

import itertools
from collections.abc import Iterable, Mapping, Sequence

from labs_common.progress import console
from labs_common.report import (
    Figure,
    Section,
    Table,
    Text,
    asked_section,
    cost_section,
    curves_section,
    histogram_figure,
    rerun_section,
    save_figure,
    write_report,
)
from labs_common.run import Run
from llm_peft_fa.answers import Comparison, Prompt, Scores
from llm_peft_fa.config import TrainConfig
from llm_peft_fa.data import Reading
from llm_peft_fa.templates import Encoded

SHOWN = 40


def data_section(run: Run, readings: dict[str, Reading], encoded: Mapping[str, Sequence[Encoded]]) -> Section:
    """What was trained and validated on: counts, lengths, what was left out, and one sample."""
    rows = []
    for name, reading in readings.items():
        lengths = sorted(len(item.ids) for item in encoded[name])
        learnt = sum(sum(item.learnt) for item in encoded[name])
        rows.append((name, reading.source, len(lengths), sum(lengths), learnt, lengths[len(lengths) // 2], lengths[-1]))
    columns = ("", "source", "conversations", "tokens", "learnt tokens", "median length", "longest")
    section = Section("Data", [Table(columns, rows)])
    section.blocks += refused_blocks(list(readings.values()))
    first = next(iter(readings.values())).conversations[0]
    sample = [(message["role"], message["content"]) for message in first.messages]
    section.blocks.append(Table(("role", "text"), sample, "One training conversation."))
    lengths = [len(item.ids) for item in next(iter(encoded.values()))]
    svg = save_figure(run, "lengths", histogram_figure(lengths, "tokens in a training conversation", "conversations"))
    section.blocks.append(Figure(svg, "Lengths of the training conversations."))
    return section


def refused_blocks(readings: Sequence[Reading]) -> list[Text | Table]:
    """Rows that could not be used, by reason, and the first few by place; nothing if all could."""
    blocks: list[Text | Table] = []
    for reading in readings:
        if reading.reasons:
            rows = [(reason, count) for reason, count in reading.reasons.most_common()]
            blocks.append(Table(("left out because", "rows"), rows, f"Rows of {reading.source} that were left out."))
            blocks.append(Text("First: " + "; ".join(reading.examples)))
    return blocks


def print_refused(readings: Iterable[Reading]) -> None:
    """Says which rows were left out: how many by reason, and the first few by place."""
    for reading in readings:
        for reason, count in reading.reasons.most_common():
            console.print(f"{reading.source}: left out {count} × {reason}")
        for example in reading.examples:
            console.print(f"  {example}")


def numbers_section(scores: dict[str, Scores], losses: dict[str, tuple[float, float]] | None = None) -> Section:
    """Scores before and after; `losses` adds rows of (before, after)."""
    rows: list[tuple[str, float | None, float | None]] = []
    for name, (before, after) in (losses or {}).items():
        rows.append((name, before, after))
    names = dict.fromkeys([*scores["before"], *scores["after"]])
    rows += [(name, scores["before"].get(name), scores["after"].get(name)) for name in names]
    note = (
        "Before is the base model, after is the same model with the adapter. Exact match counts prompts whose answer "
        "can be checked word for word; chrF runs from 0 to 100; distinct-n is the share of different n-grams."
    )
    return Section("Numbers", [Table(("", "before", "after"), rows), Text(note)])


def answers_section(comparison: Comparison) -> Section:
    """Prompts with the answers before and after; the user's own come first."""
    rows = [
        (_asked(prompt), _shown(before), _shown(after), prompt.reference)
        for prompt, before, after in zip(comparison.prompts, comparison.before, comparison.after, strict=True)
    ]
    columns = ("prompt", "before", "after", "reference")
    blocks: list[Text | Table] = [Table(columns, rows[:SHOWN])]
    if len(rows) > SHOWN:
        blocks.append(Table(columns, rows[SHOWN:], f"{len(rows) - SHOWN} more", folded=True))
    return Section("Answers before and after", list(blocks))


def _shown(answer: str) -> str:
    """An answer in one line; a long one by its beginning, since answers.json has all of it."""
    line = " ".join(answer.split())
    return line if len(line) <= 200 else line[:200] + " …"


def _asked(prompt: Prompt) -> str:
    """The last question; a long one is shown by its end, where the question of a text stands."""
    text = prompt.messages[-1]["content"]
    return text if len(text) <= 400 else "… " + text[-400:]


def finish_report(
    run: Run, config: TrainConfig, sections: Sequence[Section], comparison: Comparison, clock: dict[str, float]
) -> None:
    """Writes results.json and the report, prints the main numbers and where the report is.

    `sections` are those on the data and on what trained; `clock` holds the moments at which the parts of
    this start ended, in order.
    """
    evaluations = [line for line in run.lines("metrics.jsonl") if "validation/loss" in line]
    # With --patience the run went back to its best weights.
    kept = (
        min(evaluations[1:], key=lambda line: line["validation/loss"]) if config.training.patience else evaluations[-1]
    )
    losses = {
        name: (evaluations[0][key], kept[key])
        for name, key in (("validation loss", "validation/loss"), ("validation perplexity", "validation/perplexity"))
    }
    moments = list(clock.items())
    seconds = {name: now - before for (_, before), (name, now) in itertools.pairwise(moments)}
    results = {"before": dict(comparison.scores["before"]), "after": dict(comparison.scores["after"])}
    for name, (before, after) in losses.items():
        results["before"][name], results["after"][name] = before, after
    run.save_json("results.json", results)
    columns = ("prompt", "reference", "before", "after")
    answers = zip(comparison.prompts, comparison.before, comparison.after, strict=True)
    rows = [(prompt.messages[-1]["content"], prompt.reference, before, after) for prompt, before, after in answers]
    run.save_json("answers.json", [dict(zip(columns, row, strict=True)) for row in rows])
    if not run.is_main:
        return
    exact = "exact match"
    for name in results["after"]:
        before = results["before"].get(name)
        console.print(
            f"{name}: {'–' if before is None else f'{before:.4g}'} before, {results['after'][name]:.4g} after"
        )
    print(f"adapter: {run.path / 'adapter'}")
    if config.run.report:
        best = (
            f"{exact} {results['before'][exact]:.1%} → {results['after'][exact]:.1%}; "
            if exact in results["after"]
            else ""
        )
        summary = f"{best}validation loss {losses['validation loss'][0]:.3f} → {losses['validation loss'][1]:.3f}."
        title = f"{config.method.method} on {config.model.model}"
        body = [
            asked_section(config),
            *sections,
            curves_section(run),
            numbers_section(comparison.scores, losses),
            answers_section(comparison),
            cost_section(run, "tokens", seconds),
            rerun_section(run),
        ]
        print(f"report: {write_report(run, title, summary, body)}")
