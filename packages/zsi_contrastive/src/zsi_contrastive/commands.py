"""The lab's commands: `python -m zsi_contrastive.NAME` and the script `zsi-contrastive-NAME` run NAME of these."""

from functools import partial

from labs_common.cli import run_command
from zsi_contrastive.detector.config import (
    AblateConfig,
    ConvertConfig,
    EvaluateConfig,
    PredictConfig,
    PrepareConfig,
    TrainConfig,
    WordsConfig,
)
from zsi_contrastive.ssl.config import CompareConfig, PretrainConfig

# The detector; the third argument is the name that the user types after `python -m`.
train = partial(run_command, "zsi_contrastive.detector.train:train", TrainConfig, "zsi_contrastive.train")
evaluate = partial(
    run_command, "zsi_contrastive.detector.evaluate:evaluate", EvaluateConfig, "zsi_contrastive.evaluate"
)
predict = partial(run_command, "zsi_contrastive.detector.predict:predict", PredictConfig, "zsi_contrastive.predict")
ablate = partial(run_command, "zsi_contrastive.detector.compare:ablate", AblateConfig, "zsi_contrastive.ablate")
prepare = partial(run_command, "zsi_contrastive.detector.prepare:prepare", PrepareConfig, "zsi_contrastive.prepare")
words = partial(run_command, "zsi_contrastive.detector.words:words", WordsConfig, "zsi_contrastive.words")
convert = partial(run_command, "zsi_contrastive.detector.convert:convert", ConvertConfig, "zsi_contrastive.convert")

# Self-supervised pre-training.
pretrain = partial(run_command, "zsi_contrastive.ssl.train:train", PretrainConfig, "zsi_contrastive.pretrain")
compare = partial(run_command, "zsi_contrastive.ssl.compare:compare", CompareConfig, "zsi_contrastive.compare")
