"""The lab's commands: `python -m vit_transfer.NAME` and the script `vit-transfer-NAME` run NAME of these."""

from functools import partial

from labs_common.cli import run_command
from vit_transfer.config import AttackConfig, CompareConfig, DistillConfig, ModelsConfig, TrainConfig

attack = partial(run_command, "vit_transfer.attack:attack", AttackConfig)
compare = partial(run_command, "vit_transfer.compare:compare", CompareConfig)
distill = partial(run_command, "vit_transfer.distill:distill", DistillConfig)
models = partial(run_command, "vit_transfer.models:models", ModelsConfig)
train = partial(run_command, "vit_transfer.train:train", TrainConfig)
