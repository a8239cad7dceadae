"""Iterative pruning: the cheapest bundles leave, one by one (arXiv:2110.04869, Sec. 3.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from ..latency.table import LatencyTable
from ..spec import Group
from ..structure.masks import Masks
from .decision import Decision


def drop_cheapest(
    scores: Mapping[str, Tensor],
    masks: Masks,
    groups: Sequence[Group],
    table: LatencyTable,
    bundles_per_step: int = 2,
    eta: float = 4.85e-4,
) -> Masks:
    """Remove the bundles with the lowest `saliency - eta * latency saved` (arXiv:2110.04869, Eq. 7), one by one.

    Bundles of all groups and blocks are ranked together; within a group units leave in order of saliency. The latency
    saved is the finite difference of the whole bundle, as a fraction of the table's dense latency.

    Args:
        scores: saliency by group, `(group.size,)`; groups without one keep all they have.
        eta: saliency one dense latency is worth.

    Returns:
        New masks; the arguments are unchanged. Equal to `masks` when only last bundles remain.
    """
    decision = Decision(scores, masks, groups, table)
    for _ in range(bundles_per_step):
        score = decision.saliency() - eta * decision.latency_saved()  # Eq. 7, of every group's next bundle
        if not np.isfinite(score).any():
            break  # only last bundles remain
        decision.drop(int(score.argmin()))
    return decision.masks()
