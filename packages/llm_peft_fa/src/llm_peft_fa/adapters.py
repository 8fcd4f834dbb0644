"""What fine-tuning leaves on disk, written whole or not at all: PEFT's adapters, or a model of transformers."""

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from labs_common.errors import LabError
from labs_common.run import written_whole
from llm_peft_fa.methods import Adapted
from llm_peft_fa.model import device_precision, load_model
from llm_peft_fa.packed import PackedCausalLM

FOLDERS = ("adapter", "model")  # where a run keeps its result: of PEFT's methods, and of layers and full
Tensors = dict[str, torch.Tensor]


def initial_update(model: Adapted) -> Tensors | None:
    """The update that PiSSA and OLoRA start from, which the base then lacks; None for other methods.

    `save_tuned` needs it to write an adapter of the base as it was.
    """
    if isinstance(model, PeftModel) and getattr(model.active_peft_config, "init_lora_weights", True) in (
        "pissa",
        "olora",
    ):
        return {name: tensor.detach().cpu().clone() for name, tensor in get_peft_model_state_dict(model).items()}
    return None


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
    gathered = accelerator.get_state_dict(model)  # DeepSpeed and FSDP: the whole weights, on the main process
    if not accelerator.is_main_process:
        return
    state = {name.removeprefix("model."): tensor for name, tensor in gathered.items()}
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
    """The LoRA update B A - B0 A0 of twice the rank: [B, -B0] [A; A0].

    So PiSSA's and OLoRA's results are adapters of the base as it was, as `peft` converts them too.
    """
    made = {}
    for name, tensor in now.items():
        first = start[name].to(tensor)
        made[name] = torch.cat([tensor, first], 0) if "lora_A" in name else torch.cat([tensor, -first], 1)
    return {name: tensor.contiguous() for name, tensor in made.items()}


def load_tuned(run: Path, model: str, quantized: bool = False) -> Adapted:
    """A run's result for generation: its adapter on the base `model`, or its own model.

    Raises:
        LabError: neither is there, or the adapter does not fit the base.
    """
    if (run / "model").is_dir():
        return load_model(str(run / "model"), device_precision())
    return adapted_model(run / "adapter", model, quantized)


def adapted_model(folder: Path, model: str, quantized: bool = False) -> PeftModel:
    """The base `model` with the adapter of `folder` on it, for generation.

    Raises:
        LabError: there is no adapter, or it does not fit the base.
    """
    try:
        PeftConfig.from_pretrained(str(folder))
        base = load_model(model, device_precision(), quantized)
        adapted: PeftModel = PeftModel.from_pretrained(base, str(folder))
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = (str(error) or type(error).__name__).strip().splitlines()[0][:200]
        raise LabError(f"{folder}: no adapter can be loaded from here ({reason})") from error
    return adapted.eval()


@contextlib.contextmanager
def plain_base(tuned: Adapted, model: str) -> Iterator[Adapted]:
    """The base of a fine-tuned model: itself with the adapter switched off, or the base read anew."""
    if isinstance(tuned, PeftModel):
        with tuned.disable_adapter():
            yield tuned
    else:
        base: PreTrainedModel = load_model(model, device_precision())
        torch.nn.Module.to(base, tuned.device)
        yield base


def save_merged(adapter: Path, model: str, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes the unquantised base plus its update as one model that `transformers` loads."""
    tuned = adapted_model(adapter, model)
    with written_whole(folder) as part:
        tuned.merge_and_unload().save_pretrained(part)
        tokenizer.save_pretrained(part)


def result_folder(run: Path) -> Path:
    """The directory of a finished run's adapter or model.

    Raises:
        LabError: there is none.
    """
    for name in FOLDERS:
        if (run / name).is_dir():
            return run / name
    raise LabError(f"--run {run}: has no adapter and no model; name the directory of a finished run")


def latest_run(run: Path | None) -> Path:
    """The run's directory, by default the newest finished one under runs/.

    Raises:
        LabError: it holds no result.
    """
    if run is None:
        finished = sorted(
            (folder for name in FOLDERS for folder in Path("runs").glob(f"*/{name}")),
            key=lambda folder: folder.stat().st_mtime,
        )
        if not finished:
            raise LabError("no finished run under runs/; train one, or name one with --run")
        return finished[-1].parent
    result_folder(run)
    return run
