"""Losses of everyday Persian and English, which show what was forgotten: eight paragraphs of each, about the same."""

import math
from importlib.resources import files
from typing import Any, cast

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase

from llm_peft_fa.model import Adapted, arithmetic, base_of
from llm_peft_fa.templates import encode_plain

LOGITS = 2**26  # at once: 256 MiB in float32


@torch.no_grad()
def losses_of_general_text(model: Adapted, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """Measures the loss in Persian and in English text, in nats per token: what rises over the base's was forgotten.

    A language that the model predicts no better than by chance (the logarithm of its vocabulary's size) is left out:
    it was never learnt.
    """
    found = {}
    base = base_of(model)
    for language in ("Persian", "English"):
        text = files("llm_peft_fa").joinpath(f"general_{language.lower()}.txt").read_text(encoding="utf-8")
        rows = [item.ids for item in encode_plain(tokenizer, text.splitlines(), 1024)]
        longest, vocabulary = max(map(len, rows)), base.get_output_embeddings().weight.shape[0]
        size = max(1, LOGITS // (longest * vocabulary))
        total = 0.0
        for at in range(0, len(rows), size):
            # Padded on the right, where no token looks.
            ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows[at : at + size]], device=base.device)
            targets = torch.tensor([row + [-100] * (longest - len(row)) for row in rows[at : at + size]])
            with arithmetic(base):
                logits = cast(Any, model)(input_ids=ids, use_cache=False).logits
            logits = logits[:, -longest:-1].float()  # (rows, longest - 1, vocabulary), without those of a soft prompt
            total += float(
                F.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten().to(ids.device), reduction="sum")
            )
        loss = total / sum(len(row) - 1 for row in rows)
        if loss < math.log(vocabulary):
            found[f"{language} text loss"] = loss
    return found
