"""The lab's commands: `python -m llm_peft_fa.NAME` and the script `llm-peft-fa-NAME` run NAME of these."""

from functools import partial

from labs_common.cli import run_command
from llm_peft_fa.config import (
    ChatConfig,
    CompareConfig,
    DemoConfig,
    EvaluateConfig,
    ExportConfig,
    InspectConfig,
    RateConfig,
    TrainConfig,
)

chat = partial(run_command, "llm_peft_fa.chat:chat", ChatConfig)
compare = partial(run_command, "llm_peft_fa.compare:compare", CompareConfig)
demo = partial(run_command, "llm_peft_fa.demo:demo", DemoConfig)
evaluate = partial(run_command, "llm_peft_fa.evaluate:evaluate", EvaluateConfig)
export = partial(run_command, "llm_peft_fa.export:export", ExportConfig)
inspect = partial(run_command, "llm_peft_fa.inspect:inspect", InspectConfig)
rate = partial(run_command, "llm_peft_fa.rate:rate", RateConfig)
train = partial(run_command, "llm_peft_fa.train:train", TrainConfig)
