"""Released models of transformers and open_clip as models of this lab: measured, trained further, written again."""

import json
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from open_clip.modified_resnet import AttentionPool2d
from open_clip.pretrained import get_pretrained_cfg
from PIL import Image, ImageOps
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer

from clip_lab.config import FINISHED
from clip_lab.decoder import CocaWriter
from clip_lab.image import Seen
from clip_lab.model import Embedded, Scale, tower_rows
from clip_lab.tokens import FILLED, ReleasedWords, Words
from labs_common.data.captions import Transform
from labs_common.data.images import MOST_PIXELS, RESAMPLING
from labs_common.decoding import SpecialTokens
from labs_common.errors import LabError
from labs_common.run import written_whole
from labs_common.saved import load_auto, load_network, reading_model

SAME_PICTURE = 0.05  # mean difference of two views of a picture, in deviations of its channels
OPEN_CLIP = "open_clip_config.json", "open_clip_model.safetensors"
# The parts of the networks of both libraries; what is in neither, such as CoCa's decoder, does not train.
IMAGE = ("vision_model", "visual_projection", "visual")
TEXT = ("text_model", "text_projection", "text", "transformer", "token_embedding", "positional_embedding", "ln_final")


@dataclass(frozen=True)
class View(Transform):
    """A picture as a tower sees it: squeezed into its square, or the middle square of it.

    Attributes:
        squeezed: whether its sides become the same; then nothing is cut off but by `edge`.
        edge: what the shorter side becomes before the middle is cut out; 0 for `size`.
    """

    squeezed: bool
    edge: int = 0

    def levels(self, image: Image.Image) -> np.ndarray:
        """Resizes to (size, size, 3) of 0 to 255."""
        if not self.squeezed or self.edge:
            edge = self.edge or self.size
            # As torchvision counts: down, and half a pixel to the even side.
            whole = [edge if self.squeezed else int(edge * side / min(image.size)) for side in image.size]
            if whole[0] * whole[1] > MOST_PIXELS:  # of a strip only the middle is enlarged
                return super().levels(ImageOps.fit(image, (min(image.size), min(image.size))))
            image = image.resize((whole[0], whole[1]), RESAMPLING.get(self.interpolation, RESAMPLING["bicubic"]))
            left, top = (round((side - self.size) / 2) for side in whole)
            image = image.crop((left, top, left + self.size, top + self.size))
        return super().levels(image)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Returns the picture as the tower's input (3, size, size)."""
        return self.normalised([self.levels(image)])[0]


class ReleasedTower(nn.Module):
    """One half of a released network, as training freezes, caches and shows it; `embed` is the library's own code.

    Attributes:
        network: its modules.
        view: how an image tower sees a picture, with its parts `size`, `mean`, `std` and `interpolation`.
    """

    count, stages = 1, 0

    def __init__(
        self,
        name: str,
        network: nn.Module,
        parts: Sequence[str],
        embed: Callable[[torch.Tensor], torch.Tensor],
        view: View,
        other: "ReleasedTower | None" = None,
    ) -> None:
        super().__init__()
        self.architecture, self.embed, self.view = name, embed, view
        self.size, self.mean, self.std, self.interpolation = view.size, view.mean, view.std, view.interpolation
        self._other = (other,) if other else ()  # in a tuple, as it is no part of this one
        self.network = nn.Module()
        for part in parts:
            if (found := getattr(network, part, None)) is not None:
                setattr(self.network, part, found)

    @cached_property
    def width(self) -> int:
        """The width of the space in which pictures and captions meet; a picture tells it."""
        if self._other:
            return self._other[0].width
        with torch.no_grad():
            device = next(self.parameters()).device
            return int(self.embed(torch.zeros(1, 3, self.size, self.size, device=device)).shape[1])

    def forward(self, given: torch.Tensor) -> Seen:
        """Embeds pictures (pictures, 3, size, size) or captions (captions, length), with any length."""
        found = self.embed(given)
        return Seen(found, found[:, None])


