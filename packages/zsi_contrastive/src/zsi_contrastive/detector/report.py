"""The sections of the report that only the detector has, and what is printed."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from labs_common.fitting import Fitted
from labs_common.progress import console
from labs_common.report.figures import curve_figure
from labs_common.report.page import Figure, Gallery, Section, Table, Text, save_figure
from labs_common.report.sections import (
    asked_section,
    cost_section,
    curves_section,
    drawn_section,
    rerun_section,
    structure_of,
)
from labs_common.run import Run
from zsi_contrastive.detector.annotations import RULES, Split, read_split
from zsi_contrastive.detector.columns import neighbours
from zsi_contrastive.detector.config import TrainConfig
from zsi_contrastive.detector.data import ZeroShotData
from zsi_contrastive.detector.findings import finding_sections
from zsi_contrastive.detector.model import ZeroShotMaskRCNN
from zsi_contrastive.detector.pictures import InstancePictures
from zsi_contrastive.detector.predict import ON_IT, drawn_on
from zsi_contrastive.detector.protocol import Evaluation

COLUMNS = ("recall@0.4", "recall@0.5", "recall@0.6", "ap@0.4", "ap@0.5", "ap@0.6", "ap")
HEADINGS = ("R@100, 0.4", "R@100, 0.5", "R@100, 0.6", "AP 0.4", "AP 0.5", "AP 0.6", "AP 0.5:0.95")
NAMED = {  # columns of a sweep
    "named seen": "named, seen",
    "named unseen": "named, unseen",
    "named harmonic mean": "named, harmonic mean",
    "seen": "AP 0.5, seen",
    "unseen": "AP 0.5, unseen",
    "harmonic mean": "AP 0.5, harmonic mean",
}
VAL2014 = 40_504  # pictures of COCO's val2014, whose files are all called so:
VAL2014_NAME = "COCO_val2014_"
# ZSI of Zheng et al., CVPR 2021, by split: val2014, ResNet-101. The boxes of 48/17 are what the authors' result file
# scores; the others were quoted from memory.
LITERATURE: dict[str, dict[str, tuple[float | None, ...]]] = {  # in the order of COLUMNS
    "48_17": {
        "box": (0.574, 0.539, 0.483, 0.125, 0.114, 0.099, None),
        "mask, unverified": (0.503, 0.449, 0.387, None, 0.090, None, None),
    },
    "65_15": {
        "box, unverified": (0.619, 0.589, 0.544, None, 0.136, None, None),
        "mask, unverified": (0.558, 0.500, 0.429, None, 0.105, None, None),
    },
}


def training_sections(
    run: Run,
    config: TrainConfig,
    data: ZeroShotData,
    model: ZeroShotMaskRCNN,
    fitted: Fitted,
    found: Evaluation,
    results: Mapping[str, Any],
    seconds: Mapping[str, float],
) -> list[Section]:
    """Makes all sections of a training's report; `model` was read back from disk, `results` are results.json."""
    spent = cost_section(run, "pictures", seconds)
    spent.blocks.append(Table(("", ""), list(results["cost"].items())))
    for name, parameter in model.named_parameters():  # read back, nothing of it trains
        parameter.requires_grad_(name not in fitted.audit.before)
    parts = structure_of(model).rows
    test = data.pictures["test"]
    return [
        asked_section(config),
        data_section(data),
        words_section(data),
        drawn_section(run, fitted.audit, parts, "From below: backbone with its pyramid, proposals, regions."),
        _curves(run),
        *measured_sections(run, found, data.split, test),
        *finding_sections(run, found, data.split, test),
        spent,
        rerun_section(run),
    ]


