"""The result on disk: `config.json`, `model.safetensors` and the vocabulary, and nothing else is needed."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from caption_lab.clipcap import LANGUAGE, ClipCap, load_language
from caption_lab.config import DecoderOptions
from caption_lab.encoder import Encoder
from caption_lab.model import ImageCaptioningModel, make_model
from caption_lab.vocabulary import TOKENS, Vocabulary, load_vocabulary
from labs_common.data.captions import Transform
from labs_common.decoding import Written, write
from labs_common.options import DecodingOptions
from labs_common.saved import WEIGHTS, load_model, save_model, saved_folder

CONFIG = "config.json"


@dataclass(frozen=True)
class Captioner:
    """A model with all that it needs to describe a picture.

    Attributes:
        kind: its name in `CAPTIONERS`.
    """

    kind: str
    model: ImageCaptioningModel
    vocabulary: Vocabulary
    options: DecoderOptions

    def describe(
        self,
        images: Sequence[Image.Image],
        options: DecodingOptions,
        generator: torch.Generator | None = None,
        attention: bool = False,
    ) -> Written:
        """Writes a caption for each picture; see `write`."""
        transform = self.model.encoder.transform
        device = next(self.model.parameters()).device
        pictures = transform.normalised([transform.levels(image) for image in images]).to(device)
        with torch.no_grad():
            features = self.model.encoder(pictures)
        length = self.vocabulary.length + 1
        return write(self.model.decoder, features, TOKENS, length, options, generator, attention)


def save_captioner(folder: Path, captioner: Captioner, state: Mapping[str, torch.Tensor]) -> None:
    """Writes the whole captioner, encoder included, in one move; `state` are its weights by name."""
    encoder, transform = captioner.model.encoder, captioner.model.encoder.transform
    described = {
        "architecture": encoder.architecture, "arguments": encoder.arguments, "pool": encoder.pool,
        "image_size": transform.size, "mean": transform.mean, "std": transform.std,
        "interpolation": transform.interpolation,
    }  # fmt: skip
    said = {"model": captioner.kind, "decoder": asdict(captioner.options), "encoder": described}

    def more(part: Path) -> None:
        captioner.vocabulary.save(part)
        if isinstance(captioner.model.decoder, ClipCap):
            captioner.model.decoder.language.config.save_pretrained(part / LANGUAGE)

    save_model(folder, CONFIG, said, state, more)


def load_captioner(path: Path, option: str = "--checkpoint") -> Captioner:
    """Reads the captioner of a finished run, or of the directory that `save_captioner` wrote; in evaluation mode.

    Nothing of it trains. `option` is what named the path, for errors.

    Raises:
        LabError: none is there, or it is broken.
    """
    folder = saved_folder(path, (CONFIG, WEIGHTS), option)
    language = (folder / LANGUAGE).is_dir()
    vocabulary = load_language(folder) if language else load_vocabulary(folder)

    def options_of(said: dict[str, Any]) -> DecoderOptions:
        options = DecoderOptions(**said["decoder"])
        return replace(options, language_model=str(folder / LANGUAGE)) if language else options

    def build(said: dict[str, Any], state: Mapping[str, torch.Tensor]) -> ImageCaptioningModel:
        known = said["encoder"]
        encoder = Encoder(known["architecture"], known["arguments"], known["image_size"], known["pool"])
        encoder.transform = Transform(
            known["image_size"], tuple(known["mean"]), tuple(known["std"]), known["interpolation"]
        )
        return make_model(said["model"], encoder, options_of(said), vocabulary)

    model, said, _ = load_model(path, CONFIG, option, build)
    return Captioner(said["model"], model, vocabulary, options_of(said))
