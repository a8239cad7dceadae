"""Optimisers: which parameters decay, and AdamW with every number on the device."""

from __future__ import annotations

from typing import Any

import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

OF_TOKENS = (
    "*cls_token",
    "*dist*_token",
    "*reg*_token*",
    "*mask_token",
    "*pos_embed*",
    "*position_embedding*",
    "*latent",
)
"""Names of parameters that belong to single tokens, of timm and of transformers: weight decay leaves them alone."""


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups with and without weight decay: none for biases, norms and what belongs to single tokens."""
    names = {*OF_TOKENS, *(model.no_weight_decay() if hasattr(model, "no_weight_decay") else ())}
    return param_groups_weight_decay(model, weight_decay, no_weight_decay_list=names)


def fused_adamw(optimizer: torch.optim.Optimizer) -> bool:
    """Make an AdamW one whose every number is on the device, in place: fused, capturable, learning rates as tensors.

    Returns:
        False, and nothing is changed, for another optimiser.
    """
    if type(optimizer) is not torch.optim.AdamW:
        return False
    for group in optimizer.param_groups:
        device = group["params"][0].device
        group |= {"fused": True, "foreach": False, "capturable": device.type == "cuda"}
        group["initial_lr"] = float(group["lr"])  # of schedules
        group["lr"] = torch.tensor(float(group["lr"]), device=device)
    optimizer._step_supports_amp_scaling = True
    return True


def set_rates(optimizer: torch.optim.Optimizer, rates: list[float]) -> None:
    """Learning rates by parameter group, in place where they are tensors."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
