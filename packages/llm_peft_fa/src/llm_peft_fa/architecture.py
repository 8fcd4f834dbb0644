"""A model as a stack of blocks, input first: what is in it, and how much of it trains."""

import dataclasses
import itertools
from dataclasses import dataclass

import torch
from peft import PeftModel, PeftType

from labs_common.report import Cell, Row
from llm_peft_fa.method_options import MethodOptions
from llm_peft_fa.methods import METHODS, Adapted, Setting
from llm_peft_fa.model import load_tokenizer, unloaded_model
from llm_peft_fa.packed import base_of


@dataclass(frozen=True)
class Structure:
    """What a model is made of."""

    name: str
    rows: list[Row]
    parameters: int
    trainable: int


def structure_of(model: Adapted) -> Structure:
    """The blocks of a decoder-only model, equal layers in a row taken together."""
    base = base_of(model)
    decoder = base.get_decoder()
    head, embeddings = base.get_output_embeddings(), base.get_input_embeddings()
    rows = [*_virtual(model), Row("embeddings", [_cell("tokens", list(embeddings.parameters()))])]
    layers = [_layer_cells(layer) for layer in decoder.layers]
    start = 0
    for cells, group in itertools.groupby(layers):
        count = len(list(group))
        rows.append(Row(f"layer {start}" if count == 1 else f"layers {start}–{start + count - 1}", cells, count))
        start += count
    rows.append(Row("final norm", [_cell("norm", list(decoder.norm.parameters()))]))
    tied = head.weight is embeddings.weight
    rows.append(Row("head (the embeddings)" if tied else "head", [_cell("vocabulary", list(head.parameters()))]))
    parameters = list(model.parameters())
    trainable = sum(_size(parameter) for parameter in parameters if parameter.requires_grad)
    return Structure(type(base).__name__, rows, sum(map(_size, parameters)), trainable)


def outline(model: str, options: MethodOptions) -> Adapted:
    """The model under a method, without weights: what would train, and how much.

    Values do not matter here, so methods that start from the base's weights start at random.
    """
    alike = {"pissa": "lora", "olora": "lora", "qlora": "lora"}
    method = alike.get(options.method, options.method)
    options = dataclasses.replace(options, prompt_init="random" if options.prompt_init else None)
    setting = Setting(load_tokenizer(model), steps=100)
    return METHODS[method](unloaded_model(model), options, setting)


def _layer_cells(layer: torch.nn.Module) -> list[Cell]:
    """The parts of a decoder layer; an adapter's tensors count to the layer that they are beside."""
    parts: dict[str, list[torch.nn.Parameter]] = {}
    for name, parameter in layer.named_parameters():
        path = name.split(".")  # self_attn.q_proj.weight, or input_layernorm.weight
        part = path[1] if len(path) > 2 else path[0]
        parts.setdefault("norms" if "norm" in part else part, []).append(parameter)
    return [_cell(name, parameters) for name, parameters in parts.items()]


def _virtual(model: Adapted) -> list[Row]:
    if not isinstance(model, PeftModel) or not model.active_peft_config.is_prompt_learning:
        return []
    config = model.active_peft_config
    what = "keys and values of all layers" if config.peft_type == PeftType.PREFIX_TUNING else "virtual tokens"
    encoder = list(model.prompt_encoder.parameters())
    return [Row(f"prefix of {config.num_virtual_tokens}", [_cell(what, encoder)])]


def _cell(name: str, parameters: list[torch.nn.Parameter]) -> Cell:
    trained = sum(_size(parameter) for parameter in parameters if parameter.requires_grad)
    return Cell(name, trained, sum(map(_size, parameters)) - trained)


def _size(parameter: torch.nn.Parameter) -> int:
    packed_in_bytes = 2 if type(parameter).__name__ == "Params4bit" else 1  # two weights in a byte
    return int(getattr(parameter, "ds_numel", parameter.numel())) * packed_in_bytes
