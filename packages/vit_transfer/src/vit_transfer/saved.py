"""The result on disk, as timm and transformers read it: `config.json` and `model.safetensors`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf

from labs_common.errors import LabError
from labs_common.run import written_whole
from vit_transfer.config import ModelOptions
from vit_transfer.data import Transform
from vit_transfer.model import HEADS, Transfer, architecture

FOLDER, WEIGHTS = "model", "model.safetensors"


def save_model(
    accelerator: Accelerator,
    prepared: torch.nn.Module,
    options: ModelOptions,
    transform: Transform,
    classes: Sequence[str],
    folder: Path,
) -> None:
    """Writes the whole network under its timm name, with the names of its classes; called by all processes.

    `timm.create_model("local-dir:FOLDER", pretrained=True)` reads it, and so does transformers'
    `AutoModelForImageClassification.from_pretrained(FOLDER)`; that of `--head mlp` after `import vit_transfer.model`.
    """
    moving = accelerator.unwrap_model(prepared)
    assert isinstance(moving, Transfer)
    whole = accelerator.get_state_dict(prepared)  # DeepSpeed and FSDP: the whole weights, on the main process
    if not accelerator.is_main_process:
        return
    model: Any = moving.model
    state = {name.removeprefix("model."): tensor.cpu().contiguous() for name, tensor in whole.items()}
    own: dict[str, Any] = {"label_names": list(classes)}
    arguments: dict[str, Any] = {}
    if HEADS[options.head] is not None:
        own["pretrained_cfg"] = {"architecture": architecture(options.head)}
        arguments = {"base": model.pretrained_cfg["architecture"], "hidden": options.head_width}
    size = moving.size
    shown = {"input_size": (3, size, size), "crop_pct": 1.0, "mean": transform.mean, "std": transform.std,
             "interpolation": transform.interpolation}  # fmt: skip
    with written_whole(folder) as part:
        save_file(state, part / WEIGHTS, {"format": "pt"})
        # timm's public `save_for_hf` would write the model's own weights, which may be sharded.
        save_config_for_hf(model, str(part / "config.json"), own, arguments, shown)
        config = json.loads((part / "config.json").read_text(encoding="utf-8"))
        # It is at the top too. transformers passes both on and then fails; timm needs only the other one.
        config["model_args"].pop("num_classes", None)
        (part / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_model(folder: Path) -> Any:
    """Reads the network that `save_model` wrote, in evaluation mode.

    Raises:
        LabError: none is there, or it is broken.
    """
    if not (folder / "config.json").is_file() or not (folder / WEIGHTS).is_file():
        raise LabError(f"{folder}: holds no trained model (config.json and {WEIGHTS})")
    try:
        return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise LabError(f"{folder}: the model cannot be read ({reason})") from error


def class_names(folder: Path) -> list[str]:
    """Reads the names of the classes of a saved model; none if another program wrote it."""
    return list(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("label_names", []))


def saved_model(option: str, value: str, classes: Sequence[str]) -> Path | None:
    """Finds the directory of a saved network, if `value` names one or a run that has one; None for a network's name.

    Raises:
        LabError: the directory holds none, or one of other classes.
    """
    path = Path(value)
    if not path.exists():
        if path.is_absolute() or value.startswith(".") or len(path.parts) > 1:
            raise LabError(f"{option} {value}: no such directory")
        return None
    folder = path / FOLDER if (path / FOLDER).is_dir() else path
    if not (folder / "config.json").is_file():
        raise LabError(f"{option} {value}: holds no trained network; name a finished run of vit_transfer.train")
    known = class_names(folder)
    if known != list(classes):
        raise LabError(
            f"{option} {value}: knows other classes than the data ({', '.join(known[:4])} …); train one on this data"
        )
    return folder
