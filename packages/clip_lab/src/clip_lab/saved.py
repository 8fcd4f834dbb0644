"""The result on disk, `clip.json`, `model.safetensors` and a tokenizer, and what other libraries read instead."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel

from clip_lab.config import FINISHED, HeadOptions, TrainConfig
from clip_lab.data import transform_of
from clip_lab.image import ImageTower
from clip_lab.losses import OBJECTIVES
from clip_lab.model import ClipModel, Model
from clip_lab.released import OPEN_CLIP, ReleasedModel, View, read_open_clip, read_transformers
from clip_lab.text import PretrainedText, TextTower
from clip_lab.tokens import Words, load_words
from labs_common import saved
from labs_common.data.captions import Transform
from labs_common.data.images import MOST_PIXELS, RESAMPLING
from labs_common.errors import LabError, json_of
from labs_common.run import written_whole
from labs_common.saved import load_auto


@dataclass(frozen=True)
class Loaded:
    """A trained model with all that it needs to read pictures and captions."""

    objective: str
    model: Model | ReleasedModel
    words: Words
    transform: Transform
    said: Mapping[str, Any] = field(default_factory=dict)  # what `clip.json` says of it


def save_model(
    config: TrainConfig,
    model: Model | ReleasedModel,
    state: Mapping[str, torch.Tensor],
    words: Words,
    run: Path,
    said: Mapping[str, Any],
) -> None:
    """Writes the whole model to `model/` under the run; `state` are its weights, which may be sharded in `model`.

    `said` describes the model that training started from, if it did from one of this lab.
    """
    if isinstance(model, ReleasedModel):
        further = {"objective": config.objective, "released": model.library, "started": model.name}
        model.save(run / saved.FOLDER, further, state)
        return
    if said:
        saved.save_model(run / saved.FOLDER, FINISHED, said, state, words.save)
        return
    tower, text = model.image, getattr(model, "text", None)
    if isinstance(text, PretrainedText):
        said_of_text = {"config": text.network.config.to_dict(), "pool": text.pool}
    else:
        sizes = config.text
        said_of_text = {"width": sizes.text_width, "layers": sizes.text_layers, "heads": sizes.text_heads}
    description = {
        "objective": config.objective,
        "head": asdict(config.head),
        "length": words.length,
        "end": words.end,
        "vocabulary": len(words),
        "image": {
            "architecture": tower.architecture, "arguments": tower.arguments, "image_size": tower.size,
            "stages": tower.stages, "mean": tower.mean, "std": tower.std, "interpolation": tower.interpolation,
        },
        "text": said_of_text,
    }  # fmt: skip
    saved.save_model(run / saved.FOLDER, FINISHED, description, state, words.save)


def is_ours(path: Path) -> bool:
    """Tells whether a directory is a finished run, or what `save_model` wrote."""
    return any((folder / FINISHED).is_file() for folder in (path / saved.FOLDER, path))


def load_model(path: Path, option: str = "--checkpoint") -> Loaded:
    """Loads the model of a finished run, or of the directory that `save_model` wrote; in evaluation mode.

    Raises:
        LabError: none is there, or it is broken.
    """
    folder = saved.saved_folder(path, (FINISHED,), option)
    with saved.reading_model(path, option):
        started = json_of(folder / FINISHED, FINISHED).get("released")
        if started is not None:
            read = {"transformers": _transformers, "open_clip": _local_open_clip}[started]
            return read(str(folder), option)
    model, said, folder = saved.load_model(path, FINISHED, option, _build)
    words = load_words(folder, int(said["length"]))
    return Loaded(said["objective"], model, words, transform_of(model.image), said)


def load_any(spec: str, option: str = "--checkpoint") -> Loaded:
    """Loads a model by its name: of this lab, of transformers or of open_clip; in evaluation mode.

    A finished run of ours or its `model/`; `MODEL:PRETRAINED` of open_clip, such as `RN50:openai`, or
    `hf-hub:ORG/NAME`; else a CLIP of transformers by its name; or a directory of either library.

    Raises:
        LabError: it cannot be had.
    """
    path, (name, colon, pretrained) = Path(spec), spec.partition(":")
    if is_ours(path):
        return load_model(path, option)
    if (path / OPEN_CLIP[0]).is_file():
        return _local_open_clip(spec, option)
    if path.is_dir() and not (path / "config.json").is_file():
        return load_model(path, option)  # says what is missing
    if path.is_absolute() and not path.exists():  # the hub's message would speak of names
        raise LabError(f"{option} {spec}: no such directory")
    if path.is_dir() or not colon:
        return _transformers(spec, option)
    if name == "hf-hub":
        return _released(*read_open_clip(spec, spec, None, option), option)
    return _released(*read_open_clip(spec, name, pretrained, option), option)


def _transformers(spec: str, option: str) -> Loaded:
    return _released(*read_transformers(spec, option), option)


def _local_open_clip(spec: str, option: str) -> Loaded:
    return _released(*read_open_clip(spec, f"local-dir:{spec}", None, option), option)


def _released(model: ReleasedModel, words: Words, view: View, option: str) -> Loaded:
    objective = "clip" if model.scale.bias is None else "siglip"
    model.requires_grad_(False).eval()
    with saved.reading_model(Path(model.name), option):
        if view.size**2 > MOST_PIXELS:
            raise ValueError(f"it reads pictures of {view.size:,} pixels a side")
        view(Image.new("RGB", (8, 8)))
        _ = model.image.width  # a picture of the processor's size goes through: both may be of different models
    return Loaded(objective, model, words, view)


def _build(said: Mapping[str, Any], _: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    known, text = said["image"], said["text"]
    tower = ImageTower(known["architecture"], known["arguments"], known["image_size"], known["stages"])
    tower.mean, tower.std = tuple(known["mean"]), tuple(known["std"])
    tower.interpolation = known["interpolation"]
    reader: TextTower | PretrainedText
    if "config" in text:
        config = AutoConfig.for_model(**text["config"])
        network = load_auto(AutoModel.from_config, config, said=f"{FINISHED}: its text tower", remedy="train it again")
        reader = PretrainedText(network, said["length"], int(said["end"]), text.get("pool", "auto"))
    else:
        sizes = (text["width"], text["layers"], text["heads"])
        reader = TextTower(said["vocabulary"], *sizes, said["length"], int(said["end"]))
    return OBJECTIVES[said["objective"]].model(tower, reader, HeadOptions(**said["head"]))


def to_transformers(loaded: Loaded, folder: Path) -> None:
    """Writes a `VisionTextDualEncoderModel` on timm's image tower, with tokenizer and image processor.

    The own text tower becomes a `CLIPTextModel`, whose layers are the same.

    Raises:
        LabError: the towers are none that it has.
    """
    from transformers import (  # here, as their code takes seconds to import and only an export needs it
        CLIPImageProcessor,
        CLIPTextConfig,
        CLIPTextModel,
        TimmWrapperConfig,
        TimmWrapperModel,
        VisionTextDualEncoderModel,
    )

    if _written_as_it_is(loaded, folder, "transformers"):
        return
    model = _clip_of(loaded)
    tower = model.image
    if tower.stages:
        raise LabError("--to transformers: has no image tower that ends early (--image-stages)")
    vision_config = TimmWrapperConfig(architecture=tower.architecture, model_args=tower.arguments)
    vision_config.num_labels = 0
    vision_config.hidden_size = tower.width
    vision = TimmWrapperModel(vision_config)
    vision.timm_model.load_state_dict(tower.network.state_dict())
    if isinstance(model.text, TextTower):
        text_config = CLIPTextConfig(
            vocab_size=model.text.vocabulary, hidden_size=model.text.width, intermediate_size=4 * model.text.width,
            num_hidden_layers=len(model.text.blocks), num_attention_heads=model.text.heads,
            max_position_embeddings=model.text.length, hidden_act="gelu", layer_norm_eps=1e-5,
            bos_token_id=loaded.words.start, eos_token_id=loaded.words.end, pad_token_id=loaded.words.pad,
        )  # fmt: skip
        text: Any = CLIPTextModel(text_config)
        text.load_state_dict(_as_clip_text(model.text), strict=True)
    else:
        text = model.text.network
        if getattr(text, "pooler", None) is None:
            raise LabError("--to transformers: its dual encoder reads the pooler's output, which this text tower lacks")
    dual = VisionTextDualEncoderModel(vision_model=vision, text_model=text)
    width = model.image_projection.out_features
    if dual.visual_projection.out_features != width:
        dual.config.projection_dim = width
        dual = VisionTextDualEncoderModel(dual.config, vision_model=vision, text_model=text)
    dual.visual_projection.load_state_dict(model.image_projection.state_dict())
    dual.text_projection.load_state_dict(model.text_projection.state_dict())
    dual.logit_scale.data.copy_(model.scale().detach().log())
    shape = loaded.transform
    pictures = CLIPImageProcessor(
        size={"height": shape.size, "width": shape.size}, do_center_crop=False, image_mean=list(shape.mean),
        image_std=list(shape.std), resample=RESAMPLING.get(shape.interpolation, RESAMPLING["bicubic"]),
    )  # fmt: skip
    with written_whole(folder) as part:
        dual.save_pretrained(part)
        loaded.words.save(part)
        pictures.save_pretrained(part)


def to_open_clip(loaded: Loaded, folder: Path) -> None:
    """Writes `open_clip_config.json`, `open_clip_model.safetensors` and the tokenizer.

    Raises:
        LabError: the towers are none that it has.
    """
    if _written_as_it_is(loaded, folder, "open_clip"):
        return
    model = _clip_of(loaded)
    tower, text = model.image, model.text
    own = {name for name in tower.arguments if name != "img_size"}
    if own or tower.stages:
        here = f"{tower.architecture} here has {', '.join(sorted(own)) or '--image-stages'}"
        raise LabError(f"--to open_clip: its image towers have timm's own arguments, {here}; take --to transformers")
    if tower.arguments:  # a side of its own, which open_clip does not hand on
        usual = timm.create_model(tower.architecture, num_classes=0).state_dict()
        if any(usual[name].shape != tensor.shape for name, tensor in tower.network.state_dict().items()):
            here = f"its {tower.architecture} is not for {tower.size} pixels"
            raise LabError(f"--to open_clip: {here}; take --to transformers")
    if not isinstance(text, TextTower):
        raise LabError("--to open_clip: its Hugging Face text towers need the hub's name; take --to transformers")
    shape = loaded.transform
    said = {
        "model_cfg": {
            "embed_dim": model.image_projection.out_features,
            "custom_text": True,
            "init_logit_scale": float(model.scale().detach().log()),
            "init_logit_bias": None if model.scale.bias is None else float(model.scale.bias),
            "vision_cfg": {"timm_model_name": tower.architecture, "timm_model_pretrained": False, "timm_pool": "",
                           "timm_proj": "linear", "image_size": tower.size},
            "text_cfg": {"context_length": text.length, "vocab_size": text.vocabulary, "width": text.width,
                         "heads": text.heads, "layers": len(text.blocks), "pool_type": "eos", "eos_id": text.end,
                         "pad_id": loaded.words.pad, "hf_tokenizer_name": "this directory"},
        },
        "preprocess_cfg": {"mean": list(shape.mean), "std": list(shape.std), "interpolation": shape.interpolation,
                           "resize_mode": "squash"},
    }  # fmt: skip
    state = {f"visual.trunk.{name}": tensor for name, tensor in tower.network.state_dict().items()}
    state["visual.head.proj.weight"] = model.image_projection.weight
    state |= {f"text.{name}": tensor for name, tensor in _as_open_clip_text(text).items()}
    state["text.text_projection"] = model.text_projection.weight.T
    state["logit_scale"] = model.scale().detach().log()
    if model.scale.bias is not None:
        state["logit_bias"] = model.scale.bias
    saved.save_model(folder, OPEN_CLIP[0], said, state, loaded.words.save, OPEN_CLIP[1])


class Format(NamedTuple):
    """Another library's format: the function that writes it, and the call that reads the directory."""

    write: Callable[[Loaded, Path], None]
    read: str


