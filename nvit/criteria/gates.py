"""The gradient of every unit's gate, from weights or from activations, and saliencies that follow from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..calibration.capture import Place, capture
from ..layers import prunable_layers
from ..spec import Group
from .base import Evidence, Scores
from .gradients import gate_gradients, wide

_AT_ONCE = 2**21
"""Products of activation and gradient that are summed at once."""


class GateRecorder:
    """Reads gate gradients of every group from activations, per sample, while it is open.

    ```python
    with GateRecorder(model, groups, masks) as gates:
        loss.backward()                       # weights may be frozen
    gates.pop()["blocks.0.mlp"]               # (batch, group.size): each sample's share of the batch's gate gradient
    ```
    """

    def __init__(self, model: nn.Module, groups: Sequence[Group], masks: Mapping[str, Tensor]) -> None:
        self.groups, self.masks = {g.name: g for g in groups}, masks
        self.sums: dict[str, Tensor] = {}
        self.units: dict[Place, list[tuple[str, int]]] = {}
        for name, layer in prunable_layers(model).items():
            for site, declared in layer.sites().items():
                leaving = [(layer.axes[kind], dim) for kind, dim in declared.axes.items() if kind in layer.axes]
                if mine := [(group, dim) for group, dim in leaving if group in self.groups]:
                    self.units[name, site] = mine
        self.captured = capture(model, self.units, self._see)

    def __enter__(self) -> GateRecorder:
        self.captured.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self.captured.__exit__(*(error or (None, None, None)))

    def _see(self, place: Place, act: Tensor, grad: Tensor) -> None:
        for group, dim in self.units[place]:
            self._add(group, dim, act, grad)

    def _add(self, name: str, axis: int, act: Tensor, grad: Tensor) -> None:
        """Sum `act * grad` over everything but the image and the unit."""
        others = [d for d in range(1, act.dim()) if d != act.dim() + axis]
        # A few images at a time: the products, wider than a bfloat16 activation, are never there as a whole.
        few = max(1, _AT_ONCE // act[0].numel())
        products = (wide(a) * wide(g) for a, g in zip(act.split(few), grad.split(few), strict=True))
        part = torch.cat([p.sum(others) if others else p for p in products])
        self.sums[name] = self.sums[name] + part if name in self.sums else part

    def pop(self) -> dict[str, Tensor]:
        """Gate gradients since the last call, `(batch, group.size)`, zero at pruned units.

        Raises:
            KeyError: no backward pass reached a group's layer.
        """
        out = {}
        for name, g in self.groups.items():
            narrow = self.sums[name]
            out[name] = narrow.new_zeros(narrow.shape[0], g.size)
            out[name][:, self.masks[name].to(narrow.device)] = narrow
        self.sums.clear()
        return out


def hessian(groups: Sequence[Group], seen: Evidence) -> Scores:
    """Squared gate gradient, the gate placed where the unit leaves the network. loss²"""
    return {name: total.square() for name, total in seen.gate_gradients(groups).items()}


def nvit(groups: Sequence[Group], seen: Evidence) -> Scores:
    """Squared gate gradient over the tensors of the published runs, divided by theirs per kind. loss²"""
    totals = gate_gradients(groups, seen.params, seen.grads, lambda g: g.published_slices)
    return {g.name: (totals[g.name] / g.divisor).square() for g in groups}


def absolute(groups: Sequence[Group], seen: Evidence) -> Scores:
    """Mean over samples of the absolute gate gradient of the sample's own loss. loss"""
    return seen.over_ranks({g.name: seen.gates[g.name].abs().sum(0) for g in groups})
