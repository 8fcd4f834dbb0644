"""The results of a run, and the sections of the report that only this lab has."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import figure
from PIL import Image

from caption_lab.config import TrainConfig
from caption_lab.decoder import CAPTIONERS
from caption_lab.losses import OBJECTIVES
from caption_lab.pointing import Pointing, pointing
from caption_lab.released import CLIP_SCORES, ReleasedCaptioner
from caption_lab.saved import Captioner
from labs_common.caption_metrics import (
    METRICS,
    SCORER,
    CaptionScores,
    Truthfulness,
    caption_words,
    mistakes,
    references_of,
    rouge_l,
)
from labs_common.data.captions import CaptionedPictures, Captions
from labs_common.fitting import Fitted, results_of, write_results
from labs_common.options import DecodingOptions
from labs_common.progress import console
from labs_common.report.captions import captioned_data_section, captions_json, example_places
from labs_common.report.figures import bar_figure, curve_figure, under_map
from labs_common.report.page import Figure, Gallery, Section, Table, Text, save_figure, shown
from labs_common.report.sections import (
    asked_section,
    cost_section,
    curves_section,
    drawn_section,
    evaluations_table,
    rerun_section,
    structure_of,
)
from labs_common.run import Run, seconds_between
from labs_common.saved import FOLDER
from labs_common.scenes.captions import GRAMMAR, KINDS
from labs_common.scenes.world import Scene

PRINTED = ("bleu-1", "bleu-4", "rouge-l", "cider", *CLIP_SCORES)
SHOWN, LOOKED_AT, WORST = 10, 4, 8  # pictures in the sections on captions, on attention and on errors
POINTED = 200  # pictures whose maps are judged: a standard error of 3 % at most
LARGE = 896  # pixels of the map of one word: 64 for each of 14 x 14 places
SIDE, ACROSS = 150, 6  # pixels of a word's map, and maps in a row of a heat-map's file
# BLEU-1 to BLEU-4 and METEOR in per cent, 5 references; None where the paper gives none. Figures of Xu et al. 2015,
# table 1, which also reports those of the others.
PUBLISHED: dict[str, tuple[float | None, ...]] = {
    "Show and Tell (Google NIC)": (63.0, 41.0, 27.0, None, None),
    "Log-bilinear": (65.6, 42.4, 27.7, 17.7, 17.31),
    "Show, Attend and Tell, soft attention": (67.0, 44.8, 29.9, 19.5, 18.93),
    "Show, Attend and Tell, hard attention": (67.0, 45.7, 31.4, 21.3, 20.30),
}
SOURCE = "arXiv 1502.03044, table 1"
# What says that pictures are divided as the papers' are, and how many their test has.
OFFICIAL, OFFICIAL_TEST = ("by the official lists", "as Karpathy's dataset_flickr8k.json says"), 1000
THEIRS = "Flickr8k, official test pictures, five references."
ABOUT_BREVITY = (
    "Xu et al. give BLEU without the brevity penalty, ours has it, as coco-caption's does. Where the length ratio r "
    "(words of the captions over those of the nearest references) is below 1, ours over exp(1 - 1 / r) is theirs."
)
ABOUT_CLIP = (
    "CLIPScore (Hessel et al. 2021) is how near a CLIP finds caption and picture, without references; RefCLIPScore "
    "also how near the caption is to the nearest true one. They notice wrong things rather than wrong counts, places "
    "or grammar, depend on the CLIP, and favour captioners that see by one or were trained with one."
)


def finish_report(
    run: Run,
    config: TrainConfig,
    data: Captions,
    captioner: Captioner,
    fitted: Fitted,
    found: CaptionScores,
    clock: Mapping[str, float],
) -> None:
    """Writes results.json, captions.json and the report, prints the main numbers and where the report is."""
    seconds = seconds_between(clock)
    test = data.splits["test"]
    run.save_json("captions.json", captions_json(test, found.captions))
    results = results_of(run, config, fitted, "captions", seconds["prepared"]) | {
        "vocabulary": {"words": len(captioner.vocabulary), "length": captioner.vocabulary.length},
        "evaluations": [line for line in run.lines("metrics.jsonl") if "validation/loss" in line],
        "test": {"metrics": found.metrics, "chance": found.chance, "pictures": len(found.captions), "scorer": SCORER},
        "claims": {
            name: {"whole": truth.whole, "by kind": {kind: list(pair) for kind, pair in _by_kind(truth)}}
            for name, truth in found.claims.items()
        },
    }
    print_scores(found)
    print(f"model: {run.path / FOLDER}")

    def page() -> tuple[str, list[Section]]:
        cost = cost_section(run, "captions", seconds)
        cost.blocks.append(Table(("", ""), [("optimizer state, MiB", fitted.optimizer_bytes / 2**20),
                                            ("features kept on disk, MiB", fitted.cache_bytes / 2**20)]))  # fmt: skip
        return _summary(found), [
            asked_section(config),
            captioned_data_section(data),
            _structure_section(run, config, captioner, fitted),
            _curves(run, config, data.splits["validation"]),
            *evaluation_sections(run, found, test, data.truth, captioner, config.decoding),
            published_section({config.model: found.metrics}, test, "test", bool(data.truth)),
            cost,
            rerun_section(run),
        ]

    write_results(run, results, config.run.report, f"{config.model} describes pictures", page)


def print_scores(found: CaptionScores) -> None:
    """Prints the main numbers."""
    for name, metrics in (("test captions", found.metrics), ("by chance", found.chance)):
        names = {key: name for key, name in score_columns(metrics).items() if key in PRINTED}
        said = "  ".join(f"{name} {metrics[key]:.3g}" for key, name in names.items())
        console.print(f"{name}: {said}")
    for name, truth in found.claims.items():
        kinds = "  ".join(f"{kind} {right / there:.0%}" for kind, (right, there) in _by_kind(truth))
        console.print(f"{name}: {truth.whole:.0%} of captions right in everything ({kinds})")


def evaluation_sections(
    run: Run,
    found: CaptionScores,
    pictures: CaptionedPictures,
    truth: Mapping[str, Scene],
    captioner: Captioner | ReleasedCaptioner,
    decoding: DecodingOptions,
) -> list[Section]:
    """Shows numbers, captions, where the captioner looked, and what was wrong."""
    columns = score_columns(found.metrics)
    rows = [
        ("test captions", *(found.metrics[key] for key in columns)),
        ("true captions of other pictures", *(found.chance[key] for key in columns)),
    ]
    text = (
        f"Measured once, on the captioner read back from disk, with --beam {decoding.beam}. The second row is what "
        "somebody would score who writes good sentences without looking. BLEU and ROUGE-L in per cent. METEOR is not "
        "given: version 1.5, which the papers used, exists in Java only, and what Python has gives other numbers."
    )
    numbers = Section("Numbers", [Table(("", *columns.values()), rows), Text(text)])
    if columns.keys() & CLIP_SCORES.keys():
        numbers.blocks.append(Text(ABOUT_CLIP))
    if found.claims:
        numbers.blocks += _truth_blocks(run, found)
    spread = example_places(pictures, SHOWN)
    gallery = [_tile(pictures, place, f"{found.captions[place]}  —  true: {pictures.captions[place][0]}")
               for place in spread]  # fmt: skip
    sections = [numbers, Section("Captions", [Gallery(gallery, "Test pictures, evenly from all of them.")])]
    chosen = [pictures.image(place) for place in spread[:: max(1, len(spread) // LOOKED_AT)][:LOOKED_AT]]
    # Of a released one's attention nothing is known here.
    if isinstance(captioner, Captioner) and (maps := attention_maps(captioner, chosen, decoding)):
        blocks: list[Any] = [
            Text("The picture under the attention of each word: bright is where the captioner looked when it chose it.")
        ]
        blocks += [Gallery(word_tiles(image, *its), " ".join(its[0])) for image, its in zip(chosen, maps, strict=True)]
        blocks += _pointing_blocks(run, pictures, truth, captioner, decoding)
        sections.append(Section("Where it looked", blocks))
    return [*sections, _error_section(found, pictures, truth)]


def score_columns(metrics: Mapping[str, float]) -> dict[str, str]:
    """Returns the names of the scores that there are, in the order of tables."""
    return {key: name for key, name in (METRICS | CLIP_SCORES).items() if key in metrics}


def _pointing_blocks(
    run: Run, pictures: CaptionedPictures, truth: Mapping[str, Scene], captioner: Captioner, decoding: DecodingOptions
) -> list[Any]:
    """Judges the maps where it is known what is drawn; see `caption_lab.pointing`."""
    known = [place for place in example_places(pictures, POINTED) if pictures.names[place] in truth]
    maps: list[tuple[list[str], np.ndarray]] = []
    for first in range(0, len(known), 64):  # pictures at once
        images = [pictures.image(place) for place in known[first : first + 64]]
        maps += [(words, of.float().cpu().numpy()) for words, of in attention_maps(captioner, images, decoding)]
    found = pointing(maps, [truth[pictures.names[place]] for place in known])
    if not found:
        return []
    run.save_json("pointing.json", {kind: its._asdict() for kind, its in found.items()})
    columns = ("words that name", *Pointing._fields)
    rows = [(kind, *found[kind]) for kind in KINDS if kind in found]
    return [Table(columns, rows, f"Does the map point at what the word names? In {len(known)} test pictures, words of "
                                 "things that are there. hits: the brightest place touches the named thing; mass: "
                                 "share of the map on its places; others: hits with the map of another picture; "
                                 "chance: share of the places that the thing touches.")]  # fmt: skip


def published_section(
    ours: Mapping[str, Mapping[str, float]], pictures: CaptionedPictures, split: str, drawn: bool
) -> Section:
    """Shows our numbers of these pictures beside what the papers report on Flickr8k's test, or apart from it."""
    keys = ("bleu-1", "bleu-2", "bleu-3", "bleu-4", "length-ratio")
    here = [(name, *map(metrics.get, keys), None, "here") for name, metrics in ours.items()]
    papers = [(name, *values[:4], None, values[4], SOURCE) for name, values in PUBLISHED.items()]
    columns = ("model", *(METRICS[key] for key in keys), "METEOR", "source")
    if split == "test" and pictures.divided in OFFICIAL and len(pictures) == OFFICIAL_TEST and not drawn:
        blocks: list[Any] = [Table(columns, here + papers, THEIRS)]
    else:
        division = f", divided {pictures.divided}" if pictures.divided and split != "all" else ""
        what = f"{len(pictures):,} pictures of {pictures.source}, split: {split}{division}."
        why = "drawn scenes, which are much easier" if drawn else f"not the {OFFICIAL_TEST:,} official test pictures"
        apart = f"{THEIRS} Not to be compared with ours, which are of {why}."
        blocks = [Table(columns, here, what), Table(columns, papers, apart)]
    return Section("Beside the papers", [*blocks, Text(ABOUT_BREVITY)])


