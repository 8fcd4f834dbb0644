"""The encoder on disk: weights that detector, timm and torchvision read, and a note of what they are."""

import json
from pathlib import Path

import torch

from labs_common.saved import FOLDER, load_exactly, read_weights, reading_model, save_model, saved_folder
from zsi_contrastive.ssl.config import EncoderOptions, MethodOptions, PretrainConfig
from zsi_contrastive.ssl.methods import METHODS, complete
from zsi_contrastive.ssl.model import Encoder, encoder_of

WEIGHTS, DESCRIPTION = "encoder.safetensors", "pretrained.json"


def save_encoder(config: PretrainConfig, encoder: torch.nn.Module, path: Path) -> None:
    """Writes `model/` under the run in one move: the network's own weights, without heads."""
    network = encoder.network if isinstance(encoder, Encoder) else encoder
    description = {"method": config.method, "backbone": config.encoder.backbone, "stem": config.encoder.stem,
                   "side": config.encoder.side, "ahead": config.own.ahead}  # fmt: skip
    save_model(path / FOLDER, DESCRIPTION, description, network.state_dict(), weights=WEIGHTS)


def load_encoder(path: Path) -> torch.nn.Module:
    """Loads the encoder of a finished run, in evaluation mode and without gradients.

    Raises:
        LabError: none is there, or it is broken.
    """
    folder = saved_folder(path, (DESCRIPTION, WEIGHTS), "--checkpoint")
    with reading_model(path, "--checkpoint"):
        said = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        config = PretrainConfig(said["method"], own=MethodOptions(ahead=said["ahead"]),
                                encoder=EncoderOptions(said["backbone"], said["stem"], said["side"]))  # fmt: skip
        encoder = encoder_of(METHODS[said["method"]].network(complete(config)))
    network = encoder.network if isinstance(encoder, Encoder) else encoder
    load_exactly(network, read_weights(folder / WEIGHTS, "--checkpoint"), f"--checkpoint {path}")
    return encoder.requires_grad_(False).eval()
