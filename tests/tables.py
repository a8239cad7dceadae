"""Latency tables made by hand, and groups to go with them: one stage, as in a ViT, or several with a merge between
neighbours, as in a hierarchical model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from nvit.latency.grid import Grid
from nvit.latency.table import LatencyTable
from nvit.spec import KINDS, BlockWidths, Group, Part

Stages = Sequence[tuple[int, BlockWidths]]
"""Depth and dense widths of each stage."""

VIT: Stages = ((2, BlockWidths(emb=12, heads=3, qk_dim=4, v_dim=5, mlp=11)),)
TWO_STAGES: Stages = ((2, BlockWidths(8, 2, 4, 3, 7)), (1, BlockWidths(13, 3, 5, 4, 9)))
THREE_STAGES: Stages = (
    (1, BlockWidths(8, 2, 4, 3, 7)),
    (2, BlockWidths(11, 3, 5, 4, 9)),
    (1, BlockWidths(14, 4, 2, 4, 8)),
)

COST = {
    "attention": lambda emb, heads, qk, v: emb * heads * (2 * qk + 2 * v),
    "mlp": lambda emb, hidden: 2 * emb * hidden,
    "merge": lambda before, after: 3 * before * after,
    "embed": lambda emb: 5 * emb,
    "head": lambda emb: 4 * emb,
}
"""Milliseconds of a piece by its widths: multilinear, so that two points an axis are exact."""


def spans(stages: Stages) -> list[tuple[int, ...]]:
    """The blocks of each stage."""
    ends = np.cumsum([0, *(depth for depth, _ in stages)]).tolist()
    return [tuple(range(a, b)) for a, b in pairwise(ends)]


def blocks_of(stages: Stages) -> list[BlockWidths]:
    """Dense widths of every block."""
    return [widths for depth, widths in stages for _ in range(depth)]


def groups_of(stages: Stages, bundles: Mapping[str, int]) -> list[Group]:
    """A stream per stage, and the other four widths of every block; without slices."""
    groups = []
    for s, ((_, dense), blocks) in enumerate(zip(stages, spans(stages), strict=True)):
        groups.append(Group(f"emb.{s}", "emb", dense.emb, bundles["emb"], (), blocks))
        for i in blocks:
            groups += [
                Group(f"blocks.{i}.{kind}", kind, getattr(dense, kind), bundles[kind], (), (i,)) for kind in KINDS[1:]
            ]
    return groups


def parts_of(stages: Stages) -> list[Part]:
    """Attention and MLP of each stage, the merges between neighbours, what comes before and after."""
    each = spans(stages)
    parts = [Part("embed", ("emb",), ((0,),)), Part("head", ("emb",), ((each[-1][-1],),))]
    for s, blocks in enumerate(each):
        parts.append(Part(f"attention.{s}", KINDS[:4], tuple((i,) * 4 for i in blocks)))
        parts.append(Part(f"mlp.{s}", ("emb", "mlp"), tuple((i, i) for i in blocks)))
    return parts + [Part(f"merge.{s}", ("emb", "emb"), ((a[-1], b[0]),)) for s, (a, b) in enumerate(pairwise(each))]


def table_of(stages: Stages, points: int = 2) -> LatencyTable:
    """A table of `COST`."""
    blocks, parts, grids = blocks_of(stages), parts_of(stages), {}
    for part in parts:
        widest = [getattr(blocks[b], kind) for kind, b in zip(part.kinds, part.pieces[0], strict=True)]
        axes = [sorted({int(p) for p in np.linspace(1, most, points)}) for most in widest]
        values = COST[part.name.split(".")[0]](*np.meshgrid(*map(np.array, axes), indexing="ij"))
        grids[part.name] = Grid(part.kinds, axes, values)
    return LatencyTable(parts, grids, blocks, None)


def with_noise(table: LatencyTable, seed: int) -> LatencyTable:
    """The table with every value changed by up to a fifth."""
    rng = np.random.default_rng(seed)
    grids = {n: Grid(g.kinds, g.axes, g.values * rng.uniform(0.8, 1.2, g.values.shape)) for n, g in table.grids.items()}
    return LatencyTable(table.parts, grids, table.dense, None)
