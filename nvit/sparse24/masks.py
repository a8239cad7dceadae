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
    """Every linear projection of the blocks of a prepared model, by the name of its weight.

    >>> model = nvit.load(nvit.BUNDLED)
    >>> list(nvit.sparse24.projections(model))[:2]
    ['blocks.0.attn.qkv.weight', 'blocks.0.attn.proj.weight']
    """
    return {
        f"{name}.{part.name}.weight": part.module
        for name, layer in prunable_layers(model).items()
        if layer.reorderable() is not None
        for part in layer.linears()
    }


def refusal(weight: Tensor) -> str | None:
    """Why no sparse backend takes a weight of this shape, or None.

    >>> nvit.sparse24.refusal(torch.zeros(128, 60))
    'shape (128, 60) is not in multiples of 16'
    """
    if any(n % MULTIPLE for n in weight.shape):
        return f"shape {tuple(weight.shape)} is not in multiples of {MULTIPLE}"
    return None


def masks_2to4(model: nn.Module) -> dict[str, Tensor]:
    """The two largest of each four neighbours along the input, for every projection that a backend takes.

    Returns:
        Bool masks of the weights' shapes, by weight name.

    >>> model = nvit.load(nvit.BUNDLED)
    >>> masks = nvit.sparse24.masks_2to4(model)
    >>> {float(mask.float().mean()) for mask in masks.values()}
    {0.5}
    """
    return {n: mask_2to4(p.weight.detach()) for n, p in projections(model).items() if refusal(p.weight) is None}


@torch.no_grad()
def apply_masks_(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Zero what the masks leave out, in place.

    >>> model = nvit.load(nvit.BUNDLED)
    >>> nvit.sparse24.apply_masks_(model, nvit.sparse24.masks_2to4(model))
    >>> float((model.blocks[0].mlp.fc1.weight == 0).float().mean())
    0.5
    """
    found = projections(model)
    for name, mask in masks.items():
        found[name].weight.mul_(mask)
