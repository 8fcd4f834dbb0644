"""What a report shows of pictures: training data, unseen things that were found, failures, confusions."""

from collections import Counter
from collections.abc import Sequence

from PIL import Image

from labs_common.report import Figure, Gallery, Section, Table, Text, save_figure
from labs_common.report.figures import matrix_figure
from labs_common.run import Run
from zsi_contrastive.detector.drawing import drawn_on
from zsi_contrastive.detector.evaluation import Evaluation, Named, iou, named_objects
from zsi_contrastive.detector.finding import Result
from zsi_contrastive.detector.pictures import InstancePictures
from zsi_contrastive.detector.splits import Split

SHOWN = 9
AT_LEAST = 0.5  # IoU from which a detection is on an object


def data_gallery(pictures: InstancePictures, split: Split) -> Gallery:
    """The first pictures with their annotations."""
    by_image = pictures.part.by_image()
    names = dict(zip(pictures.part.ids(pictures.classes), pictures.classes, strict=True))
    shown = []
    for place in range(min(6, len(pictures))):
        rows = [row for row in by_image.get(pictures.part.images[place]["id"], []) if not row["iscrowd"]]
        said = [names[row["category_id"]] for row in rows]
        shown.append((drawn_on(pictures.image(place), rows, said), ", ".join(dict.fromkeys(said))))
    return Gallery(shown, "Training pictures with what their annotations outline.")


def finding_sections(run: Run, found: Evaluation, split: Split, test: InstancePictures) -> list[Section]:
    """Unseen things that were found, those that were not, and what is taken for what."""
    right, wrong = _looked_at(found, split, test)
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
    """Which class the best detection on each object has, all classes competing."""
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
    rows = [
        (name, sum(said.values()), said[name] / max(1, sum(said.values())),
         ", ".join(f"{other} {count}" for other, count in said.most_common(4)))
        for name, said in taken.items()
    ]  # fmt: skip
    text = f"Of {seen} objects of seen classes {right_seen / max(1, seen):.1%} get their own class." if seen else ""
    return Section(
        "What is taken for what",
        [
            Text(f"For every object the class of the best detection on it (IoU of at least {AT_LEAST}). {text}"),
            Figure(figure, "Objects of each unseen class, and of all seen classes together."),
            Table(("unseen class", "objects", "right", "said most often"), rows),
        ],
    )


def _looked_at(
    found: Evaluation, split: Split, test: InstancePictures
) -> tuple[list[tuple[Image.Image, str]], list[tuple[Image.Image, str]]]:
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
        on = [one for one in by_image.get(row["image_id"], []) if iou(one["bbox"], row["bbox"]) >= AT_LEAST]
        good = any(one["category_id"] == row["category_id"] for one in on)
        key = (row["image_id"], good)
        if key in used or (good and of_class[row["category_id"]] == 2) or len(right if good else wrong) == SHOWN:
            continue
        used.add(key)
        of_class[row["category_id"]] += good
        image = test.image(places[row["image_id"]])
        said = f"{names[row['category_id']]} {row['score']:.2f}"
        drawn = drawn_on(image, [_plain(row)], [said])
        if good:
            right.append((drawn, said))
        else:
            there = ", ".join(dict.fromkeys(names[one["category_id"]] for one in on)) or "no object of a known class"
            wrong.append((drawn, f"{said}; there: {there}"))
        if len(right) == len(wrong) == SHOWN:
            break
    return right, wrong


def _plain(row: Result) -> Result:
    return {key: row[key] for key in ("bbox", "segmentation") if key in row}
