"""AdaLoRA beside its layers: a regulariser in the loss, and ranks that move after every step."""

from typing import Any, cast

import torch
from peft import AdaLoraConfig, AdaLoraModel, PeftModel
from transformers import PreTrainedModel


def orthogonality(model: PeftModel) -> torch.Tensor:
    """Computes AdaLoRA's regulariser (Zhang et al. 2023, eq. 4), weighted as PEFT does: the mean of |P P^T - I|_F."""
    norms = []
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            product = parameter @ parameter.T if "lora_A" in name else parameter.T @ parameter  # (rank, rank)
            norms.append(torch.linalg.norm(product - torch.eye(len(product), device=product.device)))
    return torch.stack(norms).mean() * model.active_peft_config.orth_reg_weight


class RankBudget:
    """Lets PEFT mask the least important ranks after each step of the optimizer, by the gradients of that step.

    PEFT keeps its allocator's averages in no state dict: a resumed run would choose other ranks without these.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, optimizer: torch.optim.Optimizer) -> None:
        assert isinstance(model, PeftModel)
        assert isinstance(model.base_model, AdaLoraModel)
        self.adalora = model.base_model
        self.config = cast(AdaLoraConfig, model.active_peft_config)
        self.step = 0
        optimizer.register_step_post_hook(self._after_step)

    def _after_step(self, *_: Any) -> None:
        self.adalora.update_and_allocate(self.step)
        self.step += 1

    def state_dict(self) -> dict[str, Any]:
        """Returns the steps done, the moving averages of the importances, and the ranks that are left."""
        allocator = self.adalora.rankallocator
        return {
            "step": self.step,
            "importance": allocator.exp_avg_ipt,
            "uncertainty": allocator.exp_avg_unc,
            "rank_pattern": self.config.rank_pattern,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from where `state_dict` was taken."""
        parameters = dict(self.adalora.model.named_parameters())
        allocator = self.adalora.rankallocator
        self.step = state["step"]
        for name in ("importance", "uncertainty"):
            state[name] = {key: value.to(parameters[key].device) for key, value in state[name].items()}
        allocator.exp_avg_ipt, allocator.exp_avg_unc = state["importance"], state["uncertainty"]
        allocator.ipt = {name: torch.zeros_like(value) for name, value in allocator.exp_avg_ipt.items()}
        self.config.rank_pattern = state["rank_pattern"]
