"""The lab's commands: `python -m zsi_contrastive.NAME` and the script `zsi-contrastive-NAME` run NAME of these."""

from functools import partial

from labs_common.cli import run_command
from zsi_contrastive.command_config import AblateConfig, EvaluateConfig, PredictConfig, PrepareConfig, VectorsConfig
from zsi_contrastive.config import TrainConfig
from zsi_contrastive.pretrain_config import CompareConfig, PretrainConfig

ablate = partial(run_command, "zsi_contrastive.ablate:ablate", AblateConfig)
compare = partial(run_command, "zsi_contrastive.compare:compare", CompareConfig)
evaluate = partial(run_command, "zsi_contrastive.evaluate:evaluate", EvaluateConfig)
predict = partial(run_command, "zsi_contrastive.predict:predict", PredictConfig)
prepare = partial(run_command, "zsi_contrastive.prepare:prepare", PrepareConfig)
pretrain = partial(run_command, "zsi_contrastive.pretrain:pretrain", PretrainConfig)
train = partial(run_command, "zsi_contrastive.train:train", TrainConfig)
words = partial(run_command, "zsi_contrastive.words:words", VectorsConfig)
