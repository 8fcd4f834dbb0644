"""A causal language model whose forward pass is the loss of a row of conversations, and what it is made of."""

import contextlib
import itertools
import re
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from accelerate import Accelerator
from peft import AdaLoraModel, PeftModel, PeftType
from transformers import PreTrainedModel

from labs_common.device import widest_float
from labs_common.errors import LabError
from labs_common.report.figures import Cell, Row
from labs_common.report.sections import Structure
from llm_peft_fa.adalora import orthogonality
from llm_peft_fa.losses import chunked_cross_entropy
from llm_peft_fa.packing import PackedRow

Adapted = PreTrainedModel | PeftModel


def base_of(model: Adapted) -> PreTrainedModel:
    """Returns the model of transformers inside an adapted one, with the adapted layers in it."""
    return cast(PreTrainedModel, model.get_base_model()) if isinstance(model, PeftModel) else model


def decoder_of(model: PreTrainedModel) -> Any:
    """Returns the decoder; transformers gives the whole of Llama 4 for it, looking for a name that it does not have."""
    found = model.get_decoder()
    return model.model if found is model else found


def decoder_layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    """Returns the layers of the decoder, whose name differs between architectures.

    Raises:
        LabError: it has none.
    """
    lists = [child for child in decoder_of(model).children() if isinstance(child, torch.nn.ModuleList)]
    depth = model.config.get_text_config().num_hidden_layers
    for layers in lists:
        if len(layers) == depth:
            return layers
    raise LabError(f"--model: {type(model).__name__} has its decoder's layers where nobody looks; take another model")


def final_norm(model: PreTrainedModel) -> torch.nn.Module:
    """Returns the norm after the decoder's layers, the last that it has: its name differs between architectures."""
    parts = [(name, part) for name, part in decoder_of(model).named_children()]
    return [part for name, part in parts if "norm" in name or name.startswith("ln_")][-1]


def rope_boundary(model: Adapted) -> int | None:
    """Returns how long a conversation may be with the short factors of LongRoPE (Ding et al. 2024), as Phi 3 has them.

    One that is longer, with what a soft prompt puts before it, gives the long factors to all of its row. None of models
    without.
    """
    text = base_of(model).config.get_text_config()
    rope: Any = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return None
    before = 0
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        before = int(cast(Any, model.active_peft_config).num_virtual_tokens)
    return int(rope["original_max_position_embeddings"]) - before


def logit_scale(model: PreTrainedModel) -> float:
    """Returns the factor by which an architecture multiplies its logits: Granite, Cohere and Falcon-H1 have one."""
    text = model.config.get_text_config()
    factors = (getattr(text, name, None) for name in ("logit_scale", "lm_head_multiplier"))
    scale = next((float(factor) for factor in factors if isinstance(factor, (int, float))), 1.0)
    return scale / float(getattr(text, "logits_scaling", None) or 1.0)


def text_parameters(model: PreTrainedModel) -> dict[int, torch.nn.Parameter]:
    """Collects by id the parameters through which text goes: all but the vision tower of a base that sees pictures."""
    parts = (decoder_of(model), model.get_input_embeddings(), model.get_output_embeddings())
    return {id(parameter): parameter for part in parts for parameter in part.parameters()}


def not_adapted(model: PreTrainedModel) -> list[str]:
    """Names the linear layers beside which no update can stand.

    Phi MoE's router returns more than a product, and PEFT refuses what Mamba's kernels read by themselves.
    """
    routers = ("PhimoeTopKRouter", "Llama4Router")
    names = {name.rpartition(".")[2] for name, part in model.named_modules() if type(part).__name__ in routers}
    if model.config.model_type in ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"):
        names.add("out_proj")
    return sorted(names)


def in_text(model: PreTrainedModel, settings: dict[str, Any]) -> dict[str, Any]:
    """Narrows PEFT's `target_modules` down to the language model of a base that also sees pictures.

    The vision tower's adapters would get no gradient from text, which DistributedDataParallel takes for an error at the
    second step. Settings of other bases, and those without targets, are returned as they are.
    """
    if settings.get("target_modules") == "all-linear" and (names := not_adapted(model)):
        settings = settings | {"exclude_modules": names}
    every = {id(parameter) for parameter in model.parameters()}
    if "target_modules" not in settings or text_parameters(model).keys() == every:
        return settings
    decoder, targets = decoder_of(model), settings["target_modules"]
    if isinstance(targets, str):  # all-linear
        linear = (name for name, layer in decoder.named_modules() if isinstance(layer, torch.nn.Linear))
        targets = sorted({name.rpartition(".")[2] for name in linear})
    place = next(name for name, module in model.named_modules() if module is decoder)
    # An expression that must fit the whole name of a layer.
    return settings | {"target_modules": rf"{re.escape(place)}\.(.*\.)?({'|'.join(map(re.escape, targets))})"}


