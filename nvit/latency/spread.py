"""What repeated timings say: one number, a ratio of two models with its spread, whether two timings differ.

Whatever else a machine does only ever slows a call down. So a timing is the lower quartile of its rounds, which varies
less than their median on a busy machine and is as good on a quiet one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

DIFFER = 0.1
"""Two timings of one model are of two states of the machine where they differ by more than this share."""

ROUNDS = 8
"""At least so many, that a spread means something."""

STEADY = 0.01
"""Rounds are enough where no model's ratio may be off by more than this share."""

_RESAMPLES = 200


@dataclass(frozen=True)
class Ratio:
    """Latency as a fraction of another model's, and how far it may be off: half of its 95 % interval."""

    value: float
    spread: float


def typical(rounds: np.ndarray) -> np.ndarray:
    """The lower quartile over rounds `(rounds, ...)`: `(...)`."""
    return np.quantile(rounds, 0.25, axis=0)


def ratio_to_first(rounds: np.ndarray, model: int) -> Ratio:
    """One model of `rounds` `(rounds, models)` against the first one; its spread by drawing whole rounds anew, since
    what slows a round slows both."""
    draws = np.random.default_rng(0).integers(0, len(rounds), (len(rounds), _RESAMPLES))
    again = typical(rounds[draws, model]) / typical(rounds[draws, 0])
    now = typical(rounds)
    value = float(now[model] / now[0])
    low, high = np.quantile(again, (0.025, 0.975))
    return Ratio(value, max(float(high) - value, value - float(low), 0.0))


def steady(rounds: np.ndarray) -> bool:
    """Whether `rounds` `(rounds, models)` tell every model's ratio to the first one well enough."""
    ratios = (ratio_to_first(rounds, i) for i in range(rounds.shape[1]))
    return all(r.spread <= STEADY * r.value for r in ratios)


def differ(now: np.ndarray, then: float) -> bool:
    """Whether timings `(rounds,)` of a model are of another state of the machine than the milliseconds `then`: all of
    their middle half is more than `DIFFER` away."""
    low, high = np.quantile(now, (0.25, 0.75))
    return bool(low > (1 + DIFFER) * then or high < (1 - DIFFER) * then)


def drifted(times: np.ndarray) -> bool:
    """Whether timings `(rounds,)` of a model changed while they were taken: their halves `differ`."""
    half = len(times) // 2
    return len(times) >= ROUNDS and differ(times[half:], float(typical(times[:half])))
