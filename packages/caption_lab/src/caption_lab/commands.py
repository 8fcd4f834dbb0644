"""The lab's commands: `python -m caption_lab.NAME` and the script `caption-lab-NAME` run NAME of these."""

from functools import partial

from caption_lab.config import CaptionConfig, CompareConfig, DemoConfig, EvaluateConfig, PrepareConfig, TrainConfig
from labs_common.cli import run_command

caption = partial(run_command, "caption_lab.caption:caption", CaptionConfig)
compare = partial(run_command, "caption_lab.compare:compare", CompareConfig)
demo = partial(run_command, "caption_lab.demo:demo", DemoConfig)
evaluate = partial(run_command, "caption_lab.evaluate:evaluate", EvaluateConfig)
prepare = partial(run_command, "caption_lab.prepare:prepare", PrepareConfig)
train = partial(run_command, "caption_lab.train:train", TrainConfig)
