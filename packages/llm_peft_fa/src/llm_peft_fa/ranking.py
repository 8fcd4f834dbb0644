"""The order of methods by their answers: who is best, how sure that is, and when it cannot be told."""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from labs_common.compare.collect import Entry
from labs_common.report.page import Section, Table, Text
from llm_peft_fa.equality import same
from llm_peft_fa.metrics import answer_chrf

RESAMPLES = 2000  # of the bootstrap: an interval's ends then move by less than a tenth of its width
FEWEST = 100  # answers of a method below which none is recommended: a share of them may be off by ten points
RULE = (
    "Rule: those whose {quality} cannot be told from the best's are taken as equal, and of them the one that trains "
    "the fewest parameters is recommended. Two cannot be told apart if the 95 % interval of their mean difference on "
    "the same prompts holds zero. The interval is of {resamples:,} bootstrap samples, of seeds and of "
    "prompts."
)


def by_exact_match(answers: Sequence[Mapping[str, Any]]) -> bool:
    """Tells whether quality is exact match: where most answers can be checked; a few short ones do not decide."""
    known = [row["verifiable"] for row in answers if row["reference"]]
    return 2 * sum(known) > len(known)


def prompt_scores(answers: Sequence[Mapping[str, Any]]) -> list[float]:
    """Scores each answer: 1 or 0 if it is the reference, where that can be told of most; else its chrF (0 to 1)."""
    score = same if by_exact_match(answers) else answer_chrf
    return [float(score(row["after"], row["reference"])) for row in _scored(answers)]


