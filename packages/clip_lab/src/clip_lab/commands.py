"""The lab's commands: `python -m clip_lab.NAME` and the script `clip-lab-NAME` run NAME of these."""

from functools import partial

from clip_lab.config import (
    CompareConfig,
    DemoConfig,
    EvaluateConfig,
    ExportConfig,
    ProbeConfig,
    RetrieveConfig,
    TrainConfig,
    ZeroShotConfig,
)
from labs_common.cli import run_command

compare = partial(run_command, "clip_lab.compare:compare", CompareConfig)
demo = partial(run_command, "clip_lab.demo:demo", DemoConfig)
evaluate = partial(run_command, "clip_lab.evaluate:evaluate", EvaluateConfig)
export = partial(run_command, "clip_lab.export:export", ExportConfig)
probe = partial(run_command, "clip_lab.probe:probe", ProbeConfig)
retrieve = partial(run_command, "clip_lab.retrieve:retrieve", RetrieveConfig)
train = partial(run_command, "clip_lab.train:train", TrainConfig)
zero_shot = partial(run_command, "clip_lab.zero_shot:zero_shot", ZeroShotConfig)
