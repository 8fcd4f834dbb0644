"""Writes a model in another library's format: `python -m clip_lab.export --to open_clip`."""

from clip_lab import commands

if __name__ == "__main__":  # before the imports below: --help and a wrong option answer at once
    commands.export()

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_lab.command_config import ExportConfig
from clip_lab.config import FINISHED, TRAIN
from labs_common.errors import LabError

if TYPE_CHECKING:  # the real imports wait until the command line has been read: --help is fast
    import torch

    from clip_lab.model import ClipModel
    from clip_lab.stored import Loaded


def export(config: ExportConfig) -> None:
    """Reads the model and writes it to --output.

    Raises:
        LabError: there is no model, the other library has no such towers, or the directory exists.
    """
    from clip_lab.stored import load_model
    from labs_common.run import newest_run

    if config.output.exists():
        raise LabError(f"--output {config.output}: exists already; name another directory")
    checkpoint = config.checkpoint or newest_run(FINISHED, TRAIN)
    loaded = load_model(checkpoint)
    {"transformers": to_transformers, "open_clip": to_open_clip}[config.to](loaded, config.output)
    reader = {
        "transformers": f'VisionTextDualEncoderModel.from_pretrained("{config.output}")',
        "open_clip": f'open_clip.create_model("local-dir:{config.output}")',
    }
    print(f"written: {config.output}")
    print(f"read it: {reader[config.to]}")


def to_transformers(loaded: "Loaded", folder: Path) -> None:
    """Writes a `VisionTextDualEncoderModel` on timm's image tower, with tokenizer and image processor.

    The own text tower becomes a `CLIPTextModel`, whose layers are the same.

    Raises:
        LabError: the towers are none that it has.
    """
    from transformers import (
        CLIPImageProcessor,
        CLIPTextConfig,
        CLIPTextModel,
        TimmWrapperConfig,
        TimmWrapperModel,
        VisionTextDualEncoderModel,
    )

    from clip_lab.text import TextTower
    from labs_common.run import written_whole

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
    side = {"height": shape.size, "width": shape.size}
    pictures = CLIPImageProcessor(size=side, do_center_crop=False, image_mean=list(shape.mean),
                                  image_std=list(shape.std), resample=_resample(shape.interpolation))  # fmt: skip
    with written_whole(folder) as part:
        dual.save_pretrained(part)
        loaded.words.save(part)
        pictures.save_pretrained(part)


def to_open_clip(loaded: "Loaded", folder: Path) -> None:
    """Writes `open_clip_config.json`, `open_clip_model.safetensors` and the tokenizer.

    Raises:
        LabError: the towers are none that it has.
    """
    import timm
    from safetensors.torch import save_file

    from clip_lab.text import TextTower
    from labs_common.run import written_whole

    model = _clip_of(loaded)
    tower, text = model.image, model.text
    own = {name for name in tower.arguments if name != "img_size"}
    if own or tower.stages:
        raise LabError(f"--to open_clip: its image towers have timm's own arguments, {tower.architecture} here has "
                       f"{', '.join(sorted(own)) or '--image-stages'}; take --to transformers")  # fmt: skip
    if tower.arguments:  # a side of its own, which open_clip does not hand on
        usual = timm.create_model(tower.architecture, num_classes=0).state_dict()
        if any(usual[name].shape != tensor.shape for name, tensor in tower.network.state_dict().items()):
            raise LabError(f"--to open_clip: its {tower.architecture} is not for {tower.size} pixels; take --to "
                           "transformers")  # fmt: skip
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
    with written_whole(folder) as part:
        save_file({name: tensor.detach().contiguous().clone() for name, tensor in state.items()},
                  part / "open_clip_model.safetensors", {"format": "pt"})  # fmt: skip
        (part / "open_clip_config.json").write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
        loaded.words.save(part)


def _clip_of(loaded: "Loaded") -> "ClipModel":
    from clip_lab.model import ClipModel

    if not isinstance(loaded.model, ClipModel):
        raise LabError(f"--checkpoint: was trained with --objective {loaded.objective}, of which no other library has "
                       "the same model; clip and siglip can be written")  # fmt: skip
    return loaded.model


def _as_clip_text(text: Any) -> "dict[str, torch.Tensor]":
    """Names of transformers' `CLIPTextModel`."""
    state = {
        "embeddings.token_embedding.weight": text.words.weight,
        "embeddings.position_embedding.weight": text.places,
    }
    state |= {f"final_layer_norm.{name}": tensor for name, tensor in text.norm.state_dict().items()}
    names = {
        "norm1": "layer_norm1", "norm3": "layer_norm2", "wide": "mlp.fc1", "narrow": "mlp.fc2",
        "attention.q": "self_attn.q_proj", "attention.k": "self_attn.k_proj", "attention.v": "self_attn.v_proj",
        "attention.out": "self_attn.out_proj",
    }  # fmt: skip
    for number, block in enumerate(text.blocks):
        for own, other in names.items():
            for name, tensor in block.get_submodule(own).state_dict().items():
                state[f"encoder.layers.{number}.{other}.{name}"] = tensor
    return state


def _as_open_clip_text(text: Any) -> "dict[str, torch.Tensor]":
    """Names of open_clip's `TextTransformer`."""
    import torch

    state = {"token_embedding.weight": text.words.weight, "positional_embedding": text.places}
    state |= {f"ln_final.{name}": tensor for name, tensor in text.norm.state_dict().items()}
    names = {
        "norm1": "ln_1",
        "norm3": "ln_2",
        "wide": "mlp.c_fc",
        "narrow": "mlp.c_proj",
        "attention.out": "attn.out_proj",
    }
    for number, block in enumerate(text.blocks):
        start, attention = f"transformer.resblocks.{number}", block.attention
        for own, other in names.items():
            for name, tensor in block.get_submodule(own).state_dict().items():
                state[f"{start}.{other}.{name}"] = tensor
        layers = (attention.q, attention.k, attention.v)
        state[f"{start}.attn.in_proj_weight"] = torch.cat([layer.weight for layer in layers])
        state[f"{start}.attn.in_proj_bias"] = torch.cat([layer.bias for layer in layers])
    return state


def _resample(name: str) -> int:
    from labs_common.data.images import RESAMPLING

    return int(RESAMPLING.get(name, RESAMPLING["bicubic"]))
