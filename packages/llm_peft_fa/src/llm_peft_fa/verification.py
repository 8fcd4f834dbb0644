"""Decides before training whether conversations can be packed, by the model's own attention on one at a time.

A model is cut to a layer of each kind and computed in float32. Its hidden states and loss for a few conversations
together, as training would compute them, must be those that it gives by its own eager attention for each alone.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel

from labs_common.device import exact_float32
from labs_common.errors import LabError, reason_of
from llm_peft_fa.attention import NAME
from llm_peft_fa.model import Adapted, PackedCausalLM, decoder_layers, decoder_of, virtual_tokens
from llm_peft_fa.packing import PackedRow, packed_row, padded_row
from llm_peft_fa.templates import Encoded

# Tokens of the conversations: more than the window that is looked at, and in more than one of attention's blocks.
LENGTHS, WINDOW = (11, 40, 6), 5
FEW = 3  # virtual tokens, which must be fewer than the window
ROWS = 64  # of the vocabulary projection; one of 256,000 would be gigabytes in float32
# Largest difference of a position's hidden state, as a share of its length. Float32 alone differs by some 1e-6, a token
# more or less in attention by 1e-1.
TOLERANCE = 1e-3
LARGE = 10**9  # parameters; layers that cannot be cut out are computed all, in float32, of smaller models only
Adapt = Callable[[PreTrainedModel], Adapted]


class Choice(NamedTuple):
    """The attention to train with: our packed one (`NAME`) or the model's own; and if so, why."""

    attention: str
    why: str

    @property
    def padded(self) -> bool:
        """Tells whether conversations are padded, not packed."""
        return self.attention != NAME


class _Alone(NamedTuple):
    """The conversations, what is learnt of each in numbers of `ROWS`, and what the model computes for each alone."""

    ids: list[list[int]]
    learnt: torch.Tensor
    states: torch.Tensor
    loss: torch.Tensor


def settle(model: PreTrainedModel, accelerator: Accelerator, asked: str = "auto", adapt: Adapt | None = None) -> Choice:
    """Chooses the attention on the main process, gives it to the model on all of them, and says if it is not packed.

    Other processes need not have weights. See `choice` for the options and errors, which all processes raise.
    """
    found: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            found = [choice(model, asked, adapt)]
        except LabError as error:  # the others wait for an answer
            found = [str(error)]
    (chosen,) = broadcast_object_list(found)
    if isinstance(chosen, str):
        raise LabError(chosen)
    chosen = Choice(*chosen)
    if chosen.attention != model.config._attn_implementation:
        model.set_attn_implementation(chosen.attention)
    return chosen


def like_prompt(model: Adapted) -> Adapt | None:
    """Returns what puts a short soft prompt of the model's kind before a copy of its base; None if it has none."""
    if not isinstance(model, PeftModel) or not model.active_peft_config.is_prompt_learning:
        return None
    config = copy.copy(model.active_peft_config)
    config.num_virtual_tokens, config.num_layers, config.inference_mode = FEW, None, False
    if hasattr(config, "prompt_tuning_init"):
        config.prompt_tuning_init = "RANDOM"
    return lambda small: get_peft_model(small, config)


@torch.no_grad()
def choice(model: PreTrainedModel, asked: str = "auto", adapt: Adapt | None = None) -> Choice:
    """Chooses the first that agrees with the model's own eager attention: packed, or padded by SDPA or by eager itself.

    `asked` is --packing; `adapt` puts a soft prompt before a small copy of the model, to be looked at with it.

    Raises:
        LabError: the model is to be packed and cannot; or nothing agrees, as of a scale of logits that is not known; or
            the model, or PEFT's soft prompt for it, does not run.
    """
    with exact_float32(model.device), torch.backends.cudnn.flags(allow_tf32=False):
        alone, small, adapted = _reference(model, adapt)
        ways = {"auto": (NAME, "sdpa", "eager"), "always": (NAME,), "never": ("sdpa", "eager")}[asked]
        why = "--packing never" if asked == "never" else ""
        for attention in ways:
            try:
                _attend_by(small, attention)
                _compare(adapted, alone, packed_row if attention == NAME else padded_row)
            except Exception as error:  # each architecture that does not fit fails in its own way
                last = reason_of(error)
                why = why or last
                continue
            return Choice(small.config._attn_implementation, why)
    name = type(model).__name__
    raise LabError(
        f"--packing always: {name} cannot be packed ({why}); take --packing auto" if asked == "always"
        else f"--model: {name} computes something that training does not know ({last}); take another model"
    )  # fmt: skip