def summary_of(found: Evaluation) -> str:
    """States the main numbers in two sentences."""
    parts = [f"{kind} {scores['ap@0.5']:.3f}" for kind, scores in found.zsi.items()]
    chance = next(iter(found.others.items()), None)
    beside = f" ({chance[0]}: box {chance[1]['ap@0.5']:.3f})" if chance and chance[0].startswith("random") else ""
    both, mixed = (  # of boxes, or of masks where a file has these alone
        ", ".join(f"{name} {scores['ap@0.5']:.3f}" for name, scores in next(iter(parts.values())).items())
        for parts in (found.gzsi, found.one_list)
    )
    note = f"Note: {found.note}. " if found.note else ""
    named = ", ".join(f"{name} {line['named harmonic mean']:.3f}" for name, line in found.named.items())
    said = f" Objects that get their name, harmonic mean: {named}." if named else ""
    return (
        f"{note}Unseen classes alone: AP at 0.5 {', '.join(parts)}{beside}. Beside seen classes, each kind cut apart: "
        f"{both}. In one list of both: {mixed}.{said}"
    )


def lost_objects(found: Evaluation) -> str:
    """Says in a sentence whether unseen objects are missed or misnamed."""
    line = found.proposals["unseen"]
    if not line["objects"]:
        return "No test picture shows an unseen object."
    shares = ", ".join(f"{line[name]:.1%} {name}" for name in ("named", "misnamed", "dropped", "not proposed"))
    return f"Of {line['objects']} objects of unseen classes {shares}."


def print_scores(found: Evaluation) -> None:
    """Prints the main numbers, a line each."""
    for note in filter(None, (found.note, found.peer)):
        console.print(f"note: {note}")
    for kind, scores in found.zsi.items():
        console.print(f"unseen alone, {kind}: {_line(scores)}")
    for name, scores in found.others.items():
        console.print(f"unseen alone, box, {name}: {_line(scores)}")
    if found.proposals:
        console.print(lost_objects(found))
    for task, kinds in (("apart", found.gzsi), ("in one list", found.one_list)):
        for kind, parts in kinds.items():
            said = ", ".join(f"{name} {scores['ap@0.5']:.3f}" for name, scores in parts.items())
            console.print(f"seen and unseen {task}, {kind}, AP at 0.5: {said}")
    for name, line in found.named.items():
        shares = [f"{kind} {line[f'named {kind}']:.3f}" for kind in ("seen", "unseen", "harmonic mean")]
        console.print(f"objects that get their name, {name}: {', '.join(shares)}")
    for kind, line in found.presence.items():
        console.print(
            f"{kind} words, there from a score of {line['threshold']:.3f}: found {line['found']:.3f} of those there, "
            f"refused {line['refused']:.3f} of others"
        )


def measured_sections(run: Run, found: Evaluation, split: Split, test: InstancePictures) -> list[Section]:
    """Makes the tables of both tasks, the curve of the bias, and the table of each class."""
    rows: list[Sequence[Any]] = [("unseen alone (ZSI)", kind, *_cells(scores)) for kind, scores in found.zsi.items()]
    rows += [(f"ZSI, {name}", "box", *_cells(scores)) for name, scores in found.others.items()]
    for task, kinds in (("GZSI, kinds apart", found.gzsi), ("one list of all classes", found.one_list)):
        for kind, parts in kinds.items():
            rows += [(f"{task}: {name}", kind, *_cells(scores)) for name, scores in parts.items()]
    note = (
        f"{len(test)} test pictures. Recall and AP are means over the classes that have objects there, as COCO does "
        "it, with the best 100 of each class in a picture. ZSI is of the pictures with an unseen object. GZSI is "
        "counted as in the published code: seen and unseen classes are suppressed and cut apart, so that unseen ones "
        "score what they do alone. In one list all classes compete for the places of a picture, with "
        f"{found.bias:g} taken from the scores of seen ones."
    )
    if found.peer:
        note += f" {found.peer}."
    if found.note:
        note = f"Note: {found.note}. {note}"
    sections = [Section("Numbers", [Text(note), Table(("task", "", *HEADINGS), rows)])]
    if split.name in LITERATURE:
        theirs = [("published (ZSI)", kind, *values) for kind, values in LITERATURE[split.name].items()]
        said = (
            "Zheng et al. 2021, ResNet-101: not measured here. What is marked as unverified was quoted from memory; "
            "the boxes of 48/17 are the scores of the authors' result file."
        )
        if reason := found.note or unlike_published(split, test):
            blocks: list[Any] = [
                Text(f"Not to be compared with the numbers above: {reason}."),
                Table(("task", "", *HEADINGS), theirs),
            ]
            sections.append(Section("Published, not to be compared", [*blocks, Text(said)]))
        else:
            rows += theirs
            sections[0].blocks.append(Text(said))
    if found.proposals:
        rows = [(f"{kind} classes", *line.values()) for kind, line in found.proposals.items()]
        said = (
            f"{lost_objects(found)} R@100 is the share of objects on which one of a picture's best 100 proposals lies "
            f"(IoU {ON_IT}), whatever it is called; a small network has no more. Dropped: proposed, but no detection "
            "on it scored enough or survived suppression."
        )
        columns = ("objects of", *(name.replace("recall", "R") for name in next(iter(found.proposals.values()))))
        sections.append(Section("Where objects are lost", [Text(said), Table(columns, rows)]))
    swept = [_named_section(found), _sweep_section(run, found)] if found.sweep else []
    return [*sections, *swept, _class_section(found)]


