"""What a user allows to shrink."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from ..config import PruneConfig
from ..spec import KINDS, Group
from ..tasks import Task


def free_groups(groups: Sequence[Group], config: PruneConfig, task: Task) -> list[Group]:
    """The groups that a config allows to shrink, less the stream whose channels are the features of a model without a
    head: whoever reads them expects as many as before.

    Raises:
        ValueError: as `prunable_groups`.
    """
    kept = () if task.outputs != 0 else ([g.name for g in groups if g.kind == "emb"][-1],)
    return prunable_groups(groups, config.only, (*config.freeze, *kept), config.stages)


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