def _reference(model: PreTrainedModel, adapt: Adapt | None) -> tuple[_Alone, PreTrainedModel, Adapted]:
    """Computes a few conversations alone by the model's own attention, on a small copy; returns that too."""
    draw = torch.Generator().manual_seed(0)
    vocabulary = cast(torch.nn.Embedding, model.get_input_embeddings()).weight.shape[0]
    ids = [torch.randint(vocabulary, (length,), generator=draw).tolist() for length in LENGTHS]
    chosen, every = _kinds(model), range(len(decoder_layers(model)))
    cuts: list[Sequence[int]] = [chosen, every]
    if len(chosen) == len(every) or sum(weight.numel() for weight in model.parameters()) > LARGE:
        cuts = [chosen]
    for layers in cuts:
        try:
            small = _cut(model, layers)
            _attend_by(small, "eager")
            plain = _alone(small, small, ids)
            if adapt is None:
                return plain, small, small
            adapted = adapt(small).eval()
            alone = _alone(adapted, small, ids)
            if torch.equal(alone.states, plain.states):
                raise LabError(f"--method: a soft prompt changes nothing in {type(model).__name__}; take lora")
            return alone, small, adapted
        except LabError:
            raise
        except Exception as error:  # what a model lacks shows in its own way
            failed = error
    what, remedy = ("--model", "another") if adapt is None else ("--method: a soft prompt before", "lora")
    raise LabError(f"{what} {type(model).__name__} cannot be computed ({reason_of(failed)}); take {remedy}") from failed


def _alone(adapted: Adapted, small: PreTrainedModel, ids: list[list[int]]) -> _Alone:
    draw = torch.Generator().manual_seed(1)
    states, losses, learnt, seen = [], [], [], []
    hook = decoder_of(small).register_forward_hook(lambda module, given, out: seen.append(out.last_hidden_state))
    rows = small.get_output_embeddings().weight.shape[0]
    for conversation in ids:
        batch = torch.tensor([conversation], device=small.device)
        # A prefix is handed over in the cache.
        out = adapted(input_ids=batch, attention_mask=torch.ones_like(batch), use_cache=adapted is not small)
        count = len(conversation) - 1  # that predict; virtual tokens stand before them
        targets = torch.randint(rows, (count,), generator=draw).to(small.device)
        learnt.append(targets)
        states.append(seen[-1][0, -count - 1 : -1])
        losses.append(F.cross_entropy(out.logits[0, -count - 1 : -1].float(), targets, reduction="sum"))
    hook.remove()
    return _Alone(ids, torch.cat(learnt), torch.cat(states), torch.stack(losses).sum())


def _compare(adapted: Adapted, alone: _Alone, made: Callable[..., PackedRow]) -> None:
    """Computes the conversations together, as training does.

    Raises:
        LabError: hidden states or loss are not those of each alone.
    """
    items = [Encoded(ids, [True] * len(ids), "") for ids in alone.ids]
    row = made(items, virtual=virtual_tokens(adapted)).to(alone.states.device)
    together = PackedCausalLM(adapted)
    states = together.states(row)
    apart = ((states - alone.states).norm(dim=-1) / alone.states.norm(dim=-1)).max()
    if not apart <= TOLERANCE:  # also of NaN
        raise LabError(f"hidden states differ by {float(apart):.1%} from those of each conversation alone")
    loss = together.loss(states, PackedRow(**{**vars(row), "targets": alone.learnt}))
    if not (loss - alone.loss).abs() <= TOLERANCE * alone.loss:
        raise LabError(f"the loss is {float(loss):.4f}, and {float(alone.loss):.4f} of each conversation alone")


def _attend_by(small: PreTrainedModel, attention: str) -> None:
    """Sets the attention; one that is built in stays, and counts as eager.

    Raises:
        ValueError: the model has no such attention.
    """
    if attention == NAME and not small._supports_attention_backend:
        raise ValueError("its attention cannot be exchanged")
    if small._can_set_attn_implementation():
        small.set_attn_implementation(attention)
    elif attention != "eager":
        raise ValueError("its attention cannot be exchanged")