def _scored(answers: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    checked = by_exact_match(answers)
    return [row for row in answers if row["reference"] and (row["verifiable"] or not checked)]


def quality_name(entry: Entry) -> str:
    """Names what `quality` measures in this comparison."""
    answers = next(iter(entry.read("answers.json").values()))
    if by_exact_match(answers):
        return "exact match"
    return "chrF (0 to 1)" if any(row["reference"] for row in answers) else "minus validation loss"


def quality(entry: Entry, seed: int | None = None) -> float:
    """Averages `prompt_scores`, over all seeds or of one; minus the validation loss if no prompt has a reference."""
    answers = {key: rows for key, rows in entry.read("answers.json").items() if seed in (None, key)}
    found = [score for rows in answers.values() for score in prompt_scores(rows)]
    if found:
        return statistics.fmean(found)
    return -statistics.fmean(entry.results[key]["after"]["validation loss"] for key in answers)


def difference(one: Entry, other: Entry) -> tuple[float, float, float] | None:
    """Computes how much better `one` is than `other`, in the mean over the same prompts, and the ends of its interval.

    The interval is of 95 %, by a bootstrap that draws seeds with replacement and, apart from that, prompts: the answers
    of one training go up and down together, and so do those to one prompt, which several seeds may have (Owen 2007, The
    pigeonhole bootstrap). None if they have fewer than two prompts in common.
    """
    first, second = one.read("answers.json"), other.read("answers.json")
    seeds = sorted(first.keys() & second.keys())
    rows = [
        (place, row["prompt"], row["reference"]) for place, seed in enumerate(seeds) for row in _scored(first[seed])
    ]
    if len(rows) < 2:
        return None
    pairs = [pair for seed in seeds for pair in zip(*map(prompt_scores, (first[seed], second[seed])), strict=True)]
    found = torch.tensor(pairs).diff(dim=1).neg().ravel()
    prompts = {asked: place for place, asked in enumerate(dict.fromkeys(row[1:] for row in rows))}
    at = torch.tensor([place for place, *_ in rows]), torch.tensor([prompts[row[1:]] for row in rows])
    sums, counts = (
        torch.zeros(len(seeds), len(prompts)).index_put(at, values, accumulate=True)
        for values in (found, torch.ones_like(found))
    )
    draw = torch.Generator().manual_seed(0)
    of_seeds, of_prompts = (_times_drawn(size, draw) for size in sums.shape)
    total, times = ((of_seeds @ each * of_prompts).sum(1) for each in (sums, counts))
    low, high = (total / times.clamp(min=1)).quantile(torch.tensor([0.025, 0.975])).tolist()
    return float(found.mean()), low, high


def _times_drawn(size: int, draw: torch.Generator) -> torch.Tensor:
    """Draws `size` of `size` with replacement; returns how often each was, (RESAMPLES, size)."""
    picked = torch.randint(size, (RESAMPLES, size), generator=draw)
    return torch.zeros(RESAMPLES, size).scatter_add(1, picked, torch.ones(RESAMPLES, size))


def within_noise(best: Entry, other: Entry) -> bool:
    """Tells whether `other` cannot be told from `best`: the interval of their difference holds zero."""
    if (found := difference(best, other)) is None:
        return best.name == other.name
    return found[1] <= 0 <= found[2]


def answer_count(entry: Entry) -> int:
    """Counts the answers by which a method's quality is told."""
    return sum(len(prompt_scores(rows)) for rows in entry.read("answers.json").values())


def enough(entries: Mapping[str, Entry]) -> bool:
    """Tells whether every method gave answers enough for a recommendation to rest on."""
    return min(map(answer_count, entries.values())) >= FEWEST


def recommendation_section(
    entries: Mapping[str, Entry], best: Entry, equal: Sequence[Entry], words: str
) -> tuple[Section, str]:
    """States the rule, what it gives and how sure that is; returns the result as a sentence, too."""
    top = max(entries.values(), key=quality)
    count, seeds = answer_count(top), len(top.runs)
    rows = []
    for entry in sorted(entries.values(), key=quality, reverse=True):
        found = difference(top, entry)
        behind = f"{found[0]:.3f} ({found[1]:.3f} to {found[2]:.3f})" if found and entry is not top else None
        told = "the best" if entry is top else "cannot be told apart" if entry in equal else "worse"
        rows.append((entry.name, answer_count(entry), quality(entry), behind, told))
    basis = f"{count} answers, {seeds} {'seed' if seeds == 1 else 'seeds'}"
    alone = " How much another seed would change is not in the interval: see --seeds." if seeds == 1 else ""
    if not enough(entries):
        said = f"None is recommended: {basis} are too few (fewer than {FEWEST} answers; --test-prompts, --seeds)."
    elif len(equal) == len(entries) > 1:
        said = f"By {words} of {basis} none can be told from the best; {best.name} trains the fewest parameters."
    else:
        said = f"Recommended: {best.name}, {words} {quality(best):.3f} of {basis}."
        if len(equal) > 1:
            said += f" It cannot be told from {', '.join(e.name for e in equal if e is not best)}."
    columns = ("method", "answers", words, f"behind {top.name}", "")
    rule = RULE.format(quality=words, resamples=RESAMPLES)
    section = Section("Which method", [Text(said + alone), Table(columns, rows), Text(rule)])
    return section, said


def order_of(entries: Mapping[str, Entry], seed: int) -> list[str]:
    """Lists the methods that have this seed, best first."""
    there = [entry for entry in entries.values() if seed in entry.results]
    return [entry.name for entry in sorted(there, key=lambda entry: -quality(entry, seed))]


def changing_pairs(entries: Mapping[str, Entry], seeds: Sequence[int]) -> list[tuple[str, str]]:
    """Lists the pairs of methods whose order by quality is not the same in all seeds."""
    found = []
    for one, two in itertools.combinations(entries.values(), 2):
        both = [seed for seed in seeds if seed in one.results and seed in two.results]
        differences = [quality(one, seed) - quality(two, seed) for seed in both]
        if len({(difference > 0) - (difference < 0) for difference in differences}) > 1:
            found.append((one.name, two.name))
    return found


def stability_text(entries: Mapping[str, Entry], seeds: Sequence[int]) -> str:
    """Tells whether the order of the methods can be relied on."""
    if len(seeds) == 1:
        return "One seed was run, so whether another gives the same order is not known (--seeds 3 tells)."
    pairs = changing_pairs(entries, seeds)
    orders = {seed: " > ".join(order_of(entries, seed)) for seed in seeds}
    if not pairs:
        return f"The order is the same with all {len(seeds)} seeds: {orders[seeds[0]]}."
    changing = "; ".join(f"{one} and {two}" for one, two in pairs)
    said = "; ".join(f"seed {seed}: {order}" for seed, order in orders.items())
    return f"The order is not stable over seeds: {changing} change places. {said}."
