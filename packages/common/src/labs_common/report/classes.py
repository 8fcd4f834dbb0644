"""Sections about pictures with classes: the data, and a classifier's predictions and mistakes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from labs_common.data.classes import LabelledPictures
from labs_common.report.figures import matrix_figure
from labs_common.report.page import Figure, Gallery, Section, Table, Text, save_figure
from labs_common.run import Run

MISTAKES = 12  # as many as a reader looks at


@dataclass(frozen=True)
class Predictions:
    """A classifier's predictions for a split.

    Attributes:
        probabilities: (pictures, classes).
        labels: the true class numbers (pictures,).
    """

    probabilities: np.ndarray
    labels: np.ndarray

    @property
    def said(self) -> np.ndarray:
        """The most probable class of each picture."""
        return self.probabilities.argmax(1)

    @property
    def accuracy(self) -> float:
        """Share of pictures whose most probable class is the true one."""
        return float((self.said == self.labels).mean())

    @property
    def loss(self) -> float:
        """Mean cross-entropy."""
        right = self.probabilities[np.arange(len(self.labels)), self.labels]
        return float(-np.log(np.maximum(right, 1e-30)).mean())  # finite even where 32 bits gave a zero

    def confusion(self) -> np.ndarray:
        """Counts the pictures by true class (rows) and predicted class (columns)."""
        classes = self.probabilities.shape[1]
        return np.bincount(self.labels * classes + self.said, minlength=classes**2).reshape(classes, classes)


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """Returns the 95 % score interval of a share measured on `count` cases (Wilson 1927)."""
    z2 = 1.959963984540054**2  # between minus and plus this lie 95 % of a normal distribution
    middle = share + z2 / (2 * count)
    half = math.sqrt(z2 * (share * (1 - share) / count + z2 / (4 * count**2)))
    return (middle - half) / (1 + z2 / count), (middle + half) / (1 + z2 / count)


def class_data_section(splits: Mapping[str, LabelledPictures]) -> Section:
    """Says where the pictures are from and how many of each class are in each split, and shows one of each class."""
    first = splits["train"]
    rows = [(name, part.source, len(part), part.fingerprint()) for name, part in splits.items()]
    section = Section("Data", [Table(("split", "source", "pictures", "fingerprint"), rows)])
    for part in {part.source: part for part in splits.values() if part.left_out}.values():
        reasons = part.left_out.most_common()
        section.blocks.append(Table(("left out because", "pictures"), reasons, f"Pictures of {part.source} left out."))
        section.blocks.append(Text("First: " + "; ".join(part.examples)))
    counts = {name: np.bincount(part.labels, minlength=len(first.classes)) for name, part in splits.items()}
    by_class = [(name, *(int(count[place]) for count in counts.values())) for place, name in enumerate(first.classes)]
    section.blocks.append(Table(("class", *counts), by_class, "Pictures of each class.", folded=True))
    samples = [
        (first.image(int(np.flatnonzero(first.labels == place)[0])), name)
        for place, name in enumerate(first.classes[:20])
    ]
    section.blocks.append(Gallery(samples, "One training picture of each class, as it is stored."))
    return section


def class_sections(run: Run, test: LabelledPictures, found: Predictions) -> list[Section]:
    """Shows a table of the classes, the confusion matrix, and the most confident mistakes as pictures."""
    confusion, names = found.confusion(), test.classes
    hits, there, said = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    rows = [
        (name, int(there[place]), _share(hits[place], there[place]), _share(hits[place], said[place]))
        for place, name in enumerate(names)
    ]
    matrix = save_figure(run, "confusion", matrix_figure(confusion.tolist(), names, "predicted class", "true class"))
    table = Table(("class", "test pictures", "recall", "precision"), rows)
    figure = Figure(matrix, "Test pictures by true and predicted class; blue was right.")
    sure = found.probabilities.max(1)
    wrong = np.flatnonzero(found.said != found.labels)
    worst = wrong[np.argsort(-sure[wrong], kind="stable")][:MISTAKES].tolist()
    mistakes = [(test.image(place), said_line(names, found, place)) for place in worst]
    caption = f"{len(wrong)} of {len(found.labels)} are wrong; these with the most confidence."
    return [
        Section("Classes", [table, figure]),
        Section("Mistakes", [Gallery(mistakes, caption) if mistakes else Text("None.")]),
    ]


def said_line(names: Sequence[str], found: Predictions, place: int) -> str:
    """Says what a picture was taken for, how surely, and what it is."""
    said = int(found.said[place])
    sure = f"{names[said]} ({found.probabilities[place, said]:.0%})"
    return sure if said == found.labels[place] else f"{sure}, is {names[found.labels[place]]}"


def _share(part: int, whole: int) -> float | None:
    return float(part / whole) if whole else None
