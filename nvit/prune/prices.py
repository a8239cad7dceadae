"""What units and sublayers cost, by every way that there is to price them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..config import PruneConfig
from ..selection.curves import Curve, priced, whole_costs
from ..spec import Group
from ..structure.masks import Masks

DEARER = 2
"""What sublayers that leave together may cost, beside what they cost alone: where many do, it is more than the sum."""


@dataclass(frozen=True)
class Prices:
    """What a choice goes by.

    Attributes:
        units: by group `(group.size,)`; their sums are what units cost.
        ends: what it costs that a sublayer leaves whole, by the group that it leaves with; all others stay.
    """

    units: dict[str, Tensor]
    ends: dict[str, float] = field(default_factory=dict)


def compares(config: PruneConfig) -> bool:
    """Whether the choices by several ways to price are judged. Unless one is asked for they are, but with merged
    tokens, where measured prices kept more; where sublayers may leave whole they always are, since what these cost
    alone does not add up."""
    unsaid = config.cost == "auto" and not config.merges_tokens
    return config.measures_costs and (config.cost == "both" or config.depth or unsaid)


def ways_to_price(
    scores: dict[str, Tensor], free: Sequence[Group], masks: Masks, curves: Mapping[str, Curve]
) -> dict[str, Prices]:
    """All ways, the one to take where none are judged last. The order of a group's units is that of the scores.

    `predicted` goes by scores; where curves were measured, `measured` by these and `between` by the geometric mean of
    both, all sublayers staying. Where curves tell what sublayers cost alone, `depth` goes by that as well, and
    `less depth` as if they cost more together.
    """
    if not curves:
        return {"predicted": Prices(scores)}
    known = [g for g in free if g.name in curves and bool(masks[g.name].any())]
    by_curve = scores | {g.name: priced(g, scores[g.name], masks[g.name], curves[g.name]) for g in known}
    between = {name: _geometric_mean(score, by_curve[name]) for name, score in scores.items()}
    ways = {"predicted": Prices(scores), "between": Prices(between), "measured": Prices(by_curve)}
    ends = whole_costs(free, masks, curves)
    if not ends:
        return ways
    dearer = {name: DEARER * cost for name, cost in ends.items()}
    return ways | {"less depth": Prices(by_curve, dearer), "depth": Prices(by_curve, ends)}


def judged(ways: Mapping[str, Prices], cost: str) -> dict[str, Prices]:
    """The ways whose choices are compared: not those that a recipe's `cost` rules out."""
    ruled_out = ("predicted", "between") if cost == "measured" else ()
    return {way: prices for way, prices in ways.items() if way not in ruled_out}


def nearest(ways: Mapping[str, Prices], distance: Callable[[Prices], float]) -> tuple[Prices, dict[str, Any]]:
    """The way whose choice is nearest to the dense model, and what a decision's row says of that."""
    distances = {way: distance(prices) for way, prices in ways.items()}
    best = min(distances, key=distances.__getitem__)
    return ways[best], {"cost": best} | {f"distance_{way}": d for way, d in distances.items()}


def _geometric_mean(a: Tensor, b: Tensor) -> Tensor:
    """Of scores, those below 0 as 0: fp64."""
    return a.detach().double().clamp_min(0).sqrt() * b.double().clamp_min(0).sqrt()
