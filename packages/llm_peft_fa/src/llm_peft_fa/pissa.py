"""PiSSA's start: an update that begins as the largest singular part of each weight, which the weight then lacks."""

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from labs_common.device import exact_float32
from llm_peft_fa.base import device

# Of a matrix of 8192 x 3072 with slowly falling singular values, these two find the leading 16 vectors to 0.3 degrees
# (root mean square) and lose 5e-6 of their energy; without oversampling, as PEFT's pissa_niter_16, 13 degrees and 2e-3.
OVERSAMPLING, POWER = 2, 8


def leading_part(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Finds the largest singular triples of a matrix by a randomised subspace iteration (Halko et al. 2011, alg. 4.4).

    A matrix with few rows or columns is decomposed exactly, which takes no longer. Random numbers are torch's.

    Args:
        weight: (outputs, inputs), in float32.
        rank: how many triples.

    Returns:
        U (outputs, rank), s (rank) and V^T (rank, inputs).
    """
    width = OVERSAMPLING * rank
    if 2 * width < min(weight.shape):
        u, s, v = torch.svd_lowrank(weight, q=width, niter=POWER)
        right = v.T
    else:
        u, s, right = torch.linalg.svd(weight, full_matrices=False)
    return u[:, :rank], s[:rank], right[:rank]


@torch.no_grad()
def from_leading_part(adapted: PeftModel) -> PeftModel:
    """Gives the LoRA layers of a model the start of PiSSA (Meng et al. 2024, eq. 2 to 4), on the GPU if there is one.

    B = U sqrt(s / scale) and A = sqrt(s / scale) V^T; W loses scale B A. A model without weights stays as it is.
    """
    config = adapted.active_peft_config
    config.init_lora_weights = "pissa"
    for layer in adapted.modules():
        if not isinstance(layer, LoraLayer) or layer.get_base_layer().weight.is_meta:
            continue
        base: Any = layer.get_base_layer()
        down, up = layer.lora_A["default"], layer.lora_B["default"]
        weight: torch.Tensor = base.weight.to(device(), torch.float32)
        with exact_float32(weight.device):
            u, s, right = leading_part(weight, config.r)
            root = (s / layer.scaling["default"]).sqrt()
            a, b = root[:, None] * right, u * root
            rest = weight - layer.scaling["default"] * b @ a
        down.weight.data, up.weight.data = a.to(down.weight.device), b.to(up.weight.device)
        base.weight.data = rest.to(base.weight)
    return adapted
