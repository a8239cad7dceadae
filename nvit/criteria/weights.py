"""Saliencies read off the weights, alone or with their gradients."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..spec import Group, Slice
from .base import BatchMean, Capabilities, Evidence
from .gradients import sum_but, wide


class Taylor(BatchMean):
    """Sum of squared `grad * weight` over a unit's weights (Molchanov et al. 2019, arXiv:1906.10771, Eq. 8). loss²"""

    name, capabilities = "taylor", Capabilities(weight_gradients=True)

    @staticmethod
    def score(groups: Sequence[Group], batch: Evidence) -> dict[str, Tensor]:
        return _over_weights(groups, lambda s: s.of(wide(batch.params[s.name]) * wide(batch.grads[s.name])).square())


class Magnitude(BatchMean):
    """Mean squared weight of a unit. weight²"""

    name, capabilities = "magnitude", Capabilities(images=False, labels=False)

    @staticmethod
    def score(groups: Sequence[Group], batch: Evidence) -> dict[str, Tensor]:
        count = {g.name: sum(_units(s) for s in g.scored_slices) for g in groups}
        sums = _over_weights(groups, lambda s: s.of(wide(batch.params[s.name])).square())
        return {g.name: sums[g.name] / count[g.name] for g in groups}


class Random(BatchMean):
    """Uniform in [0, 1), the same for every batch of a run: a floor for comparisons."""

    name, capabilities = "random", Capabilities(images=False, labels=False)

    @staticmethod
    def score(groups: Sequence[Group], batch: Evidence) -> dict[str, Tensor]:
        # torch's CPU generator takes 32 bits of a seed, so that both parts have to be in them.
        draws = {g.name: torch.Generator().manual_seed(zlib.crc32(f"{batch.seed} {g.name}".encode())) for g in groups}
        return {g.name: torch.rand(g.size, generator=draws[g.name]) for g in groups}


def _units(s: Slice) -> int:
    weights = 1
    for d, size in enumerate(s.view):
        weights *= size if d != s.axis else 1
    return weights


def _over_weights(groups: Sequence[Group], value: Callable[[Slice], Tensor]) -> dict[str, Tensor]:
    return {g.name: sum(sum_but(value(s), s.axis) for s in g.scored_slices) for g in groups}