def attention_maps(
    captioner: Captioner, images: Sequence[Image.Image], options: DecodingOptions
) -> list[tuple[list[str], torch.Tensor]]:
    """Returns for each picture the words of its caption and their attention (words, rows, columns).

    Empty if the captioner does not attend. `top_p` is not used: the map is of the caption that the search finds.
    """
    written = captioner.describe(images, replace(options, top_p=0.0), attention=True)
    found = []
    for numbers, attention in zip(written.words if written.attention else [], written.attention, strict=True):
        words = captioner.vocabulary.decode(numbers).split()
        found.append((words, attention[: len(words)].unflatten(1, captioner.model.encoder.grid)))
    return found


def word_tiles(image: Image.Image, words: Sequence[str], attention: torch.Tensor) -> list[tuple[Image.Image, str]]:
    """Returns for each word the picture under its map, and the word."""
    return [(under_map(image, part.cpu().numpy(), SIDE), word) for word, part in zip(words, attention, strict=True)]


def save_heatmap(image: Image.Image, words: Sequence[str], attention: torch.Tensor, file: Path, word: str = "") -> None:
    """Writes a PNG: the picture, then the picture under the map of each word, row by row; with `word`, of it alone."""
    if word:
        large = under_map(image, attention[list(words).index(word)].cpu().numpy(), LARGE)
        part = file.with_name(f".{file.name}.part")
        large.save(part, format="png")
        part.replace(file)
        return
    tiles = [(image.resize((SIDE, SIDE)), ""), *word_tiles(image, words, attention)]
    rows = -(-len(tiles) // ACROSS)
    canvas = figure.Figure(figsize=(1.7 * ACROSS, 1.9 * rows), layout="constrained")
    for place, (tile, word) in enumerate(tiles):
        axes = canvas.add_subplot(rows, ACROSS, place + 1)
        axes.imshow(tile)
        axes.set_title(word, fontsize=10)
        axes.set_axis_off()
    part = file.with_name(f".{file.name}.part")
    canvas.savefig(part, format="png", dpi=110)
    part.replace(file)


def _structure_section(run: Run, config: TrainConfig, captioner: Captioner, fitted: Fitted) -> Section:
    encoder, decoder = captioner.model.encoder, captioner.model.decoder
    # Nothing of what was read back trains: the figure shows what did.
    encoder.train_last(config.encoder.unfreeze, frozen_is_kept=False)
    decoder.requires_grad_(True)
    rows = [*structure_of(encoder.network).rows, *structure_of(decoder).rows]
    places = f"{encoder.places} {'vector' if encoder.pool else 'places'}"
    caption = (
        f"Encoder below, decoder above: {CAPTIONERS[config.model].description}. The encoder gives {places} of "
        f"{encoder.width} values; {fitted.trained:,} of {fitted.parameters:,} parameters learnt to "
        f"{OBJECTIVES[config.objective].description}; the vocabulary has {len(captioner.vocabulary):,} words."
    )
    return drawn_section(run, fitted.audit, rows, caption)


def _curves(run: Run, config: TrainConfig, validation: CaptionedPictures) -> Section:
    section, options = curves_section(run, ("training/loss", "validation/loss")), config.training
    key = f"validation/{options.watch}"
    lines = [line for line in run.lines("metrics.jsonl") if key in line]
    if options.keep_best or options.patience:
        best = (min if options.watch == "loss" else max)(lines, key=lambda line: line[key])
        section.blocks.append(Text(f"Kept are the weights after step {best['step']:,}, the best by {key}: "
                                   f"{best[key]:.4g}. After the last step, {lines[-1]['step']:,}, it was "
                                   f"{lines[-1][key]:.4g}."))  # fmt: skip
    for key, name in (("cider", "CIDEr-D"), ("bleu-4", "BLEU-4")):
        svg = save_figure(run, key, curve_figure({name: run.curve(f"validation/{key}")}, "optimizer step", name))
        section.blocks.append(Figure(svg, f"{name} of greedy captions of the validation pictures."))
    keys = ("training/loss", "validation/loss", "validation/bleu-4", "validation/cider")
    section.blocks.append(evaluations_table(run, keys))
    if samples := list(run.lines("samples.jsonl")):
        names = [*dict.fromkeys(line["picture"] for line in samples)]
        tiles = [_tile(validation, validation.names.index(name), name) for name in names]
        said = {(line["step"], line["picture"]): line["caption"] for line in samples}
        steps = [*dict.fromkeys(line["step"] for line in samples)]
        rows = [(step, *(said.get((step, name)) for name in names)) for step in steps]
        what = "Validation pictures, drawn by chance, and what the captioner said of them after each epoch:"
        section.blocks += [Gallery(tiles, what), Table(("step", *names), rows)]
    return section


def _truth_blocks(run: Run, found: CaptionScores) -> list[Any]:
    kinds = [kind for kind in (*KINDS, GRAMMAR) if any(kind in truth.by_kind for truth in found.claims.values())]
    shares = {
        name: {kind: right / there for kind, (right, there) in _by_kind(truth)} for name, truth in found.claims.items()
    }
    rows = [(name, found.claims[name].whole, *(its.get(kind) for kind in kinds)) for name, its in shares.items()]
    bars = {kind: {name: its.get(kind, 0.0) for name, its in shares.items()} for kind in kinds}
    return [
        Text("What is drawn is known, so what captions claim can be judged, each claim for itself:"),
        Table(("captions", "right in everything", *kinds), rows, "Share of claims that are right, by kind."),
        Figure(save_figure(run, "claims", bar_figure(bars, "share of claims that are right", 1.0)),
               "Relations and places are right if they are of things with those shapes and colours."),
    ]  # fmt: skip


def _error_section(found: CaptionScores, pictures: CaptionedPictures, truth: Mapping[str, Scene]) -> Section:
    """Shows the worst captions: those with most wrong claims, or where nobody knows them, least like the true ones."""
    if not truth:
        references = references_of(pictures)
        each = [
            rouge_l(caption_words(caption), those) for caption, those in zip(found.captions, references, strict=True)
        ]
        least = [
            _tile(pictures, place, f"{found.captions[place]}  —  true: {pictures.captions[place][0]}")
            for place in np.argsort(each, kind="stable")[:WORST].tolist()
        ]
        said = (
            "The captions that have least in common with all true ones (ROUGE-L): look for wrong objects, colours, "
            "counts."
        )
        return Section("Errors", [Gallery(least, said)])
    judged = [(place, mistakes(found.captions[place], truth[name])) for place, name in enumerate(pictures.names)]
    wrong = sorted(((place, claims) for place, claims in judged if claims), key=lambda item: -len(item[1]))
    if not wrong:
        return Section("Errors", [Text("None.")])
    counts = Counter(claim.kind for _, claims in wrong for claim in claims)
    worst = []
    for place, claims in wrong[:WORST]:
        listed = ", ".join(f"{claim.said} ({claim.kind})" for claim in claims)
        worst.append(_tile(pictures, place, f"{found.captions[place]}  —  wrong: {listed}"))
    said = f"{len(wrong)} of {len(pictures)} captions claim something that is not so; these claim most of it."
    return Section("Errors", [Table(("wrong claims about", "how many"), counts.most_common()), Gallery(worst, said)])


def _summary(found: CaptionScores) -> str:
    ours, chance = (
        [f"{metrics['bleu-1']:.1f}", f"{metrics['bleu-4']:.1f}", f"{metrics['cider']:.2f}"]
        for metrics in (found.metrics, found.chance)
    )
    said = f"Test captions: BLEU-1 {ours[0]}, BLEU-4 {ours[1]}, CIDEr-D {ours[2]} (true captions of other pictures: " \
           f"{', '.join(chance)})."  # fmt: skip
    if "written" in found.claims:
        said += f" {found.claims['written'].whole:.0%} of them are right in all that they claim."
    return said


def _tile(pictures: CaptionedPictures, place: int, text: str) -> tuple[Image.Image, str]:
    return shown(pictures.image(place)), text


def _by_kind(truth: Truthfulness) -> list[tuple[str, tuple[int, int]]]:
    """Returns the kinds of claims that occur, in the order in which reports show them."""
    return [(kind, truth.by_kind[kind]) for kind in (*KINDS, GRAMMAR) if kind in truth.by_kind]
