"""The result on disk, as timm and transformers read it: `config.json` and `model.safetensors`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf

from labs_common.cache import file_sum
from labs_common.errors import LabError, json_of
from labs_common.run import written_whole
from labs_common.saved import FOLDER, WEIGHTS, reading_model, saved_folder
from vit_transfer.config import ModelOptions
from vit_transfer.data import Transform
from vit_transfer.model import HEADS, Transfer, architecture

CONFIG = "config.json"


def save_model(
    moving: Transfer,
    options: ModelOptions,
    transform: Transform,
    classes: Sequence[str],
    run: Path,
    state: Mapping[str, torch.Tensor],
) -> None:
    """Writes the whole network to `model/` of a run under its timm name, with the names of its classes.

    `state` are the weights by name, which may be sharded in `moving`.
    `timm.create_model("local-dir:FOLDER", pretrained=True)` reads it, and so does transformers'
    `AutoModelForImageClassification.from_pretrained(FOLDER)`; of another `--head` after `import vit_transfer.model`.
    """
    model: Any = moving.model
    # Copies, because safetensors refuses weights that share memory, as CoaT's positions have several names.
    whole = {name.removeprefix("model."): tensor.to("cpu", copy=True).contiguous() for name, tensor in state.items()}
    own: dict[str, Any] = {"label_names": list(classes)}
    arguments: dict[str, Any] = {}
    if HEADS[options.head] is not None:
        own["pretrained_cfg"] = {"architecture": architecture(options.head)}
        arguments = {"base": model.pretrained_cfg["architecture"], "hidden": options.head_width}
    shown = {"input_size": (3, transform.size, transform.size), "crop_pct": 1.0, "mean": transform.mean,
             "std": transform.std, "interpolation": transform.interpolation}  # fmt: skip
    with written_whole(run / FOLDER) as part:
        save_file(whole, part / WEIGHTS, {"format": "pt"})
        # timm's public `save_for_hf` would write the model's own weights, which may be sharded.
        save_config_for_hf(model, str(part / CONFIG), own, arguments, shown)
        config = json.loads((part / CONFIG).read_text(encoding="utf-8"))
        # It is at the top too. transformers passes both on and then fails; timm needs only the other one.
        config["model_args"].pop("num_classes", None)
        (part / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_model(folder: Path) -> Any:
    """Reads the network in a directory that `save_model` or timm wrote, in evaluation mode.

    Raises:
        LabError: none is there, or it is broken.
    """
    with reading_model(folder, "saved network"):
        model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        for name in ("mean", "std"):  # of each channel, which timm takes as they are
            values = torch.tensor(model.pretrained_cfg[name])
            if values.shape != (3,) or not values.isfinite().all() or (name == "std" and not values.all()):
                raise ValueError(f"{name} is {model.pretrained_cfg[name]}")
        return model


def weights_sums(folder: Path) -> dict[str, int]:
    """Returns the check sums of the files of a saved model."""
    return {file.name: file_sum(file) for file in sorted(folder.iterdir()) if file.is_file()}


def class_names(folder: Path) -> list[str]:
    """Reads the names of the classes of a saved model; none if another program wrote it."""
    said = json_of(folder / CONFIG, str(folder / CONFIG))
    names = said.get("label_names") if isinstance(said, dict) else None
    return list(map(str, names)) if isinstance(names, list) else []


def saved_model(option: str, value: str, classes: Sequence[str]) -> Path | None:
    """Finds the directory of a saved network, if `value` names one or a run that has one; None for a network's name.

    Raises:
        LabError: the directory holds none, or one of other classes.
    """
    path = Path(value)
    if not path.exists() and not (path.is_absolute() or value.startswith(".") or len(path.parts) > 1):
        return None
    folder = saved_folder(path, (CONFIG,), option)
    known = class_names(folder)
    if known != list(classes):
        raise LabError(
            f"{option} {value}: knows other classes than the data ({', '.join(known[:4])} …); train one on this data"
        )
    return folder
