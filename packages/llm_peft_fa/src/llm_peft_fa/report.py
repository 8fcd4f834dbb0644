"""The sections of the reports that only this lab has, and what a training prints."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from accelerate import Accelerator
from rich.console import Console
from rich.table import Column
from rich.table import Table as Grid
from rich.text import Text as ColouredText
from transformers import PreTrainedTokenizerBase

from labs_common.errors import reason_of
from labs_common.fitting import Fitted, results_of, write_results
from labs_common.frozen.audit import FrozenAudit
from labs_common.plan import Held, gigabytes, machine_here, sharing_of
from labs_common.progress import console, print_left_out
from labs_common.report.figures import histogram_figure
from labs_common.report.page import Figure, Section, Table, Text, save_figure
from labs_common.report.sections import (
    Structure,
    asked_section,
    cost_section,
    curves_section,
    drawn_section,
    rerun_section,
)
from labs_common.run import Run, seconds_between
from labs_common.steps import ShuffledSteps
from labs_common.training import total_steps
from llm_peft_fa.answers import Answered
from llm_peft_fa.attention import NAME
from llm_peft_fa.base import DTYPES
from llm_peft_fa.config import MethodOptions, TrainConfig
from llm_peft_fa.data import Reading
from llm_peft_fa.methods import METHODS
from llm_peft_fa.metrics import Answer, task_or_kind
from llm_peft_fa.model import base_of
from llm_peft_fa.plan import ROW, SMALL, held_with, outline, plan_of
from llm_peft_fa.saved import result_folder
from llm_peft_fa.table import Rows
from llm_peft_fa.templates import PLAIN, Encoded

Cells = tuple[Any, ...]
PACKAGES = ("torch", "transformers", "peft", "accelerate")  # whose versions go into results.json
COSTS = ("trainable", "parameters", "optimizer bytes", "disk bytes")  # in the report, of results.json
SHOWN = 40  # answers before the fold: a screen or two
SAMPLED = 200  # conversations of which words and tokens are counted, and the shortest is the example
NAMED = 8  # characters before each line of the first screen
SHOWN_TEXT = 150  # characters of the example's texts: two lines of a terminal
OFFLINE = (
    "These are generated tasks: they show the road from data to report, and say little of which method is best for a "
    "real model."
)
SCORES_EXPLAINED = (
    "Before is the base model, after is the fine-tuned one, instruct what its maker made of the base. Exact match is "
    "of prompts whose answer can be checked; spelling, punctuation and articles do not count. chrF runs from 0 to 100. "
    "Truncated is the share of answers that were cut at --max-new-tokens, distinct-n that of different n-grams, "
    "repetition that of 4-grams said before in the same answer. Refusals are told by common phrases at the start, the "
    "language of answers to Persian prompts by letters and common words. Losses of Persian and English text are of "
    "everyday paragraphs, plain text is of the base's own world: what rises over the base's was forgotten."
)
TIMED = 5  # steps that are timed after the first, which is slower


def data_section(run: Run, readings: Mapping[str, Reading], encoded: Mapping[str, Rows]) -> Section:
    """Tells the data of training, validation and test: counts, lengths, rows that were left out, and one sample."""
    rows = []
    for name, reading in readings.items():
        cells: list[int | None] = [None] * 5
        if name in encoded:
            lengths = np.sort(encoded[name].lengths).tolist()
            learnt = int(encoded[name].learnt.sum())
            cells = [len(lengths), sum(lengths), learnt, lengths[len(lengths) // 2], lengths[-1]]
        rows.append((name, reading.source, len(reading.conversations), *cells))
    columns = ("", "source", "conversations", "rows", "tokens", "learnt tokens", "median length", "longest")
    section = Section("Data", [Table(columns, rows)])
    section.blocks += refused_blocks(list(readings.values()))
    first = next(iter(readings.values())).conversations[0]
    sample = [(message["role"], message["content"]) for message in first.messages]
    section.blocks.append(Table(("role", "text"), sample, "One training conversation."))
    lengths = next(iter(encoded.values())).lengths.tolist()
    svg = save_figure(run, "lengths", histogram_figure(lengths, "tokens in a training conversation", "conversations"))
    section.blocks.append(Figure(svg, "Lengths of the training conversations."))
    return section


def refused_blocks(readings: Sequence[Reading]) -> list[Text | Table]:
    """Tells the rows that could not be used, by reason, and the first few by place; nothing if all could."""
    blocks: list[Text | Table] = []
    for reading in readings:
        if reading.reasons:
            rows = [(reason, count) for reason, count in reading.reasons.most_common()]
            blocks.append(Table(("left out because", "rows"), rows, f"Rows of {reading.source} that were left out."))
            blocks.append(Text("First: " + "; ".join(reading.examples)))
    return blocks


def print_refused(readings: Iterable[Reading]) -> None:
    """Prints the rows that were left out: counts by reason, and the first few by place."""
    for reading in readings:
        print_left_out(reading.source, reading.reasons, reading.examples)


def structure_section(run: Run, structure: Structure, audit: FrozenAudit, options: MethodOptions) -> Section:
    """Tells what trained: the method, the audit's verdict and table, and the network drawn with its trained parts."""
    caption = (
        f"{structure.name}, input below: {structure.trainable:,} of {structure.parameters:,} parameters train. A strip "
        "is a small update beside fixed weights."
    )
    section = drawn_section(run, audit, structure.rows, caption)
    section.blocks.insert(0, Text(f"{options.method}: {METHODS[options.method].description}."))
    return section


