"""What validation pictures choose, and which words are there."""

import json

import numpy as np
import pytest

from zsi_contrastive.detector.annotations import CLASSES, Instances, Split, coco_groups
from zsi_contrastive.detector.calibration import (
    best_threshold,
    calibrated,
    presence,
    rules_of,
    words_there,
)
from zsi_contrastive.detector.options import DetectionOptions
from zsi_contrastive.detector.predict import class_of
from zsi_contrastive.detector.protocol import shuffled_names

pytestmark = pytest.mark.quick

SPLIT = Split("mine", ("cat", "dog"), ("elf",))
NAMES = [{"id": number, "name": name} for name, number in (("cat", 3), ("dog", 17), ("elf", 44))]
IMAGES = [{"id": number, "file_name": f"{number}"} for number in (10, 11, 12)]


def picture(number: int, *categories: int, crowd: int = 0) -> list[dict[str, int]]:
    return [{"image_id": number, "category_id": one, "iscrowd": crowd} for one in categories]


TRUTH = Instances("x", NAMES, IMAGES, [*picture(10, 3, 3), *picture(11, 17, 44), *picture(12, 3, crowd=1)])
FOUND = [
    {"image_id": image, "category_id": category, "score": score}
    for image, category, score in (
        (10, 3, 0.9), (10, 3, 0.4), (10, 17, 0.5), (10, 44, 0.2),
        (11, 17, 0.6), (11, 3, 0.3), (11, 44, 0.1),
        (12, 3, 0.7), (12, 44, 0.05),
    )
]  # fmt: skip
SWEEP = [
    {"bias": bias, "named harmonic mean": value} for bias, value in ((0.0, 0.1), (0.1, 0.3), (0.2, 0.3), (0.3, 0.0))
]


def test_best_scores_of_words_that_are_there_and_of_distractors() -> None:
    scores, there = words_there(TRUTH, FOUND, [3, 17, 44])
    assert scores.tolist() == [[0.9, 0.5, 0.2], [0.3, 0.6, 0.1], [0.7, 0.0, 0.05]]
    assert there.tolist() == [[True, False, False], [False, True, True], [True, False, False]], "a crowd is there"


def test_the_threshold_is_the_best_of_all() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        absent, there = np.round(generator.beta(2, 4, 40), 2), np.round(generator.beta(4, 2, 9), 2)
        said = best_threshold(there, absent)

        def accuracy(at: float, there: np.ndarray = there, absent: np.ndarray = absent) -> float:
            return float((there >= at).mean() + (absent < at).mean())

        assert accuracy(said) == pytest.approx(max(accuracy(at) for at in np.arange(1, 101) / 100))
    assert best_threshold(np.zeros(3), np.zeros(3)) == 1.0, "nothing was found: no word is there"


def test_a_calibration_and_what_it_gives() -> None:
    chosen = calibrated(TRUTH, FOUND, SPLIT, SWEEP, rules_of(DetectionOptions(transfer="direct")))
    assert chosen.seen_bias == 0.1, "the smallest of the best"
    assert chosen.thresholds == {"seen": 0.6, "unseen": 0.1}
    assert chosen.rules["transfer"] == "direct"
    measured = presence(TRUTH, FOUND, SPLIT, chosen)
    assert measured["seen"] == {"threshold": 0.6, "found": 1.0, "refused": 1.0}
    assert measured["unseen"] == {"threshold": 0.1, "found": 1.0, "refused": 0.5}
    none = calibrated(TRUTH, FOUND, SPLIT, SWEEP[-1:], {})
    assert none.seen_bias is None, "no bias names anything"
    assert "unseen" not in calibrated(Instances("x", NAMES, IMAGES, picture(10, 3)), FOUND, SPLIT, SWEEP, {}).thresholds


def test_words_for_a_class() -> None:
    coco = tuple(name for names in coco_groups().values() for name in names)
    for word, name in {
        "Television": "tv", "TV": "tv", "cellphone": "cell phone", "mobile phone": "cell phone", "Cell-Phone": "cell phone",
        "plane": "airplane", "aeroplane": "airplane", "sofa": "couch", "Motorbike": "motorcycle", "hot_dog": "hot dog",
        "fridge": "refrigerator", "unicorn": None, "": None,
    }.items():  # fmt: skip
        assert class_of(word, coco) == name, word
    assert class_of("tv", ("Television", "elf")) == "Television", "also where the classes have the other name"
    assert class_of("sofa", ("elf",)) is None
    synonyms = json.loads((CLASSES / "synonyms.json").read_text())["synonyms"]
    words = [word for others in synonyms.values() for word in others]
    assert len(set(words)) == len(words), "each stands for one class"
    assert set(synonyms) <= set(coco)
    assert not set(words) & set(coco)


def test_shuffled_names_never_stay() -> None:
    rows = [{"category_id": number} for number in (1, 2, 3, 4, 5)]
    for number in range(10):
        new = [row["category_id"] for row in shuffled_names(rows, [2, 3, 4, 5], 0, number)]
        assert sorted(new) == [2, 3, 4, 5]
        assert all(one != other for one, other in zip(new, [2, 3, 4, 5], strict=True))
