"""What is in a data file: `python -m llm_peft_fa.inspect --data chats.jsonl`."""

from labs_common.cli import run_command
from llm_peft_fa.config import InspectConfig


def main() -> None:
    """The command."""
    run_command(inspect, InspectConfig, "python -m llm_peft_fa.inspect")


def inspect(config: InspectConfig) -> None:
    """Reads the data as training would, and writes and prints what it holds."""
    import dataclasses
    import random
    from collections import Counter

    from accelerate import Accelerator

    from labs_common.options import RunOptions
    from labs_common.progress import console, tracked
    from labs_common.report import Figure, Section, Table, histogram_figure, save_figure, write_report
    from labs_common.run import Run, check_run_options
    from llm_peft_fa.config import DataOptions
    from llm_peft_fa.data import read_conversations, training_and_validation
    from llm_peft_fa.model import load_tokenizer
    from llm_peft_fa.results import print_refused, refused_blocks
    from llm_peft_fa.templates import encode

    options = RunOptions(output=config.output, seed=config.seed, track="none")
    check_run_options(options)
    # Everything is counted here, also what training would stop at.
    lenient = dataclasses.replace(config.reading, on_bad_data="skip")
    if config.reading.data is None:
        reading, _ = training_and_validation(DataOptions(), config.seed)
    else:
        reading = read_conversations(config.reading.data, config.reading.split, lenient)
    tokenizer = load_tokenizer(config.model, config.template)
    found = reading.conversations
    lengths, learnt = [], 0
    for conversation in tracked(found, "counting tokens", len(found)):
        encoded = encode(tokenizer, conversation)
        lengths.append(len(encoded.ids))
        learnt += sum(encoded.learnt)
    ordered = sorted(lengths)
    texts = Counter(str(conversation.messages) for conversation in found)
    roles = Counter(message["role"] for conversation in found for message in conversation.messages)
    rows = [
        ("conversations", len(found)),
        ("rows that cannot be used", sum(reading.reasons.values())),
        ("conversations that occur more than once", sum(count > 1 for count in texts.values())),
        *((f"turns: {role}", count) for role, count in roles.items()),
        (f"tokens ({config.model})", sum(lengths)),
        ("tokens learnt", learnt),
        *(
            (f"length, {share}%", ordered[min(len(ordered) - 1, len(ordered) * share // 100)])
            for share in (50, 90, 99, 100)
        ),
    ]
    picked = random.Random(config.seed).sample(found, min(config.samples, len(found)))
    run = Run.start(config, options, "inspect", Accelerator())
    svg = save_figure(run, "lengths", histogram_figure(lengths, "tokens in a conversation", "conversations"))
    sections = [
        Section("Counts", [Table(("", ""), rows), *refused_blocks([reading])]),
        Section("Lengths", [Figure(svg, f"Lengths in tokens of {config.model}'s tokenizer.")]),
        Section(
            "Samples",
            [
                Table(("role", "text"), [(m["role"], m["content"]) for m in conversation.messages], conversation.where)
                for conversation in picked
            ],
        ),
    ]
    path = write_report(run, f"What is in {reading.source}", f"{len(found):,} usable conversations.", sections)
    for name, value in rows:
        console.print(f"{name}: {value:,}")
    print_refused([reading])
    print(f"report: {path}")


if __name__ == "__main__":
    main()