FORMATS = {
    "transformers": Format(to_transformers, 'VisionTextDualEncoderModel.from_pretrained("{}")'),
    "open_clip": Format(to_open_clip, 'open_clip.create_model("local-dir:{}")'),
}


def _written_as_it_is(loaded: Loaded, folder: Path, library: str) -> bool:
    """Writes a model that is the library's own; tells whether it is one of another library's at all."""
    model = loaded.model
    if isinstance(model, ReleasedModel) and model.library != library:
        raise LabError(f"--to {library}: the model is one of {model.library}; take --to {model.library}")
    if isinstance(model, ReleasedModel):
        with written_whole(folder) as part:
            model.write(part, dict(model.network.state_dict()))
    return isinstance(model, ReleasedModel)


def _clip_of(loaded: Loaded) -> ClipModel:
    if not isinstance(loaded.model, ClipModel):
        able = " and ".join(name for name, entry in OBJECTIVES.items() if issubclass(entry.model, ClipModel))
        reason = f"of which no other library has the same model; {able} can be written"
        raise LabError(f"--checkpoint: was trained with --objective {loaded.objective}, {reason}")
    return loaded.model


def _as_clip_text(text: TextTower) -> dict[str, torch.Tensor]:
    """Gives the weights the names of transformers' `CLIPTextModel`."""
    outer = ("embeddings.token_embedding.weight", "embeddings.position_embedding.weight", "final_layer_norm")
    inner = {
        "norm1": "layer_norm1", "norm3": "layer_norm2", "wide": "mlp.fc1", "narrow": "mlp.fc2",
        "attention.q": "self_attn.q_proj", "attention.k": "self_attn.k_proj", "attention.v": "self_attn.v_proj",
        "attention.out": "self_attn.out_proj",
    }  # fmt: skip
    return _renamed(text, outer, "encoder.layers", inner)