def _kinds(model: PreTrainedModel) -> list[int]:
    """Finds the first layer of each kind: of other parts, settings or shapes, or with another place in the config."""
    text = model.config.get_text_config()
    names = getattr(text, "layer_types", None)
    found: dict[Any, int] = {}
    for number, layer in enumerate(decoder_layers(model)):
        settings = tuple(
            (name, type(part).__name__, *sorted(
                (key, value) for key, value in vars(part).items()
                if isinstance(value, (bool, str)) or (isinstance(value, int) and "idx" not in key)
            ))
            for name, part in layer.named_modules()
        )  # fmt: skip
        shapes = tuple(weight.shape for weight in layer.parameters())
        found.setdefault((names and names[number], settings, shapes), number)
        if (source := getattr(getattr(layer, "self_attn", None), "kv_shared_layer_index", None)) is not None:
            found.setdefault(source, source)  # whose keys and values it takes
    return sorted(set(found.values()))


def _cut(model: PreTrainedModel, chosen: Sequence[int]) -> PreTrainedModel:
    """Copies the model with the chosen layers alone, in float32; embeddings and 4-bit weights are shared with it."""
    layers, head = decoder_layers(model), model.get_output_embeddings()
    kept = [layers[number] for number in chosen]
    embeddings = [part for part in decoder_of(model).modules() if isinstance(part, torch.nn.Embedding)]
    shared = {id(weight) for part in embeddings for weight in part.parameters()}
    computed = {
        id(weight) for name, part in decoder_of(model).named_children() if part is not layers
        for weight in part.parameters()
    } | {id(weight) for layer in kept for weight in layer.parameters()}  # fmt: skip
    memo: dict[int, Any] = {}  # what a deep copy takes as it is
    for weight in model.parameters():
        if id(weight) in computed - shared and weight.is_floating_point():
            memo[id(weight)] = torch.nn.Parameter(weight.detach().float(), requires_grad=False)
        else:
            memo[id(weight)] = weight
    with _layers(model, kept):
        small = copy.deepcopy(model, memo)
    for part in decoder_of(small).modules():
        if isinstance(part, torch.nn.Embedding):
            part.register_forward_hook(lambda module, given, out: out.float())
        for name in [name for name in ("sliding_window", "attention_chunk_size") if getattr(part, name, None)]:
            setattr(part, name, WINDOW)
        if hasattr(part, "compute_dtype"):  # of bitsandbytes
            part.compute_dtype = torch.float32
    for buffer in decoder_of(small).buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.float()
    _shorten(small, chosen, len(layers))
    rows = torch.linspace(0, head.weight.shape[0] - 1, min(ROWS, head.weight.shape[0])).long()
    small_head = small.get_output_embeddings()
    for name, weight in list(head.named_parameters()):
        setattr(small_head, name, torch.nn.Parameter(weight.detach()[rows].float(), requires_grad=False))
    return small


@contextmanager
def _layers(model: PreTrainedModel, kept: list[torch.nn.Module]) -> Iterator[None]:
    decoder, layers = decoder_of(model), decoder_layers(model)
    name = next(name for name, child in decoder.named_children() if child is layers)
    setattr(decoder, name, torch.nn.ModuleList(kept))
    try:
        yield
    finally:
        setattr(decoder, name, layers)


def _shorten(small: PreTrainedModel, chosen: Sequence[int], depth: int) -> None:
    """Makes configuration and numbering of a model fit the layers that were left of `depth`, and its windows short."""
    text, decoder = small.config.get_text_config(), decoder_of(small)
    for name in [name for name in ("sliding_window", "attention_chunk_size") if getattr(text, name, None)]:
        setattr(text, name, WINDOW)
    places = {number: place for place, number in enumerate(chosen)}
    own = depth - (getattr(text, "num_kv_shared_layers", None) or 0)  # the rest take keys and values of these
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == depth:
            setattr(text, name, [value[number] for number in chosen])
    text.num_hidden_layers = len(chosen)
    if own < depth:
        text.num_kv_shared_layers = sum(number >= own for number in chosen)
        decoder.first_kv_shared_layer_idx = len(chosen) - text.num_kv_shared_layers
    for part in decoder.modules():
        for name in ("layer_idx", "kv_shared_layer_index"):
            if (number := getattr(part, name, None)) in places:
                setattr(part, name, places[number])
    # Gemma 3n and 4 give each layer inputs of its own, made for all of them at once.
    if width := getattr(text, "hidden_size_per_layer_input", None):
        for name in ("embed_tokens_per_layer", "per_layer_model_projection"):
            weight = getattr(decoder, name).weight.detach()
            pick = torch.cat([torch.arange(number * width, (number + 1) * width) for number in chosen])
            cut = weight[:, pick] if "embed" in name else weight[pick]
            getattr(decoder, name).weight = torch.nn.Parameter(cut, requires_grad=False)
