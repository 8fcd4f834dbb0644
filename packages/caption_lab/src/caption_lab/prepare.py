"""Looks at captions before anything is trained: `python -m caption_lab.prepare --data flickr8k`."""

from caption_lab import commands

if __name__ == "__main__":  # before the imports below: --help and a wrong option answer at once
    commands.prepare()

import dataclasses
from collections import Counter
from typing import TYPE_CHECKING

from caption_lab.config import PrepareConfig

if TYPE_CHECKING:  # the real imports wait until the command line has been read: --help is fast
    from caption_lab.vocabulary import Vocabulary
    from labs_common.data.described import Captions
    from labs_common.report import Section
    from labs_common.run import Run

FREQUENT = 20


def prepare(config: PrepareConfig) -> None:
    """Writes vocabulary.json, tokenizer.json, splits.json, statistics.json and a report."""
    from accelerate import Accelerator

    from caption_lab.data import read_data
    from caption_lab.vocabulary import build_vocabulary
    from labs_common.data import record_splits
    from labs_common.options import RunOptions
    from labs_common.progress import console
    from labs_common.report import asked_section, rerun_section, write_report
    from labs_common.report.captioned import captioned_data_section
    from labs_common.run import Run, check_run_options

    options = RunOptions(output=config.output, track="none")
    check_run_options(options)
    words = config.vocabulary
    config = dataclasses.replace(
        config,
        vocabulary=dataclasses.replace(words, min_count=words.min_count or (1 if config.data.data is None else 3)),
    )
    data = read_data(config.data, config.seed, shown=True)
    vocabulary = build_vocabulary([c for those in data.splits["train"].captions for c in those], config.vocabulary)
    run = Run.start(config, options, "captions", Accelerator())
    record_splits(run, data.splits)
    vocabulary.save(run.path)
    found = statistics(data, vocabulary)
    run.save_json("statistics.json", found)
    for name, value in found.items():
        if isinstance(value, (int, float)):
            console.print(f"{name}: {value:,.4g}")
    sections = [
        asked_section(config),
        captioned_data_section(data),
        *word_sections(run, data, vocabulary, found),
        rerun_section(run),
    ]
    summary = (
        f"{found['pictures']:,} pictures, {found['captions']:,} captions; {len(vocabulary):,} words; "
        f"{found['unknown words, test']:.2%} of the words of the test captions are not among them."
    )
    path = write_report(run, "Captions", summary, sections)
    print(f"vocabulary: {run.path / 'vocabulary.json'}")
    print(f"report: {path}")


def statistics(data: "Captions", vocabulary: "Vocabulary") -> dict[str, object]:
    """Counts of the pictures, captions and words; rates of unknown words, cut captions and duplicates, by split."""
    known = set(vocabulary.words)
    found: dict[str, object] = {
        "pictures": sum(map(len, data.splits.values())),
        "captions": sum(len(those) for part in data.splits.values() for those in part.captions),
        "words in the vocabulary": len(vocabulary),
        "words a caption, at most": vocabulary.length,
    }
    for name, part in data.splits.items():
        cleaned = [vocabulary.cleaning.words(caption) for those in part.captions for caption in those]
        words = [word for caption in cleaned for word in caption]
        found[f"unknown words, {name}"] = sum(word not in known for word in words) / max(1, len(words))
        found[f"captions that are cut, {name}"] = sum(len(caption) > vocabulary.length for caption in cleaned) / len(
            cleaned
        )
    every = [
        " ".join(vocabulary.cleaning.words(c))
        for part in data.splits.values()
        for those in part.captions
        for c in those
    ]
    found["captions that occur more than once"] = sum(count for count in Counter(every).values() if count > 1)
    digests = Counter(digest for part in data.splits.values() for digest in part.digests)
    found["copies of pictures"] = sum(count - 1 for count in digests.values())
    return found


def word_sections(run: "Run", data: "Captions", vocabulary: "Vocabulary", found: dict[str, object]) -> "list[Section]":
    """Lengths, frequent words, what the vocabulary leaves out, and what its special tokens are for."""
    from labs_common.report import Figure, Section, Table, Text, bar_figure, save_figure
    from labs_common.report.figures import count_scatter_figure

    train = data.splits["train"]
    cleaned = [vocabulary.cleaning.words(caption) for those in train.captions for caption in those]
    lengths = Counter(map(len, cleaned))
    counts = Counter(word for words in cleaned for word in words)
    longest = counts.most_common(FREQUENT)
    scatter = count_scatter_figure(dict(lengths), "words in a caption", "captions", vocabulary.length)
    bars = bar_figure({word: {"count": float(count)} for word, count in longest}, "times in the training captions")
    dropped = [(word, count) for word, count in counts.most_common() if word not in set(vocabulary.words)]
    kept = sum(count for length, count in lengths.items() if length <= vocabulary.length) / len(cleaned)
    why = (
        "Captions of a batch lie in one tensor, so all have to be as long as the longest, and writing has to end "
        f"somewhere. {vocabulary.length} words are enough for {kept:.1%} of the training captions; the few longer ones "
        "would make every batch with one of them longer and slower. Shorter ones are filled with <pad>, from which "
        "nothing is learnt."
    )
    rare = f"{len(dropped):,} words are too rare."
    return [
        Section("Lengths", [
            Figure(save_figure(run, "lengths", scatter), "Training captions by length; beyond the line they are cut."),
            Text(why),
        ]),
        Section("Words", [
            Figure(save_figure(run, "words", bars), f"The {FREQUENT} most frequent words."),
            Table(("", ""), list(found.items())),
            Table(("left out of the vocabulary", "times"), dropped[:40], rare, folded=True),
        ]),
        Section("Special tokens", [Table(("token", "number", "what it is for"), [
            ("<pad>", 0, "fills a caption up to the length of the longest beside it; nothing is learnt from it"),
            ("<start>", 1, "what the model reads before the first word"),
            ("<end>", 2, "what it writes when the caption is over: without it, it could not stop"),
            ("<unk>", 3, "stands for a word that is too rare to be learnt; it is never written"),
        ])]),
    ]  # fmt: skip
