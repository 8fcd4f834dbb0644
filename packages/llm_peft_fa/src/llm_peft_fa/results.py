"""The sections of the reports that only this lab has."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labs_common.cli import to_plain
from labs_common.freezing import FrozenAudit
from labs_common.progress import console
from labs_common.report import (
    Figure,
    Section,
    Table,
    Text,
    architecture_figure,
    asked_section,
    cost_section,
    curves_section,
    histogram_figure,
    rerun_section,
    save_figure,
    trained_section,
    write_report,
)
from labs_common.run import Run, cost_of, machine_of, seconds_between
from llm_peft_fa.adapters import result_folder
from llm_peft_fa.answers import Comparison, Scores
from llm_peft_fa.architecture import Structure
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


def structure_section(run: Run, structure: Structure, audit: FrozenAudit) -> Section:
    """What trained: the audit's verdict and table, and the network drawn with what is fixed and what trains."""
    section = trained_section(audit)
    drawing = save_figure(run, "architecture", architecture_figure(structure.rows))
    caption = (
        f"{structure.name}, input below: {structure.trainable:,} of {structure.parameters:,} parameters train. A strip "
        "is a small update beside fixed weights."
    )
    section.blocks.insert(1, Figure(drawing, caption))
    return section


def numbers_section(scores: Mapping[str, Scores], losses: Mapping[str, tuple[float, float]] | None = None) -> Section:
    """Scores before and after; `losses` adds rows of (before, after)."""
    before, after = scores.get("before", {}), scores["after"]
    rows: list[tuple[str, float | None, float | None]] = []
    for name, (first, last) in (losses or {}).items():
        rows.append((name, first, last))
    names = dict.fromkeys([*before, *after])
    rows += [(name, before.get(name), after.get(name)) for name in names]
    note = (
        "Before is the base model, after is the fine-tuned one. Exact match counts prompts whose answer can be checked "
        "word for word; chrF runs from 0 to 100; distinct-n is the share of different n-grams. Plain text is of the "
        "base's world: a loss that rises there was forgotten."
    )
    return Section("Numbers", [Table(("", "before", "after"), rows), Text(note)])


def answers_section(comparison: Comparison) -> Section:
    """Prompts with the answers before and after; the user's own come first."""
    before = comparison.before or [""] * len(comparison.prompts)
    rows = [
        (asked(prompt.messages[-1]["content"]), shown(first), shown(last), prompt.reference)
        for prompt, first, last in zip(comparison.prompts, before, comparison.after, strict=True)
    ]
    columns = ("prompt", "before", "after", "reference")
    blocks: list[Text | Table] = [Table(columns, rows[:SHOWN])]
    if len(rows) > SHOWN:
        blocks.append(Table(columns, rows[SHOWN:], f"{len(rows) - SHOWN} more", folded=True))
    return Section("Answers before and after", list(blocks))


def saved_answers(comparison: Comparison) -> list[dict[str, str | bool | None]]:
    """One row per prompt, as answers.json holds them."""
    before: Sequence[str | None] = comparison.before or [None] * len(comparison.prompts)
    return [
        {
            "prompt": prompt.messages[-1]["content"],
            "reference": prompt.reference,
            "verifiable": prompt.verifiable,
            "before": first,
            "after": last,
        }
        for prompt, first, last in zip(comparison.prompts, before, comparison.after, strict=True)
    ]


def shown(answer: str) -> str:
    """An answer in one line; a long one by its beginning, since answers.json has all of it."""
    line = " ".join(answer.split())
    return line if len(line) <= 200 else line[:200] + " …"


def asked(text: str) -> str:
    """A question; a long one is shown by its end, where the question of a text stands."""
    return text if len(text) <= 400 else "… " + text[-400:]


@dataclass(frozen=True)
class Costs:
    """What a run took: parameters, bytes of the optimizer's state in a process, bytes of the result on disk."""

    trainable: int
    parameters: int
    optimizer_bytes: int
    disk_bytes: int


def disk_bytes(folder: Path) -> int:
    """Bytes of the weights in a directory."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def finish_report(
    run: Run,
    config: TrainConfig,
    sections: Sequence[Section],
    comparison: Comparison,
    costs: Costs,
    clock: Mapping[str, float],
) -> None:
    """Writes results.json, answers.json and the report, prints the main numbers and where the report is.

    `sections` are those on the data and on what trained; `clock` holds the moments at which the parts of
    this start ended, in order.
    """
    if not run.is_main:
        return
    evaluations = [line for line in run.lines("metrics.jsonl") if "validation/loss" in line]
    # With --patience the run went back to its best weights.
    kept = (
        min(evaluations[1:], key=lambda line: line["validation/loss"]) if config.training.patience else evaluations[-1]
    )
    losses = {
        key.replace("/", " "): (evaluations[0][key], kept[key])
        for key in ("validation/loss", "validation/perplexity", "plain text/loss")
        if key in kept
    }
    results = results_of(run, config, comparison, losses, costs)
    run.save_json("answers.json", saved_answers(comparison))
    run.save_json("results.json", results)
    for name in results["after"]:
        before = results["before"].get(name)
        console.print(
            f"{name}: {'–' if before is None else f'{before:.4g}'} before, {results['after'][name]:.4g} after"
        )
    print(f"{result_folder(run.path).name}: {result_folder(run.path)}")
    if config.run.report:
        cost = cost_section(run, "tokens", seconds_between(clock))
        rows = [(name, value) for name, value in dataclasses.asdict(costs).items()]
        cost.blocks.append(Table(("", ""), [(name.replace("_", " "), value) for name, value in rows]))
        exact, summary = "exact match", ""
        if exact in results["before"]:
            summary = f"{exact} {results['before'][exact]:.1%} → {results['after'][exact]:.1%}; "
        summary += f"validation loss {losses['validation loss'][0]:.3f} → {losses['validation loss'][1]:.3f}."
        body = [
            asked_section(config),
            *sections,
            curves_section(run),
            numbers_section(comparison.scores, losses),
            answers_section(comparison),
            cost,
            rerun_section(run),
        ]
        title = f"{config.method.method} on {config.model.model}"
        print(f"report: {write_report(run, title, summary, body)}")


def results_of(
    run: Run, config: TrainConfig, comparison: Comparison, losses: Mapping[str, tuple[float, float]], costs: Costs
) -> dict[str, Any]:
    """All that a comparison needs of a run: its config, scores, costs, machine and versions."""
    before = dict(comparison.scores.get("before", {})) | {name: values[0] for name, values in losses.items()}
    after = dict(comparison.scores["after"]) | {name: values[1] for name, values in losses.items()}
    return {
        "config": to_plain(config),
        "before": before,
        "after": after,
        "cost": {
            **cost_of(run, "tokens"),
            **{name.replace("_", " "): value for name, value in dataclasses.asdict(costs).items()},
        },
        "environment": machine_of(run, ("torch", "transformers", "peft", "accelerate")),
    }
