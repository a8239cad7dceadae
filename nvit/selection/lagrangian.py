"""One shot: least saliency removed at a latency, by the price of latency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from ..latency.table import LatencyTable
from ..spec import Group
from ..structure.masks import Masks
from .decision import Decision
from .descent import Descent

BISECTIONS = 40


def drop_to_target(
    scores: Mapping[str, Tensor],
    masks: Masks,
    groups: Sequence[Group],
    table: LatencyTable,
    target_ms: float,
    ends: Mapping[str, float] | None = None,
) -> tuple[Masks, float]:
    """Least saliency removed at `target_ms`: one shot, no training between decisions.

    For a price `eta` of latency every group in turn keeps the prefix of its queue that minimises saliency lost plus
    `eta` times latency, until none changes its mind; bisection on `eta` finds the lowest price that meets the target.

    Args:
        ends: what it costs that a sublayer leaves whole, by the group that it leaves with; all others stay.

    Returns:
        Masks and `eta` in saliency per dense latency.

    Raises:
        ValueError: the target is below what the smallest widths allow.
    """
    decision = Decision(scores, masks, groups, table, ends)
    if decision.latency_ms() <= target_ms:
        return decision.masks(), 0.0
    eta, just_below = _lowest_price(decision, target_ms)
    for queue, bundles in enumerate(just_below):
        decision.set_gone(queue, int(bundles))
    # Between the two prices lies one change of mind, which can be a large step: take its best bundles alone.
    while decision.latency_ms() > target_ms:
        price = decision.saliency() / np.maximum(decision.latency_saved(), 1e-12)
        if not np.isfinite(price).any():
            break
        decision.drop(int(price.argmin()))
    return decision.masks(), eta


def _lowest_price(decision: Decision, target_ms: float) -> tuple[float, np.ndarray]:
    """The lowest price found that meets the target, and the bundles gone at a price just below, which does not."""
    table, descent = decision.table, Descent(decision)
    enough = target_ms * (1 + 1e-12)  # the descent adds up in another order than the table does

    # Prices above what is at stake are needed only where latency hardly changes.
    at_stake = sum(q.lost[-1] for q in decision.queues) + sum(way.cost for way in decision.exits.values())
    low, high = 0.0, max(float(at_stake), 1e-30)
    dear, ms = descent.at(high)
    while ms > enough:
        low, high = high, high * 16
        if high > 1e24:
            raise ValueError(
                f"latency target {target_ms / table.dense_ms:.3f} of dense cannot be met: the smallest allowed widths "
                f"reach {ms / table.dense_ms:.3f}. Raise the target, or allow more groups to be pruned."
            )
        dear, ms = descent.at(high)

    cheap, _ = descent.at(low)
    for _ in range(BISECTIONS):
        if np.abs(dear - cheap).sum() <= 1 or high < low * (1 + 1e-6):
            break
        middle = (low * high) ** 0.5 if low else high / 16
        gone, ms = descent.at(middle)
        if ms <= enough:
            high, dear = middle, gone
        else:
            low, cheap = middle, gone
    return high, cheap