def numbers_section(both: Answered, losses: Mapping[str, tuple[float, float]] | None = None) -> Section:
    """Tabulates scores by side, of all prompts and by kind of task; `losses` adds rows of (before, after)."""
    sides = list(both.said)
    rows: list[Cells] = [
        (name, *(dict(zip(("before", "after"), values, strict=True)).get(side) for side in sides))
        for name, values in (losses or {}).items()
    ]
    names = dict.fromkeys(name for side in sides for name in both.scores[side])
    rows += [(name, *(both.scores[side].get(name) for side in sides)) for name in names]
    section = Section("Numbers", [Table(("", *sides), rows), Text(SCORES_EXPLAINED)])
    kinds: dict[str, list[Any]] = {}
    for kind, found in both.kinds["after"].items():
        name = next((name for name in ("exact match", "chrF") if name in found), None)
        if name is not None:
            kinds[kind] = [int(found["prompts"]), name, *(both.kinds[side][kind].get(name) for side in sides)]
    if len(kinds) > 1:
        caption = "By kind of task. Where there are few prompts of a kind, differences say little."
        section.blocks.append(Table(("kind", "prompts", "score", *sides), [(k, *v) for k, v in kinds.items()], caption))
    return section


def answers_section(both: Answered) -> Section:
    """Shows prompts with the answers of every side; the user's own come first."""
    rows = [
        (asked(prompt.messages[-1]["content"]), *(_shown(answer) for answer in said), prompt.reference)
        for prompt, *said in zip(both.prompts, *both.said.values(), strict=True)
    ]
    columns = ("prompt", *both.said, "reference")
    return Section("Answers before and after", [*folded_tables(columns, rows, SHOWN)])


def _shown(answer: Answer) -> str:
    return shortened(answer.text) + " [cut]" * answer.truncated


def folded_tables(columns: tuple[str, ...], rows: Sequence[Cells], shown: int) -> list[Table]:
    """Makes a table of the first rows, and one behind a fold of the others if there are more than `shown`."""
    tables = [Table(columns, rows[:shown])]
    if len(rows) > shown:
        tables.append(Table(columns, rows[shown:], f"{len(rows) - shown} more", folded=True))
    return tables


def saved_answers(both: Answered) -> list[dict[str, Any]]:
    """Lists one row per prompt, as answers.json holds them; "truncated" names the sides whose answer was cut off."""
    rows = []
    for place, prompt in enumerate(both.prompts):
        said = {side: answers[place] for side, answers in both.said.items()}
        question = prompt.messages[-1]["content"]
        rows.append(
            {"prompt": question, "kind": task_or_kind(question), "reference": prompt.reference}
            | {"verifiable": prompt.verifiable, "before": None}
            | {side: answer.text for side, answer in said.items()}
            | {"truncated": [side for side, answer in said.items() if answer.truncated]}
        )
    return rows


def shortened(answer: str) -> str:
    """Puts an answer into one line; a long one is cut, since answers.json has all of it."""
    line = " ".join(answer.split())
    return line if len(line) <= 200 else line[:200] + " …"


def asked(text: str) -> str:
    """Cuts a long question to its end, where the question about a text stands."""
    return text if len(text) <= 400 else "… " + text[-400:]


def costs_of(
    run: Run, config: TrainConfig, fitted: Fitted, structure: Structure, clock: Mapping[str, float]
) -> dict[str, Any]:
    """Gathers what results.json says of a training besides its scores, in the main process; else nothing.

    `clock` holds the moments at which the parts of this start ended, in order.
    """
    if not run.is_main:
        return {}
    results = results_of(run, config, fitted, "tokens", seconds_between(clock)["prepared"], PACKAGES)
    size = sum(file.stat().st_size for file in result_folder(run.path).glob("*.safetensors"))
    # The structure counts two weights in a byte of a base in 4 bits as two.
    results["cost"] |= {"parameters": structure.parameters, "disk bytes": size}
    return results


