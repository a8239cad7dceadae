"""Values on a grid of widths, monotone and interpolated between points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.interpolate import RegularGridInterpolator

from .spec import KINDS


def made_monotone(values: np.ndarray) -> np.ndarray:
    """Values that grow along every axis: halfway between the least ones from above and the greatest from below, so
    that one slow point does not lift all that are wider."""
    above, below = values, values
    for d in range(values.ndim):
        above = np.maximum.accumulate(above, axis=d)
        below = np.flip(np.minimum.accumulate(np.flip(below, d), axis=d), d)
    return (above + below) / 2


class Grid:
    """Values on a grid of widths, monotone along every axis, interpolated linearly between points."""

    def __init__(self, axes: Mapping[str, Sequence[int]], values: np.ndarray) -> None:
        self.axes, self.values = {k: [int(v) for v in a] for k, a in axes.items()}, np.asarray(values, dtype=float)
        self.columns = [KINDS.index(kind) for kind in axes]
        monotone = self.monotone = made_monotone(self.values)
        # An axis with one point is constant there; the interpolator wants two.
        points = [a if len(a) > 1 else [a[0], a[0] + 1] for a in self.axes.values()]
        for d, a in enumerate(self.axes.values()):
            monotone = monotone if len(a) > 1 else np.repeat(monotone, 2, axis=d)
        self._at = RegularGridInterpolator(points, monotone, method="linear", bounds_error=True)

    def __call__(self, widths: np.ndarray) -> np.ndarray:
        try:
            return self._at(widths[..., self.columns])
        except ValueError:
            for kind, column in zip(self.axes, self.columns, strict=True):
                low, high = self.axes[kind][0], self.axes[kind][-1]
                found = widths[..., column]
                if found.min() < low or found.max() > high:
                    raise ValueError(
                        f"{kind} width {found.min()}..{found.max()} lies outside the latency table's {low}..{high}. "
                        "Measure a table for this model and these bundle sizes."
                    ) from None
            raise

    def shares(self, kind: str, widths: np.ndarray) -> np.ndarray:
        """How much each point of one axis counts at `widths` `(...)`: `(..., points)`, adding up to 1.

        Multilinear interpolation is the contraction of `monotone` with one such row per axis.
        """
        points = self.axes[kind]
        return np.stack([np.interp(widths, points, unit) for unit in np.eye(len(points))], -1)
