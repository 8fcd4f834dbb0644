"""The report's pictures of what was found and what was not, and which class was said for which."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from PIL import Image

from labs_common.report.figures import matrix_figure
from labs_common.report.page import Figure, Gallery, Section, Table, Text, save_figure
from labs_common.run import Run
from zsi_contrastive.detector.annotations import Split
from zsi_contrastive.detector.pictures import InstancePictures
from zsi_contrastive.detector.predict import ON_IT, drawn_on
from zsi_contrastive.detector.protocol import Evaluation, Named, named_objects
from zsi_contrastive.detector.scoring import iou

SHOWN = 9  # pictures of a gallery: three rows of a page


def finding_sections(run: Run, found: Evaluation, split: Split, test: InstancePictures) -> list[Section]:
    """Shows right and wrong detections of unseen classes, and confusions; without picture files only the latter."""
    right, wrong = _best_of_unseen(found, split, test) if test.contents else ([], [])
    sections = []
    if right:
        caption = "Unseen classes alone: the best detections that are right, at most two of a class."
        sections.append(Section("Unseen things that were found", [Gallery(right, caption)]))
    if wrong:
        caption = "The best detections of unseen classes that are wrong; below, what was said and what is there."
        sections.append(Section("Failures", [Gallery(wrong, caption)]))
    sections.append(confusion_section(run, named_objects(test, found.results, split), split, found.bias))
    return sections


def confusion_section(run: Run, named: Sequence[Named], split: Split, bias: float) -> Section:
    """Counts which class the best detection on each object has, all classes competing."""
    names = [*split.unseen, "a seen class", "nothing"]
    counts = [[0] * len(names) for _ in names]

    def row_of(name: str) -> int:
        return names.index(name) if name in names else names.index("a seen class")

    right_seen = seen = 0
    taken: dict[str, Counter[str]] = {name: Counter() for name in split.unseen}
    for thing in named:
        said = thing.said(bias)
        counts[row_of(thing.truth)][row_of(said)] += 1
        if thing.truth in taken:
            taken[thing.truth][said] += 1
        else:
            seen += 1
            right_seen += said == thing.truth
    figure = save_figure(run, "confusion", matrix_figure(counts, names, "said", "is"))
    rows = []
    for name, names_said in taken.items():
        total, most = names_said.total(), ", ".join(f"{other} {count}" for other, count in names_said.most_common(4))
        rows.append((name, total, names_said[name] / max(1, total), most))
    text = f"Of {seen} objects of seen classes {right_seen / max(1, seen):.1%} get their own class." if seen else ""
    blocks: list[Any] = [
        Text(f"For every object the class of the best detection on it (IoU of at least {ON_IT}). {text}"),
        Figure(figure, "Objects of each unseen class, and of all seen classes together."),
        Table(("unseen class", "objects", "right", "said most often"), rows),
    ]
    return Section("Confusions", blocks)


def _best_of_unseen(
    found: Evaluation, split: Split, test: InstancePictures
) -> tuple[list[tuple[Image.Image, str]], list[tuple[Image.Image, str]]]:
    """Draws the best detections of unseen classes, right and wrong ones apart, each picture once among either."""
    part = test.part
    names = dict(zip(part.ids(split.classes), split.classes, strict=True))
    unseen = set(part.ids(split.unseen))
    places = {row["id"]: place for place, row in enumerate(part.images)}
    by_image = part.by_image()
    best = sorted((row for row in found.results if row["category_id"] in unseen), key=lambda row: -row["score"])
    right: list[tuple[Image.Image, str]] = []
    wrong: list[tuple[Image.Image, str]] = []
    of_class: Counter[int] = Counter()
    used: set[tuple[int, bool]] = set()
    for row in best:
        on = [one for one in by_image.get(row["image_id"], []) if iou(one["bbox"], row["bbox"]) >= ON_IT]
        good = any(one["category_id"] == row["category_id"] for one in on)
        key = (row["image_id"], good)
        if key in used or (good and of_class[row["category_id"]] == 2) or len(right if good else wrong) == SHOWN:
            continue
        used.add(key)
        of_class[row["category_id"]] += good
        image = test.image(places[row["image_id"]])
        said = f"{names[row['category_id']]} {row['score']:.2f}"
        drawn = drawn_on(image, [row], [said])
        if good:
            right.append((drawn, said))
        else:
            there = ", ".join(dict.fromkeys(names[one["category_id"]] for one in on)) or "no object of a known class"
            wrong.append((drawn, f"{said}; there: {there}"))
        if len(right) == len(wrong) == SHOWN:
            break
    return right, wrong
