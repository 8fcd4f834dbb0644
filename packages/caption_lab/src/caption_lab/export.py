"""The result on disk: `config.json`, `model.safetensors` and the vocabulary, and nothing else is needed."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from caption_lab.config import DecoderOptions, Model
from caption_lab.data import transform_of
from caption_lab.encoder import Encoder
from caption_lab.model import ImageCaptioningModel, make_decoder
from caption_lab.vocabulary import Vocabulary, load_vocabulary
from labs_common.data.described import Transform
from labs_common.networks import reading_model, saved_folder
from labs_common.run import written_whole

FOLDER, WEIGHTS, CONFIG = "model", "model.safetensors", "config.json"


@dataclass(frozen=True)
class Captioner:
    """A trained model with all that it needs to describe a picture.

    Attributes:
        kind: show_tell, show_attend_tell or transformer.
    """

    kind: Model
    model: ImageCaptioningModel
    vocabulary: Vocabulary
    transform: Transform
    options: DecoderOptions

    @property
    def length(self) -> int:
        """Most words of a caption, `<end>` included."""
        return self.vocabulary.length + 1


def save_captioner(
    kind: Model, model: ImageCaptioningModel, options: DecoderOptions, vocabulary: Vocabulary, folder: Path
) -> None:
    """Writes the whole captioner, encoder included, in one move."""
    encoder = model.encoder
    said = {
        "model": kind,
        "decoder": dataclasses.asdict(options),
        "encoder": {
            "architecture": encoder.architecture, "arguments": encoder.arguments, "pool": encoder.pool,
            "image_size": encoder.size, "mean": encoder.mean, "std": encoder.std,
            "interpolation": encoder.interpolation,
        },
    }  # fmt: skip
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with written_whole(folder) as part:
        save_file(state, part / WEIGHTS, {"format": "pt"})
        (part / CONFIG).write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
        vocabulary.save(part)


def load_captioner(path: Path, option: str = "--checkpoint") -> Captioner:
    """The captioner of a finished run, or of the directory that `save_captioner` wrote; in evaluation mode.

    Raises:
        LabError: none is there, or it is broken.
    """
    folder = saved_folder(path, (CONFIG, WEIGHTS), option)
    vocabulary = load_vocabulary(folder)
    with reading_model(path, option):
        said = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        model = _built(said, vocabulary)
        model.load_state_dict(load_file(folder / WEIGHTS))
    return Captioner(
        said["model"], model.eval(), vocabulary, transform_of(model.encoder), DecoderOptions(**said["decoder"])
    )


def _built(said: dict[str, Any], vocabulary: Vocabulary) -> ImageCaptioningModel:
    known = said["encoder"]
    encoder = Encoder(known["architecture"], known["arguments"], known["image_size"], known["pool"])
    encoder.mean, encoder.std = tuple(known["mean"]), tuple(known["std"])
    encoder.interpolation = known["interpolation"]
    options = DecoderOptions(**said["decoder"])
    decoder = make_decoder(said["model"], options, len(vocabulary), vocabulary.length + 1, encoder)
    for parameter in encoder.parameters():
        parameter.requires_grad_(False)
    return ImageCaptioningModel(encoder, decoder)


def features_of(captioner: Captioner, pictures: torch.Tensor) -> torch.Tensor:
    """What the decoder reads of pictures (batch, 3, size, size)."""
    with torch.no_grad():
        features: torch.Tensor = captioner.model.encoder(pictures)
    return features
