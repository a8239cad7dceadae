"""Gauss-Newton curvature between gates: loss that removing a unit adds, nothing refitted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..calibration.capture import Place
from ..calibration.statistics import GateProducts, Seen
from ..layers import prunable_layers
from ..spec import Group
from .fisher import leave_in_turn


def _places(model: nn.Module, groups: Sequence[Group], seen: Mapping[Place, Seen]) -> dict[str, list[Place]]:
    """Where the units of each group leave.

    Raises:
        ValueError: a group at none of whose places a gradient was seen.
    """
    places: dict[str, list[Place]] = {g.name: [] for g in groups}
    for name, layer in prunable_layers(model).items():
        for axis, group in layer.axes.items():
            site = next((s for s, declared in layer.sites().items() if axis in declared.axes), "")
            if group in places and (name, site) in seen:
                places[group].append((name, site))
    for name, found in places.items():
        if not found:
            raise ValueError(f"{name}: no gradient reached where its units leave; this criterion cannot rank it")
    return places


def _wide(group: Group, mask: Tensor, narrow: Tensor) -> Tensor:
    return narrow.new_zeros(group.size).index_copy_(0, mask.nonzero().squeeze(1).cpu(), narrow.cpu())


def curvature_loss(
    model: nn.Module,
    groups: Sequence[Group],
    masks: Mapping[str, Tensor],
    seen: Mapping[Place, Seen],
    gates: GateProducts,
) -> dict[str, Tensor]:
    """Loss that removing a unit adds, those that left before it gone, by group `(group.size,)`; nothing is refitted.

    Removing a set of units costs half the sum of the curvature between their gates over all pairs in it. The curvature
    is the mean of two estimates. Products of gate gradients over images are right on average, but noisy. Those of
    activations times those of gradients (Martens & Grosse 2015, arXiv:1503.05671) have all tokens to average over, but
    take tokens for independent of each other. See `saliency.leave_in_turn` for the order.

    Raises:
        ValueError: a group at none of whose places a gradient was seen.
    """
    places, scores = _places(model, groups, seen), {}
    for g in groups:
        units = int(masks[g.name].sum())

        def by_unit(products: Tensor, kind: str = g.kind, units: int = units) -> Tensor:
            dims = _dims(kind, units, len(products))
            order = dims.flatten().to(products.device)
            return products[order][:, order].view(*dims.shape, *dims.shape).sum((1, 3))

        sampled = [(g.name, "emb")] if g.kind == "emb" else places[g.name]
        total = sum(by_unit(gates.sums[place] / gates.images) for place in sampled)
        total = total + sum(by_unit(seen[p].xx / seen[p].rows * seen[p].curvature) for p in places[g.name])
        scores[g.name] = _wide(g, masks[g.name], leave_in_turn(total / 2))
    return scores


def _dims(kind: str, units: int, d: int) -> Tensor:
    """Which dims each unit owns, `(units, dims of a unit)`."""
    every = torch.arange(d)
    if kind == "heads":
        return every.view(units, -1)
    return every.view(-1, units).T
