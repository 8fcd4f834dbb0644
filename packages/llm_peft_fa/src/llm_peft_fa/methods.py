"""One function per fine-tuning method: (model, options) -> model with exactly that method's parameters training."""

from collections.abc import Callable

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from labs_common.errors import LabError
from labs_common.freezing import train_only
from llm_peft_fa.config import MethodOptions


def lora(model: PreTrainedModel, options: MethodOptions) -> PeftModel:
    """LoRA (Hu et al. 2021, eq. 3): W x + (alpha / r) B A x, with A random and B zero at the start.

    Raises:
        LabError: no layer has a name in --target-modules, or the rank is not positive.
    """
    targets = list(options.target_modules)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=options.rank,
        lora_alpha=options.alpha,  # type: ignore[arg-type]  # PEFT divides it by the rank: any number will do
        lora_dropout=options.dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
    )
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise LabError(f"--method lora: {str(error).splitlines()[0]}") from error
    train_only(adapted, lambda name: ".lora_" in name)
    return adapted


METHODS: dict[str, Callable[[PreTrainedModel, MethodOptions], PeftModel]] = {"lora": lora}
