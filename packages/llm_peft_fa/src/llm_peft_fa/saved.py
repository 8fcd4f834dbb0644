"""Results on disk, written whole or not at all: PEFT's adapters, or models of transformers; and how they are loaded."""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from labs_common.cli import config_from_yaml
from labs_common.errors import LabError
from labs_common.run import written_whole
from llm_peft_fa.base import device, load_model, load_tokenizer
from llm_peft_fa.config import TrainConfig
from llm_peft_fa.model import Adapted, PackedCausalLM

FOLDERS = ("adapter", "model")  # of a run: the result of PEFT's methods, and of layers and full
Tensors = dict[str, torch.Tensor]


def initial_update(model: Adapted) -> Tensors | None:
    """Copies the update that PiSSA and OLoRA start from, which the base then lacks; None for other methods.

    `save_tuned` needs it to write an adapter of the base as it was.
    """
    start = model.active_peft_config if isinstance(model, PeftModel) else None
    if getattr(start, "init_lora_weights", True) not in ("pissa", "olora"):
        return None
    return {name: tensor.detach().cpu().clone() for name, tensor in get_peft_model_state_dict(model).items()}


def save_tuned(
    accelerator: Accelerator,
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    run: Path,
    initial: Tensors | None = None,
) -> None:
    """Writes `adapter/` or `model/` under `run`, with the tokenizer; gathered from, and called by, all processes."""
    packed = accelerator.unwrap_model(model)
    assert isinstance(packed, PackedCausalLM)
    tuned = packed.model
    virtual = None
    if isinstance(tuned, PeftModel) and tuned.active_peft_config.is_prompt_learning:
        # PEFT runs the encoder when it saves, on one process alone; sharded weights need all of them for that.
        virtual = tuned.get_prompt_embedding_to_save("default").contiguous()
    whole = accelerator.get_state_dict(model)  # DeepSpeed and FSDP: the whole weights, on the main process
    if not accelerator.is_main_process:
        return
    state = {name.removeprefix("model."): tensor for name, tensor in whole.items()}
    folder = run / FOLDERS[not isinstance(tuned, PeftModel)]
    with written_whole(folder) as part:
        if not isinstance(tuned, PeftModel):
            dtype = getattr(tuned.config, "dtype", None) or torch.float32
            tuned.save_pretrained(part, state_dict={name: tensor.to(dtype) for name, tensor in state.items()})
        elif virtual is None and initial is None:
            tuned.save_pretrained(str(part), state_dict=state)
        else:
            config = copy.deepcopy(tuned.active_peft_config)
            config.inference_mode = True
            config.base_model_name_or_path = tuned.get_base_model().name_or_path
            if virtual is not None:
                tensors = {"prompt_embeddings": virtual}
            else:
                assert initial is not None
                tensors = difference(get_peft_model_state_dict(tuned, state_dict=state), initial)
                config.init_lora_weights, config.r, config.lora_alpha = True, 2 * config.r, 2 * config.lora_alpha
            save_file(tensors, part / "adapter_model.safetensors")
            config.save_pretrained(str(part))
        tokenizer.save_pretrained(part)


def difference(now: Tensors, start: Tensors) -> Tensors:
    """Returns the LoRA update B A - B0 A0 as one of twice the rank: [B, -B0] [A; A0].

    So PiSSA's and OLoRA's results are adapters of the base as it was, as `peft` converts them too.
    """
    made = {}
    for name, tensor in now.items():
        first = start[name].to(tensor)
        # A is (rank, inputs), B is (outputs, rank).
        made[name] = torch.cat([tensor, first], 0) if "lora_A" in name else torch.cat([tensor, -first], 1)
    return {name: tensor.contiguous() for name, tensor in made.items()}


def load_tuned(run: Path, model: str, quantized: bool = False) -> Adapted:
    """Loads a run's result for inference: its adapter on the base `model`, or its own model.

    Raises:
        LabError: neither is there, or the adapter does not fit the base.
    """
    if (run / "model").is_dir():
        return load_model(str(run / "model"))
    return adapted_model(run / "adapter", model, quantized)


