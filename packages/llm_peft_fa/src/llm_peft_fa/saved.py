"""Results on disk, written whole or not at all: PEFT's adapters, or models of transformers; and how they are loaded."""

import contextlib
import copy
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from huggingface_hub import hf_hub_download, snapshot_download
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from labs_common.cli import config_from_yaml
from labs_common.errors import LabError
from labs_common.run import written_whole
from labs_common.saved import load_auto, named
from labs_common.sharding import place, reads_weights, take_over
from llm_peft_fa.base import base_config, device, load_model, load_tokenizer, model_path
from llm_peft_fa.config import SubjectOptions, TrainConfig
from llm_peft_fa.methods import METHODS
from llm_peft_fa.model import Adapted, base_of

READ = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]  # of an adapter on the hub
FOUR_BITS = "llm_peft_fa.json"  # beside an exported adapter of a base that was held in 4 bits: PEFT keeps no word of it
FOLDERS = ("adapter", "model")  # of a run: the result of PEFT's methods, and of layers and full
Tensors = dict[str, torch.Tensor]


def initial_update(model: Adapted) -> Tensors | None:
    """Copies the update that PiSSA and OLoRA start from, which the base then lacks; None for other methods.

    `save_tuned` needs it to write an adapter of the base as it was.
    """
    start = model.active_peft_config if isinstance(model, PeftModel) else None
    if next(model.parameters()).is_meta:  # only the main process has the weights of a large base, and saves
        return None
    if getattr(start, "init_lora_weights", True) not in ("pissa", "olora"):
        return None
    return {name: tensor.detach().cpu().clone() for name, tensor in get_peft_model_state_dict(model).items()}


def computed_prompt(model: Adapted) -> torch.Tensor | None:
    """Computes the virtual tokens, or keys and values, of a soft prompt; called by all processes together.

    PEFT runs the encoder when it saves, in one process alone; sharded weights need all of them for that.
    """
    if not isinstance(model, PeftModel) or not model.active_peft_config.is_prompt_learning:
        return None
    return model.get_prompt_embedding_to_save("default").contiguous()


def save_tuned(
    tuned: Adapted,
    weights: Tensors,
    tokenizer: PreTrainedTokenizerBase,
    run: Path,
    initial: Tensors | None = None,
    prompt: torch.Tensor | None = None,
) -> None:
    """Writes `adapter/` or `model/` under `run`, with the tokenizer.

    `weights` are all of `PackedCausalLM(tuned)`, which may be sharded in the model itself; `initial` is of
    `initial_update`, `prompt` of `computed_prompt`.
    """
    state = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    folder = run / FOLDERS[not isinstance(tuned, PeftModel)]
    with written_whole(folder) as part:
        if not isinstance(tuned, PeftModel):
            dtype = getattr(tuned.config, "dtype", None) or torch.float32
            tied = tuned.all_tied_weights_keys  # the embeddings themselves: another copy would be written beside them
            kept = {name: tensor.to(dtype) for name, tensor in state.items() if name not in tied}
            tuned.save_pretrained(part, state_dict=kept)
            config = copy.deepcopy(tuned.config)
            config.dtype = dtype  # that of the weights in training stands there, and others would load them so
            config.save_pretrained(part)
        elif prompt is None and initial is None:
            tuned.save_pretrained(str(part), state_dict=state)
        else:
            config = copy.deepcopy(tuned.active_peft_config)
            config.inference_mode = True
            config.base_model_name_or_path = tuned.get_base_model().name_or_path
            if prompt is not None:
                tensors = {"prompt_embeddings": prompt}
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


def load_tuned(run: Path, model: str, quantized: bool = False, read: bool = True) -> Adapted:
    """Loads a run's result for inference: its adapter on the base `model`, or its own model.

    For `read` see `load_model`.

    Raises:
        LabError: neither is there, or the adapter does not fit the base.
    """
    if (run / "model").is_dir():
        return load_model(str(run / "model"), read=read)
    return adapted_model(run / "adapter", model, quantized, read)


def adapted_model(
    folder: Path, model: str, quantized: bool = False, read: bool = True, merging: bool = False
) -> PeftModel:
    """Loads the base `model` with the adapter of `folder` on it, for inference or for `merging`: in float32.

    A quantised base that is to be merged has the values of its four bits, as the adapter was trained with.

    Raises:
        LabError: there is no adapter, or it does not fit the base.
    """
    adapter_config(folder, str(folder))  # before the base is read: its absence is told at once
    file = folder / "adapter_model.safetensors"
    if folder.is_dir() and not file.is_file():
        raise LabError(f"{folder}: holds no {file.name}; save the adapter again in safetensors")
    base = load_model(model, "no" if merging else None, quantized, read)
    if merging and quantized:
        base.dequantize()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")  # PEFT goes on with random ones
        remedy = f"is it an adapter of {model}?"
        adapted: PeftModel = load_auto(
            partial(PeftModel.from_pretrained, base), str(folder), said=str(folder), remedy=remedy
        )
    if file.is_file():  # PEFT also passes over what the base has no place for
        with safe_open(file, "pt") as tensors:
            names = set(tensors.keys()) - get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
        # An adapter of a larger vocabulary may bring the embeddings themselves.
        if more := sorted(name for name in names if not name.endswith(("embed_tokens.weight", "lm_head.weight"))):
            raise LabError(f"{folder}: is an adapter of another base than {model}, which has no {named(more)}")
    return adapted.eval()


def adapter_config(folder: Path, said: str) -> PeftConfig:
    """Reads what an adapter is.

    Raises:
        LabError: there is none, or its configuration is broken.
    """
    return load_auto(
        PeftConfig.from_pretrained, str(folder), said=said, remedy="name the directory of an adapter of PEFT"
    )


