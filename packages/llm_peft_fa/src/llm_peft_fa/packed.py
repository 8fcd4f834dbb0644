"""A causal language model whose forward pass is the loss of a packed row."""

from collections.abc import Iterable
from typing import Any, cast

import torch
from accelerate import Accelerator
from peft import AdaLoraModel, PeftModel, PeftType
from transformers import PreTrainedModel

from labs_common.errors import LabError
from llm_peft_fa.adalora import orthogonality
from llm_peft_fa.loss import chunked_cross_entropy
from llm_peft_fa.packing import PackedRow, packed_row
from llm_peft_fa.templates import Encoded


def base_of(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The model of transformers inside an adapted one, with the adapted layers in it."""
    return cast(PreTrainedModel, model.get_base_model()) if isinstance(model, PeftModel) else model


class PackedCausalLM(torch.nn.Module):
    """A causal language model, adapted or not, whose forward pass is the loss of a packed row.

    With `prompted` False it leaves a soft prompt out.
    """

    model: PreTrainedModel | PeftModel
    prompted = True

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, row: PackedRow) -> torch.Tensor:
        """The row's summed negative log-likelihood over its learnt tokens, a float32 scalar.

        In training of AdaLoRA its regulariser is in it, as often as the row has learnt tokens.
        """
        base = base_of(self.model)
        hidden = base.get_decoder()(
            **self._inputs(base, row),
            # A mask of four dimensions is taken as it is: none is made for the row. With the cache on, and
            # without restarting positions, transformers would let conversations see each other.
            attention_mask=torch.zeros(1, 1, 1, 1, device=row.input_ids.device),
            use_cache=False,
            blocks=row.blocks,
        ).last_hidden_state[0]  # (tokens, width)
        softcap = getattr(base.config.get_text_config(), "final_logit_softcapping", None)
        loss = chunked_cross_entropy(
            hidden.index_select(0, row.predicting), base.get_output_embeddings(), row.targets, softcap
        )
        if self.training and isinstance(self.model, PeftModel) and isinstance(self.model.base_model, AdaLoraModel):
            loss = loss + orthogonality(self.model) * len(row.targets)
        return loss

    def _inputs(self, base: PreTrainedModel, row: PackedRow) -> dict[str, Any]:
        """Tokens and positions; with a soft prompt, its virtual tokens or keys and values for each conversation."""
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
        return {
            "inputs_embeds": embedded.index_copy(1, row.slots.flatten(), virtual),
            "position_ids": positions,
        }


def virtual_tokens(model: PreTrainedModel | PeftModel) -> int:
    """How many slots each conversation needs in a packed row: virtual tokens among the inputs, none in a cache."""
    if not isinstance(model, PeftModel) or not model.active_peft_config.is_prompt_learning:
        return 0
    config = model.active_peft_config
    return 0 if config.peft_type == PeftType.PREFIX_TUNING else int(config.num_virtual_tokens)


@torch.no_grad()
def mean_loss(model: torch.nn.Module, rows: Iterable[PackedRow], accelerator: Accelerator) -> float:
    """Mean negative log-likelihood over the learnt tokens of `rows` (those of one `PackedSteps.rows_of`), in nats."""
    model.eval()
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        total += model(row.to(accelerator.device)).double().cpu() * row.weight
    return float(accelerator.reduce(total.to(accelerator.device), "mean"))


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
