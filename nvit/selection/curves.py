"""What the first units of a group cost, as a convex curve through costs that were measured: from scores that order
units to scores whose sums over the first ones are these costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..spec import Group
from .bundles import units_gone


@dataclass(frozen=True)
class Curve:
    """Costs measured at some depths of one group, all else whole.

    Attributes:
        gone: units gone at each depth, ascending, more than 0.
        cost: what that costs, in any unit that all curves share; noise may make it negative, or fall.
    """

    gone: tuple[int, ...]
    cost: tuple[float, ...]

    def __post_init__(self) -> None:
        assert len(self.gone) == len(self.cost) > 0 and self.gone[0] > 0
        assert all(a < b for a, b in zip(self.gone, self.gone[1:], strict=False))

    def paid(self, gone: int) -> float:
        """The cost of so many units gone, about: linear between the measured depths, and 0 at none."""
        return float(np.interp(gone, np.r_[0, self.gone], np.maximum.accumulate(np.r_[0.0, self.cost])))

    def before(self, size: int) -> Curve | None:
        """The part of it that tells of fewer units than `size`; None where there is none."""
        known = [(g, c) for g, c in zip(self.gone, self.cost, strict=True) if g < size]
        return Curve(*zip(*known, strict=True)) if known else None

    def at(self, shape: Sequence[float]) -> np.ndarray:
        """The cost of 0, 1, 2, … units gone, `(len(shape),)`: from 0, never falling, through the measured points.

        Args:
            shape: a predicted cost of so many units gone, ascending from 0; between two depths, and beyond the last,
                the curve rises in proportion to it.
        """
        shape = np.asarray(shape, dtype=float)
        knots = np.r_[0, self.gone]
        cost = np.maximum.accumulate(np.r_[0.0, self.cost])
        found = np.empty(len(shape))
        for i, start in enumerate(knots):
            inner = i + 1 < len(knots)
            end = knots[i + 1] if inner else len(shape) - 1
            if end <= start:
                continue
            span = slice(start, end + 1)
            part = shape[span] - shape[start]
            if inner:
                rise, predicted = cost[i + 1] - cost[i], part[-1]
            else:  # as steep against the prediction as between the last two depths
                rise, predicted = cost[i] - cost[i - 1], shape[start] - shape[knots[i - 1]]
            if predicted > 0:
                found[span] = cost[i] + rise * (part / predicted)
            else:
                length = end - start if inner else start - knots[i - 1]
                found[span] = cost[i] + rise * np.arange(end - start + 1) / length
        return found


def depths(size: int, multiple: int, shares: Sequence[float]) -> list[int]:
    """Units gone at which a group is measured: whole bundles, about such shares of its units, each once."""
    choices = units_gone(size, multiple)[1:]
    return sorted({int(choices[np.abs(choices - share * size).argmin()]) for share in shares if len(choices)})


def convex_hull(x: Sequence[float], y: Sequence[float]) -> np.ndarray:
    """The greatest convex function through or below the points `(n,)`, at `x`, which ascends."""
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    corners: list[int] = []
    for i in range(len(x)):
        while len(corners) > 1:
            a, b = corners[-2:]
            if (y[b] - y[a]) * (x[i] - x[a]) < (y[i] - y[a]) * (x[b] - x[a]):
                break
            corners.pop()
        corners.append(i)
    return np.interp(x, x[corners], y[corners])


def priced(group: Group, score: Tensor, keep: Tensor, curve: Curve) -> Tensor:
    """Scores `(group.size,)` in the order of `score`, whose sums over the first bundles are those of a convex curve.

    Where units have left already, the next ones cost what the curve rises by from there.

    Args:
        score: fp64 or fp32 `(group.size,)`; orders the units, and says how costs go between depths.
        keep: units still there, bool `(group.size,)`.
    """
    # All of it gone is a step of its own (`whole_costs`), and makes none of the others cheaper.
    if (curve := curve.before(group.size)) is None:
        return score.detach().double()
    kept = keep.cpu().numpy().nonzero()[0]
    before = group.size - len(kept)
    predicted = score.detach().cpu().double().numpy()[kept]
    order = np.argsort(predicted, kind="stable")
    shape = np.r_[np.zeros(before), 0.0, np.cumsum(np.maximum(predicted[order], 0))]
    if before:  # what left is as the curve says, evenly
        shape[: before + 1] = shape[-1] * np.arange(before + 1) / max(1, len(kept))
        shape[before + 1 :] += shape[before]
    total = curve.at(shape)[before:]
    ends = np.r_[units_gone(len(kept), group.multiple), len(kept)]
    hull = convex_hull(ends, total[ends] - total[0])
    each = np.repeat(np.diff(hull) / np.diff(ends), np.diff(ends))
    # Equal slopes must not put units into another order.
    ranked = np.maximum.accumulate(each) * (1 + 1e-12 * np.arange(len(each))) + 1e-300 * np.arange(len(each))
    found = torch.full((group.size,), float("inf"), dtype=torch.float64)
    found[torch.from_numpy(kept[order])] = torch.from_numpy(ranked)
    return found.to(score.device)


def whole_costs(groups: Sequence[Group], masks: Mapping[str, Tensor], curves: Mapping[str, Curve]) -> dict[str, float]:
    """What it costs that sublayers leave whole, beyond what units that have left them cost already; by the group that
    each leaves with, of those where it was measured."""
    found = {}
    for g in groups:
        curve = curves.get(g.name)
        if g.ends is None or curve is None or curve.gone[-1] < g.size or not bool(masks[g.name].any()):
            continue
        members = {n: len(masks[n]) - int(masks[n].sum()) for n in (g.name, *g.ends)}
        found[g.name] = curve.cost[-1] - sum(curves[n].paid(gone) for n, gone in members.items() if n in curves)
    return found
