"""What merging tokens takes, measured on the dense model: the work that is left says most of a latency, the merges
themselves the rest."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import nn

from .. import adapters
from ..selection.schedules import FAMILIES, Family, Merges
from .timing import Ratios
from .tokens import schedules, work_of

SHARES = (0.75, 0.5, 0.3)
"""Of the dense model's work, at which each family is measured."""


@dataclass(frozen=True)
class MergingCost:
    """Latency that is not in the work left, in dense latencies, by family and share of the dense model's work.

    Attributes:
        points: by family, shares ascending and what merging takes there; nothing where it was not measured.
    """

    points: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]]

    def of(self, family: str, share: float) -> float:
        """Of a schedule with which the dense model takes `share` of its work."""
        shares, extra = self.points.get(family, ((1.0,), (0.0,)))
        return float(np.interp(share, shares, extra))


def measure_merging(dense: nn.Module, ratios: Ratios | None) -> MergingCost:
    """Whole models with merges are timed in turn with the dense one.

    Args:
        dense: prepared; as it was, afterwards.
        ratios: what measures; without it merging takes nothing beside its work.
    """
    if ratios is None:
        return MergingCost({})
    work, models, where = work_of(dense), [], []
    whole = work(())
    for share in SHARES:
        for family, merges in schedules(dense, lambda _, m, share=share: work(m) <= share * whole).items():
            models.append(adapters.merge_(_sharing_weights(dense), merges))
            where.append((family, work(merges) / whole))
    found: dict[str, list[tuple[float, float]]] = {family: [(1.0, 0.0)] for family, _ in where}
    for (family, share), ratio in zip(where, ratios(models), strict=True):
        found[family].append((share, ratio.value - share))
    return MergingCost({family: tuple(zip(*sorted(points), strict=True)) for family, points in found.items()})


def _sharing_weights(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model, memo={id(t): t for t in (*model.parameters(), *model.buffers())})


class Rung:
    """A compact model of some widths, and what it takes when tokens merge.

    Attributes:
        model: without merges; `at` gives it some.
        ratio: its predicted latency as a fraction of dense.
    """

    def __init__(self, model: nn.Module, ratio: float, cost: MergingCost, dense_work) -> None:
        self.model, self.ratio, self.cost = model, ratio, cost
        self.work, self.dense_work = work_of(model), dense_work
        self.whole, self.dense_whole = self.work(()), dense_work(())

    def predicted(self, family: str, merges: Merges) -> float:
        """Latency with merges as a fraction of dense: the work that is left, and what the merges took when measured."""
        if not any(merges):
            return self.ratio
        extra = self.cost.of(family, self.dense_work(merges) / self.dense_whole)
        return self.ratio * self.work(merges) / self.whole + extra

    def schedules(self, target: float, families: Mapping[str, Family] = FAMILIES) -> dict[str, Merges]:
        """By family, the schedule that merges least and is predicted to meet a target."""
        return schedules(self.model, lambda family, merges: self.predicted(family, merges) <= target, families)
