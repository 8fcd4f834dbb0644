"""The encoder on disk: weights that detector, timm and torchvision read, and a note of what they are."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from labs_common.errors import LabError
from labs_common.networks import load_exactly, read_weights
from labs_common.run import written_whole
from zsi_contrastive.detector.config import TINY
from zsi_contrastive.greedy import TINY_SIZES, GreedySizes, PatchModules
from zsi_contrastive.ssl.config import GREEDY, PRETRAINED, EncoderOptions, PretrainConfig
from zsi_contrastive.ssl.model import Encoder, make_encoder

FOLDER, WEIGHTS = "model", "encoder.safetensors"


def save_encoder(config: PretrainConfig, encoder: torch.nn.Module, path: Path) -> None:
    """Writes `model/` under the run in one move: the network's own weights, without heads."""
    network = encoder.network if isinstance(encoder, Encoder) else encoder
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    said = {"method": config.method, "backbone": config.encoder.backbone, "stem": config.encoder.stem,
            "side": config.encoder.side, "ahead": config.own.ahead}  # fmt: skip
    with written_whole(path / FOLDER) as part:
        save_file(state, part / WEIGHTS, {"format": "pt"})
        (part / PRETRAINED).write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")


def load_encoder(path: Path, option: str = "--checkpoint") -> torch.nn.Module:
    """The encoder of a finished run, in evaluation mode and without gradients.

    Raises:
        LabError: none is there, or it is broken.
    """
    folder = path / FOLDER if (path / FOLDER / PRETRAINED).is_file() else path
    if not (folder / PRETRAINED).is_file():
        there = "holds no pre-trained encoder; name a finished run" if path.is_dir() else "no such directory"
        raise LabError(f"{option} {path}: {there}")
    try:
        said: dict[str, Any] = json.loads((folder / PRETRAINED).read_text(encoding="utf-8"))
        encoder: torch.nn.Module
        if said["method"] in GREEDY:
            sizes = TINY_SIZES if said["backbone"] == TINY else GreedySizes()
            encoder = PatchModules(sizes, said["method"] == "gim", said["ahead"])
        else:
            encoder = make_encoder(EncoderOptions(said["backbone"], said["stem"], said["side"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise LabError(f"{option} {path}: the encoder cannot be read ({reason})") from error
    network = encoder.network if isinstance(encoder, Encoder) else encoder
    load_exactly(network, read_weights(folder / WEIGHTS, option), f"{option} {path}")
    return encoder.requires_grad_(False).eval()
