"""A latency table as it is once tokens merge, so that widths leave where they still cost something."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from torch import nn

from .. import adapters
from ..latency.grid import Grid
from ..latency.table import LatencyTable
from ..selection.schedules import Merges
from ..structure.compact import meta_copy
from ..structure.masks import full_masks, widths

Piece = tuple[tuple[str, ...], tuple[int, ...]]
"""What tells a piece of a model: its kinds of widths, and the blocks they are of."""


def merged_table(table: LatencyTable, model: nn.Module, merges: Merges) -> LatencyTable:
    """The table of a dense model whose tokens merge so: what a piece takes is what it took, times the share of its
    multiply-accumulates that is left.

    What merging itself takes, and what does not shrink with the tokens, is not in it: for choosing widths, not for
    foretelling a latency.
    """
    whole, left = _work(model, (0,) * len(merges)), _work(model, merges)
    parts, grids = [], {}
    for part in table.parts:
        for i, piece in enumerate(part.pieces):
            share = left[part.kinds, piece] / whole[part.kinds, piece]
            name = f"{part.name}.{i}"
            parts.append(replace(part, name=name, pieces=(piece,)))
            grids[name] = Grid(part.kinds, table.grids[part.name].axes, share * table.grids[part.name].values)
    return LatencyTable(parts, grids, table.dense, table.setting)


def _work(model: nn.Module, merges: Merges) -> dict[Piece, float]:
    """Multiply-accumulates of every piece at its dense widths."""
    adapter = adapters.find(model)
    skeleton = adapter.prepare(meta_copy(model))
    groups = adapter.groups(skeleton)
    blocks, found = widths(groups, full_masks(groups)), defaultdict(float)
    adapter.merge_(skeleton, merges)
    for part in adapter.parts(skeleton):
        macs = adapter.part_macs(skeleton, part)
        for piece in part.pieces:
            axes = zip(piece, part.kinds, strict=True)
            found[part.kinds, piece] += macs(*(getattr(blocks[b], kind) for b, kind in axes))
    return found
