"""Several captioners under one budget, and one report: `python -m caption_lab.compare --data flickr8k`."""

from caption_lab import commands

if __name__ == "__main__":  # before the imports below: --help and a wrong option answer at once
    commands.compare()

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from operator import methodcaller
from typing import Any

import numpy as np

from caption_lab.config import TINY, CompareConfig, ComparedOptions, TrainConfig
from caption_lab.data import read_data
from caption_lab.decoder import CAPTIONERS
from caption_lab.encoder import make_encoder
from caption_lab.model import complete
from caption_lab.report import attention_maps, published_section, word_tiles
from caption_lab.saved import load_captioner
from caption_lab.tiny import tiny_weights
from labs_common.caption_metrics import METRICS, SCORER, CiderD, caption_words, mistakes, references_of
from labs_common.cli import parse
from labs_common.compare.collect import Entry, Measure, cost_measures, rows_of, within_one_error
from labs_common.compare.plan import comparison_folder, plan_runs, seeds_text
from labs_common.compare.processes import compare_runs, start_server
from labs_common.compare.report import Findings, budget_section, curves_of, notes_on, pareto_section, table_of
from labs_common.data.captions import CaptionedPictures, Captions
from labs_common.report.captions import example_places, examples_section
from labs_common.report.figures import bar_figure
from labs_common.report.page import Figure, Gallery, Section, Table, Text, save_figure, shown
from labs_common.run import Run
from labs_common.scenes.captions import GRAMMAR, KINDS
from labs_common.scenes.world import Scene

WORST = 6  # pictures in the section on errors
TRUTH: dict[str, Measure] = {"right in everything": lambda entry: entry.values("claims", "written", "whole")}
COSTS = cost_measures("captions")


def compare(config: CompareConfig) -> None:
    """Plans the runs, does those that are missing, and writes the report."""
    planned = plan(config)
    folder = comparison_folder("compare-captioners", config, [config.data.data])
    start_server(config.comparison.launch, ["caption_lab.train"])
    if any(run.encoder.encoder == TINY and run.encoder.pretrained for run in planned.values()):
        tiny_weights()  # made here, so that no run's memory is that of making it
    data = read_data(config.data, config.comparison.seed, shown=True)
    for run in planned.values():
        make_encoder(replace(run.encoder, pretrained=False)).train_last(run.encoder.unfreeze, False)
    compare_runs(folder, config, "caption_lab.train", planned, partial(findings, config, data))


def plan(config: CompareConfig) -> dict[str, TrainConfig]:
    """Makes the run of each entry of --models: a model, and options of it after colons.

    Raises:
        LabError: the comparison cannot start, or an entry names no model or option, or has a wrong value.
    """

    def run_of(name: str, flags: list[str]) -> TrainConfig:
        options = ("learning_rate", "label_smoothing", "scheduled_sampling")
        shared = {option: getattr(config.training, option) for option in options}
        own = parse(ComparedOptions, "--models", flags, ComparedOptions(**shared))
        given = {option: getattr(own, option) for option in options}
        return complete(
            TrainConfig(
                model=name, encoder=own.encoder, decoder=own.decoder, vocabulary=config.vocabulary, data=config.data,
                cache=config.cache, training=replace(config.training, **given), decoding=config.decoding,
            )
        )  # fmt: skip

    return plan_runs(config.comparison, "--models", config.models, "model", run_of, tuple(CAPTIONERS))


