"""The kernels of group_dot; docs/kernels/group_dot.md says what they compute, `plan.Tables` what the tables hold."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tiles_kernel(
    pointers,  # (2 · parameters,) int64, addresses of weights and gradients in turns
    tiles,  # (programs, 7) int64: parameter, first row, end row, column tile, columns / STEP, row and column workspace
    workspace,  # out: (Tables.workspace,) float32
    W: tl.constexpr,  # dtype of the weights
    G: tl.constexpr,  # of the gradients
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Of a tile's products: a sum for each row, and one for each column."""
    entry = tiles + tl.program_id(0).to(tl.int64) * 7
    number, start, end, j = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
    columns = tl.load(entry + 4) * STEP
    w = tl.load(pointers + 2 * number).to(tl.pointer_type(W))
    g = tl.load(pointers + 2 * number + 1).to(tl.pointer_type(G))
    if STEP == 8 and not INTERPRETED:  # parameters come from an allocator that aligns to more than this
        w, g = tl.multiple_of(w, 16), tl.multiple_of(g, 16)
    across = (columns + BLOCK - 1) // BLOCK
    col = j * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for r0 in range(start, end, ROWS):
        row = r0 + tl.arange(0, ROWS)
        inside = (row < end)[:, None] & (col < columns)[None, :]
        at = row[:, None] * columns + col[None, :]
        wt = tl.load(w + at, mask=inside, other=0.0).to(tl.float32)
        product = wt * tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(workspace + tl.load(entry + 5) + row * across + j, tl.sum(product, 1), mask=row < end)
        total += product
    tl.store(workspace + tl.load(entry + 6) + col, tl.sum(total, 0), mask=col < columns)


@triton.jit
def add_columns(x, out, first, outer, units, ROWS: tl.constexpr, UNITS: tl.constexpr):
    """out[u] = Σ over outer of x[outer, u]: neighbouring threads read neighbouring units."""
    unit = first + tl.arange(0, UNITS)
    total = tl.zeros([ROWS, UNITS], tl.float32)
    for start in range(0, outer, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < outer)[:, None] & (unit < units)[None, :]
        total += tl.load(x + row[:, None] * units + unit[None, :], mask=inside, other=0.0)
    tl.store(out + unit, tl.sum(total, 0), mask=unit < units)


@triton.jit
def add_runs(x, out, first, outer, units, inner, UNITS: tl.constexpr, LANES: tl.constexpr):
    """out[u] = Σ over outer and inner of x[outer, u, inner]: neighbouring threads read along inner."""
    unit = first + tl.arange(0, UNITS)
    total = tl.zeros([UNITS, LANES], tl.float32)
    for start in range(0, outer * inner, LANES):
        i = start + tl.arange(0, LANES)
        at = (i // inner * units * inner + i % inner)[None, :] + unit[:, None] * inner
        inside = (unit < units)[:, None] & (i < outer * inner)[None, :]
        total += tl.load(x + at, mask=inside, other=0.0)
    tl.store(out + unit, tl.sum(total, 1), mask=unit < units)


@triton.jit
def slices_kernel(
    workspace,  # (Tables.workspace,) float32
    reductions,  # (programs, 6) int64: workspace offset, outer, units, inner, place among the slice sums, first unit
    sums,  # out: (Tables.slice_sums,) float32
    MANY: tl.constexpr,
    SHORT: tl.constexpr,
    FEW: tl.constexpr,
    LONG: tl.constexpr,
):
    """sums[place + u] = Σ over outer and inner of workspace[offset + (outer, u, inner)]."""
    entry = reductions + tl.program_id(0).to(tl.int64) * 6
    x, out = workspace + tl.load(entry), sums + tl.load(entry + 4)
    outer, units = tl.load(entry + 1).to(tl.int32), tl.load(entry + 2).to(tl.int32)
    inner, first = tl.load(entry + 3).to(tl.int32), tl.load(entry + 5).to(tl.int32)
    if inner == 1:
        add_columns(x, out, first, outer, units, SHORT, MANY)
    elif outer * inner <= SHORT:
        add_runs(x, out, first, outer, units, inner, MANY, SHORT)
    else:
        add_runs(x, out, first, outer, units, inner, FEW, LONG)


@triton.jit
def outputs_kernel(
    sums,  # (Tables.slice_sums,) float32
    outputs,  # (programs, 5) int64: output offset, units, first and last contribution, first unit
    contributions,  # int64, places among the slice sums, by output
    scale,  # (1,) float32
    out,  # out: (plan.outputs,) float32
    BLOCK: tl.constexpr,
):
    """out[offset + u] = scale · Σ over the group's slices, in their declared order."""
    entry = outputs + tl.program_id(0).to(tl.int64) * 5
    offset, units, first, last = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
    unit = tl.load(entry + 4) + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(first, last):
        total += tl.load(sums + tl.load(contributions + i) + unit, mask=unit < units, other=0.0)
    tl.store(out + offset + unit, total * tl.load(scale), mask=unit < units)