def finish_report(
    run: Run,
    config: TrainConfig,
    sections: Sequence[Section],
    both: Answered,
    results: dict[str, Any],
    clock: Mapping[str, float],
) -> None:
    """Writes results.json, answers.json and the report, prints the main numbers and the report's path.

    `sections` are those on the data and on what trained, `results` are of `costs_of`.
    """
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
    before, after = (
        dict(both.scores.get(side, {})) | {name: pair[place] for name, pair in losses.items()}
        for place, side in enumerate(("before", "after"))
    )
    run.save_json("answers.json", saved_answers(both))
    for name, value in after.items():
        console.print(f"{name}: {f'{before[name]:.4g}' if name in before else '–'} before, {value:.4g} after")
    print(f"{result_folder(run.path).name}: {result_folder(run.path)}")

    def page() -> tuple[str, list[Section]]:
        cost = cost_section(run, "tokens", seconds_between(clock))
        cost.blocks.append(Table(("", ""), [(name, results["cost"][name]) for name in COSTS]))
        exact, summary = "exact match", ""
        if exact in before:
            count = sum(prompt.verifiable and prompt.reference is not None for prompt in both.prompts)
            error = 100 * math.sqrt(after[exact] * (1 - after[exact]) / count)  # of a share, in points
            summary = f"{exact} {before[exact]:.1%} → {after[exact]:.1%} (± {error:.1f} points) of {count} answers; "
        summary += f"validation loss {losses['validation loss'][0]:.3f} → {losses['validation loss'][1]:.3f}."
        if config.data.data is None:
            summary += f" {OFFLINE}"
        return summary, [
            asked_section(config),
            *sections,
            curves_section(run),
            numbers_section(both, losses),
            answers_section(both),
            cost,
            rerun_section(run),
        ]

    title = f"{config.method.method} on {config.model.model}"
    results |= {"before": before, "after": after, "kinds": both.kinds}
    if "instruct" in both.scores:
        results["instruct"] = both.scores["instruct"]
    write_results(run, results, config.run.report, title, page)


def show_learnt(tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Encoded]) -> None:
    """Prints conversations as the tokenizer decodes them: learnt tokens green, the others grey.

    Without colours, learnt stretches stand in ⟦ ⟧.
    """
    console = Console(highlight=False, soft_wrap=True)
    for item in conversations:
        console.rule(f"{item.where}: {len(item.ids)} tokens, {sum(item.learnt)} learnt", align="left")
        console.print(_coloured(tokenizer, item, console))


def _coloured(
    tokenizer: PreTrainedTokenizerBase, item: Encoded, console: Console, most: int | None = None
) -> ColouredText:
    """Marks what is learnt of a row, by colours if the console has them; in one line of two turns if `most` is given.

    `most` is then the number of characters of each of their texts.
    """
    text = ColouredText()
    for start, end in _stretches(item.learnt)[: None if most is None else 4]:
        learnt, piece = item.learnt[start], str(tokenizer.decode(item.ids[start:end]))
        if most is not None:
            piece = piece.replace("\n", "↵")
            if len(piece) > most:  # an answer's beginning, and of the question that which it answers
                piece = f"{piece[:most]} …" if learnt else f"… {piece[-most:]}"
        marked = learnt and (console.no_color or not console.is_terminal)
        text.append(f"⟦{piece}⟧" if marked else piece, "bold green" if learnt else "bright_black")
    return text


