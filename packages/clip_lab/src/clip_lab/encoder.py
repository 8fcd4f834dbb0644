"""One face for every model that reads pictures, and captions if it can: ours and released ones, all frozen.

```
encoder = load_encoder("RN50:openai")
encoder.features(pictures)   # what a probe reads
encoder.image(pictures), encoder.text(["a dog"])   # where pictures and captions meet
```
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from timm.data import resolve_model_data_config

from clip_lab.config import FINISHED, TRAIN, ImageOptions
from clip_lab.image import make_image_tower
from clip_lab.losses import OBJECTIVES
from clip_lab.model import tower_rows
from clip_lab.released import ReleasedModel, View
from clip_lab.saved import Loaded, load_any
from labs_common.device import inference_accelerator
from labs_common.errors import LabError
from labs_common.frozen.cache import front_key
from labs_common.run import newest_run

TEXTS = 256  # sentences through a text tower at once


@dataclass(frozen=True)
class Encoder:
    """A frozen model.

    Attributes:
        name: as it was asked for.
        module: all of its weights.
        features: maps pictures (pictures, 3, size, size) to a probe's input (pictures, width).
        image: maps the same to embeddings of length 1; None where it has none.
        text: maps sentences to embeddings of length 1; None where it has none.
        scale: factor of the cosines.
        ours: the same as a model of this lab, with its tokenizer; None for an image tower alone.
        accelerator: its device, and the precision in which `embedded`, `read` and rows of features are computed.
    """

    name: str
    module: torch.nn.Module
    view: View
    features: Callable[[torch.Tensor], torch.Tensor]
    image: Callable[[torch.Tensor], torch.Tensor] | None
    text: Callable[[Sequence[str]], torch.Tensor] | None
    scale: float
    ours: Loaded | None = None
    accelerator: Accelerator = field(default_factory=inference_accelerator)

    @property
    def device(self) -> torch.device:
        """The device that its weights are on."""
        return self.accelerator.device

    @torch.no_grad()
    def embedded(self, pictures: torch.Tensor) -> torch.Tensor:
        """Embeds pictures (pictures, 3, size, size): (pictures, width), on the CPU.

        Raises:
            LabError: it has none.
        """
        if self.image is None:
            able = ", ".join(name for name, objective in OBJECTIVES.items() if objective.model.embeds)
            raise LabError(
                f"--checkpoint {self.name}: has no embeddings of pictures that captions could be compared with; take a "
                f"model that was trained with an --objective that makes them: {able}"
            )
        with self.accelerator.autocast():
            return self.image(pictures.to(self.device)).float().cpu()

    @torch.no_grad()
    def read(self, sentences: Sequence[str]) -> torch.Tensor:
        """Embeds sentences: (sentences, width), on the CPU.

        Raises:
            LabError: it has none.
        """
        if self.text is None:
            raise LabError(f"--checkpoint {self.name}: reads no text; name a model with a text tower")
        with self.accelerator.autocast():
            parts = [self.text(sentences[at : at + TEXTS]).float().cpu() for at in range(0, len(sentences), TEXTS)]
        return torch.cat(parts)

    def recipe(self) -> dict[str, Any]:
        """Returns all that its output for a picture depends on, as JSON values."""
        return front_key(self.module, self.accelerator) | {"view": asdict(self.view)}


def load_encoder(spec: str) -> Encoder:
    """Loads the model that `--checkpoint` names, frozen, in evaluation mode.

    What `saved.load_any` takes, by default the newest run under runs/; or `timm:NAME`, an image tower alone.

    Raises:
        LabError: it cannot be had.
    """
    if spec.startswith("timm:"):
        return frozen(_timm(spec))
    spec = spec or str(newest_run(FINISHED, TRAIN))
    return frozen(of_loaded(load_any(spec), spec))


def frozen(encoder: Encoder) -> Encoder:
    """Puts the encoder on its device, in evaluation mode, without gradients."""
    encoder.module.to(encoder.device).eval().requires_grad_(False)
    return encoder


def of_loaded(loaded: Loaded, name: str) -> Encoder:
    """Wraps a model of this lab, or one of another library as such."""
    seen = loaded.transform
    view = seen if isinstance(seen, View) else View(**asdict(seen), squeezed=True)
    model: Any = loaded.model  # of any objective: its class says what it can do

    def features(pictures: torch.Tensor) -> torch.Tensor:
        return model.pooled(tower_rows(model, pictures))

    if not model.embeds:
        return Encoder(name, model, view, features, None, None, 1.0, loaded)

    def text(sentences: Sequence[str]) -> torch.Tensor:
        return model.embed_texts(loaded.words(sentences).to(next(model.parameters()).device))

    known = model.features if isinstance(model, ReleasedModel) else features
    scale = float(model.scale().detach())
    return Encoder(name, model, view, known, lambda x: model.embedded(tower_rows(model, x)), text, scale, loaded)


def _timm(spec: str) -> Encoder:
    name, _, how = spec.removeprefix("timm:").partition(",")
    weights = Path(how) if how.endswith(".safetensors") else None
    if how not in ("", "random") and weights is None:
        raise LabError(f"--checkpoint {spec}: after the name only ,random or ,FILE.safetensors may follow")
    tower = make_image_tower(ImageOptions(name, not how, weights))
    view = _timm_view(resolve_model_data_config(tower.network), f"--checkpoint {spec}")
    return Encoder(spec, tower, view, lambda x: tower(x).feature, None, None, 1.0)


def _timm_view(known: Mapping[str, Any], said: str) -> View:
    """Sees as timm's own transform of the weights does, from what `timm.data.resolve_data_config` says."""
    if known["crop_mode"] == "border":
        raise LabError(f"{said}: its pictures get a border, which nothing here gives; take another network")
    side, squeezed = int(known["input_size"][-1]), known["crop_mode"] == "squash"
    edge = math.floor(side / known["crop_pct"])
    return View(side, tuple(known["mean"]), tuple(known["std"]), str(known["interpolation"]), squeezed, edge)
