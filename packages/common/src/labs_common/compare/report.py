"""The report of a comparison: what all labs' comparisons show; a lab adds its rows and the sections of its own."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from labs_common.compare.collect import Entry, Measure, cell, figure_text, pareto
from labs_common.options import ComparisonOptions
from labs_common.progress import console
from labs_common.report.figures import curve_figure, scatter_figure
from labs_common.report.page import Figure, Section, Table, Text, save_figure, write_report
from labs_common.report.sections import asked_section
from labs_common.run import Run, environment

# Breiman et al. 1984, section 3.4.3.
RULE = (
    "Rule (Breiman's one standard error): of those whose {quality} is within one standard error of the best, taken of "
    "the mean difference on the same {samples}, take the one that trains the fewest parameters."
)


@dataclass(frozen=True)
class Findings:
    """A lab's results of a comparison.

    Attributes:
        title: of the report.
        summary: the result in a sentence or two.
        rows: a dictionary for each entry, the best first; the first key is its name.
        sections: in their order; what was asked for follows.
        printed: the columns of `rows` that the terminal shows.
        recommended: the name of an entry, if there is a rule.
    """

    title: str
    summary: str
    rows: list[dict[str, Any]]
    sections: list[Section]
    printed: Sequence[str]
    recommended: str | None = None


def write_comparison(run: Run, config: Any, found: Findings, failed: Mapping[str, int]) -> None:
    """Writes comparison.json, environment.json and report.html; prints the main columns and where the report is."""
    run.save_json("environment.json", environment())
    more = {} if found.recommended is None else {"recommended": found.recommended}
    run.save_json("comparison.json", {"rows": found.rows, **more, "failed": dict(failed)})
    path = write_report(run, found.title, found.summary, [*found.sections, asked_section(config)])
    for row in found.rows:
        said = "  ".join(f"{name} {figure_text(row[name])}" for name in found.printed if name in row)
        console.print(f"{next(iter(row.values()))}: {said}")
    if found.recommended is not None:
        console.print(f"recommended: {found.recommended}")
    print(f"report: {path}")


def table_of(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], caption: str = "") -> Table:
    """Shows these columns of the rows, with the spread over seeds where there are several."""
    shown = [[row.get(name) if isinstance(row.get(name), str) else cell(row, name) for name in columns] for row in rows]
    return Table(columns, shown, caption)


def notes_on(options: ComparisonOptions, failed: Mapping[str, int]) -> list[Text]:
    """Says how many seeds the figures are of, and which runs are missing from them."""
    said = f"Mean ± standard deviation over {options.seeds} seeds."
    if options.seeds == 1:
        said = "One run of each says little about small differences: see --seeds."
    notes = [Text(said)]
    if failed:
        said = ", ".join(f"{name} (exit code {code})" for name, code in failed.items())
        notes.append(Text(f"Not finished, and not in the tables: {said}."))
    return notes


def pareto_section(
    run: Run,
    entries: Mapping[str, Entry],
    quality: Callable[[Entry], float],
    name: str,
    against: Mapping[str, tuple[Measure, bool]],
) -> Section:
    """Draws quality against costs; `against` has for each cost its measure and whether its axis is logarithmic."""
    figures = []
    for across, (measure, logarithmic) in against.items():
        points = {key: (statistics.fmean(measure(entry)), quality(entry)) for key, entry in entries.items()}
        drawn = scatter_figure(points, across, name, logarithmic, pareto(points))
        file = f"pareto-{across.split(',')[0].replace(' ', '-')}"
        caption = f"{name} against {across}; orange: no other is better in both."
        figures.append(Figure(save_figure(run, file, drawn), caption[0].upper() + caption[1:]))
    return Section("Quality against cost", [*figures])


def curves_of(
    run: Run,
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    across: str,
    up: str,
    caption: str,
    log_up: bool = False,
) -> Figure:
    """Draws the entries' curves on one axis; long ones are averaged over a few steps."""
    thinned = {}
    for name, (places, values) in curves.items():
        width = max(1, len(places) // 40)  # more points than this are a blur at the width of a page
        parts = [slice(at, at + width) for at in range(0, len(places), width)]
        thinned[name] = ([places[part][-1] for part in parts], [statistics.fmean(values[part]) for part in parts])
    file = up.split(",")[0].replace(" ", "-")
    return Figure(save_figure(run, file, curve_figure(thinned, across, up, log_up=log_up)), caption)


def recommendation_section(
    what: str,
    top: Entry,
    best: Entry,
    equal: Sequence[Entry],
    quality: Callable[[Entry], float],
    name: str,
    samples: str,
    parameters: str,
) -> Section:
    """States the rule of `recommend` and what it gives; labs may add what else is known."""
    said = (
        f"Best {name}: {top.name} ({quality(top):.3f}). Within noise of it: {', '.join(e.name for e in equal)}. Of "
        f"these {best.name} trains the fewest parameters ({int(best.cost(parameters)[0]):,}): recommended."
    )
    return Section(f"Which {what}", [Text(RULE.format(quality=name, samples=samples)), Text(said)])


def budget_section(what: str, entries: Mapping[str, Entry], unit: str, same: str) -> Section:
    """Shows what was the same for all, as the runs recorded it, and on what machine; `same` says so in words."""
    rows = [(name, int(entry.cost("steps")[0]), int(entry.cost(unit)[0])) for name, entry in entries.items()]
    machine = dict(next(iter(entries.values())).first["environment"])
    packages = machine.pop("packages")
    described = [(name.replace("_", " "), str(value)) for name, value in machine.items()] + [*packages.items()]
    if len({(steps, count) for _, steps, count in rows}) > 1:
        same = f"They did not all have the same number of steps or {unit}: the table says which."
    columns = (what, "optimizer steps", unit)
    return Section("Budget and machine", [Text(same), Table(columns, rows), Table(("", ""), described)])
