"""Whether tokens of a model may merge, what they save, and the schedules that save enough."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from .. import adapters
from ..config import PruneConfig
from ..selection.schedules import FAMILIES, Family, Merges, weakest
from ..structure.compact import meta_copy
from ..structure.masks import full_masks, widths


def work_of(model: nn.Module) -> Callable[[Merges], int]:
    """Multiply-accumulates of an image as a function of how many tokens merge in each block; the model, dense or
    compact, stays as it is."""
    adapter = adapters.find(model)
    skeleton = adapter.prepare(meta_copy(model))
    groups = adapter.groups(skeleton)
    blocks = widths(groups, full_masks(groups))

    def work(merges: Merges) -> int:
        adapter.merge_(skeleton, merges)
        total = 0
        for part in adapter.parts(skeleton):
            macs = adapter.part_macs(skeleton, part)
            for piece in part.pieces:
                total += macs(*(getattr(blocks[b], kind) for b, kind in zip(piece, part.kinds, strict=True)))
        return total

    return work


def check_merging(model: nn.Module, config: PruneConfig) -> None:
    """Raise ValueError where a recipe lets tokens of a model merge that cannot, or do already."""
    if not config.merges_tokens:
        return
    if (reason := adapters.find(model).merge_refusal(model)) is not None:
        raise ValueError(f"only tokens: {reason}. Leave out tokens (--only widths)")
    if adapters.merges(model):
        raise ValueError(
            "only tokens: tokens of this model merge already; leave out tokens (--only widths), or end it first "
            "(nvit.adapters.merge_(model, ()))"
        )


def least_share(model: nn.Module, config: PruneConfig) -> float:
    """The share of a model's work that is left where as many tokens merge as a schedule lets; 1 where a recipe lets
    none."""
    if not config.merges_tokens:
        return 1.0
    check_merging(model, config)
    work = work_of(model)
    return min(map(work, schedules(model, None).values())) / work(())


def schedules(
    model: nn.Module, enough: Callable[[Merges], bool] | None, families: Mapping[str, Family] = FAMILIES
) -> dict[str, Merges]:
    """By family, the schedule that merges least and is `enough`; families without one are absent. Without `enough` the
    strongest."""
    given = shape_of(model)
    if enough is None:
        return {name: family(*given, 1.0) for name, family in families.items()}
    found = {name: weakest(family, *given, enough) for name, family in families.items()}
    return {name: merges for name, merges in found.items() if merges is not None}


def shape_of(model: nn.Module) -> tuple[int, int, int]:
    """Tokens that enter the first block, how many of them never merge, and blocks."""
    adapter = adapters.find(model)
    return adapter.tokens(model), adapter.prefix(model), len(adapter.blocks(model))
