"""One face for every model that reads pictures, and captions if it can: ours and released ones, all frozen.

```
encoder = load_encoder("RN50:openai")
encoder.features(pictures)   # what a probe reads
encoder.image(pictures), encoder.text(["a dog"])   # where pictures and captions meet
```
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from open_clip.pretrained import get_pretrained_cfg
from PIL import Image, ImageOps
from transformers import AutoConfig, AutoModel, AutoTokenizer

from clip_lab.config import FINISHED, TRAIN, ImageOptions
from clip_lab.image import make_image_tower
from clip_lab.losses import OBJECTIVES
from clip_lab.model import tower_rows
from clip_lab.saved import Loaded, is_ours, load_model
from labs_common.data.captions import Transform
from labs_common.data.images import MOST_PIXELS, RESAMPLING
from labs_common.errors import LabError
from labs_common.frozen.cache import front_key
from labs_common.run import newest_run
from labs_common.saved import load_auto, load_network, reading_model
from labs_common.training import inference_accelerator

TEXTS = 256  # sentences through a text tower at once


@dataclass(frozen=True)
class View(Transform):
    """A picture as a tower sees it: squeezed into its square, or the middle square of it.

    Attributes:
        squeezed: whether nothing is cut off.
    """

    squeezed: bool

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Returns the picture as the tower's input (3, size, size)."""
        if not self.squeezed:
            # As torchvision counts: down, and half a pixel to the even side.
            whole = [int(self.size * side / min(image.size)) for side in image.size]
            if whole[0] * whole[1] > MOST_PIXELS:  # of a strip only the middle is enlarged
                return replace(self, squeezed=True)(ImageOps.fit(image, (min(image.size), min(image.size))))
            image = image.resize((whole[0], whole[1]), RESAMPLING.get(self.interpolation, RESAMPLING["bicubic"]))
            left, top = (round((side - self.size) / 2) for side in whole)
            image = image.crop((left, top, left + self.size, top + self.size))
        return self.normalised([self.levels(image)])[0]


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
        ours: the model, where it is one of this lab.
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

    A finished run of ours or its `model/` (by default the newest under runs/); `MODEL:PRETRAINED` of open_clip, such as
    `RN50:openai`, or `hf-hub:ORG/NAME`; `timm:NAME`, an image tower alone; else a CLIP of transformers by its name or
    directory.

    Raises:
        LabError: it cannot be had.
    """
    path = Path(spec) if spec else newest_run(FINISHED, TRAIN)
    if is_ours(path) or (spec and path.is_dir() and not (path / "config.json").is_file()):
        if (path / "open_clip_config.json").is_file():
            return frozen(_open_clip(spec, f"local-dir:{path}", None))
        return frozen(of_ours(load_model(path), spec or str(path)))
    if spec.startswith("hf-hub:"):
        return frozen(_open_clip(spec, spec, None))
    if spec.startswith("timm:"):
        return frozen(_timm(spec))
    if path.is_dir():
        return frozen(_transformers(spec))
    name, colon, pretrained = spec.partition(":")
    return frozen(_open_clip(spec, name, pretrained) if colon else _transformers(spec))


def frozen(encoder: Encoder) -> Encoder:
    """Puts the encoder on its device, in evaluation mode, without gradients."""
    encoder.module.to(encoder.device).eval().requires_grad_(False)
    return encoder


def of_ours(loaded: Loaded, name: str) -> Encoder:
    """Wraps a model of this lab."""
    view = View(**asdict(loaded.transform), squeezed=True)
    model: Any = loaded.model  # of any objective: its class says what it can do
    if not model.embeds:
        return Encoder(name, model, view, lambda x: model.image(x).feature, None, None, 1.0, loaded)

    def features(pictures: torch.Tensor) -> torch.Tensor:
        return model.pooled(tower_rows(model, pictures))

    def text(sentences: Sequence[str]) -> torch.Tensor:
        return model.embed_texts(loaded.words(sentences).to(next(model.parameters()).device))

    scale = float(model.scale().detach())
    return Encoder(name, model, view, features, lambda x: model.embedded(tower_rows(model, x)), text, scale, loaded)


def _transformers(spec: str) -> Encoder:
    # Here, as the code of these models takes seconds to import and only released ones need it.
    from transformers import AutoImageProcessor, CLIPModel, VisionTextDualEncoderModel

    said = f"--checkpoint {spec}"
    remedy = "name a run, MODEL:PRETRAINED of open_clip, timm:NAME, or a CLIP of transformers"
    config = load_auto(AutoConfig.from_pretrained, spec, said=said, remedy=remedy)
    if config.model_type in ("siglip2", "flava"):  # NaFlex, and a model of more than pairs
        raise LabError(f"{said}: {config.model_type} takes more than pictures of one size; take a CLIP or SigLIP")
    kinds: dict[str, Any] = {"clip": CLIPModel, "vision-text-dual-encoder": VisionTextDualEncoderModel}
    model = load_network(kinds.get(config.model_type, AutoModel), spec, said, remedy)
    tokenizer = load_auto(AutoTokenizer.from_pretrained, spec, said=said, remedy=remedy)
    processor = load_auto(AutoImageProcessor.from_pretrained, spec, said=said, remedy=remedy)
    if not hasattr(model, "get_image_features"):
        kind = type(model).__name__
        raise LabError(f"--checkpoint {spec}: {kind} is no CLIP; for an image tower alone write timm:NAME")
    with reading_model(Path(spec), "--checkpoint"):
        view = _processor_view(processor)
        places = getattr(config.text_config, "max_position_embeddings", tokenizer.model_max_length)
        most = min(tokenizer.model_max_length, places)
    # SigLIP has no mask: it was trained on texts that are filled up to its full length, and reads no others rightly.
    filled = "max_length" if "siglip" in config.model_type else True

    def pooled(output: Any) -> torch.Tensor:
        found: torch.Tensor = output if isinstance(output, torch.Tensor) else output.pooler_output
        return found.flatten(1)  # ALIGN's is (pictures, width, 1, 1)

    def text(sentences: Sequence[str]) -> torch.Tensor:
        read = tokenizer(list(sentences), truncation=True, max_length=most, padding=filled, return_tensors="pt")
        return F.normalize(pooled(model.get_text_features(**read.to(model.device))), dim=-1)

    def features(pictures: torch.Tensor) -> torch.Tensor:
        return pooled(model.vision_model(pixel_values=pictures))

    def image(pictures: torch.Tensor) -> torch.Tensor:
        return F.normalize(pooled(model.get_image_features(pixel_values=pictures)), dim=-1)

    # ALIGN divides by what the others multiply by the exponential of.
    scale = 1 / model.temperature if config.model_type == "align" else model.logit_scale.exp()
    return Encoder(spec, model, view, features, image, text, float(scale.detach()))


def _processor_view(known: Any) -> View:
    """Reads off an image processor of transformers how it sees a picture."""
    squeezed = not getattr(known, "do_center_crop", False)
    size = known.size if squeezed else known.crop_size
    side = int(getattr(size, "height", None) or size["height"])
    how = next((name for name, number in RESAMPLING.items() if number == int(known.resample)), "bicubic")
    return View(side, tuple(known.image_mean), tuple(known.image_std), how, squeezed)


def _open_clip(spec: str, name: str, pretrained: str | None) -> Encoder:
    architecture = name.removeprefix("local-dir:")
    if not name.startswith(("local-dir:", "hf-hub:")) and architecture not in open_clip.list_models():
        known = "RN50:openai or ViT-B-32:laion2b_s34b_b79k"
        raise LabError(f"--checkpoint {spec}: open_clip has no model {architecture}; as in {known}")
    said, remedy = f"--checkpoint {spec}", "check the name and the network"
    # OpenAI's weights, and some others', were trained with another activation than their network's description has;
    # open_clip says so in a warning and computes with the wrong one.
    tag = get_pretrained_cfg(architecture, pretrained) if pretrained else {}
    model = load_auto(
        open_clip.create_model, name, said=said, remedy=remedy, pretrained=pretrained or None, weights_only=True,
        require_pretrained=True, force_quick_gelu=tag.get("quick_gelu", False),
    )  # fmt: skip
    tokenizer = load_auto(open_clip.get_tokenizer, name, said=said, remedy=remedy)
    shape = open_clip.get_model_preprocess_cfg(model)
    side = int(shape["size"] if isinstance(shape["size"], int) else shape["size"][0])
    how, squeezed = shape.get("interpolation", "bicubic"), shape.get("resize_mode", "shortest") == "squash"
    view = View(side, tuple(shape["mean"]), tuple(shape["std"]), how, squeezed)

    def text(sentences: Sequence[str]) -> torch.Tensor:
        device = next(model.parameters()).device
        return model.encode_text(tokenizer(list(sentences)).to(device), normalize=True)

    def image(pictures: torch.Tensor) -> torch.Tensor:
        return model.encode_image(pictures, normalize=True)

    scale = float(model.logit_scale.detach().exp())
    return Encoder(spec, model, view, _before_projection(model), image, text, scale)


def _before_projection(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns the function of the paper's probe: a ViT's feature before its projection (a ResNet's pool projects)."""
    visual = model.visual
    if hasattr(visual, "trunk"):  # a timm tower
        return lambda x: visual.trunk(x)
    if not hasattr(visual, "proj"):  # a ResNet
        return lambda x: visual(x)

    def pooled(pictures: torch.Tensor) -> torch.Tensor:
        kept, visual.proj = visual.proj, None
        try:
            found = visual(pictures)
        finally:
            visual.proj = kept
        return found[0] if isinstance(found, tuple) else found  # CoCa's has what its decoder reads beside it

    return pooled


def _timm(spec: str) -> Encoder:
    name, _, how = spec.removeprefix("timm:").partition(",")
    if how not in ("", "random"):
        raise LabError(f"--checkpoint {spec}: after the name only ,random may follow (weights that were never trained)")
    tower = make_image_tower(ImageOptions(image=name, image_pretrained=not how))
    view = View(tower.size, tower.mean, tower.std, tower.interpolation, squeezed=False)
    return Encoder(spec, tower, view, lambda x: tower(x).feature, None, None, 1.0)
