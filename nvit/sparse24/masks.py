"""Which weights of a model can be 2:4, and the masks that keep the two largest of four."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..layers import prunable_layers
from .kernels import mask_2to4

MULTIPLE = 16
"""Both sides of a projection must be multiples of this for any sparse backend."""


def projections(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear projection of the blocks of a prepared model, by the name of its weight."""
    return {
        f"{name}.{part.name}.weight": part.module
        for name, layer in prunable_layers(model).items()
        if layer.reorderable() is not None
        for part in layer.linears()
    }


def refusal(weight: Tensor) -> str | None:
    """Why no sparse backend takes a weight of this shape, or None."""
    if any(n % MULTIPLE for n in weight.shape):
        return f"shape {tuple(weight.shape)} is not in multiples of {MULTIPLE}"
    return None


def masks_2to4(model: nn.Module) -> dict[str, Tensor]:
    """The two largest of each four neighbours along the input, for every projection that a backend takes.

    Returns:
        Bool masks of the weights' shapes, by weight name.
    """
    return {n: mask_2to4(p.weight.detach()) for n, p in projections(model).items() if refusal(p.weight) is None}


@torch.no_grad()
def apply_masks_(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Zero what the masks leave out, in place."""
    found = projections(model)
    for name, mask in masks.items():
        found[name].weight.mul_(mask)
