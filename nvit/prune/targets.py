"""Targets in milliseconds or images per second, as fractions of the dense latency."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from .. import adapters, tasks
from ..config import PruneConfig
from ..latency.table import LatencyTable
from .limits import check_reachable, free_groups, least_ms
from .tokens import least_share


def fractions(
    model: nn.Module,
    table: LatencyTable,
    config: PruneConfig,
    latency_ms: Sequence[float] = (),
    images_per_second: Sequence[float] = (),
) -> tuple[float, ...]:
    """`latency_target` of a config for absolute targets, rounded down to a ten-thousandth.

    Args:
        model: prepared and dense, with the blocks that `table` is for.
        config: its bundle sizes and limits say how little may be left.
        latency_ms: milliseconds a batch of the table's.
        images_per_second: throughput at the table's batch.

    Raises:
        ValueError: an analytic table, or a target that the dense model meets already or no pruning reaches.
    """
    if table.setting is None:
        raise ValueError(
            "latency in ms and images per second need a table that was measured; this one counts multiply-accumulates"
        )
    groups = adapters.of(model).groups(model, config.bundle_sizes)
    free = free_groups(groups, config, tasks.of(config.task, model))
    least, dense, batch = least_ms(table, groups, free, config.depth), table.dense_ms, table.setting.batch_size
    least *= least_share(model, config)

    asked = [(ms, f"latency_ms {ms:g}") for ms in latency_ms]
    asked += [(1e3 * batch / rate, f"images_per_second {rate:g}") for rate in images_per_second]
    found = []
    for ms, what in asked:
        fraction = math.floor(1e4 * ms / dense + 1e-6) / 1e4  # 0.7 × dense is 0.7
        if fraction >= 1:
            raise ValueError(
                f"{what} is met without pruning: the dense model takes {dense:.3g} ms for {batch} images, "
                f"{1e3 * batch / dense:.4g} images/s"
            )
        if fraction * dense < least:
            raise ValueError(
                f"{what} cannot be met: the smallest model that pruning may leave takes {least:.3g} ms for {batch} "
                f"images, {1e3 * batch / least:.4g} images/s, the dense one {dense:.3g} ms"
            )
        found.append(fraction)
    return tuple(found)


def refuse_out_of_reach(model: nn.Module, table: LatencyTable, config: PruneConfig) -> None:
    """Raise ValueError where a target of the config is below what pruning can leave of `model`, as `fractions` does."""
    groups = adapters.of(model).groups(model, config.bundle_sizes)
    free = free_groups(groups, config, tasks.of(config.task, model))
    check_reachable(config.latency_target, table, groups, free, config.depth, least_share(model, config))
