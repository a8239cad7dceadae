"""Loss that stays after a unit is removed and its readers are refitted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ..calibration.capture import Place
from ..calibration.statistics import SiteStatistics
from ..spec import Group
from .base import Scores
from .elimination import eliminate
from .gauss_newton import GaussNewton, dims_of, places_of, widened


class Remaining(GaussNewton):
    """Loss that stays after a unit is removed and its readers are refitted. loss"""

    name = "remaining"

    @property
    def wants_images(self) -> bool:
        return self.context is None or self.context.statistics is None

    def finish(self) -> Scores:
        return remaining_loss(self.context.model, self.context.groups, self.context.masks, self.statistics)


def remaining_loss(
    model: nn.Module,
    groups: Sequence[Group],
    masks: Mapping[str, Tensor],
    statistics: Mapping[Place, SiteStatistics],
) -> Scores:
    """Loss that stays after a unit is removed and its readers are refitted, by group `(group.size,)`.

    Units of a group leave one after another, the cheapest first. What a unit costs is the curvature times the part of
    it that the kept ones do not predict linearly, as in the optimal brain surgeon (Hassibi & Stork 1993) with
    activations in place of weights and their Gauss-Newton curvature. Query/key dims have no linear reader: their cost
    is curvature times mean square. Scores ascend in the order of leaving, so that sums over a prefix are its cost.

    Raises:
        ValueError: a group at none of whose places statistics were gathered.
    """
    places, scores = places_of(model, groups, statistics), {}
    for g in groups:
        narrow = _cost(g, int(masks[g.name].sum()), [statistics[place] for place in places[g.name]])
        scores[g.name] = widened(g, masks[g.name], narrow)
    return scores


def _cost(group: Group, units: int, statistics: Sequence[SiteStatistics]) -> Tensor:
    if group.kind == "qk_dim":
        total = sum(s.curvature.diagonal() * s.xx.diagonal() / s.rows for s in statistics)
        return total[dims_of("qk_dim", units, len(total))].sum(1).cpu()
    problems = [(s.covariance, s.curvature, dims_of(group.kind, units, len(s.x))) for s in statistics]
    return eliminate(problems, units, chunk=max(1, units // 96))
