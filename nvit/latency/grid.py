"""Values on a grid of widths, monotone and interpolated between points."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.interpolate import RegularGridInterpolator


def made_monotone(values: np.ndarray) -> np.ndarray:
    """Values that grow along every axis: halfway between the least ones from above and the greatest from below, so
    that one slow point does not lift all that are wider."""
    above, below = values, values
    for d in range(values.ndim):
        above = np.maximum.accumulate(above, axis=d)
        below = np.flip(np.minimum.accumulate(np.flip(below, d), axis=d), d)
    return (above + below) / 2


class Grid:
    """Values on a grid of widths, monotone along every axis, interpolated linearly between points.

    Args:
        kinds: what each axis is the width of, for messages.
        axes: ascending points of each axis.
        values: one dimension an axis.
    """

    def __init__(self, kinds: Sequence[str], axes: Sequence[Sequence[int]], values: np.ndarray) -> None:
        self.kinds, self.axes = tuple(kinds), [[int(v) for v in a] for a in axes]
        self.values = np.asarray(values, dtype=float)
        monotone = self.monotone = made_monotone(self.values)
        # An axis with one point is constant there; the interpolator wants two.
        points = [a if len(a) > 1 else [a[0], a[0] + 1] for a in self.axes]
        for d, a in enumerate(self.axes):
            monotone = monotone if len(a) > 1 else np.repeat(monotone, 2, axis=d)
        self._at = RegularGridInterpolator(points, monotone, method="linear", bounds_error=True)

    def __call__(self, widths: np.ndarray) -> np.ndarray:
        """Values at `widths` `(..., axes)`; returns `(...)`."""
        try:
            return self._at(widths)
        except ValueError:
            for d, (kind, points) in enumerate(zip(self.kinds, self.axes, strict=True)):
                found = widths[..., d]
                if found.min() < points[0] or found.max() > points[-1]:
                    raise ValueError(
                        f"{kind} width {found.min()}..{found.max()} lies outside the latency table's "
                        f"{points[0]}..{points[-1]}. Measure a table for this model and these bundle sizes."
                    ) from None
            raise

    def shares(self, axis: int, widths: np.ndarray) -> np.ndarray:
        """How much each point of one axis counts at `widths` `(...)`: `(..., points)`, adding up to 1.

        Multilinear interpolation is the contraction of `monotone` with one such row per axis.
        """
        points = self.axes[axis]
        return np.stack([np.interp(widths, points, unit) for unit in np.eye(len(points))], -1)