def adapted_model(folder: Path, model: str, quantized: bool = False) -> PeftModel:
    """Loads the base `model` with the adapter of `folder` on it, for inference.

    Raises:
        LabError: there is no adapter, or it does not fit the base.
    """
    try:
        PeftConfig.from_pretrained(str(folder))  # before the base is read: its absence is told at once
        base = load_model(model, quantized=quantized)
        adapted: PeftModel = PeftModel.from_pretrained(base, str(folder))
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = (str(error) or type(error).__name__).strip().splitlines()[0][:200]
        raise LabError(f"{folder}: no adapter can be loaded from here ({reason})") from error
    return adapted.eval()


@contextlib.contextmanager
def plain_base(tuned: Adapted, model: str) -> Iterator[Adapted]:
    """Gives the base of a fine-tuned model: itself with the adapter switched off, or the base read anew."""
    if isinstance(tuned, PeftModel):
        with tuned.disable_adapter():
            yield tuned
    else:
        base: PreTrainedModel = load_model(model)
        torch.nn.Module.to(base, tuned.device)
        yield base


def save_merged(adapter: Path, model: str, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes the unquantised base plus its update as one model that `transformers` loads."""
    tuned = adapted_model(adapter, model)
    with written_whole(folder) as part:
        tuned.merge_and_unload().save_pretrained(part)
        tokenizer.save_pretrained(part)


def result_folder(run: Path) -> Path:
    """Finds the directory of a finished run's adapter or model.

    Raises:
        LabError: there is none.
    """
    for name in FOLDERS:
        if (run / name).is_dir():
            return run / name
    raise LabError(f"--checkpoint {run}: has no adapter and no model; name the directory of a finished run")


def finished_runs() -> list[Path]:
    """Lists the runs under runs/ that have a result, the newest first."""
    results = [folder for name in FOLDERS for folder in Path("runs").glob(f"*/{name}")]
    return [folder.parent for folder in sorted(results, key=lambda folder: -folder.stat().st_mtime)]


@dataclass(frozen=True)
class Subject:
    """A model that answers, and where it comes from.

    Attributes:
        name: what a reader calls it.
        base: the model that it was made from; None for a model of which that is not known.
        adapter: the directory of its adapter, or None for a whole model.
        model: the name or directory of that whole model, or None.
        tokenizer: the name or directory of its tokenizer.
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
        """Loads the model onto this machine's device, for inference.

        Raises:
            LabError: it cannot be loaded.
        """
        if self.adapter is not None:
            assert self.base is not None
            return adapted_model(self.adapter, self.base, self.quantized).to(device())
        assert self.model is not None
        loaded = load_model(self.model)
        torch.nn.Module.to(loaded, device())
        return loaded

    def load_tokenizer(self, template: str = "auto") -> PreTrainedTokenizerBase:
        """Loads its tokenizer, with the chat template that `--template` names."""
        return load_tokenizer(self.tokenizer, template)


def subject_of(run: Path | None, adapter: Path | None, model: str | None, base: str | None = None) -> Subject:
    """Finds the subject that the options name; without any of the first three, the newest run under runs/.

    `base` takes the place of the base that a run or an adapter names.

    Raises:
        LabError: more than one is named, or nothing is there.
    """
    given = {"--checkpoint": run, "--adapter": adapter, "--model": model}
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
    if run is None:
        run = next(iter(finished_runs()), None)
        if run is None:
            raise LabError("no finished run under runs/; train one, or name one with --checkpoint")
    result = result_folder(run)
    trained = config_from_yaml(TrainConfig, run / "config.yaml")
    whole = result.name == "model"
    return Subject(
        run.name, base or trained.model.model, None if whole else result, str(result) if whole else None, str(result),
        trained.method.method == "qlora", trained,
    )  # fmt: skip