def unlike_published(split: Split, test: InstancePictures) -> str:
    """Says why figures cannot stand beside published ones of the split; empty if classes and pictures are the same."""
    part = test.part
    if split != read_split(split.name):
        return f"the classes are not those of the published split {split.name}"
    names = (row["file_name"].rpartition("/")[2] for row in part.images)
    if part.file_pictures != VAL2014 or not all(name.startswith(VAL2014_NAME) for name in names):
        return f"they are of all test pictures of COCO's val2014, and {part.source} is not its file"
    unseen = set(part.ids(split.unseen))
    if {row["id"] for row in part.images} != {
        row["image_id"] for row in part.annotations if row["category_id"] in unseen
    }:
        return "they are of pictures with an unseen object alone, which not all of these show"
    if len(test) < part.part_pictures:
        return (
            f"they are of all {part.part_pictures} test pictures, of which {len(test)} were looked at here (take "
            "--validation-fraction 0 and --limit 0)"
        )
    return ""


def data_section(data: ZeroShotData) -> Section:
    """Says where the pictures are from and how many the rule leaves, and shows some of them."""
    rows = [(name, part.source, len(part), len(part.part.annotations)) for name, part in data.pictures.items()]
    blocks: list[Any] = [
        Text(
            f"Training pictures show at least one object of a seen class; {RULES[data.protocol]}. Some test pictures "
            "may be set aside for validation."
        ),
        Table(("part of the rule", "pictures", "objects", "crowds"), data.counts),
        Table(("used", "annotations", "pictures", "objects and crowds"), rows),
    ]
    section = Section("Data", blocks)
    for name, part in data.pictures.items():
        if part.left_out and name in ("train", "test"):
            left = list(part.left_out.items())
            section.blocks.append(Table((f"left out, {name}", "how many"), left))
    section.blocks.append(data_gallery(data.pictures["train"]))
    return section


def words_section(data: ZeroShotData) -> Section:
    """Says what the classes are known by, and which classes are near each unseen one."""
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
    blocks = [Text(" ".join([said, *(f"Note: {note}." for note in vectors.notes)]))]
    return Section("Words", [*blocks, Table(("unseen class", "most similar classes, with cosines"), rows)])


def _named_section(found: Evaluation) -> Section:
    rows = [
        (f"{name} ({line['bias']:g})", *(_shown(line[column]) for column in NAMED))
        for name, line in found.named.items()
    ]
    blocks: list[Any] = [
        Text(
            f"The share of objects for which the best detection on it (IoU of at least {ON_IT}) has the right class, "
            "all classes competing, and AP at 0.5 of boxes in one list of all classes. The bias is taken from seen "
            "scores; validation pictures choose it, by the harmonic mean of what is named."
        ),
        Table(("", *NAMED.values()), rows),
    ]
    if found.presence:
        said = (
            "Is a word there? Its best score in a picture is compared with a threshold that validation pictures chose, "
            "whose distractors are the classes that a picture does not show. On the test pictures:"
        )
        kinds = [(kind, *(_shown(value) for value in line.values())) for kind, line in found.presence.items()]
        blocks += [Text(said), Table(("words", "threshold", "of those there, found", "of others, refused"), kinds)]
    return Section("Named, and there or not", blocks)