def placed(tuned: Adapted, accelerator: Accelerator) -> Adapted:
    """Puts a loaded model on this process's device; its layers in parts under FSDP and ZeRO-3 (see `place`)."""
    spread = place(base_of(tuned), accelerator)
    if isinstance(tuned, PeftModel) and tuned.active_peft_config.is_prompt_learning:
        if spread:
            take_over(tuned.prompt_encoder, accelerator.device)
        else:
            tuned.prompt_encoder.to(accelerator.device)
    return tuned


@contextlib.contextmanager
def plain_base(tuned: Adapted, model: str, accelerator: Accelerator | None = None) -> Iterator[Adapted]:
    """Gives the base of a fine-tuned model: itself with the adapter switched off, or the base read anew.

    The latter is placed as the launch of `accelerator` says (see `placed`), if there is one.
    """
    if isinstance(tuned, PeftModel):
        with tuned.disable_adapter():
            yield tuned
    else:
        base = load_model(model, read=accelerator is None or reads_weights(accelerator))
        if accelerator is None:
            torch.nn.Module.to(base, tuned.device)
        else:
            place(base, accelerator)
        yield base


def write_merged(adapter: Path, model: str, quantized: bool, folder: Path) -> None:
    """Writes base plus update and tokenizer to `folder` as one model that `transformers` loads.

    It is added up in float32 and written in the precision of the base. llama.cpp wants SentencePiece's own file.
    """
    merged: Any = adapted_model(adapter, model, quantized, merging=True).merge_and_unload()
    merged.to(getattr(base_config(model), "dtype", None) or torch.float32).save_pretrained(folder)
    load_tokenizer(str(adapter)).save_pretrained(folder)
    if (pieces := file_of(model, "tokenizer.model")) is not None:
        shutil.copy(pieces, folder)


def file_of(model: str, name: str) -> Path | None:
    """Finds a file beside a model's weights, in its directory or on the hub; None if there is none."""
    folder = Path(model_path(model))
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    try:
        return Path(hf_hub_download(model, name))
    except (OSError, ValueError):  # it is not there, or nothing of the hub is
        return None


def result_folder(run: Path) -> Path:
    """Finds the directory of a finished run's adapter or model.

    Raises:
        LabError: there is none.
    """
    for name in FOLDERS:
        if (run / name).is_dir():
            return run / name
    raise LabError(f"--checkpoint {run}: has no adapter and no model; name the directory of a finished run")


def runs_with_result() -> list[Path]:
    """Lists the runs under runs/ that have a result, the newest first."""
    results = [folder for name in FOLDERS for folder in Path("runs").glob(f"*/{name}")]
    return [folder.parent for folder in sorted(results, key=lambda folder: -folder.stat().st_mtime)]


@dataclass(frozen=True)
class Subject:
    """A model that answers, and where it comes from.

    Attributes:
        name: what a reader calls it.
        base: the model that it was made from; None for a model of which that is not known.
        source: the directory of its adapter, or the name or directory of a whole model.
        adapted: whether it is an adapter.
        tokenizer: the name or directory of its tokenizer.
        quantized: whether the base is held in 4 bits.
        trained: the config of its run, if it is one.
    """

    name: str
    base: str | None
    source: str
    adapted: bool
    tokenizer: str
    quantized: bool = False
    trained: TrainConfig | None = None

    def load(self) -> Adapted:
        """Loads the model onto this machine's device, for inference.

        Raises:
            LabError: it cannot be loaded.
        """
        if self.adapted:
            assert self.base is not None
            return adapted_model(Path(self.source), self.base, self.quantized).to(device())
        loaded = load_model(self.source)
        torch.nn.Module.to(loaded, device())
        return loaded


def subject_of(options: SubjectOptions, base: str | None = None) -> Subject:
    """Finds the subject that the options name; if they name none, the newest run under runs/.

    `base` takes the place of the base that a run or an adapter names.

    Raises:
        LabError: more than one is named, or nothing is there.
    """
    run, adapter, model = options.checkpoint, options.adapter, options.model
    named = [f"--{name}" for name, value in vars(options).items() if value is not None]
    if len(named) > 1:
        raise LabError(f"{' and '.join(named)}: name one of them")
    if model is not None and file_of(model, "adapter_config.json") is None:
        return Subject(model, base, model, False, model)
    if run is not None and not any((run / name).is_dir() for name in FOLDERS):  # what `export` wrote, perhaps
        if (run / "adapter_config.json").is_file():
            adapter = run
        elif (run / "config.json").is_file():
            return Subject(run.name, base, str(run), False, str(run))
    if model is not None:
        adapter = Path(model) if Path(model).is_dir() else Path(snapshot_download(model, allow_patterns=READ))
    if adapter is not None:
        base = base or adapter_config(adapter, f"--adapter {adapter}").base_model_name_or_path
        if base is None:
            raise LabError(f"--adapter {adapter}: does not say which base it is of; name it with --base")
        own = (adapter / "tokenizer_config.json").exists()
        quantized = (adapter / FOUR_BITS).is_file()
        return Subject(model or adapter.name, base, str(adapter), True, str(adapter) if own else base, quantized)
    if run is None:
        run = next(iter(runs_with_result()), None)
        if run is None:
            raise LabError("no finished run under runs/; train one, or name one with --checkpoint")
    result = result_folder(run)
    trained = config_from_yaml(TrainConfig, run / "config.yaml")
    return Subject(
        run.name, base or trained.model.model, str(result), result.name == "adapter", str(result),
        METHODS[trained.method.method].quantized, trained,
    )  # fmt: skip
