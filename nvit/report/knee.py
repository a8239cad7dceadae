"""Where a curve of quality against cost bends."""

from __future__ import annotations

from collections.abc import Sequence


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the `(cost, quality)` points that no other one beats, by rising cost: none is cheaper and as good."""
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1]))
    found: list[int] = []
    for i in order:
        if not found or points[i][1] > points[found[-1]][1]:
            found.append(i)
    return found


def knee(points: Sequence[tuple[float, float]], least: float = 0.0) -> int | None:
    """The index of the `(cost, quality)` point at the knee: of the best quality that each cost buys, the point farthest
    above the chord from the cheapest to the dearest point (Kneedle, Satopaa et al., ICDCSW 2011, without its smoothing,
    as there are few points; upright distances, in proportion to those to the chord).

    Args:
        points: quality grows with what is wanted.
        least: how far above the chord a knee has to stand, in units of quality, so that noise makes none.

    Returns:
        None where there is no knee: fewer than three costs, or no point stands above the chord, as where quality falls
        the less the further one goes.
    """
    if len({x for x, _ in points}) < 3:
        return None
    kept = front(points)
    (x0, y0), x1, y1 = points[kept[0]], max(x for x, _ in points), points[kept[-1]][1]
    above = {
        i: points[i][1] - (y0 + (y1 - y0) * (points[i][0] - x0) / (x1 - x0)) for i in kept[1:] if points[i][0] < x1
    }
    best = max(above, key=lambda i: above[i], default=None)
    return best if best is not None and above[best] > max(least, 1e-9 * abs(y1 - y0)) else None
