"""Trains the paper's variants under one budget and reports on them: `python -m zsi_contrastive.ablate`."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from labs_common.compare.collect import Entry, Measure, rows_of
from labs_common.compare.plan import comparison_folder, plan_runs, seeds_text
from labs_common.compare.processes import compare_runs, start_server
from labs_common.compare.report import Findings, curves_of, notes_on, table_of
from labs_common.errors import LabError
from labs_common.report.figures import bar_figure
from labs_common.report.page import Figure, Section, Text, save_figure
from labs_common.run import Run
from zsi_contrastive.detector.config import OWN_SHARES, AblateConfig, ModelOptions, TrainConfig
from zsi_contrastive.detector.contrastive import CONTRASTIVE
from zsi_contrastive.detector.data import read_data
from zsi_contrastive.detector.defaults import complete
from zsi_contrastive.detector.vectors import file_of

LIBRARIES = ["zsi_contrastive.detector.train"]  # a fork server imports them once for all runs


@dataclass(frozen=True)
class Variant:
    """A row of the ablation: what a report calls it, the parts and contrastive heads that it has, and its options."""

    said: str
    parts: tuple[str, ...]
    contrastive: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


# In the order in which the paper adds them.
PATCH = ("patch_infonce",)
PARTS = ("mask_head", "mask_decoder", "box_decoder", "background_rpn", "sync_background")
VARIANTS: dict[str, Variant] = {
    "detector": Variant("detector alone: boxes", ()),
    "mask-head": Variant("+ semantic mask head (encoder)", PARTS[:1]),
    "mask-decoder": Variant("+ its decoder", PARTS[:2]),
    "box-decoder": Variant("+ decoder in the detector", PARTS[:3]),
    "background-rpn": Variant("+ background-aware proposals", PARTS[:4]),
    "sync-background": Variant("+ synchronised background", PARTS),
    "none": Variant("no contrastive head", PARTS),  # the same beside contrastive heads
    **{name.replace("_", "-"): Variant(head.said, PARTS, (name,)) for name, head in CONTRASTIVE.items()},
    "both": Variant("all contrastive heads", PARTS, tuple(CONTRASTIVE)),
    # Not among those that run by default: one option each, beside the row of its head, or beside none.
    "thumbnail": Variant("Greedy InfoMax at 64 × 64", PARTS, ("greedy_infomax",), {"thumbnail": 64}),
    "patch-place": Variant("patches related by place", PARTS, PATCH, {"patches_by": "place"}),
    "patch-hadsell": Variant("Hadsell's loss on patches", PARTS, PATCH, {"patch_loss": "hadsell"}),
    "patch-size": Variant("patches of 5 places", PARTS, PATCH, {"patch_size": 5}),
    "patch-number": Variant("32 patches", PARTS, PATCH, {"patches": 32}),
    "patch-temperature": Variant("temperature 0.5 for patches", PARTS, PATCH, {"patch_temperature": 0.5}),
    "contrast": Variant("contrast 1.5", PARTS, (), {"contrast": 1.5}),
    "sharpness": Variant("sharpness 2", PARTS, (), {"sharpness": 2.0}),
}
USUAL = ModelOptions()
CONTROLS = ("random vectors", "shuffled names", "nearest seen class")
ZSI, GZSI, LIST = "ZSI box AP 0.5", "GZSI box harmonic mean", "one list, box harmonic mean"


def control_of(entry: Entry, control: str) -> list[float]:
    """Reads by seed what a control in the place of the unseen classes' vectors scored (AP at 0.5, boxes)."""
    rules = [rule for results in entry.results.values() for rule in results["test"]["other rules"].items()]
    return [scores["ap@0.5"] for said, scores in rules if said.startswith(control) and scores["ap@0.5"] is not None]


