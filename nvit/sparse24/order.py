"""An order of hidden units and V dims under which 2:4 keeps more; the function of the model is unchanged."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..layers import Prunable, prunable_layers
from ..utils.progress import Progress, silent
from .kernels import search_channel_order


def _reorder_(layer: Prunable, axis: str, order: Tensor) -> None:
    """Reorder the units of `mlp`, or the dims of `v_dim` head by head, wherever the layer's parameters hold them."""
    for inner in prunable_layers(layer).values():
        params = dict(inner.named_parameters())
        for mine, s in inner.slices():
            if mine == axis:
                part = s.of(params[s.name])
                first = s.axis - (axis == "v_dim")  # the head stands before its dim
                part.copy_(part.flatten(first, s.axis).index_select(first, order).view(part.shape))


@torch.no_grad()
def permute_(model: nn.Module, seconds: float = 60.0, progress: Progress = silent) -> list[dict[str, float | str]]:
    """Reorder MLP hidden units, and V dims inside each head, so that 2:4 keeps more magnitude. The function of the
    model is unchanged.

    Args:
        seconds: bound on the time for all layers together.

    Returns:
        A row per reader: `weight, kept_before, kept_after` (fractions of the sum of magnitudes).

    >>> model = nvit.load(nvit.BUNDLED)
    >>> rows = nvit.sparse24.permute_(model, seconds=0.5)
    >>> all(row["kept_after"] >= row["kept_before"] for row in rows)
    True
    """
    layers = {n: m for n, m in prunable_layers(model).items() if m.reorderable() is not None}
    rows = []
    for done, (name, layer) in enumerate(layers.items(), start=1):
        part, axis, span = layer.reorderable()
        reader = part.module
        if reader.in_features % 4 or (span or 4) % 4:
            continue
        found = search_channel_order(reader.weight.detach().cpu(), span=span, seconds=seconds / len(layers))
        _reorder_(layer, axis, found.order.to(reader.weight.device))
        kept = {"kept_before": found.kept_before, "kept_after": found.kept_after}
        rows.append({"weight": f"{name}.{part.name}.weight"} | kept)
        progress(done, len(layers), f"permute: {name} keeps {found.kept_after:.4f} of its magnitude")
    return rows
