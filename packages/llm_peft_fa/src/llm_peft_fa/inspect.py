"""Shows what is in a model and in a data file: `python -m llm_peft_fa.inspect --model … --data chats.jsonl`."""

from llm_peft_fa import commands

if __name__ == "__main__":  # before the imports below: --help and a wrong option answer at once
    commands.inspect()

import dataclasses
import random
from collections import Counter

from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from labs_common.options import RunOptions
from labs_common.progress import console, tracked
from labs_common.report.figures import architecture_figure, histogram_figure
from labs_common.report.page import Code, Figure, Section, Table, Text, save_figure, write_report
from labs_common.run import Run, check_run_options
from llm_peft_fa.base import load_tokenizer, own_template
from llm_peft_fa.config import DataOptions, InspectConfig, MethodOptions
from llm_peft_fa.data import Reading, read_conversations, training_and_validation
from llm_peft_fa.methods import METHODS, resolved
from llm_peft_fa.model import structure_of
from llm_peft_fa.plan import outline
from llm_peft_fa.report import print_refused, refused_blocks
from llm_peft_fa.templates import encode, render, takes


def inspect(config: InspectConfig) -> None:
    """Takes model and data as training would, and writes and prints what they hold."""
    options = RunOptions(output=config.output, seed=config.seed, track="none")
    check_run_options(options)
    method = resolved(config.method)
    # Everything is counted here, also what training would stop at.
    lenient = dataclasses.replace(config.reading, on_bad_data="skip")
    if config.reading.data is None:
        reading, _ = training_and_validation(DataOptions(), config.seed)
    else:
        reading = read_conversations(config.reading.data, config.reading.split, lenient)
    tokenizer = load_tokenizer(config.model, config.template, config.thinking)
    run = Run.start(config, options, "inspect", Accelerator())
    sections = [
        _model_section(run, config.model, method),
        _template_section(config, tokenizer),
        *_data_sections(run, config, reading, tokenizer),
    ]
    for section in sections[:3]:
        console.rule(section.title, align="left")
        for block in section.blocks:
            if isinstance(block, Text):
                console.print(block.text)
            elif isinstance(block, Table):
                for row in block.rows:
                    console.print("  ".join(f"{value:,}" if isinstance(value, int) else str(value) for value in row))
    print_refused([reading])
    path = write_report(run, f"{config.model}, and {reading.source}", f"{len(reading.conversations):,} usable "
                        "conversations.", sections)  # fmt: skip
    print(f"report: {path}")


def _model_section(run: Run, model: str, method: MethodOptions) -> Section:
    """Shows the parts of the model, drawn and as a table, and what the method would train of them."""
    structure = structure_of(outline(model, method))
    drawing = save_figure(run, "architecture", architecture_figure(structure.rows))
    said = (
        f"{structure.name}: {structure.parameters:,} parameters. --method {method.method} trains "
        f"{structure.trainable:,} of them ({structure.trainable / structure.parameters:.2%}): "
        f"{METHODS[method.method].description}."
    )
    rows = [
        (row.name, cell.name, row.times * (cell.trained + cell.fixed), row.times * cell.trained)
        for row in structure.rows
        for cell in row.cells
    ]
    columns = ("block", "part", "parameters", "trained")
    return Section("The model", [Text(said), Figure(drawing, "Input below."), Table(columns, rows)])


def _template_section(config: InspectConfig, tokenizer: PreTrainedTokenizerBase) -> Section:
    """Tells base from instruct, and what that means for templates."""
    talk = [{"role": "user", "content": "سلام"}, {"role": "assistant", "content": "سلام!"}]
    _, takes_system, _ = takes(tokenizer, tokenizer.get_chat_template())
    if own_template(config.model):
        kind = (
            "Instruct, or made ready for it: the tokenizer has a chat template. --template auto uses it, so that "
            "fine-tuning goes on in the format that the model may know already."
        )
    else:
        kind = (
            "Base: the tokenizer has no chat template. --template auto takes the plain one (### User: …), made of text "
            "that every tokenizer has and ended by the end-of-sequence token; --template FILE gives it another."
        )
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    rows = [
        *special.items(),
        ("vocabulary", len(tokenizer)),
        ("system role", "in the template" if takes_system else "none: the text goes before the first question"),
    ]
    return Section("Base or instruct", [Text(kind), Table(("", ""), rows), Code(render(tokenizer, talk))])


def _data_sections(
    run: Run, config: InspectConfig, reading: Reading, tokenizer: PreTrainedTokenizerBase
) -> list[Section]:
    """Shows counts, lengths and samples of the conversations."""
    found = reading.conversations
    lengths, learnt = [], 0
    for conversation in tracked(found, "counting tokens", len(found)):
        for row in encode(tokenizer, conversation):
            lengths.append(len(row.ids))
            learnt += sum(row.learnt)
    ordered = sorted(lengths)
    texts = Counter(str(conversation.messages) for conversation in found)
    roles = Counter(message["role"] for conversation in found for message in conversation.messages)
    rows = [
        ("conversations:", len(found)),
        ("rows that cannot be used:", sum(reading.reasons.values())),
        ("conversations that occur more than once:", sum(count > 1 for count in texts.values())),
        *((f"turns, {role}:", count) for role, count in roles.items()),
        (f"tokens ({config.model}):", sum(lengths)),
        ("tokens learnt:", learnt),
        *(
            (f"length, {share}%:", ordered[min(len(ordered) - 1, len(ordered) * share // 100)])
            for share in (50, 90, 99, 100)
        ),
    ]
    picked = random.Random(config.seed).sample(found, min(config.samples, len(found)))
    svg = save_figure(run, "lengths", histogram_figure(lengths, "tokens in a conversation", "conversations"))
    return [
        Section("The data", [Table(("", ""), rows), *refused_blocks([reading])]),
        Section("Lengths", [Figure(svg, f"Lengths in tokens of {config.model}'s tokenizer.")]),
        Section(
            "Samples",
            [
                Table(("role", "text"), [(m["role"], m["content"]) for m in conversation.messages], conversation.where)
                for conversation in picked
            ],
        ),
    ]
