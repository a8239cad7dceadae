"""Matrix products of which one width is a kept list: the kernels under `mlp` and `swiglu`.

`tokens` computes token rows, `weights` sums over tokens. A kept width is *compact* in memory: its first `count`
columns are the kept units in list order, within a buffer of the dense width. What lies past the last written tile
is never read. All matrices are contiguous. An optional pointer is None where there is nothing; `index` and `count` are
both None where every unit is kept. Shapes and roles: docs/kernels/mlp.md.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rounded(x, like):
    """What a later reader of the stored value sees."""
    return x.to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def how_many(count, width):
    """Kept units of a width."""
    if count is not None:
        return tl.load(count)
    else:
        return width


@triton.jit
def unit_at(index, j, inside):
    """The units that compact columns `j` stand for."""
    if index is not None:
        return tl.load(index + j, mask=inside, other=0)
    else:
        return j


@triton.jit
def tokens_kernel(
    a,  # (M, K)
    b,  # (N, K) where B_BY is n, (K, N) where it is k
    bias,  # (N,); None: no bias
    out,  # out: (M, N), what the role says first
    out2,  # out: (M, N); None where the role has no second
    aux,  # (M, N), read by the role's epilogue; None where it reads none
    aux2,  # (M, N)
    part,  # out: (row tiles + samples, N) float32, partial scores; None: none are wanted
    index,  # (N or K,) int32, kept units first
    count,  # (1,) int32
    M,  # token rows
    N8,  # columns of the result / 8
    K8,  # width summed over / 8
    TOKENS,  # rows of a sample
    ROLE: tl.constexpr,
    B_BY: tl.constexpr,
    KEPT: tl.constexpr,
    GATHER: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out = role(a @ b + bias); KEPT, n or k, is the width that the list is for; GATHER reads b's rows through it."""
    N, K = N8 * 8, K8 * 8
    pm, pn = tl.program_id(1), tl.program_id(0)  # neighbours share the rows of a, which stay in L2
    rm, rn, rk = pm * BLOCK_M + tl.arange(0, BLOCK_M), pn * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    if KEPT == "n":
        kept = how_many(count, N)
        if pn * BLOCK_N >= kept:
            return
        n_end, k_end = (kept + 7) // 8 * 8, K
    else:
        kept = how_many(count, K)
        n_end, k_end = N, (kept + 7) // 8 * 8  # compact operands hold zeros up to there
    n_unit = unit_at(index, rn, rn < n_end) if KEPT == "n" and (GATHER or bias is not None) else rn
    exists = rn < kept if KEPT == "n" else rn < N
    a_rows = a + rm.to(tl.int64)[:, None] * K
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k0 in range(0, k_end, BLOCK_K):
        k = k0 + rk
        at = tl.load(a_rows + k[None, :], mask=(rm < M)[:, None] & (k < k_end)[None, :], other=0.0)
        if B_BY == "n":  # rows by output column
            rows = n_unit if GATHER else rn
            bt = tl.load(b + rows[None, :] * K + k[:, None], mask=exists[None, :] & (k < k_end)[:, None], other=0.0)
        else:
            rows = unit_at(index, k, k < k_end) if GATHER else k
            there = k < kept if KEPT == "k" else k < k_end
            bt = tl.load(b + rows[:, None] * N + rn[None, :], mask=there[:, None] & (rn < n_end)[None, :], other=0.0)
        acc = tl.dot(at, bt, acc, input_precision=PRECISION)
    if bias is not None:
        acc += tl.load(bias + (n_unit if KEPT == "n" else rn), mask=exists, other=0.0).to(tl.float32)[None, :]
    at = rm.to(tl.int64)[:, None] * N + rn[None, :]
    inside = (rm < M)[:, None] & (rn < N)[None, :]
    if ROLE == "linear":
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)
    elif ROLE == "gelu":  # out = u, out2 = gelu(u)
        u = rounded(acc, out)
        tl.store(out + at, u.to(out.dtype.element_ty), mask=inside)
        u = u * 0.5 * (1 + tl.erf(u * 0.7071067811865476))
        tl.store(out2 + at, u.to(out2.dtype.element_ty), mask=inside)
    elif ROLE == "swiglu":  # aux = gate, out = value, out2 = silu(gate) · value
        gate = tl.load(aux + at, mask=inside & exists[None, :], other=0.0).to(tl.float32)
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)
        acc = rounded(acc, out) * gate / (1 + tl.exp(-gate))
        tl.store(out2 + at, acc.to(out2.dtype.element_ty), mask=inside)
    elif ROLE == "gelu_backward":  # acc = ∂activation, aux = u, out = ∂u
        u = tl.load(aux + at, mask=inside & exists[None, :], other=0.0).to(tl.float32)
        below = 0.5 * (1 + tl.erf(u * 0.7071067811865476))
        slope = below + u * tl.exp(-0.5 * u * u) * 0.3989422804014327
        tl.store(out + at, (acc * slope).to(out.dtype.element_ty), mask=inside)
        acc *= u * below
    else:  # "swiglu_backward": acc = ∂activation, aux = gate, aux2 = value, out = ∂gate, out2 = ∂value
        gate = tl.load(aux + at, mask=inside & exists[None, :], other=0.0).to(tl.float32)
        value = tl.load(aux2 + at, mask=inside & exists[None, :], other=0.0).to(tl.float32)
        open_ = 1 / (1 + tl.exp(-gate))
        silu = gate * open_
        tl.store(out2 + at, (acc * silu).to(out2.dtype.element_ty), mask=inside)
        tl.store(out + at, (acc * value * (open_ + silu * (1 - open_))).to(out.dtype.element_ty), mask=inside)
        acc *= silu * value
    if part is not None:  # this tile's part of each sample it touches; tile + sample is different for every such pair
        first = pm * BLOCK_M // TOKENS
        last = (tl.minimum(pm * BLOCK_M + BLOCK_M, M) - 1) // TOKENS
        for sample in range(first, last + 1):
            mine = ((rm // TOKENS) == sample) & (rm < M)
            tl.store(part + (pm + sample).to(tl.int64) * N + rn, tl.sum(tl.where(mine[:, None], acc, 0.0), 0), rn < N)


@triton.jit
def weights_kernel(
    a,  # (T, M)
    b,  # (T, N)
    out,  # out: (M, N)
    sums,  # out: (M,), Σ over tokens of a; None: not wanted
    index,  # (M or N,) int32, kept units first
    count,  # (1,) int32
    T,  # tokens
    M8,  # rows of the result / 8
    N8,  # its columns / 8
    KEPT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[m, n] = Σ_t a[t, m] b[t, n]; KEPT, m or n, is compact in its operand and in its place in `out`."""
    M, N = M8 * 8, N8 * 8
    pm, pn = tl.program_id(1), tl.program_id(0)
    rm, rn = pm * BLOCK_M + tl.arange(0, BLOCK_M), pn * BLOCK_N + tl.arange(0, BLOCK_N)
    kept = how_many(count, M if KEPT == "m" else N)
    end = (kept + 7) // 8 * 8
    m_end, n_end = (end, N) if KEPT == "m" else (M, end)
    # a tile of pruned units reads no tokens; sums over a still want theirs where a is not the kept side
    steps = 0 if (pm * BLOCK_M >= m_end or (pn * BLOCK_N >= n_end and (pn > 0 or sums is None))) else T
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for t0 in range(0, steps, BLOCK_K):
        t = (t0 + tl.arange(0, BLOCK_K)).to(tl.int64)
        at = tl.load(a + t[None, :] * M + rm[:, None], mask=(t < T)[None, :] & (rm < m_end)[:, None], other=0.0)
        bt = tl.load(b + t[:, None] * N + rn[None, :], mask=(t < T)[:, None] & (rn < n_end)[None, :], other=0.0)
        acc = tl.dot(at, bt, acc, input_precision=PRECISION)
        if sums is not None:
            total += tl.sum(at.to(tl.float32), 1)
    m_unit = unit_at(index, rm, rm < M) if KEPT == "m" else rm
    n_unit = rn if KEPT == "m" else unit_at(index, rn, rn < N)
    alive = (rm < kept)[:, None] if KEPT == "m" else (rn < kept)[None, :]
    places = out + m_unit.to(tl.int64)[:, None] * N + n_unit[None, :]
    acc = tl.where(alive, acc, 0.0)
    tl.store(places, acc.to(out.dtype.element_ty), mask=(rm < M)[:, None] & (rn < N)[None, :])
    if sums is not None:  # noqa: SIM102  a constant, then a value of the device
        if pn == 0:
            tl.store(sums + m_unit, total.to(sums.dtype.element_ty), mask=rm < M)


@triton.jit
def compact_kernel(
    w,  # (rows, N)
    out,  # out: (rows, N)
    index,  # (N,) int32, kept columns first
    count,  # (1,) int32
    rows,
    N8,  # columns / 8
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The kept columns of w side by side, zeros after the last one up to its block's end."""
    kept, N = tl.load(count), N8 * 8
    row, col = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(0) * BLOCK >= kept:
        return
    unit = tl.load(index + col, mask=col < N, other=0)
    at = row.to(tl.int64)[:, None] * N
    value = tl.load(w + at + unit[None, :], mask=(row < rows)[:, None] & (col < kept)[None, :], other=0.0)
    tl.store(out + at + col[None, :], value, mask=(row < rows)[:, None] & (col < N)[None, :])


@triton.jit
def scores_kernel(
    part,  # (row tiles + samples, N) float32
    scores,  # in, out: (samples, N) float32
    index,  # (N,) int32, kept units first; None: all are kept
    count,  # (1,) int32
    M,  # token rows
    N,
    TOKENS,  # rows of a sample
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """scores[sample, index[j]] += Σ over the tiles that touch the sample of part[tile + sample, j]."""
    sample, j = tl.program_id(1), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    kept = j < how_many(count, N)
    for tile in range(sample * TOKENS // ROWS, (tl.minimum(sample * TOKENS + TOKENS, M) - 1) // ROWS + 1):
        total += tl.load(part + (tile + sample).to(tl.int64) * N + j, mask=kept, other=0.0)
    place = scores + sample.to(tl.int64) * N + unit_at(index, j, kept)
    tl.store(place, tl.load(place, mask=kept, other=0.0) + total, mask=kept)
