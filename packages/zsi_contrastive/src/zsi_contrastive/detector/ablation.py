"""The results of an ablation's runs, and the report on them."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from labs_common.comparing import cell, figure_text, mean_and_spread, seeds_text, slug
from labs_common.progress import console
from labs_common.report import Figure, Section, Table, Text, asked_section, save_figure, write_report
from labs_common.report.figures import bar_figure, curve_figure
from labs_common.run import Run, environment
from zsi_contrastive.detector.command_config import AblateConfig

SAID = {
    "detector": "detector alone: boxes",
    "mask-head": "+ semantic mask head",
    "decoders": "+ decoders with reconstruction",
    "background-rpn": "+ background-aware proposals",
    "sync-background": "+ synchronised background",
    "none": "no contrastive head",
    "greedy-infomax": "Greedy InfoMax",
    "patch-infonce": "patch InfoNCE",
    "both": "both contrastive heads",
}
MEASURED = {
    "ZSI box AP 0.5": ("zsi", "box", "ap@0.5"),
    "ZSI box R@100": ("zsi", "box", "recall@0.5"),
    "ZSI mask AP 0.5": ("zsi", "mask", "ap@0.5"),
    "ZSI mask R@100": ("zsi", "mask", "recall@0.5"),
    "GZSI box seen": ("gzsi", "box", "seen", "ap@0.5"),
    "GZSI box unseen": ("gzsi", "box", "unseen", "ap@0.5"),
    "GZSI box harmonic mean": ("gzsi", "box", "harmonic mean", "ap@0.5"),
}


def gathered(folder: Path, rows: Iterable[str], seeds: Sequence[int]) -> dict[str, list[Run]]:
    """The finished runs of each variant."""
    runs = {row: [Run(folder / slug(row) / f"seed-{seed}") for seed in seeds] for row in rows}
    done = {row: [run for run in of_row if run.load_json("results.json")] for row, of_row in runs.items()}
    return {row: of_row for row, of_row in done.items() if of_row}


def measured(runs: Iterable[Run]) -> dict[str, Any]:
    """Means, and spreads over seeds, of what is compared; masks are missing where there is no mask head."""
    line: dict[str, Any] = {}
    results = [run.load_json("results.json") for run in runs]
    for name, path in MEASURED.items():
        values = [_at(result["test"], path) for result in results]
        line |= mean_and_spread(name, [value for value in values if value is not None])
    chance = [
        scores["ap@0.5"]
        for result in results
        for said, scores in result["test"]["other rules"].items()
        if said.startswith("random") and scores["ap@0.5"] is not None
    ]
    line |= mean_and_spread("random vectors, box AP 0.5", chance)
    for name, key in (("seconds", "seconds"), ("parameters", "parameters"), ("peak memory, MiB", "peak memory")):
        scale = 2**20 if key == "peak memory" else 1
        line |= mean_and_spread(name, [result["cost"][key] / scale for result in results])
    return line


def write_ablation(
    folder: Path, config: AblateConfig, found: Mapping[str, list[Run]], failed: Mapping[str, int]
) -> None:
    """Writes results.json and report.html, and prints where they are."""
    (folder / "figures").mkdir(exist_ok=True)
    run = Run(folder)
    if not found:
        console.print("no run is finished: there is nothing to report")
        return
    lines = {row: measured(runs) for row, runs in found.items()}
    run.save_json("environment.json", environment())
    run.save_json("results.json", {"rows": lines, "failed": dict(failed)})
    names = [*MEASURED]
    columns = (names[:4], [*names[4:], "random vectors, box AP 0.5"], ["seconds", "parameters", "peak memory, MiB"])
    tables = [
        Table(("", *part), [(SAID[row], *(cell(line, name) for name in part)) for row, line in lines.items()])
        for part in columns  # a page is too narrow for all
    ]
    shown = {"unseen alone": "ZSI box AP 0.5", "seen": "GZSI box seen", "both": "GZSI box harmonic mean"}
    bars = {SAID[row]: {said: line.get(name, 0.0) for said, name in shown.items()} for row, line in lines.items()}
    curves = {}
    for row, runs in found.items():
        points = [line for line in runs[0].lines("metrics.jsonl") if "validation/unseen_ap50" in line]
        curves[SAID[row]] = ([line["step"] for line in points], [line["validation/unseen_ap50"] for line in points])
    note = f"Every variant has the same pictures, steps and {seeds_text(config.comparison)}. "
    note += "Up to the synchronised background each adds one part; contrastive heads are added to all of them."
    if config.comparison.seeds == 1:
        note += " One run of each says little about small differences: see --seeds."
    sections = [
        asked_section(config),
        Section("Variants", [
            Text(note),
            *tables,
            Figure(save_figure(run, "variants", bar_figure(bars, "AP at 0.5")), "Boxes; both: harmonic mean."),
            Figure(save_figure(run, "unseen", curve_figure(curves, "optimizer step", "AP at 0.5, unseen boxes")),
                   "Unseen classes alone, on validation pictures, first seed."),
        ]),
    ]  # fmt: skip
    if failed:
        sections.append(Section("Failed", [Table(("run", "exit code"), list(failed.items()))]))
    best = max(lines, key=lambda row: lines[row].get("ZSI box AP 0.5", 0.0))
    summary = f"{SAID[best]} has the best unseen boxes: AP at 0.5 {lines[best].get('ZSI box AP 0.5', 0.0):.3f}."
    path = write_report(run, "What each part adds", summary, sections)
    for row, line in lines.items():
        said = [f"{name} {figure_text(line[name])}" for name in list(MEASURED)[:4] if name in line]
        print(f"{SAID[row]}: {', '.join(said)}")
    print(f"report: {path}")


def _at(value: Any, path: tuple[str, ...]) -> float | None:
    for key in path:
        if value is None or key not in value:
            return None
        value = value[key]
    return float(value) if value is not None else None
