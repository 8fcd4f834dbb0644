"""Networks of timm by name, and weights from files: what goes wrong with either is said in one line.

timm is a dependency of the labs that call this, not of the core.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from labs_common.errors import LabError


def timm_arguments(name: str, size: int, option: str) -> dict[str, Any]:
    """What `timm.create_model` needs besides the name so that the network takes pictures of `size` (0: its own).

    Raises:
        LabError: timm has no such network; similar names are listed.
    """
    import timm

    plain = name.removeprefix("timm/")
    if not timm.is_model(plain.split(".")[0]):
        like = difflib.get_close_matches(plain, timm.list_models(), 4)
        hint = f"; like it are {', '.join(like)}" if like else ""
        raise LabError(f"{option} {name}: timm has no such model{hint}")
    known = timm.get_pretrained_cfg(plain, allow_unregistered=True)
    fixed = known is not None and known.fixed_input_size
    return {"img_size": size} if size and fixed else {}


def read_weights(file: Path, option: str) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors file.

    Raises:
        LabError: it cannot be read.
    """
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise LabError(f"{option} {file}: cannot be read ({str(error).splitlines()[0]})") from error


def load_exactly(network: torch.nn.Module, state: Mapping[str, torch.Tensor], said: str) -> None:
    """Gives the network its weights from `state`, which may hold more, such as a classifier.

    Raises:
        LabError: one is missing or has another shape; `said` names where they are from.
    """
    own = network.state_dict()
    for name, tensor in own.items():
        if name not in state or state[name].shape != tensor.shape:
            raise LabError(f"{said}: is of another architecture or image size (first difference: {name})")
    network.load_state_dict({name: state[name] for name in own})