def _as_open_clip_text(text: TextTower) -> dict[str, torch.Tensor]:
    """Gives the weights the names of open_clip's `TextTransformer`, which has q, k and v in one matrix."""
    outer, blocks = ("token_embedding.weight", "positional_embedding", "ln_final"), "transformer.resblocks"
    inner = {
        "norm1": "ln_1", "norm3": "ln_2", "wide": "mlp.c_fc", "narrow": "mlp.c_proj", "attention.out": "attn.out_proj"
    }  # fmt: skip
    state = _renamed(text, outer, blocks, inner)
    for number, block in enumerate(text.blocks):
        layers = [block.get_submodule(f"attention.{name}").state_dict() for name in "qkv"]
        for kind in ("weight", "bias"):
            state[f"{blocks}.{number}.attn.in_proj_{kind}"] = torch.cat([layer[kind] for layer in layers])
    return state


def _renamed(
    text: TextTower, outer: tuple[str, str, str], blocks: str, inner: Mapping[str, str]
) -> dict[str, torch.Tensor]:
    """Renames the weights: of words, places and last norm (`outer`), and of each block's layers (`inner`)."""
    state = {outer[0]: text.words.weight, outer[1]: text.places}
    state |= {f"{outer[2]}.{name}": tensor for name, tensor in text.norm.state_dict().items()}
    for number, block in enumerate(text.blocks):
        for own, other in inner.items():
            weights = block.get_submodule(own).state_dict()
            state |= {f"{blocks}.{number}.{other}.{name}": tensor for name, tensor in weights.items()}
    return state
