"""The paper's variants under one budget, and one report: `python -m zsi_contrastive.ablate`.

Each variant and seed is a run of `zsi_contrastive.train` in a process of its own. What is finished is not run again:
the same command goes on where it was stopped, and rebuilds the report when all is there.
"""

import dataclasses
from typing import Any

from labs_common.comparing import check_compared, comparison_folder, entries_of, seeds_of
from labs_common.errors import LabError
from labs_common.own_process import claimed, finished_runs, start_server
from zsi_contrastive.detector.command_config import AblateConfig
from zsi_contrastive.detector.config import TrainConfig, complete

LIBRARIES = [
    "zsi_contrastive.detector.train",
    "zsi_contrastive.detector.fitting",
    "zsi_contrastive.detector.results",
    "labs_common.training",
]
# Each has the parts of those before it, and the one that it is called after.
ROWS = ("detector", "mask-head", "decoders", "background-rpn", "sync-background")
# These have all of the above, and contrastive heads: Greedy InfoMax, patch InfoNCE.
HEADS = {"greedy-infomax": (True, False), "patch-infonce": (False, True), "both": (True, True)}


def ablate(config: AblateConfig) -> None:
    """Plans the runs, does those that are missing, and writes the report."""
    check_compared("variant", config.comparison)
    planned = {row: planned_run(config, row) for row in entries_of("--rows", config.rows)}
    files = [config.data.data, config.words.word_vectors or None, config.words.vocabulary]
    folder = comparison_folder("ablation", config, files)

    start_server(config.comparison.launch, LIBRARIES)
    from zsi_contrastive.detector.ablation import gathered, write_ablation
    from zsi_contrastive.detector.data import read_data

    first = next(iter(planned.values()))
    read_data(
        first.data, first.words, config.comparison.seed, shown=True
    )  # what is wrong with it is said before anything runs
    seeds = seeds_of(config.comparison)
    with claimed(folder, config):
        failed = finished_runs("zsi_contrastive.train", planned, folder, config.comparison)
        write_ablation(folder, config, gathered(folder, planned, seeds), failed)


def planned_run(config: AblateConfig, row: str) -> TrainConfig:
    """The run of a variant.

    Raises:
        LabError: there is no such variant.
    """
    row = "sync-background" if row == "none" else row  # as it is called beside contrastive heads
    if row not in (*ROWS, *HEADS):
        raise LabError(f"--rows {row}: no such variant; take {', '.join([*ROWS, *HEADS])}")
    last = ROWS.index(row) if row in ROWS else len(ROWS) - 1
    parts: dict[str, Any] = {name.replace("-", "_"): ROWS.index(name) <= last for name in ROWS[1:]}
    greedy, patch = HEADS.get(row, (False, False))
    weights = config.model.greedy_weights if greedy else None
    model = dataclasses.replace(
        config.model, **parts, greedy_infomax=greedy, patch_infonce=patch, greedy_weights=weights
    )
    return complete(
        TrainConfig(
            data=config.data, words=config.words, model=model, detection=config.detection, training=config.training
        )
    )
