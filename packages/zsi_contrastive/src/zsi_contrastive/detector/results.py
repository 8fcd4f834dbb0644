"""results.json and the sections of the report that only this lab has."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from labs_common.cli import to_plain
from labs_common.progress import console
from labs_common.report import (
    Figure,
    Section,
    Table,
    Text,
    architecture_figure,
    asked_section,
    cost_section,
    curve_figure,
    curves_section,
    rerun_section,
    save_figure,
    trained_section,
    write_report,
)
from labs_common.report.structure import structure_of
from labs_common.run import Run, cost_of, machine_of, seconds_between
from zsi_contrastive.detector.columns import neighbours
from zsi_contrastive.detector.config import TrainConfig
from zsi_contrastive.detector.data import ZeroShotData
from zsi_contrastive.detector.evaluation import Evaluation
from zsi_contrastive.detector.fitting import Fitted
from zsi_contrastive.detector.galleries import data_gallery, finding_sections
from zsi_contrastive.detector.pictures import InstancePictures
from zsi_contrastive.detector.published import PUBLISHED
from zsi_contrastive.detector.splits import Split
from zsi_contrastive.detector.stored import FOLDER, Loaded

COLUMNS = ("recall@0.4", "recall@0.5", "recall@0.6", "ap@0.4", "ap@0.5", "ap@0.6", "ap")
HEADINGS = ("R@100, 0.4", "R@100, 0.5", "R@100, 0.6", "AP 0.4", "AP 0.5", "AP 0.6", "AP 0.5:0.95")


def finish_report(
    run: Run,
    config: TrainConfig,
    data: ZeroShotData,
    loaded: Loaded,
    fitted: Fitted,
    found: Evaluation,
    clock: Mapping[str, float],
) -> None:
    """Writes results.json, the detections and the report, and prints the main numbers."""
    seconds = seconds_between(clock)
    write_findings(run, found)
    cost = {
        **cost_of(run, "pictures"),
        "trained": fitted.parameters["trained"],
        "parameters": fitted.parameters["all"],
        "optimizer bytes": fitted.optimizer_bytes,
    }
    machine = machine_of(run, ("torch", "torchvision", "timm", "accelerate"))
    run.save_json(
        "results.json", {"config": to_plain(config), "test": found.plain(), "cost": cost, "environment": machine}
    )
    print_scores(found)
    print(f"model: {run.path / FOLDER}")
    if not config.run.report:
        return
    test = data.pictures["test"]
    spent = cost_section(run, "pictures", seconds)
    spent.blocks.append(Table(("", ""), list(cost.items())))
    for name, parameter in loaded.model.named_parameters():  # read back, nothing of it trains
        parameter.requires_grad_(name not in fitted.audit.before)
    structure = structure_of(loaded.model)
    trained = trained_section(fitted.audit)
    caption = "From below: backbone with its pyramid, proposals, regions."
    trained.blocks.insert(1, Figure(save_figure(run, "architecture", architecture_figure(structure.rows)), caption))
    sections = [
        asked_section(config),
        data_section(data),
        words_section(data),
        trained,
        _curves(run),
        *measured_sections(run, found, data.split, test),
        *finding_sections(run, found, data.split, test),
        spent,
        rerun_section(run),
    ]
    path = write_report(run, "Zero-shot instance segmentation", summary_of(found), sections)
    print(f"report: {path}")


def write_findings(run: Run, found: Evaluation) -> None:
    """COCO's result JSON of all that was found: the best of the seen and of the unseen classes in every picture."""
    run.save_json("detections.json", found.results)


def summary_of(found: Evaluation) -> str:
    """The main numbers in a sentence."""
    parts = [f"{kind} {scores['ap@0.5']:.3f}" for kind, scores in found.zsi.items()]
    chance = next(iter(found.others.items()), None)
    beside = f" ({chance[0]}: box {chance[1]['ap@0.5']:.3f})" if chance and chance[0].startswith("random") else ""
    both = found.gzsi["box"]
    return (
        f"Unseen classes alone: AP at 0.5 {', '.join(parts)}{beside}. Among all classes: seen "
        f"{both['seen']['ap@0.5']:.3f}, unseen {both['unseen']['ap@0.5']:.3f}, harmonic mean "
        f"{both['harmonic mean']['ap@0.5']:.3f}."
    )