class ReleasedModel(nn.Module):
    """A CLIP of transformers or open_clip; its attributes are those of `model.ClipModel`.

    Attributes:
        network: the library's own.
        image: its image tower, with the projection; likewise `text`. Their weights are those of `network`.
        features: maps pictures to a probe's input (pictures, width).
        write: writes a directory that the library reads, from the weights of `network` by name.
        library: its name, as `--to` of export has it.
        writer: what writes captions of pictures, as `labs_common.decoding` says; None where nothing does. It does not
            train.
    """

    made_of, reads, embeds, writes, continues = "the towers of a released model", "feature", True, False, False
    image: ReleasedTower
    text: ReleasedTower
    writer: CocaWriter | None = None

    def __init__(
        self,
        name: str,
        library: str,
        network: nn.Module,
        view: View,
        image: Callable[[torch.Tensor], torch.Tensor],
        text: Callable[[torch.Tensor], torch.Tensor],
        features: Callable[[torch.Tensor], torch.Tensor],
        write: Callable[[Path, dict[str, torch.Tensor]], object],
    ) -> None:
        super().__init__()
        self.name, self.library, self.network, self.features, self.write = name, library, network, features, write
        known: Any = network
        # ALIGN divides by what the others multiply by the exponential of.
        self._divides = hasattr(known, "temperature")
        scale = 1 / known.temperature if self._divides else known.logit_scale.exp()
        bias = getattr(known, "logit_bias", None)
        self.scale = Scale(float(scale.detach()), None if bias is None else float(bias.detach()))
        # Not as submodules: each weight has one name, the library's.
        tower = self.__dict__["image"] = ReleasedTower(name, network, IMAGE, image, view)
        self.__dict__["text"] = ReleasedTower(name, network, TEXT, text, view, tower)

    def forward(self, pictures: torch.Tensor, words: torch.Tensor) -> Embedded:
        """Embeds pictures (pictures, 3, size, size), or a frozen tower's rows, and captions (captions, length)."""
        image = self.embedded(tower_rows(self, pictures))
        return Embedded(image, self.embed_texts(words), self.scale(), self.scale.bias)

    def embedded(self, rows: torch.Tensor) -> torch.Tensor:
        """Gives what the tower made of pictures (pictures, width) the length 1."""
        return F.normalize(rows, dim=1)

    def embed_texts(self, words: torch.Tensor) -> torch.Tensor:
        """Embeds captions (captions, length), or the frozen tower's output for them, with length 1."""
        return F.normalize(words if words.is_floating_point() else self.text(words).feature, dim=1)

    def train_towers(self, lora: str, rank: int) -> None:
        """Lets both towers train; of those that `lora` names (image, text, both) adapters of their linear layers alone.

        Raises:
            LabError: there is no layer that an adapter could be added to.
        """
        self.requires_grad_(False)
        adapted = {"none": (), "both": ("image", "text")}.get(lora, (lora,))
        if adapted:
            # Here: this library takes seconds to import, and only a training with --lora needs it.
            from peft import LoraConfig, inject_adapter_in_model

            layers = [layer for tower in adapted for layer in _linear_layers(self.network, tower)]
            if not layers:
                raise LabError(f"--lora {lora}: {self.name} has no linear layers there that adapters could be added to")
            inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers), self.network)
        for name, parameter in self.network.named_parameters():
            tower = _tower_of(name)
            parameter.requires_grad_("lora_" in name if tower in adapted else tower is not None)
        self.scale.requires_grad_(True)

    def save(self, folder: Path, description: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> None:
        """Writes the directory that the library reads, with `clip.json` beside; `state` are the weights by name.

        Adapters are merged into the layers that they belong to.
        """
        own = {name.removeprefix("network."): tensor.detach().cpu() for name, tensor in state.items()}
        scale = own.pop("scale.logit_scale")
        named = "temperature" if self._divides else "logit_scale"
        own[named] = ((-scale).exp() if self._divides else scale).reshape(own[named].shape)
        if (bias := own.pop("scale.logit_bias", None)) is not None:
            own["logit_bias"] = bias.reshape(own["logit_bias"].shape)
        with written_whole(folder) as part:
            self.write(part, merged(own, self.network))
            (part / FINISHED).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def _tower_of(name: str) -> str | None:
    first = name.partition(".")[0]
    return "image" if first in IMAGE else "text" if first in TEXT else None


def _linear_layers(network: nn.Module, tower: str) -> list[str]:
    """Lists the linear layers of a tower, but for those whose weights their parent reads without calling them."""
    called = (nn.MultiheadAttention, AttentionPool2d)
    return [
        name for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and _tower_of(name) == tower
        and not isinstance(network.get_submodule(name.rpartition(".")[0]), called)
    ]  # fmt: skip


def merged(state: Mapping[str, torch.Tensor], network: nn.Module) -> dict[str, torch.Tensor]:
    """Adds the adapters of a network to the weights that they belong to (Hu et al. 2022, eq. 3), by the plain names."""
    found = {}
    for name, tensor in state.items():
        layer, adapted, kind = name.partition(".base_layer.")
        if adapted and kind == "weight":
            scaling = float(network.get_submodule(layer).scaling["default"])  # type: ignore[index]
            down, up = (state[f"{layer}.lora_{part}.default.weight"] for part in "AB")
            tensor = tensor + scaling * up @ down
        if ".lora_" not in name:
            found[name.replace(".base_layer.", ".")] = tensor.contiguous()
    return found


def read_transformers(spec: str, option: str) -> tuple[ReleasedModel, Words, View]:
    """Loads a CLIP of transformers, or of its kind, by its name or directory.

    Raises:
        LabError: it cannot be had, or is none.
    """
    # Here, as the code of these models takes seconds to import and only released ones need it.
    from transformers import AutoImageProcessor, CLIPModel, VisionTextDualEncoderModel

    said = f"{option} {spec}"
    remedy = "name a run, MODEL:PRETRAINED of open_clip, timm:NAME, or a CLIP of transformers"
    config = load_auto(AutoConfig.from_pretrained, spec, said=said, remedy=remedy)
    if config.model_type in ("siglip2", "flava"):  # NaFlex, and a model of more than pairs
        raise LabError(f"{said}: {config.model_type} takes more than pictures of one size; take a CLIP or SigLIP")
    kinds: dict[str, Any] = {"clip": CLIPModel, "vision-text-dual-encoder": VisionTextDualEncoderModel}
    # In float32 whatever its files have: pictures are, and weights that train have to be.
    network = load_network(kinds.get(config.model_type, AutoModel), spec, said, remedy, dtype=torch.float32)
    tokenizer = load_auto(AutoTokenizer.from_pretrained, spec, said=said, remedy=remedy)
    processor = load_auto(AutoImageProcessor.from_pretrained, spec, said=said, remedy=remedy)
    if not hasattr(network, "get_image_features"):
        raise LabError(f"{said}: {type(network).__name__} is no CLIP; for an image tower alone write timm:NAME")
    with reading_model(Path(spec), option):
        view = _processor_view(processor, said)
        places = getattr(config.text_config, "max_position_embeddings", tokenizer.model_max_length)
        most = min(tokenizer.model_max_length, places)
    # SigLIP has no mask: it was trained on texts that are filled up to its full length, and reads no others rightly.
    filled = "max_length" if "siglip" in config.model_type else False
    pad = 0 if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)

    def pooled(output: Any) -> torch.Tensor:
        found: torch.Tensor = output if isinstance(output, torch.Tensor) else output.pooler_output
        return found.flatten(1)  # ALIGN's is (pictures, width, 1, 1)

    def text(words: torch.Tensor) -> torch.Tensor:
        there = words != FILLED
        return pooled(network.get_text_features(words.masked_fill(~there, pad), attention_mask=there.long()))

    def read(sentences: Sequence[str]) -> list[list[int]]:
        found = tokenizer(list(sentences), truncation=True, max_length=most, padding=filled)
        if filled or "attention_mask" not in found:
            return list(found.input_ids)
        masks = zip(found.input_ids, found.attention_mask, strict=True)
        return [[number if there else FILLED for number, there in zip(*both, strict=True)] for both in masks]

    def write(folder: Path, state: dict[str, torch.Tensor]) -> None:
        network.save_pretrained(folder, state_dict=state)
        for part in (tokenizer, processor):
            part.save_pretrained(folder)

    model = ReleasedModel(
        spec, "transformers", network, view, lambda x: pooled(network.get_image_features(pixel_values=x)), text,
        lambda x: pooled(network.vision_model(pixel_values=x)), write,
    )  # fmt: skip
    return model, ReleasedWords(tokenizer, most, read), view


