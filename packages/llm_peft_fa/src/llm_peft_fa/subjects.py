"""What can be asked: a finished run, any adapter of PEFT, or any model of transformers."""

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftConfig
from transformers import PreTrainedTokenizerBase

from labs_common.cli import config_from_yaml
from labs_common.errors import LabError
from llm_peft_fa.adapters import adapted_model, latest_run, result_folder
from llm_peft_fa.config import TrainConfig
from llm_peft_fa.methods import Adapted
from llm_peft_fa.model import device, device_precision, load_model, load_tokenizer


@dataclass(frozen=True)
class Subject:
    """A model that answers, and where it comes from.

    Attributes:
        name: what a reader calls it.
        base: the model that it was made from; None for a model of which that is not known.
        adapter: the directory of its adapter, or None for a whole model.
        model: the name or directory of that whole model, or None.
        tokenizer: where its tokenizer is.
        quantized: whether the base is held in 4 bits.
        trained: the config of its run, if it is one.
    """

    name: str
    base: str | None
    adapter: Path | None
    model: str | None
    tokenizer: str
    quantized: bool = False
    trained: TrainConfig | None = None

    def load(self) -> Adapted:
        """The model on this machine's device, for generation.

        Raises:
            LabError: it cannot be loaded.
        """
        if self.adapter is not None:
            assert self.base is not None
            return adapted_model(self.adapter, self.base, self.quantized).to(device())
        assert self.model is not None
        loaded = load_model(self.model, device_precision())
        torch.nn.Module.to(loaded, device())
        return loaded

    def load_tokenizer(self, template: str = "auto") -> PreTrainedTokenizerBase:
        """Its tokenizer, with the chat template that `--template` names."""
        return load_tokenizer(self.tokenizer, template)


def subject_of(run: Path | None, adapter: Path | None, model: str | None, base: str | None = None) -> Subject:
    """The subject that the options name; without any of the first three, the newest run under runs/.

    `base` takes the place of the base that a run or an adapter names.

    Raises:
        LabError: more than one is named, or nothing is there.
    """
    given = {"--run": run, "--adapter": adapter, "--model": model}
    named = [flag for flag, value in given.items() if value is not None]
    if len(named) > 1:
        raise LabError(f"{' and '.join(named)}: name one of them")
    if model is not None:
        return Subject(model, base, None, model, model)
    if adapter is not None:
        try:
            recorded = PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path
        except (OSError, ValueError, TypeError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise LabError(f"--adapter {adapter}: no adapter of PEFT is there ({reason})") from error
        base = base or recorded
        if base is None:
            raise LabError(f"--adapter {adapter}: does not say which base it is of; name it with --base")
        own = (adapter / "tokenizer_config.json").exists()
        return Subject(adapter.name, base, adapter, None, str(adapter) if own else base)
    folder = latest_run(run)
    trained = config_from_yaml(TrainConfig, folder / "config.yaml")
    result = result_folder(folder)
    return Subject(
        folder.name,
        base or trained.model.model,
        result if result.name == "adapter" else None,
        None if result.name == "adapter" else str(result),
        str(result),
        trained.method.method == "qlora",
        trained,
    )
