"""Saliencies read off the weights."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..spec import Group, Slice
from .base import Evidence, Scores
from .gradients import sum_but, wide


def taylor(groups: Sequence[Group], seen: Evidence) -> Scores:
    """Sum of squared `grad * weight` over a unit's weights (Molchanov et al. 2019, arXiv:1906.10771, Eq. 8). loss²"""
    return _over_weights(groups, lambda s: s.of(wide(seen.params[s.name]) * wide(seen.grads[s.name])).square())


def magnitude(groups: Sequence[Group], seen: Evidence) -> Scores:
    """Mean squared weight of a unit. weight²"""
    count = {g.name: sum(_units(s) for s in g.scored_slices) for g in groups}
    sums = _over_weights(groups, lambda s: s.of(wide(seen.params[s.name])).square())
    return {g.name: sums[g.name] / count[g.name] for g in groups}


def random(groups: Sequence[Group], seen: Evidence) -> Scores:
    """Uniform in [0, 1), the same for every batch of a run: a floor for comparisons."""
    # torch's CPU generator takes 32 bits of a seed, so that both parts have to be in them.
    draws = {g.name: torch.Generator().manual_seed(zlib.crc32(f"{seen.seed} {g.name}".encode())) for g in groups}
    return {g.name: torch.rand(g.size, generator=draws[g.name]) for g in groups}


def _units(s: Slice) -> int:
    weights = 1
    for d, size in enumerate(s.view):
        weights *= size if d != s.axis else 1
    return weights


def _over_weights(groups: Sequence[Group], value: Callable[[Slice], Tensor]) -> Scores:
    return {g.name: sum(sum_but(value(s), s.axis) for s in g.scored_slices) for g in groups}