def _processor_view(known: Any, said: str) -> View:
    """Reads off an image processor of transformers how it sees a picture; a drawn one shows whether that is so."""
    squeezed = not getattr(known, "do_center_crop", False)
    size = known.size if squeezed else known.crop_size
    side = int(size["height"] or 0)
    edge = 0 if squeezed else int(known.size["shortest_edge"] or 0)
    how = next((name for name, number in RESAMPLING.items() if number == int(known.resample)), "bicubic")
    view = View(side, tuple(known.image_mean), tuple(known.image_std), how, squeezed, edge)
    if 8 * max(side, edge) ** 2 > MOST_PIXELS:
        raise LabError(f"{said}: it reads pictures of {max(side, edge):,} pixels a side")
    picture = Image.radial_gradient("L").convert("RGB").resize((4 * side, 2 * side)) if side else None
    theirs = known(picture, return_tensors="pt")["pixel_values"][0] if picture else torch.empty(0)
    # A pixel's shift is 0.01 here, as libraries cut odd sides differently; a wrong size or mean is ten times that.
    if picture is None or theirs.shape[1:] != (side, side) or (view(picture) - theirs).abs().mean() > SAME_PICTURE:
        raise LabError(f"{said}: its {type(known).__name__} neither squeezes pictures nor cuts out their middle square")
    return view


