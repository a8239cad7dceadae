"""Where by the table a latency target lies, once compact models have been measured: a table is a sum of parts, and the
model it foretells is a little faster or slower than that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from torch import nn

from ..latency.spread import Ratio

Clock = Callable[[nn.Module], Ratio]
"""Latency of a compact model as a fraction of the dense one's, as measured."""

T = TypeVar("T")

ATTEMPTS = 4
"""Decisions at most for one target."""

NEAR = 0.005
"""A miss of less than this share of the target is none, however small the spread: bundles are not finer."""

WANDERS = 0.05
"""How far a table is off (one standard deviation) once all of the latency has gone; half way 0.7 times as far."""


@dataclass(frozen=True)
class Reading:
    """A compact model's latency as a fraction of the dense one's: by the table, and measured, with its spread."""

    predicted: float
    measured: float
    spread: float

    def meets(self, target: float) -> bool:
        """Whether the target is met, as far as can be told."""
        return self.measured - self.spread <= target

    def misses(self, target: float) -> bool:
        """Whether it lies to either side of the target by more than its spread."""
        return abs(self.measured - target) > max(self.spread, NEAR * target)


def measured(reading: Reading | None) -> dict[str, float]:
    """What a decision's row says of a measurement."""
    return {} if reading is None else {"measured_ratio": reading.measured, "measured_spread": reading.spread}


class Aim:
    """The predicted latency to prune to, so that the measured one is a target's.

    Args:
        clock: None where the table's word counts.
        least: the smallest predicted ratio that pruning can reach.

    Attributes:
        readings: of compact models so far, in order; part of a run's state.
    """

    def __init__(self, clock: Clock | None = None, least: float = 0.0) -> None:
        self.clock, self.least = clock, least
        self.readings: list[Reading] = []

    def at(self, target: float) -> float:
        """The predicted ratio to prune to: off the target by as much as the table is expected to be there."""
        if self.clock is None or not self.readings:
            return target
        off, low, high = self._off(), 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if middle + off(middle) <= target else (low, middle)
        return low

    def _off(self) -> Callable[[float], float]:
        """By how much measured latencies are expected to be above a predicted one.

        The more has left, the farther a table may be off: a random walk from the dense model on, of which readings are
        noisy samples; this is its mean given them. One exact reading holds from there on, one that the spread
        drowns says little, and several are averaged.
        """
        gone = 1 - np.array([r.predicted for r in self.readings])
        noise = np.array([max(r.spread / 2, WANDERS / 50) for r in self.readings])
        off = np.array([r.measured - r.predicted for r in self.readings])
        alike = WANDERS**2 * np.minimum.outer(gone, gone)
        weights = WANDERS**2 * np.linalg.solve(alike + np.diag(noise**2), off)
        return lambda predicted: float(np.minimum(1 - predicted, gone) @ weights)

    def beyond(self, target: float) -> bool:
        """Whether no pruning reaches where the target lies, by what was measured."""
        return self.at(target) < self.least

    def read(self, predicted: float, compact: Callable[[], nn.Module]) -> Reading:
        """Measure a model for which the table says `predicted`; one that was measured last is not measured again."""
        if not self.readings or self.readings[-1].predicted != predicted:
            found = self.clock(compact())
            self.readings.append(Reading(predicted, found.value, found.spread))
        return self.readings[-1]

    def hit(
        self, target: float, choose: Callable[[float], tuple[float, T]], build: Callable[[T], nn.Module]
    ) -> tuple[T, Reading | None]:
        """One shot: choose, measure what was chosen, and choose again where it misses.

        Args:
            choose: what to prune for a predicted ratio, and the ratio that it really has.
            build: the compact model of a choice.

        Returns:
            Of all that was measured the choice nearest to the target, one that meets it if there is any, and its
            reading; None without a clock.
        """
        if self.clock is None:
            return choose(target)[1], None
        tried: list[tuple[Reading, T]] = []
        goal = target if self.beyond(target) else self.at(target)
        while len(tried) < ATTEMPTS:
            predicted, choice = choose(goal)
            if any(predicted == reading.predicted for reading, _ in tried):
                break  # bundles are not finer than that
            tried.append((self.read(predicted, lambda choice=choice: build(choice)), choice))
            if not tried[-1][0].misses(target) or self.beyond(target):
                break
            goal = self.at(target)
        reading, choice = min(tried, key=lambda t: (not t[0].meets(target), abs(t[0].measured - target)))
        return choice, reading