# In groups, because a page is too narrow for all; where there is no mask head, its figures are missing.
MEASURES: list[dict[str, Measure]] = [
    {
        ZSI: lambda entry: entry.values("test", "zsi", "box", "ap@0.5"),
        "ZSI box R@100": lambda entry: entry.values("test", "zsi", "box", "recall@0.5"),
        "ZSI mask AP 0.5": lambda entry: entry.values("test", "zsi", "mask", "ap@0.5"),
        "ZSI mask R@100": lambda entry: entry.values("test", "zsi", "mask", "recall@0.5"),
    },
    {
        "GZSI box seen": lambda entry: entry.values("test", "gzsi", "box", "seen", "ap@0.5"),
        GZSI: lambda entry: entry.values("test", "gzsi", "box", "harmonic mean", "ap@0.5"),
        LIST: lambda entry: entry.values("test", "one_list", "box", "harmonic mean", "ap@0.5"),
        "named, harmonic mean": lambda entry: entry.values("test", "named", "without a bias", "named harmonic mean"),
        "named, with validation's bias": lambda entry: entry.values(
            "test", "named", "with validation's bias", "named harmonic mean"
        ),
    },
    # In the place of the unseen classes' vectors: what each of them is to beat.
    {f"{name}, box AP 0.5": partial(control_of, control=name) for name in CONTROLS},
    {
        "seconds": lambda entry: entry.cost("seconds"),
        "parameters": lambda entry: entry.cost("parameters"),
        "peak memory, MiB": lambda entry: entry.cost("peak memory", 2**20),
    },
]


def ablate(config: AblateConfig) -> None:
    """Plans the runs, does those that are missing, and writes the report."""
    planned = plan(config)
    files = [config.data.data, file_of(config.words.word_vectors) or None, config.words.vocabulary]
    folder = comparison_folder("ablation", config, files)
    start_server(config.comparison.launch, LIBRARIES)
    first = next(iter(planned.values()))
    # What is wrong with the data is said before anything runs.
    read_data(first.data, first.words, config.comparison.seed, shown=True)
    compare_runs(folder, config, "zsi_contrastive.train", planned, partial(findings, config))


def plan(config: AblateConfig) -> dict[str, TrainConfig]:
    """Makes the run of each variant of --rows.

    Raises:
        LabError: the comparison cannot start, there is no such variant, or it has options after a colon.
    """

    def run_of(row: str, flags: list[str]) -> TrainConfig:
        if flags:
            raise LabError("variants have no options of their own; give them to all, as in --epochs 3")
        variant = VARIANTS[row]
        parts: dict[str, Any] = {name: name in variant.parts for name in PARTS}
        parts |= {"contrastive": variant.contrastive, **dict.fromkeys(OWN_SHARES, False)}
        for name, head in CONTRASTIVE.items():
            if name not in variant.contrastive:
                parts |= {option: getattr(USUAL, option) for option in head.options}
        model = replace(config.model, **parts | variant.options)
        return complete(TrainConfig(config.data, config.words, model, config.detection, config.training))

    return plan_runs(config.comparison, "--rows", config.rows, "variant", run_of, tuple(VARIANTS))


def findings(config: AblateConfig, run: Run, entries: Mapping[str, Entry], failed: Mapping[str, int]) -> Findings:
    """Sets the variants beside each other, in the order in which they were asked for."""
    rows = rows_of("variant", entries.values(), {name: one for group in MEASURES for name, one in group.items()})
    rows = [{"variant": row["variant"], "description": VARIANTS[row["variant"]].said, **row} for row in rows]
    tables = [table_of(rows, ("description", *group)) for group in MEASURES]
    shown = {"unseen": ZSI, "seen": "GZSI box seen", "both": GZSI, "both in one list": LIST}
    bars = {row["description"]: {said: row.get(name, 0.0) for said, name in shown.items()} for row in rows}
    curves = {VARIANTS[name].said: entry.curve("validation/unseen_ap50") for name, entry in entries.items()}
    caption = "Unseen classes alone, on validation pictures, first seed."
    note = (
        f"Every variant has the same pictures, steps and {seeds_text(config.comparison)}. Up to the synchronised "
        "background each adds one part; contrastive heads are added to all of them."
    )
    blocks: list[Any] = [
        Text(note),
        *notes_on(config.comparison, failed),
        *tables,
        Figure(save_figure(run, "variants", bar_figure(bars, "AP at 0.5")), "Boxes; both: harmonic mean."),
        curves_of(run, curves, "optimizer step", "AP at 0.5, unseen boxes", caption),
    ]
    best = max(rows, key=lambda row: row.get(ZSI, 0.0))
    summary = f"{best['description']} has the best unseen boxes: AP at 0.5 {best.get(ZSI, 0.0):.3f}."
    return Findings("What each part adds", summary, rows, [Section("Variants", blocks)], tuple(MEASURES[0]))


if __name__ == "__main__":
    raise SystemExit("the command is python -m zsi_contrastive.ablate")
