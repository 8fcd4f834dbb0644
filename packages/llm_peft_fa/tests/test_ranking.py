"""Which method is better, told from answers that were made up: what can and what cannot be told."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from labs_common.compare.collect import Entry, recommend
from labs_common.run import Run
from llm_peft_fa.ranking import (
    changing_pairs,
    difference,
    enough,
    order_of,
    prompt_scores,
    quality,
    quality_name,
    recommendation_section,
    stability_text,
    within_noise,
)

pytestmark = pytest.mark.quick


def entry(
    name: str, right: list[int], trainable: int, seeds: int = 1, first: int = 0, of: int = 10, own: bool = True
) -> Entry:
    """A method that answered `right` of `of` prompts of each seed, from the prompt `first` on; prompts are a seed's `own`, or of all."""
    result: dict[str, Any] = {
        "config": {"training": {"learning_rate": 1e-3}},
        "before": {"validation loss": 3.0, "plain text loss": 0.9},
        "cost": {
            "seconds": 1.0, "steps": 5, "tokens": 50, "tokens per second": 10.0, "peak memory": 2**20,
            "trainable": trainable, "parameters": 1000, "optimizer bytes": 8 * trainable, "disk bytes": 4 * trainable,
        },
    }  # fmt: skip
    results, runs = {}, {}
    for seed in range(seeds):
        count = right[seed % len(right)]
        results[seed] = result | {"after": {"exact match": count / of, "validation loss": 1.0, "plain text loss": 1.0}}
        answers = [
            {
                "prompt": f"prompt {place} of {seed * own}",
                "reference": "تهران",
                "verifiable": True,
                "after": "تهران" if first <= place < first + count else "شیراز",
            }
            for place in range(of)
        ]
        runs[seed] = cast(Run, SimpleNamespace(load_json={"answers.json": answers}.get))
    return Entry(name, runs, results)


def recommended(*entries: Entry) -> str:
    by_name = {one.name: one for one in entries}
    best, equal = recommend(by_name, quality, within_noise, "trainable")
    return recommendation_section(by_name, best, equal, quality_name(entries[0]))[1]


def test_the_rule_takes_the_smallest_that_cannot_be_told_from_the_best() -> None:
    big, small, tiny = (
        entry("big", [90], 1000, of=100),
        entry("small", [87], 10, first=5, of=100),
        entry("tiny", [40], 1, of=100),
    )
    assert quality(small) == 0.87
    assert within_noise(big, small)
    assert not within_noise(big, tiny)
    said = recommended(big, small, tiny)
    assert said.startswith("Recommended: small, exact match 0.870 of 100 answers, 1 seed.")
    assert "cannot be told from big" in said


def test_a_handful_of_answers_recommends_nothing() -> None:
    assert not enough({"a": entry("a", [9], 1), "b": entry("b", [1], 1)})
    assert "None is recommended: 10 answers, 1 seed are too few" in recommended(entry("a", [9], 1), entry("b", [1], 1))
    assert enough({"a": entry("a", [9] * 10, 1, seeds=10)}), "ten prompts of ten seeds"
    equal = recommended(entry("a", [50], 5, of=100), entry("b", [49], 1, of=100))
    assert "none can be told from the best; b trains the fewest" in equal


def test_the_interval_of_one_seed_is_that_of_another_bootstrap() -> None:
    one, other = entry("one", [60], 1, of=100), entry("other", [45], 1, first=20, of=100)
    found = difference(one, other)
    assert found is not None
    right = np.arange(100)
    differences = (right < 60).astype(float) - ((right >= 20) & (right < 65))
    stats = pytest.importorskip("scipy.stats", reason="scipy is the peer")
    expected = stats.bootstrap(
        (differences,), np.mean, method="percentile", n_resamples=5000, rng=0
    ).confidence_interval
    assert found[0] == pytest.approx(differences.mean())
    assert found[1:] == pytest.approx((expected.low, expected.high), abs=0.02)
    assert found == difference(one, other), "the same every time"


def test_seeds_that_disagree_widen_the_interval() -> None:
    """Of 3 × 100 prompts alone 20 points would be told; but one seed says 60, one none and one the other way."""
    other = entry("other", [30], 1, seeds=3, of=100)
    steady, moody = entry("steady", [50], 1, seeds=3, of=100), entry("moody", [90, 30, 30], 1, seeds=3, of=100)
    assert quality(steady) == quality(moody)
    assert not within_noise(steady, other)
    assert within_noise(moody, other)


def test_seeds_that_ask_the_same_prompts_are_no_further_prompts() -> None:
    def differs(seeds: int, own: bool) -> bool:
        one, other = (entry(name, [count], 1, seeds, of=100, own=own) for name, count in (("a", 50), ("b", 47)))
        return not within_noise(one, other)

    assert differs(3, own=True), "9 of 300 prompts"
    assert not differs(3, own=False), "the same 3 of 100 prompts, three times"
    assert not differs(1, own=True)


def test_order_over_seeds_is_told() -> None:
    stable = {"a": entry("a", [9, 8], 1, 2), "b": entry("b", [5, 6], 1, 2)}
    assert order_of(stable, 0) == ["a", "b"]
    assert changing_pairs(stable, [0, 1]) == []
    assert "same with all 2 seeds" in stability_text(stable, range(2))
    crossing = {"a": entry("a", [9, 5], 1, 2), "b": entry("b", [5, 6], 1, 2)}
    assert changing_pairs(crossing, [0, 1]) == [("a", "b")]
    assert "not stable" in stability_text(crossing, range(2))
    assert "not known" in stability_text({"a": entry("a", [9], 1)}, range(1))


def test_answers_that_cannot_be_checked_are_scored_by_chrf_and_a_few_short_ones_do_not_decide() -> None:
    rows = [
        {"reference": "الف ب ج", "verifiable": False, "after": "الف ب ج"},
        {"reference": "الف ب ج", "verifiable": False, "after": ""},
        {"reference": None, "verifiable": False, "after": "چیزی"},
    ]
    assert prompt_scores(rows) == [1.0, 0.0]
    short = {"reference": "نه", "verifiable": True, "after": "نه!"}
    assert len(prompt_scores([*rows, short])) == 3, "one of three can be checked: chrF of all"
    assert prompt_scores([*rows, short, short, short]) == [1.0, 1.0, 1.0]
