"""Towers whose stream is pruned while their output keeps its width: a linear layer behind the last norm brings the
kept channels back to it. It begins as the identity, loses inputs with the channels, and a refit fits what is left."""

from __future__ import annotations

from torch import nn

from ..layers import Norm, RestoringNorm, prunable_layers
from .base import Adapter
from .tower import restored_width


def restore_(adapter: Adapter, model: nn.Module, width: int = 0) -> nn.Module:
    """Let the output of a prepared tower keep its width whatever is pruned, in place; twice is once. What follows the
    last norm reads the restored width from then on and is the host's own.

    Args:
        width: of the output; the stream's where 0.

    Raises:
        ValueError: the tower has no place for it; names the reason.
    """
    if restored_width(model) is not None or (name := adapter.output_norm(model)) == "":
        return model
    inside = tuple(f"{block}." for block in adapter.block_names(model))
    for other, layer in prunable_layers(model).items():
        if layer.follows_stream and not other.startswith(inside):
            layer.release_()
    host: Norm = model.get_submodule(name)
    model.set_submodule(name, RestoringNorm(host, width or host.weight.numel()))
    return model