def findings(
    config: CompareConfig, data: Captions, run: Run, entries: Mapping[str, Entry], failed: Mapping[str, int]
) -> Findings:
    """Makes the table, the highest CIDEr-D first, and the sections of the report."""
    test, truth, seed = data.splits["test"], data.truth, config.comparison.seed
    captions = {
        name: {seed: [row["caption"] for row in rows] for seed, rows in entry.read("captions.json").items()}
        for name, entry in entries.items()
    }
    ordered = sorted(entries.values(), key=lambda entry: -_cider(entry))
    metrics = {name: methodcaller("values", "test", "metrics", key) for key, name in METRICS.items()}
    measures: dict[str, Measure] = metrics | (TRUTH if ordered[0].values("claims", "written", "whole") else {}) | COSTS
    rows = rows_of("model", ordered, measures)
    best = ordered[0].name
    equal = equal_to(best, captions, judges_of(config, test, {seed for its in captions.values() for seed in its}))
    summary = (
        f"{len(entries)} captioners, {seeds_text(config.comparison)} each. Highest CIDEr-D: {best} "
        f"({rows[0]['CIDEr-D']:.2f}); within one standard error of it: {', '.join(equal)}."
    )
    bars = {row["model"]: {name: row[name] for name in ("BLEU-1", "BLEU-4")} for row in rows}
    numbers: list[Any] = [
        table_of(rows, ("model", *METRICS.values())),
        Figure(save_figure(run, "bleu", bar_figure(bars, "per cent")), "BLEU of the test captions."),
        Text(f"Each was read back from disk and described the test pictures with --beam {config.decoding.beam}."),
        *scorer_notes(entries),
        *notes_on(config.comparison, failed),
    ]
    against = {name: (COSTS[name], False) for name in ("training seconds", "trained parameters")}
    cost = [table_of(rows, ("model", *COSTS)), *pareto_section(run, entries, _cider, "CIDEr-D", against).blocks]
    ours = {name: entry.first["test"]["metrics"] for name, entry in entries.items()}
    sections = [
        Section("Numbers", numbers),
        *([truth_section(run, entries)] if truth else []),
        published_section(ours, test, "test", bool(truth)),
        examples_section({name: its[seed] for name, its in captions.items() if seed in its}, test),
        looks_section(entries, test, config),
        *([errors_section(captions, test, truth, seed)] if truth else []),
        curves_section(run, entries),
        Section("Cost", cost),
        budget_section("model", entries, "captions",
                       "All had the same captions in the same order, and the same number of epochs."),
    ]  # fmt: skip
    printed = ("BLEU-1", "BLEU-4", "CIDEr-D", *TRUTH, "training seconds")
    return Findings("Captioners compared", summary, rows, sections, printed)


def scorer_notes(entries: Mapping[str, Entry]) -> list[Text]:
    """Names the entries with a run of an earlier version, whose captions were cleaned as its own vocabulary is."""
    older = [name for name, its in entries.items() if its.values("test", "scorer") != [SCORER] * len(its.results)]
    said = (
        f"{', '.join(older)}: scored by an earlier version, by other rules, and not to be compared with the others; "
        "caption_lab.evaluate scores a run again."
    )
    return [Text(said)] if older else []


def judges_of(config: CompareConfig, test: CaptionedPictures, seeds: Collection[int]) -> dict[int, CiderD]:
    """Returns the judge of each seed's captions: by the references of its own test, `test` being the first seed's."""
    tests = {seed: read_data(config.data, seed, shown=False).splits["test"] for seed in seeds
             if seed != config.comparison.seed}  # fmt: skip
    return {seed: CiderD(references_of(its)) for seed, its in ({config.comparison.seed: test} | tests).items()}


def equal_to(best: str, captions: Mapping[str, Mapping[int, list[str]]], judges: Mapping[int, CiderD]) -> list[str]:
    """Names the entries whose CIDEr-D is no more than one standard error below that of `best`, on the same pictures.

    `captions` are those of the test pictures by entry and seed, `judges` have the references of each seed's.
    """
    scores = {
        name: {seed: judges[seed].scores([*map(caption_words, said)], range(len(said))) for seed, said in its.items()}
        for name, its in captions.items()
    }
    found = []
    for name, its in scores.items():
        differences = [scores[best][seed] - its[seed] for seed in sorted(scores[best].keys() & its.keys())]
        if name == best or (differences and within_one_error(np.concatenate(differences).tolist())):
            found.append(name)
    return found


