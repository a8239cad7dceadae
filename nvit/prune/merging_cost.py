"""What merging tokens takes, measured on the dense model: the work that is left says most of a latency, the merges
themselves the rest."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from .. import adapters
from ..latency.spread import Ratio
from ..selection.schedules import FAMILIES, Family, Merges
from .timing import Ratios
from .tokens import schedules, work_of

SHARES = (0.75, 0.5, 0.3)
"""Of the dense model's work, at which what merging takes is measured."""

MERGING_TAKES = (0.05, 0.05, 0.01)
"""Of a dense latency: the mean at any share of the work, its standard deviation, and that of what differs from share to
share. On CPUs it took 0.03 to 0.06 at 64 images a batch and 0.10 to 0.12 at 8, at one share within 0.02 of others."""

MEASURED = {"uniform": FAMILIES["uniform"]}
"""The family of schedules that is timed, for all: at equal work `uniform` and `rising` took the same within 0.2 % of a
dense DeiT-Ti (benchmarks/results/tokens_cpu.csv)."""


@dataclass(frozen=True)
class MergingCost:
    """Latency that is not in the work left, in dense latencies, by share of the dense model's work.

    Attributes:
        shares: ascending, the last 1.
        extra: what merging takes at each; nothing where nothing was measured.
    """

    shares: tuple[float, ...] = (1.0,)
    extra: tuple[float, ...] = (0.0,)

    def of(self, share: float) -> float:
        """Of a schedule with which the dense model takes `share` of its work."""
        return float(np.interp(share, self.shares, self.extra))


def measure_merging(dense: nn.Module, ratios: Ratios | None) -> MergingCost:
    """Whole models with merges are timed in turn with the dense one, roughly: the model that wins is measured itself.

    Args:
        dense: prepared; as it was, afterwards.
        ratios: what measures; without it merging takes nothing beside its work.
    """
    if ratios is None:
        return MergingCost()
    work, found = work_of(dense), {}
    whole = work(())
    for share in SHARES:
        for merges in schedules(dense, lambda m, share=share: work(m) <= share * whole, MEASURED).values():
            found[work(merges) / whole] = adapters.merge_(_sharing_weights(dense), merges)
    if not found:
        return MergingCost()
    read = ratios(list(found.values()), rough=True)
    points = [(1.0, 0.0), *zip(found, _expected(np.array(list(found)), read), strict=True)]
    return MergingCost(*zip(*sorted(points), strict=True))


def _expected(shares: np.ndarray, read: Sequence[Ratio]) -> list[float]:
    """What merging takes at `shares` of the work, by readings that few rounds make vague on a busy machine: the mean
    given them, under the Gaussian prior of `MERGING_TAKES`. The dense model's noise is in all readings, so what they
    have in common says more than each alone. Less than nothing is noise."""
    values, (mean, common, own) = np.array([r.value for r in read]), MERGING_TAKES
    noise = float(np.mean([r.spread / 2 / r.value for r in read])) / 2**0.5  # of one model's latency
    prior = common**2 + own**2 * np.eye(len(shares))
    of_clock = noise**2 * (np.outer(values, values) + np.diag(values**2))
    return (mean + prior @ np.linalg.solve(prior + of_clock, values - shares - mean)).clip(0.0).tolist()


def _sharing_weights(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model, memo={id(t): t for t in (*model.parameters(), *model.buffers())})


class Rung:
    """A compact model of some widths, and what it takes when tokens merge.

    Attributes:
        model: without merges.
        ratio: its predicted latency as a fraction of dense.
    """

    def __init__(self, model: nn.Module, ratio: float, cost: MergingCost, dense_work) -> None:
        self.model, self.ratio, self.cost = model, ratio, cost
        self.work, self.dense_work = work_of(model), dense_work
        self.whole, self.dense_whole = self.work(()), dense_work(())

    def predicted(self, merges: Merges) -> float:
        """Latency with merges as a fraction of dense: the work that is left, and what the merges took when measured."""
        if not any(merges):
            return self.ratio
        extra = self.cost.of(self.dense_work(merges) / self.dense_whole)
        return self.ratio * self.work(merges) / self.whole + extra

    def schedules(self, target: float, families: Mapping[str, Family] = FAMILIES) -> dict[str, Merges]:
        """By family, the schedule that merges least and is predicted to meet a target."""
        return schedules(self.model, lambda merges: self.predicted(merges) <= target, families)
