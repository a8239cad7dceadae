"""What a user allows to shrink."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from ..config import PruneConfig
from ..latency.table import LatencyTable
from ..spec import KINDS, TOKENS, Group, block_widths
from ..structure.masks import Masks
from ..tasks import Task


def free_groups(groups: Sequence[Group], config: PruneConfig, task: Task) -> list[Group]:
    """The groups that a config allows to shrink, less the stream whose channels are the features of a model without a
    head: whoever reads them expects as many as before, and gets them where the output keeps its width by itself.

    Raises:
        ValueError: as `prunable_groups`.
    """
    if config.depth and all(g.ends is None for g in groups):
        raise ValueError("depth: no attention or MLP of this model may leave whole (of Swin none); leave out --depth")
    if not config.width_kinds and config.merges_tokens:
        return []
    kept = () if task.outputs != 0 or config.keep_output else ([g.name for g in groups if g.kind == "emb"][-1],)
    freeze = [pattern for pattern in config.freeze if pattern != TOKENS]
    return prunable_groups(groups, config.width_kinds or config.only, (*freeze, *kept), config.stages)


def prunable_groups(
    groups: Sequence[Group], only: Sequence[str], freeze: Sequence[str], stages: Sequence[int] = ()
) -> list[Group]:
    """The groups a user allows to shrink.

    Args:
        stages: counted as the residual streams are, from 0; all if empty.

    Raises:
        ValueError: a pattern of `freeze` matches no group, a stage does not exist, or nothing is left.
    """
    streams = [g.blocks for g in groups if g.kind == "emb"]
    for stage in stages:
        if not 0 <= stage < len(streams):
            has = f"the stages 0 to {len(streams) - 1}" if len(streams) > 1 else "one stage, 0"
            raise ValueError(f"stages: there is no stage {stage}; this model has {has}")
    inside = {b for stage in stages or range(len(streams)) for b in streams[stage]}
    for pattern in freeze:
        if not fnmatch.filter([g.name for g in groups], pattern):
            raise ValueError(f"freeze: {pattern!r} matches no group; groups are named like emb, blocks.0.mlp")
    allowed = [g for g in groups if g.kind in (only or KINDS) and inside.issuperset(g.blocks)]
    free = [g for g in allowed if not any(fnmatch.fnmatch(g.name, p) for p in freeze)]
    if not free:
        found = f"only={list(only)}, freeze={list(freeze)} and stages={list(stages)}"
        raise ValueError(f"nothing is left to prune with {found}")
    return free


def least_ms(
    table: LatencyTable,
    groups: Sequence[Group],
    free: Sequence[Group],
    depth: bool = False,
    masks: Masks | None = None,
) -> float:
    """Milliseconds by the table of the smallest model that pruning may leave: the last bundle of every group in `free`,
    or with `depth` nothing of the sublayers that may leave with it, the rest whole; without what `masks` say has left
    whole already."""
    names = {g.name for g in free}
    left = {g.name: min(g.multiple, g.size) if g.name in names else g.size for g in groups}
    if depth:
        left |= {name: 0 for g in free if g.ends is not None for name in (g.name, *g.ends)}
    left |= {name: 0 for name, keep in (masks or {}).items() if not bool(keep.any())}
    return table.model_ms(block_widths(groups, left))


def check_reachable(
    targets: Sequence[float],
    table: LatencyTable,
    groups: Sequence[Group],
    free: Sequence[Group],
    depth: bool = False,
    merging: float = 1.0,
) -> None:
    """Raise ValueError where a target, a fraction of the dense latency, is below what pruning can leave.

    Args:
        merging: the share of a model's work that is left where as many tokens merge as can.
    """
    least = merging * least_ms(table, groups, free, depth) / table.dense_ms
    how = "the smallest allowed widths" + (" and the fewest tokens" if merging < 1 else "")
    for target in targets:
        if target < least:
            raise ValueError(
                f"latency target {target:g} of dense cannot be met: {how} reach {least:.3f}. "
                "Raise the target, or allow more groups to be pruned."
            )
