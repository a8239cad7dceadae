"""Iterative pruning: the cheapest bundles leave, one by one (arXiv:2110.04869, Eq. 7)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from ..latency.table import LatencyTable
from ..spec import Group
from ..structure.masks import Masks
from .bundles import _State


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
    state = _State(scores, masks, groups, table)
    for _ in range(bundles_per_step):
        lost, open_ = state.next_lost()
        if not open_.any():
            break
        best = int(np.where(open_, lost - eta * state.next_saved(), np.inf).argmin())
        state.set_gone(best, state.gone[best] + 1)
    return state.new_masks()
