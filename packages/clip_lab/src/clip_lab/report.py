"""results.json and the sections of the report that only this lab has."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from clip_lab.config import EvaluateConfig, TrainConfig
from clip_lab.image import ImageTower
from clip_lab.metrics import AMONG, Evaluation, captions_of
from clip_lab.saved import Loaded
from labs_common.caption_metrics import METRICS, SCORER
from labs_common.cli import to_plain
from labs_common.data.captions import CaptionedPictures, Captions
from labs_common.fitting import Fitted, results_of, write_results
from labs_common.progress import console
from labs_common.report.captions import captioned_data_section, captions_json, example_places
from labs_common.report.figures import curve_figure, heat_figure
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

SHOWN, MATRIX, WORST = 5, 40, 6  # results shown of a caption, pictures of the matrix, errors
RIGHT, WRONG = "#16a34a", "#dc2626"
WAYS = {"text_to_image": "a picture for a caption", "image_to_text": "captions for a picture"}
QUERIES = {"first": "first picture right", "among": "one of the first five right", "chance": "first right by chance"}
PROBED = "Radford et al. 2021, table 10 (CIFAR-10)"
MEASURED = "open_clip's results table (CIFAR-10)"
# Published of the released weights, in per cent: linear probe and zero-shot accuracy on CIFAR-10.
PUBLISHED = {
    "RN50": (88.7, 71.57),
    "RN101": (91.1, 80.78),
    "ViT-B/32": (95.1, 89.83),
    "ViT-B/16": (96.2, 90.77),
    "ViT-L/14": (98.0, 95.59),
}

# Recall@1 in per cent of the same weights on Flickr30k's test: a picture for a caption, captions for a picture.
FLICKR30K = {"RN50": (57.4, 80.0), "ViT-B/32": (58.8, 78.9), "ViT-B/16": (62.2, 82.2), "ViT-L/14": (65.0, 85.2)}
PROTOCOL = (1000, 5000)  # pictures and captions of the tests of Flickr8k and Flickr30k: recall depends on how many


def finish_report(
    run: Run,
    config: TrainConfig,
    data: Captions,
    loaded: Loaded,
    fitted: Fitted,
    found: Evaluation,
    clock: Mapping[str, float],
    before: Evaluation | None = None,
) -> None:
    """Writes results.json and the report, prints the main numbers and where the report is.

    `before` is of the model that training started from.
    """
    seconds, test = seconds_between(clock), data.splits["test"]
    results = results_of(run, config, fitted, "pictures", seconds["prepared"]) | {
        "evaluations": [line for line in run.lines("metrics.jsonl") if "validation/loss" in line],
        "test": {
            "metrics": found.metrics, "chance": found.chance, "pictures": found.ranked, "perplexity": found.perplexity,
            "captions": len(found.of_picture),
        },
        "queries": {
            kind: {"count": queries.count, **{key: getattr(queries, key) for key in QUERIES}}
            for kind, queries in found.queries.items()
        },
    }  # fmt: skip
    results |= _written(run, found, test)
    if before is not None:
        results["before"] = before.metrics
        console.print("before training:")
        print_scores(before)
        console.print("after it:")
    print_scores(found)
    print(f"model: {run.path / FOLDER}")

    def page() -> tuple[str, list[Section]]:
        cost, kept = cost_section(run, "pictures", seconds), fitted.cache_bytes / 2**20
        state = ("optimizer state, MiB", fitted.optimizer_bytes / 2**20)
        cost.blocks.append(Table(("", ""), [state, ("pictures and features on disk, MiB", kept)]))
        return summary_of(found), [
            asked_section(config),
            captioned_data_section(data),
            _structure_section(run, config, loaded, fitted),
            _curves(run),
            numbers_section(found, before=before),
            *written_sections(found, test),
            *query_sections(found, test),
            _matrix_section(run, found),
            *retrieval_sections(found, test),
            cost,
            rerun_section(run),
        ]

    write_results(run, results, config.run.report, f"{config.objective} finds pictures", page)


def finish_evaluation(
    run: Run,
    config: EvaluateConfig,
    checkpoint: str,
    data: Captions,
    found: Evaluation,
    intervals: Mapping[str, tuple[float, float]],
) -> None:
    """Writes results.json and the report of a model on the only split of `data`, and prints the main numbers."""
    ((split, pictures),) = data.splits.items()
    results = {
        "config": to_plain(config), "checkpoint": checkpoint, "pictures": found.ranked,
        "captions": len(found.of_picture), "metrics": found.metrics, "intervals": intervals, "chance": found.chance,
        "perplexity": found.perplexity,
    } | _written(run, found, pictures)  # fmt: skip
    print_scores(found)

    def page() -> tuple[str, list[Section]]:
        said = f"{len(pictures):,} pictures of {pictures.source} ({split}), at most five captions of each."
        sections = [
            asked_section(config),
            Section("Data", [Text(said)]),
            numbers_section(found, intervals),
            published_recall_section(found, checkpoint),
            *written_sections(found, pictures),
            *query_sections(found, pictures),
            _matrix_section(run, found),
            *retrieval_sections(found, pictures),
            rerun_section(run),
        ]
        return summary_of(found), sections

    write_results(run, results, True, f"Evaluation of {checkpoint}", page)


def _written(run: Run, found: Evaluation, test: CaptionedPictures) -> dict[str, Any]:
    """Keeps what the model wrote with the run, and returns its scores for results.json; nothing if it wrote none."""
    said = found.captions
    if said is None:
        return {}
    run.save_json("captions.json", captions_json(test, said.captions))
    right = {name: truth.whole for name, truth in said.claims.items()}
    return {"written": {"metrics": said.metrics, "chance": said.chance, "scorer": SCORER, "right": right}}


def published_recall_section(found: Evaluation, checkpoint: str) -> Section:
    """Puts recall@1 measured here beside that published of released weights, where the test is as large as theirs."""
    ways = [found.metrics[f"{way}/recall@1"] for way in WAYS]
    rows: list[tuple[Any, ...]] = [(f"here, {checkpoint}", *ways, "")]
    rows += [(f"{name} (OpenAI)", *(value / 100 for value in values), "open_clip's results table (Flickr30k)")
             for name, values in FLICKR30K.items()]  # fmt: skip
    if (found.ranked, len(found.of_picture)) != PROTOCOL:
        here = f"these are {found.ranked:,} with {len(found.of_picture):,} in all"
        said = f"Published figures are of 1,000 pictures with five captions each, {here}: not to be compared."
        return Section("Beside published figures", [Text(said)])
    note = "R@1 among 1,000 pictures with five captions each; to be compared where the data is Flickr30k's test."
    return Section("Beside published figures", [Table(("", *WAYS.values(), "source"), rows, note)])


def print_scores(found: Evaluation) -> None:
    """Prints the main numbers to the terminal."""
    for way, said in WAYS.items():
        ours = "  ".join(f"R@{k} {found.metrics[f'{way}/recall@{k}']:.3f}" for k in AMONG)
        chance = "  ".join(f"{found.chance[f'{way}/recall@{k}']:.3f}" for k in AMONG)
        rank, guessed = (metrics[f"{way}/median rank"] for metrics in (found.metrics, found.chance))
        ranks = f"median rank {rank:g} (by chance {guessed:g})"
        console.print(f"{said}, of {found.ranked} pictures: {ours} (by chance {chance})  {ranks}", highlight=False)
    if found.perplexity is not None:
        console.print(f"perplexity of the test captions: {found.perplexity:.2f}")
    if found.captions is not None:
        for name, metrics in (("written captions", found.captions.metrics), ("by chance", found.captions.chance)):
            said = "  ".join(f"{METRICS[key]} {metrics[key]:.3g}" for key in ("bleu-1", "bleu-4", "rouge-l", "cider"))
            console.print(f"{name}: {said}", highlight=False)
    for kind, queries in found.queries.items():
        right = f"first picture right {queries.first:.0%}, one of five {queries.among:.0%}"
        console.print(f"searches for {kind}: {right} (by chance {queries.chance:.1%})")


def _structure_section(run: Run, config: TrainConfig, loaded: Loaded, fitted: Fitted) -> Section:
    """Draws the network and tells what trained."""
    model = loaded.model
    frozen = set(fitted.audit.before)
    for name, parameter in model.named_parameters():  # read back, nothing of it trains
        parameter.requires_grad_(name not in frozen)
    rows = []
    if isinstance(model.image, ImageTower):  # a released network is one, with both towers
        rows += structure_of(model.image.network).rows
        if text := getattr(model, "text", None):
            rows += structure_of(text).rows
    rows += [row for row in structure_of(model).rows if not row.name.startswith(("image", "text"))]
    model.requires_grad_(False)
    caption = (
        f"From below: image tower, text tower, what joins them. {fitted.trained:,} of "
        f"{fitted.parameters:,} parameters train; captions have at most {loaded.words.length} pieces of "
        f"{len(loaded.words):,}."
    )
    if config.image.image_pretrained and isinstance(model.image, ImageTower):
        known = model.image.network.pretrained_cfg
        caption += f" The image tower started from timm's {known['architecture']}.{known['tag']}."
    return drawn_section(run, fitted.audit, rows, caption)


def _curves(run: Run) -> Section:
    """Draws loss, recall and temperature by step, and lists every evaluation."""
    section = curves_section(run, ("training/loss", "validation/loss"))
    ways = [(way, said, k) for way, said in WAYS.items() for k in (1, 10)]
    curves = {f"R@{k}, {said}": run.curve(f"validation/{way}/recall@{k}") for way, said, k in ways}
    if all(steps for steps, _ in curves.values()):
        svg = save_figure(run, "recall", curve_figure(curves, "optimizer step", "recall"))
        section.blocks.append(Figure(svg, "Recall among the validation pictures after each epoch."))
    steps, scales = run.curve("logit_scale")
    if steps:
        curve = {"temperature": (steps, [1 / scale for scale in scales])}
        svg = save_figure(run, "temperature", curve_figure(curve, "optimizer step", "temperature"))
        section.blocks.append(Figure(svg, "The learnt temperature: cosines are divided by it."))
    section.blocks.append(evaluations_table(run))
    return section


def numbers_section(
    found: Evaluation,
    intervals: Mapping[str, tuple[float, float]] | None = None,
    before: Evaluation | None = None,
) -> Section:
    """Shows recall and rank beside those of a random order, and of the model before training; or with intervals."""
    columns = ("", *(f"R@{k}" for k in AMONG), "median rank")
    rows: list[tuple[Any, ...]] = []
    for way, said in WAYS.items():
        then = [(f"{said}, before training", before.metrics)] if before is not None else []
        for name, metrics in ((said, found.metrics), *then, (f"{said}, by chance", found.chance)):
            rows.append((name, *(metrics[f"{way}/recall@{k}"] for k in AMONG), metrics[f"{way}/median rank"]))
        if intervals is not None:
            ends = [intervals[f"{way}/{key}"] for key in (*(f"recall@{k}" for k in AMONG), "median rank")]
            rows.append(("95 % interval", *(f"{low:.3g} to {high:.3g}" for low, high in ends)))
    captions = len(found.of_picture)
    note = (
        f"Measured once, on the model read back from disk, among {found.ranked} test pictures and their {captions:,} "
        "captions. A caption has found its picture if that is among the first k; a picture has found its captions if "
        "any of them is. Captions that are true of several pictures count as wrong with all but their own."
    )
    if intervals is not None:
        note += " Intervals: bootstrap over pictures, each with its captions."
    section = Section("Numbers", [Table(columns, rows), Text(note)])
    if found.perplexity is not None:
        section.blocks.append(Text(f"Perplexity of the test captions with their pictures: {found.perplexity:.2f}."))
    return section


def written_sections(found: Evaluation, test: CaptionedPictures) -> list[Section]:
    """Shows the captions that the model wrote, and their scores beside those of true captions of other pictures."""
    scored = found.captions
    if scored is None:
        return []
    rows = [
        ("written captions", *scored.metrics.values()),
        ("true captions of other pictures", *scored.chance.values()),
    ]
    text = (
        "By beam search of 3, from the picture alone, scored as in caption_lab. The second row is what somebody would "
        "score who writes good sentences without looking. BLEU and ROUGE-L in per cent."
    )
    blocks: list[Any] = [Table(("", *(METRICS[key] for key in scored.metrics)), rows), Text(text)]
    if scored.claims:
        right = [(f"captions {name}", truth.whole) for name, truth in scored.claims.items()]
        blocks.append(Table(("", "right in everything"), right, "What is drawn is known, so claims can be judged."))
    places = example_places(test, 2 * SHOWN)
    tiles = [(shown(test.image(at)), f"{scored.captions[at]}  —  true: {test.captions[at][0]}") for at in places]
    return [Section("Captions that it writes", [*blocks, Gallery(tiles, "Test pictures, evenly from all of them.")])]


def query_sections(found: Evaluation, test: CaptionedPictures) -> list[Section]:
    """Shows searches whose answers are known, because it is known what was drawn."""
    if not found.queries:
        return []
    rows = [
        (kind, queries.count, *(getattr(queries, key) for key in QUERIES)) for kind, queries in found.queries.items()
    ]
    blocks: list[Any] = [
        Text("What is drawn is known, so it can be checked whether what is found is what was asked for:"),
        Table(("sentences about", "how many", *QUERIES.values()), rows),
    ]
    for sentence, places, right in (example for queries in found.queries.values() for example in queries.examples[:2]):
        tiles = [
            (framed(shown(test.image(place)), yes), "right" if yes else test.captions[place][0])
            for place, yes in zip(places, right, strict=True)
        ]
        blocks.append(Gallery(tiles, f"“{sentence}”"))
    return [Section("Searches", blocks)]


def _matrix_section(run: Run, found: Evaluation) -> Section:
    """Draws the cosines of some test pictures with a caption of each."""
    count = min(MATRIX, found.ranked)
    first = [int(np.flatnonzero(found.of_picture == place)[0]) for place in range(count)]
    values = found.similarity[first][:, :count]
    svg = save_figure(run, "similarity", heat_figure(values.tolist(), "picture", "caption of picture"))
    own, others = values.diagonal().mean(), (values.sum() - values.diagonal().sum()) / max(1, count * (count - 1))
    said = (
        f"{count} test pictures with their first captions: {own:.3f} on the diagonal on average, {others:.3f} off it."
    )
    return Section("Similarity of captions and pictures", [Figure(svg, said)])


def retrieval_sections(found: Evaluation, test: CaptionedPictures) -> list[Section]:
    """Shows captions with the pictures that they find, evenly from all; and those whose own picture comes last."""
    captions, _ = captions_of(test, found.ranked)
    own = found.similarity[torch.arange(len(captions)), torch.from_numpy(found.of_picture)]
    ranks = (found.similarity > own[:, None]).sum(1) + 1  # (captions,)
    blocks: list[Any] = [Text("The picture that the caption was written about has a green frame.")]
    for place in np.linspace(0, len(captions) - 1, min(SHOWN, len(captions))).round().astype(int):
        tiles = []
        scores, pictures = found.similarity[place].topk(min(SHOWN, found.ranked))
        for score, picture in zip(scores.tolist(), pictures.tolist(), strict=True):
            image = shown(test.image(picture))
            tiles.append((framed(image, True) if picture == found.of_picture[place] else image, f"{score:.3f}"))
        blocks.append(Gallery(tiles, f"“{captions[place]}” (its picture is number {ranks[place]})"))
    worst = [
        (shown(test.image(int(found.of_picture[place]))), f"{captions[place]} — {rank:,}th of {found.ranked:,}")
        for place, rank in ((place, int(ranks[place])) for place in ranks.argsort(descending=True)[:WORST].tolist())
    ]
    return [
        Section("Captions and what they find", blocks),
        Section("Errors", [Gallery(worst, "Captions whose own picture comes last.")]),
    ]


def summary_of(found: Evaluation) -> str:
    """States the main result in two sentences."""
    metrics, chance = found.metrics, found.chance
    keys = [f"text_to_image/{name}" for name in ("recall@1", "recall@10", "median rank")]
    first, ten, rank = (metrics[key] for key in keys)
    guessed = [chance[key] for key in keys]
    said = (
        f"Among {found.ranked:,} test pictures a caption finds its own first in {first:.1%} of cases and among ten in "
        f"{ten:.1%} (by chance {guessed[0]:.1%} and {guessed[1]:.1%}); its median rank is {rank:g} (by chance "
        f"{guessed[2]:g})."
    )
    related = found.queries.get("two things and their relation")
    if related is not None and related.count:
        said += (
            f" Searches such as “a red circle to the left of a blue square” show a right picture first in "
            f"{related.first:.0%} of cases (by chance {related.chance:.1%})."
        )
    return said


def framed(image: Image.Image, right: bool) -> Image.Image:
    """Frames the picture, of any size, in the colour for right or wrong."""
    copy = image.copy()
    ImageDraw.Draw(copy).rectangle(
        (0, 0, image.width - 1, image.height - 1), outline=RIGHT if right else WRONG, width=4
    )
    return copy


def published_section(ours: Mapping[str, float], checkpoint: str, data: str | None) -> Section:
    """Puts accuracies measured here beside those published for CIFAR-10."""
    here = f"here, {checkpoint} on {data or 'drawn things: not to be compared'}"
    rows: list[tuple[Any, ...]] = [(name, value, here) for name, value in ours.items()]
    rows += [(f"{name}, linear probe", value / 100, PROBED) for name, (value, _) in PUBLISHED.items()]
    rows += [(f"{name}, zero-shot", value / 100, MEASURED) for name, (_, value) in PUBLISHED.items()]
    return Section("Beside published figures", [Table(("", "accuracy", "source"), rows, "CIFAR-10, test pictures.")])
