"""results.json and the sections of the report that only this lab has."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from caption_lab.config import DecodingOptions, TrainConfig
from caption_lab.evaluation import Evaluation, Truthfulness, mistakes
from caption_lab.export import FOLDER, Captioner
from caption_lab.fitting import Fitted
from caption_lab.looking import looked_at, word_tiles
from caption_lab.metrics import rouge_l
from caption_lab.published import PUBLISHED, SOURCE
from caption_lab.writing import references_of
from labs_common.cli import to_plain
from labs_common.data import CaptionedPictures
from labs_common.data.described import Captions
from labs_common.progress import console
from labs_common.report import (
    Figure,
    Gallery,
    Section,
    Table,
    Text,
    architecture_figure,
    asked_section,
    bar_figure,
    cost_section,
    curve_figure,
    curves_section,
    rerun_section,
    save_figure,
    trained_section,
    write_report,
)
from labs_common.report.captioned import captioned_data_section, shown
from labs_common.report.structure import structure_of
from labs_common.run import Run, cost_of, machine_of, seconds_between
from labs_common.scenes import Scene
from labs_common.scenes.judging import GRAMMAR, KINDS

SHOWN, LOOKED_AT, WORST = 10, 4, 8
METRICS = {
    "bleu-1": "BLEU-1", "bleu-2": "BLEU-2", "bleu-3": "BLEU-3", "bleu-4": "BLEU-4", "rouge-l": "ROUGE-L",
    "cider": "CIDEr-D", "distinct": "distinct captions", "words used": "words used", "length": "words a caption",
}  # fmt: skip


def finish_report(
    run: Run,
    config: TrainConfig,
    data: Captions,
    captioner: Captioner,
    fitted: Fitted,
    found: Evaluation,
    clock: Mapping[str, float],
) -> None:
    """Writes results.json, captions.json and the report, prints the main numbers and where the report is."""
    seconds = seconds_between(clock)
    test = data.splits["test"]
    run.save_json("captions.json", captions_json(test, found.captions))
    run.save_json("results.json", results_of(run, config, captioner, fitted, found, seconds))
    print_scores(found)
    print(f"model: {run.path / FOLDER}")
    if not config.run.report:
        return
    cost = cost_section(run, "captions", seconds)
    cost.blocks.append(Table(("", ""), [("optimizer state, MiB", fitted.optimizer_bytes / 2**20),
                                        ("features kept on disk, MiB", fitted.cache_bytes / 2**20)]))  # fmt: skip
    sections = [
        asked_section(config),
        captioned_data_section(data),
        _structure_section(run, config, captioner, fitted),
        _curves(run, data.splits["validation"]),
        *evaluation_sections(run, found, test, data.truth, captioner, config.decoding),
        published_section({config.model: found.metrics}, config.data.data),
        cost,
        rerun_section(run),
    ]
    path = write_report(run, f"{config.model} describes pictures", _summary(found), sections)
    print(f"report: {path}")


def print_scores(found: Evaluation) -> None:
    """The main numbers, for the terminal."""
    for name, metrics in (("test captions", found.metrics), ("by chance", found.chance)):
        said = "  ".join(f"{METRICS[key]} {metrics[key]:.3g}" for key in ("bleu-1", "bleu-4", "rouge-l", "cider"))
        console.print(f"{name}: {said}")
    for name, truth in found.claims.items():
        kinds = "  ".join(f"{kind} {right / there:.0%}" for kind, (right, there) in _by_kind(truth))
        console.print(f"{name}: {truth.whole:.0%} of captions right in everything ({kinds})")


def captions_json(pictures: CaptionedPictures, captions: Sequence[str]) -> list[dict[str, str]]:
    """What was written about each picture, as other programs may read it."""
    return [{"image": name, "caption": caption} for name, caption in zip(pictures.names, captions, strict=True)]


def results_of(
    run: Run, config: TrainConfig, captioner: Captioner, fitted: Fitted, found: Evaluation, by_part: Mapping[str, float]
) -> dict[str, Any]:
    """All that a comparison needs of a run: its config, scores, costs, machine and versions."""
    evaluations = [line for line in run.lines("metrics.jsonl") if "validation/loss" in line]
    return {
        "config": to_plain(config),
        "vocabulary": {"words": len(captioner.vocabulary), "length": captioner.vocabulary.length},
        "evaluations": evaluations,
        "test": {"metrics": found.metrics, "chance": found.chance, "pictures": len(found.captions)},
        "claims": {
            name: {"whole": truth.whole, "by kind": {kind: list(pair) for kind, pair in _by_kind(truth)}}
            for name, truth in found.claims.items()
        },
        "cost": {
            **cost_of(run, "captions"),
            "preparation seconds": by_part["prepared"],
            "trained": fitted.parameters["trained"],
            "parameters": fitted.parameters["all"],
            "optimizer bytes": fitted.optimizer_bytes,
            "cache bytes": fitted.cache_bytes,
        },
        "environment": machine_of(run, ("torch", "timm", "accelerate")),
    }


def _structure_section(run: Run, config: TrainConfig, captioner: Captioner, fitted: Fitted) -> Section:
    section = trained_section(fitted.audit)
    model = captioner.model
    model.encoder.train_last(config.encoder.unfreeze, frozen_is_kept=False)  # read back, nothing of it trains
    rows = [*structure_of(model.encoder.network).rows, *structure_of(model.decoder).rows]
    drawing = save_figure(run, "architecture", architecture_figure(rows))
    places = f"{model.encoder.places} {'vector' if model.encoder.pool else 'places'}"
    caption = (
        f"Encoder below, decoder above. The encoder gives {places} of {model.encoder.width} values; "
        f"{fitted.parameters['trained']:,} of {fitted.parameters['all']:,} parameters train; the vocabulary has "
        f"{len(captioner.vocabulary):,} words."
    )
    section.blocks.insert(1, Figure(drawing, caption))
    return section


def _curves(run: Run, validation: CaptionedPictures) -> Section:
    section = curves_section(run, ("training/loss", "validation/loss"))
    lines = [line for line in run.lines("metrics.jsonl") if "validation/cider" in line]
    epochs = [line["step"] for line in lines]
    for key, name in (("cider", "CIDEr-D"), ("bleu-4", "BLEU-4")):
        curve = {name: (epochs, [line[f"validation/{key}"] for line in lines])}
        svg = save_figure(run, key, curve_figure(curve, "optimizer step", name))
        section.blocks.append(Figure(svg, f"{name} of greedy captions of the validation pictures."))
    keys = ("step", "training/loss", "validation/loss", "validation/bleu-4", "validation/cider")
    columns = [key.replace("/", " ") for key in keys]
    section.blocks.append(Table(columns, [[line.get(key) for key in keys] for line in lines], "every evaluation", True))
    samples = list(run.lines("samples.jsonl"))
    if samples:
        place = validation.names.index(samples[0]["picture"])
        picture = (shown(validation.image(place)), samples[0]["picture"])
        section.blocks.append(
            Gallery([picture], "What the captioner said of this validation picture after each epoch:")
        )
        section.blocks.append(Table(("step", "caption"), [(line["step"], line["caption"]) for line in samples]))
    return section


def evaluation_sections(
    run: Run,
    found: Evaluation,
    pictures: CaptionedPictures,
    truth: Mapping[str, Scene],
    captioner: Captioner,
    decoding: DecodingOptions,
) -> list[Section]:
    """Numbers, captions, what was looked at, and what was wrong."""
    numbers = Section("Numbers", [Table(("", *METRICS.values()), [
        ("test captions", *(found.metrics[key] for key in METRICS)),
        ("true captions of other pictures", *(found.chance[key] for key in METRICS)),
    ])])  # fmt: skip
    numbers.blocks.append(Text(
        f"Measured once, on the captioner read back from disk, with --beam {decoding.beam}. The second row is what "
        "somebody would score who writes good sentences without looking. BLEU and ROUGE-L in per cent. METEOR is not "
        "given: version 1.5, which the papers used, exists in Java only, and what Python has gives other numbers."
    ))  # fmt: skip
    if found.claims:
        numbers.blocks += _truth_blocks(run, found)
    spread = np.linspace(0, len(pictures) - 1, min(SHOWN, len(pictures))).round().astype(int)
    gallery = [(shown(pictures.image(int(place))), f"{found.captions[place]}  —  true: {pictures.captions[place][0]}")
               for place in spread]  # fmt: skip
    sections = [numbers, Section("Captions", [Gallery(gallery, "Test pictures, evenly from all of them.")])]
    chosen = [int(place) for place in spread[:: max(1, len(spread) // LOOKED_AT)][:LOOKED_AT]]
    looks = looked_at(captioner, [pictures.image(place) for place in chosen], decoding)
    if looks:
        blocks: list[Any] = [
            Text("The picture under the attention of each word: bright is where the captioner looked when it chose it.")
        ]
        for place, (words, attention) in zip(chosen, looks, strict=True):
            blocks.append(Gallery(word_tiles(pictures.image(place), words, attention), " ".join(words)))
        sections.append(Section("Where it looked", blocks))
    sections.append(error_section(found, pictures, truth, captioner))
    return sections


def _truth_blocks(run: Run, found: Evaluation) -> list[Any]:
    kinds = [kind for kind in (*KINDS, GRAMMAR) if any(kind in truth.by_kind for truth in found.claims.values())]
    rows = []
    for name, truth in found.claims.items():
        cells = [_share(truth.by_kind.get(kind)) for kind in kinds]
        rows.append((name, truth.whole, *cells))
    bars = {
        kind: {name: _share(truth.by_kind.get(kind)) or 0.0 for name, truth in found.claims.items()} for kind in kinds
    }
    return [
        Text("What is drawn is known, so what captions claim can be judged, each claim for itself:"),
        Table(("captions", "right in everything", *kinds), rows, "Share of claims that are right, by kind."),
        Figure(save_figure(run, "claims", bar_figure(bars, "share of claims that are right", 1.0)),
               "Relations and places are right if they are of things with those shapes and colours."),
    ]  # fmt: skip


def error_section(
    found: Evaluation, pictures: CaptionedPictures, truth: Mapping[str, Scene], captioner: Captioner
) -> Section:
    """The worst captions: those with wrong claims where the truth is known, else those least like the true ones."""
    if truth:
        wrong = [(place, mistakes(found.captions[place], truth[name])) for place, name in enumerate(pictures.names)]
        wrong = sorted(((place, claims) for place, claims in wrong if claims), key=lambda item: -len(item[1]))
        counts = Counter(claim.kind for _, claims in wrong for claim in claims)
        worst = [
            (shown(pictures.image(place)),
             f"{found.captions[place]}  —  wrong: {', '.join(f'{claim.said} ({claim.kind})' for claim in claims)}")
            for place, claims in wrong[:WORST]
        ]  # fmt: skip
        said = f"{len(wrong)} of {len(pictures)} captions claim something that is not so; these claim most of it."
        table = Table(("wrong claims about", "how many"), counts.most_common())
        return Section("Errors", [table, Gallery(worst, said)] if worst else [Text("None.")])
    references = references_of(pictures, captioner.vocabulary)
    each = [rouge_l(caption.split(), those) for caption, those in zip(found.captions, references, strict=True)]
    least = np.argsort(each, kind="stable")[:WORST]
    worst = [
        (shown(pictures.image(int(place))), f"{found.captions[place]}  —  true: {pictures.captions[place][0]}")
        for place in least
    ]
    said = (
        "The captions that have least in common with all true ones (ROUGE-L): look for wrong objects, colours, counts."
    )
    return Section("Errors", [Gallery(worst, said)])


def published_section(ours: Mapping[str, Mapping[str, float]], data: str | None) -> Section:
    """Ours beside what the papers report on Flickr8k."""
    keys = ("bleu-1", "bleu-2", "bleu-3", "bleu-4")
    here = data or "drawn scenes, which are much easier: not to be compared"
    rows: list[tuple[Any, ...]] = [
        (name, *(metrics[key] for key in keys), None, f"here, on {here}") for name, metrics in ours.items()
    ]
    rows += [(name, *values, SOURCE) for name, values in PUBLISHED.items()]
    columns = ("model", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "source")
    return Section("Beside the papers", [Table(columns, rows, "Flickr8k, official test pictures, five references.")])


def _summary(found: Evaluation) -> str:
    said = f"Test captions: BLEU-1 {found.metrics['bleu-1']:.1f}, BLEU-4 {found.metrics['bleu-4']:.1f}, CIDEr-D " \
           f"{found.metrics['cider']:.2f} (true captions of other pictures: {found.chance['bleu-1']:.1f}, " \
           f"{found.chance['bleu-4']:.1f}, {found.chance['cider']:.2f})."  # fmt: skip
    if "written" in found.claims:
        said += f" {found.claims['written'].whole:.0%} of them are right in all that they claim."
    return said


def _by_kind(truth: Truthfulness) -> list[tuple[str, tuple[int, int]]]:
    return [(kind, truth.by_kind[kind]) for kind in (*KINDS, GRAMMAR) if kind in truth.by_kind]


def _share(pair: tuple[int, int] | None) -> float | None:
    return pair[0] / pair[1] if pair else None