class PackedCausalLM(torch.nn.Module):
    """A causal language model, adapted or not, whose forward pass is the loss of a packed row.

    Attributes:
        prompted: False leaves a soft prompt out.
        kernel: of `attention.KERNELS`, or auto.
        chunk: positions whose logits exist at once in the loss; None takes what suits the device.
    """

    model: Adapted
    prompted = True

    def __init__(self, model: Adapted, kernel: str = "auto", chunk: int | None = None) -> None:
        super().__init__()
        self.model, self.kernel, self.chunk = model, kernel, chunk

    def forward(self, row: PackedRow) -> torch.Tensor:
        """Computes the row's summed negative log-likelihood over its learnt tokens, a float32 scalar.

        In training of AdaLoRA its regulariser is in it, as often as the row has learnt tokens: the step's mean over
        tokens then has it once.
        """
        return self.loss(self.states(row), row)

    def states(self, row: PackedRow) -> torch.Tensor:
        """Computes the decoder's output where the next token is learnt, (learnt, width)."""
        base = base_of(self.model)
        inputs = self._inputs(base, row)
        if row.blocks is not None:
            # A mask of four dimensions is taken as it is: none is made for the row. With the cache on, and
            # without restarting positions, transformers would let conversations see each other.
            mask = torch.zeros(1, 1, 1, 1, device=row.input_ids.device)
            inputs |= {"attention_mask": mask, "use_cache": False, "blocks": row.blocks, "kernel": self.kernel}
        hidden = decoder_of(base)(**inputs).last_hidden_state
        return cast(torch.Tensor, hidden.flatten(0, 1).index_select(0, row.predicting))

    def loss(self, states: torch.Tensor, row: PackedRow) -> torch.Tensor:
        """Computes the loss of `forward` from `states`."""
        base = base_of(self.model)
        softcap = getattr(base.config.get_text_config(), "final_logit_softcapping", None)
        loss = chunked_cross_entropy(
            states, base.get_output_embeddings(), row.targets, softcap, self.chunk, logit_scale(base)
        )
        if self.training and isinstance(self.model, PeftModel) and isinstance(self.model.base_model, AdaLoraModel):
            loss = loss + orthogonality(self.model) * len(row.targets)
        return loss

    def _inputs(self, base: PreTrainedModel, row: PackedRow) -> dict[str, Any]:
        """Returns tokens and positions; with a soft prompt, also its virtual tokens or keys and values."""
        ids, positions = row.input_ids, row.position_ids
        soft = isinstance(self.model, PeftModel) and self.model.active_peft_config.is_prompt_learning
        # Padded conversations begin where a model lets them by itself; some know no positions.
        at = {"use_cache": False} if row.blocks is None else {"position_ids": positions}
        if not (soft and self.prompted):
            return {"input_ids": ids, **at}
        assert isinstance(self.model, PeftModel)
        prompt: Any = self.model.get_prompt(
            batch_size=1 if row.blocks is not None or row.slots is not None else len(ids)
        )
        if row.slots is None:  # prefix tuning
            if row.blocks is None:
                return {"input_ids": ids, "past_key_values": prompt, "use_cache": True}
            count = self.model.active_peft_config.num_virtual_tokens
            prefix = [(layer.keys, layer.values) for layer in prompt.layers]
            return {"input_ids": ids, "position_ids": positions + count, "prefix": prefix}
        embedded = base.get_input_embeddings()(ids)  # (1, tokens, width), or padded
        virtual = prompt.to(embedded.dtype)[0].repeat(len(row.slots), 1)
        placed = embedded.flatten(0, 1).index_copy(0, row.slots.flatten(), virtual)
        return {"inputs_embeds": placed.view_as(embedded), **at}


def virtual_tokens(model: Adapted) -> int:
    """Counts the slots that a conversation needs in a packed row: one per virtual token, none for keys and values."""
    if not isinstance(model, PeftModel) or not model.active_peft_config.is_prompt_learning:
        return 0
    config = model.active_peft_config
    return 0 if config.peft_type == PeftType.PREFIX_TUNING else int(config.num_virtual_tokens)


@torch.no_grad()
def mean_loss(model: torch.nn.Module, rows: Iterable[PackedRow], accelerator: Accelerator) -> float:
    """Averages the negative log-likelihood, in nats, over the learnt tokens of `rows` (of one `Packing.rows`)."""
    model.eval()
    device = accelerator.device
    total = torch.zeros((), dtype=widest_float(device), device=device)  # read once, after all rows
    for row in rows:
        total += model(row.to(device)).to(total) * row.weight
    return float(accelerator.reduce(total, "mean"))


def arithmetic(model: PreTrainedModel) -> AbstractContextManager[Any]:
    """Lets a model outside of training compute in its weights' precision, adapters too: autocast, but not on a CPU.

    There only float16 needs it, which `load_model` adds up in float32.
    """
    kind, dtype = model.device.type, model.dtype
    if dtype == torch.float32 or (kind == "cpu" and dtype != torch.float16):
        return contextlib.nullcontext()
    return torch.autocast(kind, dtype)


def structure_of(model: Adapted) -> Structure:
    """Lists the blocks of a decoder-only model, input first, equal layers in a row taken together."""
    base = base_of(model)
    head, embeddings = base.get_output_embeddings(), base.get_input_embeddings()
    rows = [*_virtual(model), Row("embeddings", [_cell("tokens", list(embeddings.parameters()))])]
    layers = [_layer_cells(layer) for layer in decoder_layers(base)]
    start = 0
    for cells, group in itertools.groupby(layers):
        count = len(list(group))
        rows.append(Row(f"layer {start}" if count == 1 else f"layers {start}–{start + count - 1}", cells, count))
        start += count
    rows.append(Row("final norm", [_cell("norm", list(final_norm(base).parameters()))]))
    tied = head.weight is embeddings.weight
    rows.append(Row("head (the embeddings)" if tied else "head", [_cell("vocabulary", list(head.parameters()))]))
    parameters = list(model.parameters())
    trainable = sum(_size(parameter) for parameter in parameters if parameter.requires_grad)
    return Structure(type(base).__name__, rows, sum(map(_size, parameters)), trainable)


def _layer_cells(layer: torch.nn.Module) -> list[Cell]:
    """Lists the parts of a decoder layer; an adapter's tensors count to the layer that they are beside."""
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
