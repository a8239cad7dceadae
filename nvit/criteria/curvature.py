"""Gauss-Newton curvature between gates: loss that removing a unit adds, nothing refitted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ..calibration.capture import Place
from ..calibration.gauss_newton import GateProducts
from ..calibration.statistics import SiteStatistics
from ..spec import Group
from .base import Scores
from .gauss_newton import GaussNewton, dims_of, places_of, widened
from .turns import leave_in_turn


class Curvature(GaussNewton):
    """Loss that removing a unit adds, by Gauss-Newton curvature between gates, those that left before it gone. loss"""

    name = "curvature"

    def __init__(self, momentum: float | None = None) -> None:
        super().__init__(momentum)
        self.gates = GateProducts()

    def finish(self) -> Scores:
        c = self.context
        return curvature_loss(c.model, c.groups, c.masks, self.statistics, self.gates)


def curvature_loss(
    model: nn.Module,
    groups: Sequence[Group],
    masks: Mapping[str, Tensor],
    statistics: Mapping[Place, SiteStatistics],
    gates: GateProducts,
) -> Scores:
    """Loss that removing a unit adds, those that left before it gone, by group `(group.size,)`; nothing is refitted.

    Removing a set of units costs half the sum of the curvature between their gates over all pairs in it. The curvature
    is the mean of two estimates. Products of gate gradients over images are right on average, but noisy. Those of the
    Kronecker factors, activations' second moments times gradients' (Martens & Grosse 2015, arXiv:1503.05671), have all
    tokens to average over, but take tokens for independent of each other. See `leave_in_turn` for the order.

    Raises:
        ValueError: a group at none of whose places statistics were gathered.
    """
    places, scores = places_of(model, groups, statistics), {}
    for g in groups:
        units = int(masks[g.name].sum())
        sampled = [(g.name, "emb")] if g.kind == "emb" else places[g.name]
        total = sum(_by_unit(gates.sums[place] / gates.images, g.kind, units) for place in sampled)
        factors = (statistics[place] for place in places[g.name])
        total = total + sum(_by_unit(s.xx / s.rows * s.curvature, g.kind, units) for s in factors)
        scores[g.name] = widened(g, masks[g.name], leave_in_turn(total / 2))
    return scores


def _by_unit(products: Tensor, kind: str, units: int) -> Tensor:
    """Products of dims `(d, d)` added up to those of units `(units, units)`."""
    dims = dims_of(kind, units, len(products))
    order = dims.flatten().to(products.device)
    return products[order][:, order].view(*dims.shape, *dims.shape).sum((1, 3))
