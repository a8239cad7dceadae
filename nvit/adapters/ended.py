"""Sublayers that leave whole: attention or MLP of a block becomes its bias, and the norm before it, which nobody reads
any more, an identity."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ..layers import Attention, GatedMlp, Mlp, prunable_layers

SUBLAYERS = {"heads": Attention, "qk_dim": Attention, "v_dim": Attention, "mlp": (Mlp, GatedMlp)}
"""What a block has to hold for each of its widths to be there."""


def has(block: nn.Module, kind: str) -> bool:
    """Whether a prepared block has the sublayer with this width; its `emb` it always has."""
    return kind not in SUBLAYERS or any(isinstance(m, SUBLAYERS[kind]) for m in block.modules())


def end_(
    model: nn.Module, norms: Mapping[str, str], params: Mapping[str, Tensor], masks: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Let the sublayers of which `masks` leave nothing leave a prepared model, in place.

    Args:
        norms: of a block, the name of each sublayer and of the norm before it.
        params: of the whole model, cut.

    Returns:
        Those that are left.
    """
    left = dict(params)
    for name, layer in prunable_layers(model).items():
        if not layer.ended({axis: masks[group] for axis, group in layer.axes.items()}):
            continue
        owner, _, leaf = name.rpartition(".")
        kept = f"{name}.{layer.last_name}.bias"
        absent = layer.absent(layer.last.bias)
        absent.axes = {"emb": layer.axes["emb"]}
        model.set_submodule(name, absent.train(layer.training))
        setattr(model.get_submodule(owner), norms[leaf], nn.Identity())
        gone = (f"{name}.", f"{owner}.{norms[leaf]}.")
        left = {n: t for n, t in left.items() if n == kept or not n.startswith(gone)}
    return left
