"""Shows what is in a model and in a data file: `python -m llm_peft_fa.inspect --model … --data chats.jsonl`."""

from llm_peft_fa import commands

if __name__ == "__main__":  # before the imports below: --help and a wrong option answer at once
    commands.inspect()

import dataclasses
import hashlib
import random
import unicodedata
from collections import Counter
from collections.abc import Mapping

import numpy as np
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from labs_common.errors import LabError
from labs_common.options import RunOptions
from labs_common.progress import console, tracked
from labs_common.report.figures import architecture_figure, histogram_figure
from labs_common.report.page import Code, Figure, Section, Table, Text, save_figure, write_report
from labs_common.run import Run, check_run_options
from llm_peft_fa.base import load_tokenizer, own_template
from llm_peft_fa.config import DataOptions, InspectConfig, MethodOptions
from llm_peft_fa.data import Reading, read_conversations, splits
from llm_peft_fa.methods import METHODS, resolved
from llm_peft_fa.model import structure_of
from llm_peft_fa.plan import outline
from llm_peft_fa.report import print_refused, refused_blocks
from llm_peft_fa.spelling import LETTERS, Message, changes, in_one_spelling
from llm_peft_fa.survey import repeats, surveyed
from llm_peft_fa.table import encode_all
from llm_peft_fa.templates import render, takes

SAMPLED = 1000  # conversations of which bases' tokens per word are counted: enough for two digits
SPELT = 20_000  # conversations of which it is told what normalisation changed
KINDS_SAID = "By asking words in the question's last sentence (`survey.KINDS`): the first rule that fits."


def inspect(config: InspectConfig) -> None:
    """Takes model and data as training would, and writes and prints what they hold."""
    options = RunOptions(output=config.output, seed=config.seed, track="none")
    check_run_options(options)
    method = resolved(config.method)
    # Everything is counted here, also what training would stop at.
    lenient = dataclasses.replace(config.reading, on_bad_data="skip")
    data = DataOptions(**vars(lenient))
    try:
        parts = splits(data, config.seed)
    except LabError:  # too few to hold some out, or it cannot be read at all
        parts = {"training": read_conversations(str(data.data), data.split, data)}
    reading = parts["training"] if data.data is None else read_conversations(data.data, data.split, data)
    tokenizer = load_tokenizer(config.model, config.template, config.thinking)
    run = Run.start(config, options, "inspect", Accelerator())
    sections = [
        _model_section(run, config.model, method),
        _template_section(config, tokenizer),
        *_data_sections(run, config, reading, parts, tokenizer),
    ]
    for section in sections[:-2]:
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
    run: Run, config: InspectConfig, reading: Reading, parts: Mapping[str, Reading], tokenizer: PreTrainedTokenizerBase
) -> list[Section]:
    """Shows counts, lengths and samples of the conversations, what they are about, and what repeats.

    `parts` are what training would make of them.
    """
    found = reading.conversations
    encoded = encode_all(tokenizer, reading, np.iinfo(np.int64).max, "skip")
    languages, kinds, signatures = Counter[str](), Counter[str](), {}
    for name, part in parts.items():
        talks = tracked(part.conversations, f"reading, {name}", len(part.conversations))
        one, other, signatures[name] = surveyed(talks)
        languages += one
        kinds += other
    roles, texts = Counter[str](), Counter[str]()
    for conversation in found:
        roles.update(message["role"] for message in conversation.messages)
        texts[hashlib.sha256(str(conversation.messages).encode()).hexdigest()[:16]] += 1
    rows = [
        ("conversations:", len(found)),
        ("rows that cannot be used:", sum(reading.reasons.values())),
        ("conversations that occur more than once:", sum(count > 1 for count in texts.values())),
        *repeats(signatures),
        *((f"turns, {role}:", count) for role, count in roles.items()),
        (f"tokens ({config.model}):", int(encoded.lengths.sum())),
        ("tokens learnt:", int(encoded.learnt.sum())),
        *((f"length, {share}%:", int(np.percentile(encoded.lengths, share))) for share in (50, 90, 99, 100)),
    ]
    picked = [
        found[place] for place in random.Random(config.seed).sample(range(len(found)), min(config.samples, len(found)))
    ]
    lengths = encoded.lengths.tolist()
    svg = save_figure(run, "lengths", histogram_figure(lengths, "tokens in a conversation", "conversations"))
    sections = [
        Section("The data", [Table(("", ""), rows), *refused_blocks([reading])]),
        Section("Languages", [Table(("conversations", ""), languages.most_common(), "By the letters of most of it.")]),
        Section("Kinds of questions", [Table(("last question", ""), kinds.most_common(), KINDS_SAID)]),
    ]
    if config.reading.normalise and config.reading.data is not None:
        sections.append(_spelling_section(config))
    if config.bases:
        sections.append(_bases_section(config, [message for one in found[:SAMPLED] for message in one.messages]))
    return [
        *sections,
        Section("Lengths", [Figure(svg, f"Lengths in tokens of {config.model}'s tokenizer.")]),
        Section(
            "Samples",
            [
                Table(("role", "text"), [(m["role"], m["content"]) for m in conversation.messages], conversation.where)
                for conversation in picked
            ],
        ),
    ]


def _spelling_section(config: InspectConfig) -> Section:
    """Tells what normalisation changed, letter by letter."""
    options = dataclasses.replace(config.reading, normalise=False, on_bad_data="skip")
    options.limit = min(options.limit or SPELT, SPELT)
    raw = read_conversations(str(options.data), options.split, options).conversations
    changed, touched = Counter[str](), Counter[str]()
    for conversation in raw:
        after = in_one_spelling(conversation.messages)
        counts = Counter[str]()
        for one, other in zip(conversation.messages, after, strict=True):
            counts.update(changes(one["content"], other["content"]))
        changed += counts
        touched.update(counts.keys())
    rows = [
        (f"{unicodedata.name(letter).lower()} ({letter})" if letter.isprintable() else unicodedata.name(letter).lower(),
         unicodedata.name(LETTERS[letter]).lower() if LETTERS.get(letter) else "dropped", count, touched[letter])
        for letter, count in changed.most_common()
    ]  # fmt: skip
    said = f"In the first {len(raw):,} conversations; lines in Arabic stay as they are."
    return Section("Normalisation", [Table(("written", "becomes", "times", "conversations"), rows, said)])


def _bases_section(config: InspectConfig, messages: list[Message]) -> Section:
    """Counts tokens per word of each base."""
    texts = [message["content"] for message in messages]
    words = max(1, sum(len(text.split()) for text in texts))
    rows = []
    for base in (config.model, *config.bases):
        try:
            tokenizer = load_tokenizer(base)
        except LabError as error:
            raise LabError(str(error).replace("--model", "--bases", 1)) from error
        tokens = sum(map(len, tokenizer(texts, add_special_tokens=False).input_ids))
        rows.append((base, len(tokenizer), round(tokens / words, 3)))
    said = f"Of the first {min(SAMPLED, len(texts)):,} conversations: fewer tokens are faster and fit more text."
    return Section("Tokens per word", [Table(("base", "vocabulary", "tokens per word"), rows, said)])