def print_scores(found: Evaluation) -> None:
    """The main numbers, a line each."""
    for kind, scores in found.zsi.items():
        console.print(f"unseen alone, {kind}: {_line(scores)}")
    for name, scores in found.others.items():
        console.print(f"unseen alone, box, {name}: {_line(scores)}")
    for kind, parts in found.gzsi.items():
        said = ", ".join(f"{name} {scores['ap@0.5']:.3f}" for name, scores in parts.items())
        console.print(f"seen and unseen, {kind}, AP at 0.5: {said}")


def measured_sections(run: Run, found: Evaluation, split: Split, test: InstancePictures) -> list[Section]:
    """The tables of both tasks, the curve of the bias, and each class."""
    rows: list[Sequence[Any]] = [("unseen alone (ZSI)", kind, *_cells(scores)) for kind, scores in found.zsi.items()]
    rows += [(f"ZSI, {name}", "box", *_cells(scores)) for name, scores in found.others.items()]
    for kind, parts in found.gzsi.items():
        rows += [(f"together (GZSI), {name}", kind, *_cells(scores)) for name, scores in parts.items()]
    note = (
        f"{len(test)} test pictures. Recall and AP are means over the classes that have objects there, as COCO does "
        "it, with the best 100 of each picture. Unseen classes alone: no class of training competes. Together: all "
        f"classes compete for these 100, with {found.bias:g} taken from the scores of seen ones."
    )
    section = Section("Numbers", [Text(note), Table(("task", "", *HEADINGS), rows)])
    if split.name in PUBLISHED:
        beside = [(kind, *(values.get(name) for name in COLUMNS)) for kind, values in PUBLISHED[split.name].items()]
        said = "Zheng et al. 2021, ResNet-101, all of COCO's pictures of 2014: as cited, not measured here."
        section.blocks.append(Table(("published (ZSI)", *HEADINGS), beside, said))
    return [section, *([_sweep_section(run, found)] if found.sweep else []), _class_section(found)]


def data_section(data: ZeroShotData) -> Section:
    """Where the pictures are from, how many the rule leaves, and some of them."""
    rows = [(name, part.source, len(part), len(part.part.annotations)) for name, part in data.pictures.items()]
    blocks: list[Any] = [
        Text("Training pictures show at least one object of a seen class and none of an unseen one. Test pictures show "
             "an unseen object; some of them are set aside for validation."),
        Table(("part of the rule", "pictures", "objects", "crowds"), data.counts),
        Table(("used", "annotations", "pictures", "objects and crowds"), rows),
    ]  # fmt: skip
    section = Section("Data", blocks)
    for name, part in data.pictures.items():
        if part.left_out and name in ("train", "test"):
            left = list(part.left_out.items())
            section.blocks.append(Table((f"left out, {name}", "how many"), left))
    section.blocks.append(data_gallery(data.pictures["train"], data.split))
    return section


def words_section(data: ZeroShotData) -> Section:
    """What the classes are known by, and which classes are near each unseen one."""
    vectors, split = data.vectors, data.split
    near = neighbours(vectors.classes, split.classes)
    rows = [
        (name, ", ".join(f"{other} {cosine:.2f}" for other, cosine in near[len(split.seen) + place]))
        for place, name in enumerate(split.unseen)
    ]
    length = vectors.seen.shape[1]
    said = (
        f"{len(split.seen)} seen and {len(split.unseen)} unseen classes, {length} values each, from {vectors.source}."
    )
    blocks = [Text(" ".join([said, *(f"Note: {note}." for note in data.notes)]))]
    return Section("Words", [*blocks, Table(("unseen class", "most similar classes, with cosines"), rows)])


