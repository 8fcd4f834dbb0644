"""Looks at captions before anything is trained: `python -m caption_lab.prepare --data flickr8k`."""

from caption_lab import commands

if __name__ == "__main__":  # before the imports below: --help and a wrong option answer at once
    commands.prepare()

import dataclasses
from collections import Counter

from accelerate import Accelerator

from caption_lab.config import PrepareConfig, complete_words
from caption_lab.data import read_data
from caption_lab.vocabulary import PURPOSES, Vocabulary, build_vocabulary
from labs_common.data.captions import CaptionedPictures, Captions
from labs_common.data.images import record_splits
from labs_common.options import RunOptions
from labs_common.progress import console
from labs_common.report.captions import captioned_data_section
from labs_common.report.figures import bar_figure, count_scatter_figure
from labs_common.report.page import Figure, Section, Table, Text, making_report, save_figure, write_report
from labs_common.report.sections import asked_section, rerun_section
from labs_common.run import Run, check_run_options
from labs_common.scenes.files import is_drawn

FREQUENT, RARE = 20, 40  # words that the report shows of those kept and of those left out


def prepare(config: PrepareConfig) -> None:
    """Writes vocabulary.json, tokenizer.json, splits.json, statistics.json and a report."""
    options = RunOptions(output=config.output, track="none")
    check_run_options(options)
    config = dataclasses.replace(config, vocabulary=complete_words(config.vocabulary, is_drawn(config.data.data)))
    data = read_data(config.data, config.seed, shown=True)
    vocabulary = build_vocabulary([c for those in data.splits["train"].captions for c in those], config.vocabulary)
    run = Run.start(config, options, "captions", Accelerator())
    record_splits(run, data.splits)
    vocabulary.save(run.path)
    found = statistics(data, vocabulary)
    run.save_json("statistics.json", found)
    for name, value in found.items():
        console.print(f"{name}: {value:,.4g}")
    with making_report():
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


def statistics(data: Captions, vocabulary: Vocabulary) -> dict[str, float]:
    """Counts pictures, captions and words; gives rates of unknown words and cut captions by split, and duplicates."""
    known = set(vocabulary.words)
    cleaned = {name: _cleaned(part, vocabulary) for name, part in data.splits.items()}
    found: dict[str, float] = {
        "pictures": sum(map(len, data.splits.values())),
        "captions": sum(map(len, cleaned.values())),
        "words in the vocabulary": len(vocabulary),
        "words a caption, at most": vocabulary.length,
    }
    for name, captions in cleaned.items():
        words = [word for caption in captions for word in caption]
        cut = sum(len(caption) > vocabulary.length for caption in captions)
        found[f"unknown words, {name}"] = sum(word not in known for word in words) / max(1, len(words))
        found[f"captions that are cut, {name}"] = cut / len(captions)
    every = Counter(" ".join(caption) for captions in cleaned.values() for caption in captions)
    found["captions that occur more than once"] = sum(count for count in every.values() if count > 1)
    digests = Counter(digest for part in data.splits.values() for digest in part.digests)
    found["copies of pictures"] = sum(count - 1 for count in digests.values())
    return found


def word_sections(run: Run, data: Captions, vocabulary: Vocabulary, found: dict[str, float]) -> list[Section]:
    """Shows lengths, frequent words, what the vocabulary leaves out, and what its special tokens are for."""
    cleaned = _cleaned(data.splits["train"], vocabulary)
    lengths = Counter(map(len, cleaned))
    counts = Counter(word for words in cleaned for word in words)
    scatter = count_scatter_figure(dict(lengths), "words in a caption", "captions", vocabulary.length)
    frequent = {word: {"count": float(count)} for word, count in counts.most_common(FREQUENT)}
    bars = bar_figure(frequent, "times in the training captions")
    known = set(vocabulary.words)
    dropped = [(word, count) for word, count in counts.most_common() if word not in known]
    kept = sum(count for length, count in lengths.items() if length <= vocabulary.length) / len(cleaned)
    why = (
        "Captions of a batch lie in one tensor, so all have to be as long as the longest, and writing has to end "
        f"somewhere. {vocabulary.length} words are enough for {kept:.1%} of the training captions; the few longer ones "
        "would make every batch with one of them longer and slower. Shorter ones are filled with <pad>, from which "
        "nothing is learnt."
    )
    special = [(token, number, purpose) for number, (token, purpose) in enumerate(PURPOSES.items())]
    rare = f"{len(dropped):,} words are too rare."
    return [
        Section("Lengths", [
            Figure(save_figure(run, "lengths", scatter), "Training captions by length; beyond the line they are cut."),
            Text(why),
        ]),
        Section("Words", [
            Figure(save_figure(run, "words", bars), f"The {FREQUENT} most frequent words."),
            Table(("", ""), list(found.items())),
            Table(("left out of the vocabulary", "times"), dropped[:RARE], rare, folded=True),
        ]),
        Section("Special tokens", [Table(("token", "number", "what it is for"), special)]),
    ]  # fmt: skip


def _cleaned(pictures: CaptionedPictures, vocabulary: Vocabulary) -> list[list[str]]:
    return [vocabulary.cleaning.words(caption) for those in pictures.captions for caption in those]
