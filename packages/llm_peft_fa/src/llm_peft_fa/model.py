"""The base model and its tokenizer: the tiny offline one, or any causal language model of transformers."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from labs_common.errors import LabError
from llm_peft_fa.attention import NAME
from llm_peft_fa.loss import chunked_cross_entropy
from llm_peft_fa.packing import PackedRow, packed_row
from llm_peft_fa.templates import Encoded, set_template
from llm_peft_fa.tiny import tiny_base


def model_path(model: str) -> str:
    """Where transformers finds the model that `--model` names; makes the tiny one on first use."""
    return str(tiny_base()) if model == "tiny" else model


def load_tokenizer(model: str, template: str = "auto") -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with the chat template that `--template` names.

    Raises:
        LabError: there is no such model, or its tokenizer cannot tell which characters a token covers.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model_path(model))
    except (OSError, ValueError) as error:
        raise LabError(_no_model(model, error)) from error
    if not tokenizer.is_fast:
        raise LabError(f"--model {model}: its tokenizer has no fast version, which maps tokens to characters")
    set_template(tokenizer, template)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:  # only generation pads, and there a mask hides it
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(model: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A causal language model in evaluation mode whose attention can be packed.

    Raises:
        LabError: there is no such model, or its files cannot be read.
    """
    try:
        loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            model_path(model), dtype=dtype, attn_implementation=NAME, use_safetensors=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise LabError(_no_model(model, error)) from error
    return loaded.eval()


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens at which generation stops."""
    configured = model.generation_config.eos_token_id
    ids = set(configured if isinstance(configured, list) else [configured])
    return {token for token in ids | {tokenizer.eos_token_id} if token is not None}


class PackedCausalLM(torch.nn.Module):
    """A causal language model, adapted or not, whose forward pass is the loss of a packed row."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, row: PackedRow) -> torch.Tensor:
        """The row's summed negative log-likelihood over its learnt tokens, a float32 scalar."""
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        hidden = base.get_decoder()(
            input_ids=row.input_ids,
            position_ids=row.position_ids,
            # A mask of four dimensions is taken as it is: none is made for the row. With the cache on, and
            # without restarting positions, transformers would let conversations see each other.
            attention_mask=torch.zeros(1, 1, 1, 1, device=row.input_ids.device),
            use_cache=False,
            blocks=row.blocks,
        ).last_hidden_state[0]  # (tokens, width)
        softcap = getattr(base.config.get_text_config(), "final_logit_softcapping", None)
        return chunked_cross_entropy(
            hidden.index_select(0, row.predicting), base.get_output_embeddings(), row.targets, softcap
        )


@torch.no_grad()
def check_packed_loss(model: PreTrainedModel) -> None:
    """Compares the packed loss with the model's own on two short random sequences.

    Some architectures scale their logits or carry their own attention; training them packed would be wrong.

    Raises:
        LabError: the two differ.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    pieces = [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in (5, 9)]
    row = packed_row([Encoded(ids, [True] * len(ids), "") for ids in pieces]).to(model.device)
    packed = PackedCausalLM(model)(row).item()
    own = 0.0
    for ids in pieces:
        batch = torch.tensor([ids], device=model.device)
        own += model(input_ids=batch, labels=batch, use_cache=False).loss.item() * (len(ids) - 1)
    if abs(packed - own) > (1e-3 if model.dtype == torch.float32 else 3e-2) * abs(own):
        raise LabError(
            f"--model: {type(model).__name__} cannot be trained packed (loss {packed:.4f}, its own {own:.4f})"
        )


def _no_model(model: str, error: BaseException) -> str:
    reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    kind = "directory" if Path(model).is_dir() else "name"
    return f"--model {model}: no model can be loaded from this {kind} ({reason}); give tiny, a directory or a hub id"
