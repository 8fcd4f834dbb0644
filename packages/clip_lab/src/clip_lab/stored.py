"""The result on disk: `clip.json`, `model.safetensors` and a tokenizer, and nothing else is needed."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from clip_lab.config import FINISHED, HeadOptions, Objective, TrainConfig
from clip_lab.data import transform_of
from clip_lab.image import ImageTower
from clip_lab.model import Model, built
from clip_lab.text import PretrainedText, TextTower
from clip_lab.tokens import Words, load_words
from labs_common.data.described import Transform
from labs_common.networks import reading_model, saved_folder
from labs_common.run import written_whole

FOLDER, WEIGHTS = "model", "model.safetensors"


@dataclass(frozen=True)
class Loaded:
    """A trained model with all that it needs to read pictures and captions."""

    objective: Objective
    model: Model
    words: Words
    transform: Transform


def save_model(
    config: TrainConfig, model: Model, state: Mapping[str, torch.Tensor], words: Words, folder: Path
) -> None:
    """Writes the whole model in one move; `state` are its weights, which may be sharded in `model` itself."""
    tower, text = model.image, getattr(model, "text", None)
    said: dict[str, Any] = {
        "objective": config.objective,
        "head": asdict(config.head),
        "length": words.length,
        "end": words.end,
        "vocabulary": len(words),
        "image": {
            "architecture": tower.architecture, "arguments": tower.arguments, "image_size": tower.size,
            "stages": tower.stages, "mean": tower.mean, "std": tower.std, "interpolation": tower.interpolation,
        },
    }  # fmt: skip
    if isinstance(text, PretrainedText):
        said["text"] = {"config": text.network.config.to_dict()}
    else:
        said["text"] = {"width": config.text.text_width, "layers": config.text.text_layers,
                        "heads": config.text.text_heads}  # fmt: skip
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with written_whole(folder) as part:
        save_file(kept, part / WEIGHTS, {"format": "pt"})
        (part / FINISHED).write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
        words.save(part)


def is_ours(path: Path) -> bool:
    """Whether a directory is a finished run, or what `save_model` wrote."""
    return any((folder / FINISHED).is_file() for folder in (path / FOLDER, path))


def load_model(path: Path, option: str = "--checkpoint") -> Loaded:
    """The model of a finished run, or of the directory that `save_model` wrote; in evaluation mode.

    Raises:
        LabError: none is there, or it is broken.
    """
    folder = saved_folder(path, (FINISHED, WEIGHTS), option)
    with reading_model(path, option):
        said = json.loads((folder / FINISHED).read_text(encoding="utf-8"))
        model = _built(said)
        model.load_state_dict(load_file(folder / WEIGHTS))
        objective: Objective = said["objective"]
        length = int(said["length"])
    model.requires_grad_(False)
    return Loaded(objective, model.eval(), load_words(folder, length), transform_of(model.image))


def _built(said: Mapping[str, Any]) -> Model:
    known, text = said["image"], said["text"]
    tower = ImageTower(known["architecture"], known["arguments"], known["image_size"], known["stages"])
    tower.mean, tower.std = tuple(known["mean"]), tuple(known["std"])
    tower.interpolation = known["interpolation"]
    reader: TextTower | PretrainedText
    if "config" in text:
        from transformers import AutoConfig, AutoModel

        config = AutoConfig.for_model(**text["config"])
        reader = PretrainedText(AutoModel.from_config(config), said["length"], said["end"])
    else:
        sizes = (text["width"], text["layers"], text["heads"])
        reader = TextTower(said["vocabulary"], *sizes, said["length"], said["end"])
    return built(said["objective"], tower, reader, HeadOptions(**said["head"]))
