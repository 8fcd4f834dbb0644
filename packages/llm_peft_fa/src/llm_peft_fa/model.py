"""A causal language model whose forward pass is the loss of a packed row, and what it is made of."""

import contextlib
import itertools
import re
from collections.abc import Iterable, Iterator
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
from llm_peft_fa.packing import PackedRow, packed_row
from llm_peft_fa.templates import Encoded

Adapted = PreTrainedModel | PeftModel


def base_of(model: Adapted) -> PreTrainedModel:
    """Returns the model of transformers inside an adapted one, with the adapted layers in it."""
    return cast(PreTrainedModel, model.get_base_model()) if isinstance(model, PeftModel) else model


def text_parameters(model: PreTrainedModel) -> dict[int, torch.nn.Parameter]:
    """Collects by id the parameters through which text goes: all but the vision tower of a base that sees pictures."""
    parts = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
    return {id(parameter): parameter for part in parts for parameter in part.parameters()}


def in_text(model: PreTrainedModel, settings: dict[str, Any]) -> dict[str, Any]:
    """Narrows PEFT's `target_modules` down to the language model of a base that also sees pictures.

    The vision tower's adapters would get no gradient from text, which DistributedDataParallel takes for an error at the
    second step. Settings of other bases, and those without targets, are returned as they are.
    """
    every = {id(parameter) for parameter in model.parameters()}
    if "target_modules" not in settings or text_parameters(model).keys() == every:
        return settings
    decoder, targets = model.get_decoder(), settings["target_modules"]
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
        base = base_of(self.model)
        hidden = base.get_decoder()(
            **self._inputs(base, row),
            # A mask of four dimensions is taken as it is: none is made for the row. With the cache on, and
            # without restarting positions, transformers would let conversations see each other.
            attention_mask=torch.zeros(1, 1, 1, 1, device=row.input_ids.device),
            use_cache=False,
            blocks=row.blocks,
            kernel=self.kernel,
        ).last_hidden_state[0]  # (tokens, width)
        softcap = getattr(base.config.get_text_config(), "final_logit_softcapping", None)
        loss = chunked_cross_entropy(
            hidden.index_select(0, row.predicting), base.get_output_embeddings(), row.targets, softcap, self.chunk
        )
        if self.training and isinstance(self.model, PeftModel) and isinstance(self.model.base_model, AdaLoraModel):
            loss = loss + orthogonality(self.model) * len(row.targets)
        return loss

    def _inputs(self, base: PreTrainedModel, row: PackedRow) -> dict[str, Any]:
        """Returns tokens and positions; with a soft prompt, also its virtual tokens or keys and values."""
        ids, positions = row.input_ids, row.position_ids
        soft = isinstance(self.model, PeftModel) and self.model.active_peft_config.is_prompt_learning
        if not (soft and self.prompted):
            return {"input_ids": ids, "position_ids": positions}
        assert isinstance(self.model, PeftModel)
        prompt: Any = self.model.get_prompt(batch_size=1)
        if row.slots is None:  # prefix tuning
            count = self.model.active_peft_config.num_virtual_tokens
            prefix = [(layer.keys, layer.values) for layer in prompt.layers]
            return {"input_ids": ids, "position_ids": positions + count, "prefix": prefix}
        embedded = base.get_input_embeddings()(ids)  # (1, tokens, width)
        virtual = prompt.to(embedded.dtype).repeat(1, len(row.slots), 1)
        return {"inputs_embeds": embedded.index_copy(1, row.slots.flatten(), virtual), "position_ids": positions}


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


@contextlib.contextmanager
def shortened(model: PreTrainedModel) -> Iterator[None]:
    """Cuts the model to its first layers, at least two and of all kinds of attention that it has, for a while."""
    decoder = model.get_decoder()
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or []
    count = max([2, *(kinds.index(kind) + 1 for kind in set(kinds))])
    whole = decoder.layers
    decoder.layers = whole[:count]
    try:
        yield
    finally:
        decoder.layers = whole


@torch.no_grad()
def check_packed_loss(model: PreTrainedModel) -> None:
    """Compares the packed loss with the model's own on two short random sequences.

    Some architectures scale their logits or carry their own attention; training them packed would be wrong. The first
    layers show that as well as all, and every process does this on its CPU.

    Raises:
        LabError: the two differ.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    pieces = [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in (5, 9)]
    row = packed_row([Encoded(ids, [True] * len(ids), "") for ids in pieces]).to(model.device)
    own = 0.0
    with shortened(model), arithmetic(model):
        packed = PackedCausalLM(model)(row).item()
        for ids in pieces:
            batch = torch.tensor([ids], device=model.device)
            own += model(input_ids=batch, labels=batch, use_cache=False).loss.item() * (len(ids) - 1)
    # Room for rounding alone: float32 agrees to 1e-6, bfloat16 has between two and three digits.
    if abs(packed - own) > (1e-3 if model.dtype == torch.float32 else 3e-2) * abs(own):
        raise LabError(
            f"--model: {type(model).__name__} cannot be trained packed (loss {packed:.4f}, its own {own:.4f})"
        )


def structure_of(model: Adapted) -> Structure:
    """Lists the blocks of a decoder-only model, input first, equal layers in a row taken together."""
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