def print_first_screen(
    config: TrainConfig,
    accelerator: Accelerator,
    readings: Mapping[str, Reading],
    texts: Mapping[str, Rows],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Prints before any weight is read what will be trained on what, and what that needs, on one screen.

    `texts` are rows by "training" and "validation"; `config` is of `plan.fitted`. `print_rows` ends the screen.

    Raises:
        LabError: the method does not fit the model.
    """
    model, options, rows = config.model, config.method, texts["training"]
    precision = accelerator.mixed_precision
    whole = outline(model.model, options, DTYPES[precision])
    held, tokens = held_with(whole, precision, config.training.optimizer), int(rows.lengths.sum())
    share = held.trained / held.parameters
    quantized = METHODS[options.method].quantized
    held_in = "4 bits" if quantized else str(DTYPES[precision]).removeprefix("torch.")
    talks = readings["training"].conversations
    split = f" in {len(rows):,} rows, one per answer: its template rewrites earlier turns" * (len(rows) > len(talks))
    said = [message["content"] for talk in talks[:SAMPLED] for message in talk.messages]
    pieces = sum(map(len, tokenizer(said, add_special_tokens=False).input_ids))
    per_word = pieces / max(1, sum(len(text.split()) for text in said))
    own = "the tokenizer's own" if model.template == "auto" else model.template
    thinking = f"; thinking: {model.thinking}" * ("think" in tokenizer.get_chat_template())
    row = config.data.tokens_per_batch or ROW
    count = total_steps(config.training, ShuffledSteps(len(rows), config.training.batch_size, 0, lambda *_: []))
    example = min(rows[:SAMPLED], key=lambda row: len(row.ids))
    lines: dict[str, str | ColouredText] = {
        "model": f"{model.model}, {type(base_of(whole)).__name__} in {held_in}",
        "method": f"{options.method}: {held.trained:,} of {held.parameters:,} parameters train ({share:.2%})",
        "data": f"{len(talks):,} conversations{split}; {len(texts['validation']):,} rows to validate",
        "tokens": f"{tokens:,}, {int(rows.learnt.sum()) / tokens:.0%} of them learnt; {per_word:.2f} per "
        "word of this data",
        "template": f"{'plain' if tokenizer.chat_template == PLAIN else own}{thinking}",
        "memory": _memory(config, accelerator, quantized, held, row, tokens // len(rows)),
        "work": f"{count:,} steps of {config.training.batch_size} rows; after {TIMED + 1} of them the time is told",
        "example": ColouredText(f"{example.where}: ") + _coloured(tokenizer, example, console, SHOWN_TEXT),
    }
    console.rule(f"{options.method} on {model.model}", align="left")
    _print_lines(lines)


def print_rows(why: str, attention: str, padding: float) -> None:
    """Prints the last line of the first screen: how rows are made, which is compared when the weights are there.

    `attention` and `why` are of `verification.settle`, `padding` is the share of what is computed.
    """
    compared = "states and loss are those of the model's own attention on each conversation alone"
    packed, padded = f"packed: {compared}", f"padded, not packed ({why}): {padding:.0%} is padding; {compared}"
    _print_lines({"rows": packed if attention == NAME else padded})
    console.rule()


def _print_lines(lines: Mapping[str, str | ColouredText]) -> None:
    grid = Grid.grid(Column(width=NAMED), Column(), padding=(0, 1))
    for name, line in lines.items():
        grid.add_row(name, line if isinstance(line, ColouredText) else ColouredText(line))
    console.print(grid, soft_wrap=False)


def print_expected_time(seconds: float, left: int) -> None:
    """Prints how long the steps that are left take at so many seconds a step."""
    if left:
        time = seconds * left
        said = f"{time:.0f} s" if time < 120 else f"{time / 60:.0f} min" if time < 7200 else f"{time / 3600:.1f} h"
        console.print(f"expected: {said} for {left:,} steps, by the last {TIMED}; evaluations and answers come on top")


def _memory(config: TrainConfig, accelerator: Accelerator, quantized: bool, held: Held, row: int, length: int) -> str:
    """Says what --plan would say of the memory; on a CPU, and of small models, only what is held whatever the row."""
    machine = machine_here(accelerator.mixed_precision)
    checkpointing = config.model.gradient_checkpointing
    how = f"rows of {row:,} tokens, {'with' if checkpointing else 'without'} gradient checkpointing"
    peak = None
    if machine.gpu and held.total >= SMALL * machine.usable:
        try:
            plan = plan_of(config, machine, min(max(2, length), ROW), sharing_of(accelerator))
            held, peak = plan.held, plan.peak(row, checkpointing)
        except Exception as error:  # as in `plan.fitted`: what cannot be measured on shapes is trained all the same
            how += f" (activations could not be measured: {reason_of(error)})"
    if peak is not None:
        parts = held.lines(sharing_of(accelerator))[0]
        return f"at most {gigabytes(peak)} of {gigabytes(machine.usable)}: {how}; {parts}"
    return how if quantized else f"{held.total / 1e6:,.3g} MB for weights, gradients and optimizer; {how}"


def _stretches(flags: Sequence[bool]) -> list[tuple[int, int]]:
    """Lists the ranges over which `flags` stays the same."""
    ends = [place for place in range(1, len(flags)) if flags[place] != flags[place - 1]] + [len(flags)]
    return list(zip([0, *ends], ends, strict=False))
