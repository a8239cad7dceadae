"""What repeated timings say: a ratio of two models with its spread, and whether two timings of one model differ."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

DIFFER = 0.1
"""Two timings of one model are of two states of the machine where they differ by more than this share."""

ROUNDS = 8
"""At least so many, that a spread means something."""


@dataclass(frozen=True)
class Ratio:
    """Latency as a fraction of another model's: the median over rounds, and how far it may be off, see `spread_of`."""

    value: float
    spread: float


def spread_of(values: np.ndarray) -> float:
    """How far the median of `values` `(rounds,)` may be off: the larger side of its 95 % interval by ranks, which
    asks nothing of the distribution; of fewer than eight values their whole range."""
    ordered, count = np.sort(values), len(values)
    outside = max(0, int(count / 2 - 0.98 * math.sqrt(count)))
    middle = float(np.median(ordered))
    return max(float(ordered[count - 1 - outside]) - middle, middle - float(ordered[outside]))


def ratio_to_first(rounds: np.ndarray, model: int) -> Ratio:
    """One model of `rounds` `(rounds, models)` against the first one, round by round: what slows a round slows both."""
    each = rounds[:, model] / rounds[:, 0]
    return Ratio(float(np.median(each)), spread_of(each))


def differ(now: np.ndarray, then: float) -> bool:
    """Whether timings `(rounds,)` of a model are of another state of the machine than the milliseconds `then`: they
    differ by more than `DIFFER` and by more than their spread."""
    off = abs(float(np.median(now)) - then)
    return off > max(DIFFER * then, spread_of(now))