def truth_section(run: Run, entries: Mapping[str, Entry]) -> Section:
    """Shows how much of what the captions claim is so, by kind of claim."""
    columns = (*KINDS, GRAMMAR)
    rows = []
    bars = {}
    for name, entry in entries.items():
        for how, found in entry.first["claims"].items():
            of_others = how == "of another picture"
            if of_others and name != next(iter(entries)):
                continue  # it is the same for all
            shares = {kind: pair[0] / pair[1] for kind, pair in found["by kind"].items()}
            rows.append((how if of_others else f"{name}, {how}", found["whole"], *map(shares.get, columns)))
            if how == "written":
                bars[name] = {kind: shares.get(kind, 0.0) for kind in ("objects", "colours", "relations")}
    text = (
        "What is drawn is known, so each claim of a caption can be judged. Written: the captions that were measured. "
        "Drawn by chance: three more of each picture (--top-p 0.9), which say more different things. Of another "
        "picture: true captions, but of other pictures."
    )
    svg = save_figure(run, "claims", bar_figure(bars, "share of claims that are right", 1.0))
    head = ("captions", "right in everything", *columns)
    table = Table(head, rows, "Share of claims that are right, by kind; first seed.")
    return Section("What is true", [Text(text), table, Figure(svg, "The captions that were measured.")])


def looks_section(entries: Mapping[str, Entry], test: CaptionedPictures, config: CompareConfig) -> Section:
    """Shows where each captioner that attends looked for each word, on the same pictures."""
    blocks: list[Any] = []
    for name, entry in entries.items():
        captioner = load_captioner(entry.run.path)
        images = [test.image(place) for place in example_places(test)[:2]]
        for image, (words, attention) in zip(images, attention_maps(captioner, images, config.decoding), strict=False):
            blocks.append(Gallery(word_tiles(image, words, attention), f"{name}: {' '.join(words)}"))
    return Section("Where they looked", blocks or [Text("None of them looks at places.")])


def errors_section(
    captions: Mapping[str, Mapping[int, list[str]]],
    test: CaptionedPictures,
    truth: Mapping[str, Scene],
    seed: int,
) -> Section:
    """Shows test pictures of which every captioner claims something wrong."""
    said = {name: its[seed] for name, its in captions.items() if seed in its}
    wrong = {
        name: [mistakes(caption, truth[picture]) for caption, picture in zip(its, test.names, strict=True)]
        for name, its in said.items()
    }
    hard = [place for place in range(len(test)) if all(claims[place] for claims in wrong.values())]
    gallery = []
    for place in hard[:WORST]:
        each = [
            f"{name}: {said[name][place]} (wrong: {', '.join(claim.said for claim in claims[place])})"
            for name, claims in wrong.items()
        ]
        gallery.append((shown(test.image(place)), "; ".join(each)))
    text = f"Of {len(hard)} of {len(test)} test pictures every captioner claims something that is not so."
    return Section("Hard for all", [Gallery(gallery, text) if gallery else Text(text)])


def curves_section(run: Run, entries: Mapping[str, Entry]) -> Section:
    """Draws loss and CIDEr-D by epoch, all on one axis."""
    figures = [
        curves_of(run, {name: entry.epochs(key) for name, entry in entries.items()}, "epoch", title,
                  f"{title[0].upper()}{title[1:]} by epoch; first seed.")
        for key, title in (("validation/loss", "validation loss"), ("training/loss", "training loss"),
                           ("validation/cider", "validation CIDEr-D"))
    ]  # fmt: skip
    note = "show_attend_tell's training loss contains its attention penalty; validation losses are of the words alone."
    return Section("Curves", [*figures, Text(note)])


def _cider(entry: Entry) -> float:
    return entry.mean("test", "metrics", "cider")