def _sweep_section(run: Run, found: Evaluation) -> Section:
    by_bias = {name: sorted(lines, key=lambda line: line["bias"]) for name, lines in found.sweep.items()}
    curves = {
        f"{what}, {name}": ([line[f"{prefix}seen"] for line in lines], [line[f"{prefix}unseen"] for line in lines])
        for name, lines in by_bias.items()
        for what, prefix in (("AP", ""), ("named", "named "))
    }
    drawn = save_figure(run, "seen_unseen", curve_figure(curves, "seen classes", "unseen classes"))
    blocks: list[Any] = [
        Figure(
            drawn,
            "What is gained for unseen classes and lost for seen ones by taking a bias from seen scores. AP at 0.5 "
            "ranks the detections of each class among themselves: a bias moves it only through the cut at 100 a "
            "picture. Named: the share of objects for which the best detection on it (IoU 0.5) has the right class.",
        )
    ]
    columns = ("bias", "seen", "unseen", "harmonic mean", "named seen", "named unseen", "named harmonic mean")
    for name, lines in by_bias.items():
        rows = [tuple(line[column] for column in columns) for line in lines]
        blocks.append(Table(columns, rows, f"{name}: every bias", folded=True))
    return Section("Seen–unseen trade-off", blocks)


def _class_section(found: Evaluation) -> Section:
    kinds = list(found.zsi)
    shown = {f"AP 0.5, {kind}": (f"{kind} gzsi", "ap@0.5") for kind in kinds}
    shown |= {f"R@100, {kind}": (f"{kind} gzsi", "recall@0.5") for kind in kinds}
    shown |= {f"AP 0.5 in one list, {kind}": (f"{kind} one list", "ap@0.5") for kind in kinds}
    rows = []
    for line in sorted(found.classes, key=lambda line: line["seen"]):
        cells = [_shown(line[task][name]) for task, name in shown.values()]
        rows.append((line["class"], "seen" if line["seen"] else "unseen", line["objects"], *cells))
    caption = "every class: kinds apart, and all in one list"
    return Section("Classes", [Table(("class", "", "objects", *shown), rows, caption, folded=True)])


def _curves(run: Run) -> Section:
    section = curves_section(run, ())
    first = next((line for line in run.lines("metrics.jsonl") if "loss" in line), {})
    names = [name for name in first if name.endswith("_loss")]
    parts = {name.removesuffix("_loss").replace("_", " "): run.curve(name) for name in names}
    drawn = save_figure(run, "losses", curve_figure(parts, "optimizer step", "loss", log_up=True))
    section.blocks.insert(1, Figure(drawn, "The parts of the loss."))
    found = {name: run.curve(f"validation/{name}_ap50") for name in ("seen", "unseen")}
    drawn = save_figure(run, "validation", curve_figure(found, "optimizer step", "AP at 0.5, boxes"))
    section.blocks.insert(0, Figure(drawn, "Boxes on validation pictures, each kind of class looked for alone."))
    return section


def data_gallery(pictures: InstancePictures) -> Gallery:
    """Shows the first pictures with their annotations."""
    names = dict(zip(pictures.part.ids(pictures.classes), pictures.classes, strict=True))
    shown = []
    for place in range(min(6, len(pictures))):
        rows = [row for row in pictures.part.of_image(pictures.part.images[place]["id"]) if not row["iscrowd"]]
        said = [names[row["category_id"]] for row in rows]
        shown.append((drawn_on(pictures.image(place), rows, said), ", ".join(dict.fromkeys(said))))
    return Gallery(shown, "Training pictures with what their annotations outline.")


def _cells(scores: Mapping[str, float]) -> list[float | None]:
    return [_shown(scores[name]) for name in COLUMNS]


def _shown(value: float) -> float | None:
    return None if math.isnan(value) else value


def _line(scores: Mapping[str, float]) -> str:
    return f"AP at 0.5 {scores['ap@0.5']:.3f}, recall@100 at 0.5 {scores['recall@0.5']:.3f}"
