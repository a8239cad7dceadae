"""What units cost, by every way that there is to price them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..config import PruneConfig
from ..selection.curves import Curve, priced
from ..spec import Group
from ..structure.masks import Masks

Prices = dict[str, Tensor]
"""By group `(group.size,)`; their sums are what units cost."""


def compares(config: PruneConfig) -> bool:
    """Whether the choices by all ways to price are judged. Unless one is asked for they are, but with merged tokens,
    where measured prices kept more, and where sublayers may leave whole, which has but one price."""
    unsaid = config.cost == "auto" and not (config.depth or config.merges_tokens)
    return config.measures_costs and (config.cost == "both" or unsaid)


def ways_to_price(
    scores: Prices, free: Sequence[Group], masks: Masks, curves: Mapping[str, Curve]
) -> dict[str, Prices]:
    """`predicted`, by scores, and where curves were measured `measured`, by these: the order is that of the scores."""
    if not curves:
        return {"predicted": scores}
    known = [g for g in free if g.name in curves and bool(masks[g.name].any())]
    by_curve = {g.name: priced(g, scores[g.name], masks[g.name], curves[g.name]) for g in known}
    return {"predicted": scores, "measured": scores | by_curve}


def nearest(ways: Mapping[str, Prices], distance: Callable[[Prices], float]) -> tuple[Prices, dict[str, Any]]:
    """The way whose choice is nearest to the dense model, and what a decision's row says of that."""
    distances = {way: distance(prices) for way, prices in ways.items()}
    best = min(distances, key=distances.__getitem__)
    return ways[best], {"cost": best} | {f"distance_{way}": d for way, d in distances.items()}