def _sweep_section(run: Run, found: Evaluation) -> Section:
    curves = {
        f"{what}, {name}": ([line[f"{prefix}seen"] for line in lines], [line[f"{prefix}unseen"] for line in lines])
        for name, lines in found.sweep.items()
        for what, prefix in (("AP", ""), ("named", "named "))
    }
    drawn = save_figure(run, "seen_unseen", curve_figure(curves, "seen classes", "unseen classes"))
    blocks: list[Any] = [
        Figure(
            drawn,
            "What is gained for unseen classes and lost for seen ones by taking a bias from seen scores. AP at 0.5 "
            "ranks the detections of each class among themselves: a bias moves it only through the cut at 100 a "
            "picture. Named: the share of objects for which the best detection on it (IoU 0.5) has the right class.",
        ),
    ]
    if "validation" in found.sweep:
        best = max(found.sweep["validation"], key=lambda line: _or_zero(line["named harmonic mean"]))
        at = next(line for line in found.sweep["test"] if line["bias"] == best["bias"])
        none = found.sweep["test"][0]
        blocks.append(
            Text(f"On validation pictures a bias of {best['bias']:g} names best. On the test pictures it changes the "
                 f"harmonic mean of named objects from {none['named harmonic mean']:.3f} to "
                 f"{at['named harmonic mean']:.3f}, and that of AP from {none['harmonic mean']:.3f} to "
                 f"{at['harmonic mean']:.3f}. Use it with --seen-bias {best['bias']:g}.")
        )  # fmt: skip
    columns = ("bias", "seen", "unseen", "harmonic mean", "named seen", "named unseen", "named harmonic mean")
    for name, lines in found.sweep.items():
        rows = [tuple(line[column] for column in columns) for line in lines]
        blocks.append(Table(columns, rows, f"{name}: every bias", folded=True))
    return Section("Seen against unseen", blocks)


def _class_section(found: Evaluation) -> Section:
    kinds = list(found.zsi)
    columns = ["class", "", "objects", *(f"AP 0.5, {kind}" for kind in kinds), *(f"R@100, {kind}" for kind in kinds),
               *(f"AP 0.5 alone, {kind}" for kind in kinds)]  # fmt: skip
    rows = []
    for line in sorted(found.classes, key=lambda line: line["seen"]):
        alone = [_shown(line[f"{kind} zsi"]["ap@0.5"]) if f"{kind} zsi" in line else None for kind in kinds]
        rows.append((
            line["class"], "seen" if line["seen"] else "unseen", line["objects"],
            *(_shown(line[f"{kind} gzsi"]["ap@0.5"]) for kind in kinds),
            *(_shown(line[f"{kind} gzsi"]["recall@0.5"]) for kind in kinds), *alone,
        ))  # fmt: skip
    return Section("Classes", [Table(columns, rows, "every class, together with all others and alone", folded=True)])


def _curves(run: Run) -> Section:
    section = curves_section(run, ())
    lines = list(run.lines("metrics.jsonl"))
    names = [name for name in next((line for line in lines if "loss" in line), {}) if name.endswith("_loss")]
    training = [line for line in lines if "loss" in line]
    steps = [line["step"] for line in training]
    parts = {name.removesuffix("_loss").replace("_", " "): (steps, [line[name] for line in training]) for name in names}
    drawn = save_figure(run, "losses", curve_figure(parts, "optimizer step", "loss", log_up=True))
    section.blocks.insert(1, Figure(drawn, "The parts of the loss."))
    points = [line for line in lines if "validation/seen_ap50" in line]
    found = {
        name: ([line["step"] for line in points], [line[f"validation/{key}"] for line in points])
        for name, key in (("seen", "seen_ap50"), ("unseen", "unseen_ap50"))
    }
    drawn = save_figure(run, "validation", curve_figure(found, "optimizer step", "AP at 0.5, boxes"))
    section.blocks.insert(0, Figure(drawn, "Boxes on validation pictures, each kind of class looked for alone."))
    return section


def _cells(scores: Mapping[str, float]) -> list[float | None]:
    return [_shown(scores[name]) for name in COLUMNS]


def _shown(value: float) -> float | None:
    return None if math.isnan(value) else value


def _or_zero(value: float) -> float:
    return 0.0 if math.isnan(value) else value


def _line(scores: Mapping[str, float]) -> str:
    return f"AP at 0.5 {scores['ap@0.5']:.3f}, recall@100 at 0.5 {scores['recall@0.5']:.3f}"