def read_open_clip(spec: str, name: str, pretrained: str | None, option: str) -> tuple[ReleasedModel, Words, View]:
    """Loads a model of open_clip: a name of its list with a tag of weights, or `local-dir:…`, or `hf-hub:…`.

    Raises:
        LabError: it cannot be had.
    """
    if not name.startswith(("local-dir:", "hf-hub:")) and name not in open_clip.list_models():
        known = "RN50:openai or ViT-B-32:laion2b_s34b_b79k"
        raise LabError(f"{option} {spec}: open_clip has no model {name}; as in {known}")
    said, remedy = f"{option} {spec}", "check the name and the network"
    # OpenAI's weights, and some others', were trained with another activation than their network's description has;
    # open_clip says so in a warning and computes with the wrong one.
    quick = bool(pretrained and get_pretrained_cfg(name, pretrained).get("quick_gelu", False))
    network = load_auto(
        open_clip.create_model, name, said=said, remedy=remedy, pretrained=pretrained or None, weights_only=True,
        require_pretrained=True, force_quick_gelu=quick,
    )  # fmt: skip
    tokenizer = load_auto(open_clip.get_tokenizer, name, said=said, remedy=remedy)
    shape = open_clip.get_model_preprocess_cfg(network)
    side = int(shape["size"] if isinstance(shape["size"], int) else shape["size"][0])
    how, squeezed = shape.get("interpolation", "bicubic"), shape.get("resize_mode", "shortest") == "squash"
    view = View(side, tuple(shape["mean"]), tuple(shape["std"]), how, squeezed)

    def write(folder: Path, state: dict[str, torch.Tensor]) -> None:
        if name.startswith("local-dir:"):
            source = Path(name.removeprefix("local-dir:"))
            described = json.loads((source / OPEN_CLIP[0]).read_text(encoding="utf-8"))["model_cfg"]
        elif name.startswith("hf-hub:"):
            kept = hf_hub_download(name.removeprefix("hf-hub:"), OPEN_CLIP[0])  # it has been downloaded before
            described = json.loads(Path(kept).read_text(encoding="utf-8"))["model_cfg"]
        else:
            described = deepcopy(open_clip.get_model_config(name)) | ({"quick_gelu": True} if quick else {})
        seen = {"mean": view.mean, "std": view.std, "interpolation": how,
                "resize_mode": "squash" if squeezed else "shortest"}  # fmt: skip
        (folder / OPEN_CLIP[0]).write_text(json.dumps({"model_cfg": described, "preprocess_cfg": seen}, indent=2))
        save_file(state, folder / OPEN_CLIP[1])
        if hasattr(tokenizer, "save_pretrained"):  # of the hub; the others come with the library
            tokenizer.save_pretrained(folder)

    model = ReleasedModel(
        spec, "open_clip", network, view, lambda x: network.encode_image(x), lambda x: network.encode_text(x),
        _before_projection(network), write,
    )  # fmt: skip
    length, special = int(getattr(tokenizer, "context_length", None) or network.context_length), None
    if isinstance(network, open_clip.CoCa) and isinstance(tokenizer, open_clip.SimpleTokenizer):
        start, end, pad = tokenizer.sot_token_id, tokenizer.eot_token_id, network.pad_id
        special, model.writer = SpecialTokens(start, end, pad, (pad, start)), CocaWriter(network)
    return model, ReleasedWords(tokenizer, length, lambda said: tokenizer(list(said)).tolist(), special), view


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
