"""A causal language model whose forward pass is the loss of a packed row."""

from typing import cast

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from labs_common.errors import LabError
from llm_peft_fa.loss import chunked_cross_entropy
from llm_peft_fa.packing import PackedRow, packed_row
from llm_peft_fa.templates import Encoded


def base_of(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The model of transformers inside an adapted one, with the adapted layers in it."""
    return cast(PreTrainedModel, model.get_base_model()) if isinstance(model, PeftModel) else model


class PackedCausalLM(torch.nn.Module):
    """A causal language model, adapted or not, whose forward pass is the loss of a packed row."""

    model: PreTrainedModel | PeftModel

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, row: PackedRow) -> torch.Tensor:
        """The row's summed negative log-likelihood over its learnt tokens, a float32 scalar."""
        base = base_of(self.model)
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
