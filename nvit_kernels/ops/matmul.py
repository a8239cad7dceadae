"""Matrix products of which one width is a kept list: the two kernels under `mlp` and `swiglu`.

`tokens` computes token rows, `weights` sums over tokens. A kept width is *compact* in memory: its first `count`
columns are the kept units in list order, within a buffer of the dense width. What lies past the last written tile
is never read. Shapes and roles: docs/kernels/mlp.md.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvit_kernels.configs import tuned
from nvit_kernels.launch import FUSED_MULTIPLY_ADD, INTERPRET, eighths, matmul_precision

ROWS = 128  # token rows per program: partial scores are laid out by it, so never tuned


@triton.jit
def rounded(x, like):
    """What a later reader of the stored value sees."""
    return x.to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def tokens_kernel(a, b, bias, out, out2, out3, aux, aux2, part, index, count, M, N8, K8, lda8, ldb8, ldo8, TOKENS,
                  ROLE: tl.constexpr, B_BY: tl.constexpr, KEPT: tl.constexpr, GATHER: tl.constexpr,
                  BIAS: tl.constexpr, SCORES: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
                  BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    N, lda, ldb, ldo = N8 * 8, lda8 * 8, ldb8 * 8, ldo8 * 8
    kept = tl.load(count)
    pm, pn = tl.program_id(1), tl.program_id(0)  # neighbours share the rows of a, which stay in L2
    rm, rn, rk = pm * BLOCK_M + tl.arange(0, BLOCK_M), pn * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    if KEPT == "n":
        if pn * BLOCK_N >= kept:
            return
        n_end, k_end = (kept + 7) // 8 * 8, K8 * 8
    else:
        n_end, k_end = N, (kept + 7) // 8 * 8  # compact operands hold zeros up to there
    n_unit = tl.load(index + rn, mask=rn < n_end, other=0) if KEPT == "n" and (GATHER or BIAS) else rn
    exists = rn < kept if KEPT == "n" else rn < N
    a_rows = a + rm.to(tl.int64)[:, None] * lda
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k0 in range(0, k_end, BLOCK_K):
        k = k0 + rk
        at = tl.load(a_rows + k[None, :], mask=(rm < M)[:, None] & (k < k_end)[None, :], other=0.0)
        if B_BY == "n":  # b is (n, k): rows by output column
            rows = n_unit if GATHER else rn
            bt = tl.load(b + rows[None, :] * ldb + k[:, None], mask=exists[None, :] & (k < k_end)[:, None], other=0.0)
        else:  # b is (k, n)
            rows = tl.load(index + k, mask=k < k_end, other=0) if GATHER else k
            there = k < kept if KEPT == "k" else k < k_end
            bt = tl.load(b + rows[:, None] * ldb + rn[None, :], mask=there[:, None] & (rn < n_end)[None, :], other=0.0)
        acc = tl.dot(at, bt, acc, input_precision=PRECISION)
    if BIAS:
        acc += tl.load(bias + (n_unit if KEPT == "n" else rn), mask=exists, other=0.0).to(tl.float32)[None, :]
    at = rm.to(tl.int64)[:, None] * ldo + rn[None, :]
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
    elif ROLE == "gelu_backward":  # acc = ∂activation, aux = u, out = ∂u, out2 = the activation again
        u = tl.load(aux + at, mask=inside & exists[None, :], other=0.0).to(tl.float32)
        below = 0.5 * (1 + tl.erf(u * 0.7071067811865476))
        slope = below + u * tl.exp(-0.5 * u * u) * 0.3989422804014327
        tl.store(out + at, (acc * slope).to(out.dtype.element_ty), mask=inside)
        activation = u * below
        tl.store(out2 + at, activation.to(out2.dtype.element_ty), mask=inside)
        acc *= activation
    else:  # "swiglu_backward": aux = gate, aux2 = value, out = ∂gate, out2 = the activation, out3 = ∂value
        gate = tl.load(aux + at, mask=inside & exists[None, :], other=0.0).to(tl.float32)
        value = tl.load(aux2 + at, mask=inside & exists[None, :], other=0.0).to(tl.float32)
        open_ = 1 / (1 + tl.exp(-gate))
        silu = gate * open_
        tl.store(out3 + at, (acc * silu).to(out3.dtype.element_ty), mask=inside)
        tl.store(out + at, (acc * value * (open_ + silu * (1 - open_))).to(out.dtype.element_ty), mask=inside)
        tl.store(out2 + at, (silu * value).to(out2.dtype.element_ty), mask=inside)
        acc *= silu * value
    if SCORES:  # this tile's part of each sample it touches; tile + sample is different for every such pair
        first = pm * BLOCK_M // TOKENS
        last = (tl.minimum(pm * BLOCK_M + BLOCK_M, M) - 1) // TOKENS
        for sample in range(first, last + 1):
            mine = ((rm // TOKENS) == sample) & (rm < M)
            tl.store(part + (pm + sample).to(tl.int64) * N + rn, tl.sum(tl.where(mine[:, None], acc, 0.0), 0), rn < N)


@triton.jit
def weights_kernel(a, b, out, sums, index, count, T, M8, N8, lda8, ldb8, ldo8, KEPT: tl.constexpr, SUMS: tl.constexpr,
                   PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                   BLOCK_K: tl.constexpr):  # fmt: skip
    """out[m, n] = Σ_t a[t, m] b[t, n]; one of m, n is kept: compact in the operand, in its place in `out`."""
    M, N, lda, ldb, ldo = M8 * 8, N8 * 8, lda8 * 8, ldb8 * 8, ldo8 * 8
    kept = tl.load(count)
    pm, pn = tl.program_id(1), tl.program_id(0)
    rm, rn = pm * BLOCK_M + tl.arange(0, BLOCK_M), pn * BLOCK_N + tl.arange(0, BLOCK_N)
    end = (kept + 7) // 8 * 8
    m_end, n_end = (end, N) if KEPT == "m" else (M, end)
    # a tile of pruned units reads no tokens; sums over a still want theirs where a is not the kept side
    steps = 0 if (pm * BLOCK_M >= m_end or (pn * BLOCK_N >= n_end and (pn > 0 or not SUMS))) else T
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for t0 in range(0, steps, BLOCK_K):
        t = (t0 + tl.arange(0, BLOCK_K)).to(tl.int64)
        at = tl.load(a + t[None, :] * lda + rm[:, None], mask=(t < T)[None, :] & (rm < m_end)[:, None], other=0.0)
        bt = tl.load(b + t[:, None] * ldb + rn[None, :], mask=(t < T)[:, None] & (rn < n_end)[None, :], other=0.0)
        acc = tl.dot(at, bt, acc, input_precision=PRECISION)
        if SUMS:
            total += tl.sum(at.to(tl.float32), 1)
    m_unit = tl.load(index + rm, mask=rm < M, other=0) if KEPT == "m" else rm
    n_unit = rn if KEPT == "m" else tl.load(index + rn, mask=rn < N, other=0)
    alive = (rm < kept)[:, None] if KEPT == "m" else (rn < kept)[None, :]
    places = out + m_unit.to(tl.int64)[:, None] * ldo + n_unit[None, :]
    acc = tl.where(alive, acc, 0.0)
    tl.store(places, acc.to(out.dtype.element_ty), mask=(rm < M)[:, None] & (rn < N)[None, :])
    if SUMS:  # noqa: SIM102  a constant, then a value of the device
        if pn == 0:
            tl.store(sums + m_unit, total.to(sums.dtype.element_ty), mask=rm < M)


@triton.jit
def compact_kernel(w, out, index, count, rows, N8, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The kept columns of w `(rows, N)` side by side, zeros after the last one up to its block's end."""
    kept, N = tl.load(count), N8 * 8
    row, col = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(0) * BLOCK >= kept:
        return
    unit = tl.load(index + col, mask=col < N, other=0)
    at = row.to(tl.int64)[:, None] * N
    value = tl.load(w + at + unit[None, :], mask=(row < rows)[:, None] & (col < kept)[None, :], other=0.0)
    tl.store(out + at + col[None, :], value, mask=(row < rows)[:, None] & (col < N)[None, :])


@triton.jit
def scores_kernel(part, scores, index, count, M, N, TOKENS, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """scores[sample, index[j]] += Σ over the tiles that touch the sample of part[tile + sample, j]."""
    sample, j = tl.program_id(1), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    kept = j < tl.load(count)
    for tile in range(sample * TOKENS // ROWS, (tl.minimum(sample * TOKENS + TOKENS, M) - 1) // ROWS + 1):
        total += tl.load(part + (tile + sample).to(tl.int64) * N + j, mask=kept, other=0.0)
    place = scores + sample.to(tl.int64) * N + tl.load(index + j, mask=kept, other=0)
    tl.store(place, tl.load(place, mask=kept, other=0.0) + total, mask=kept)


tokens_tuned = tuned("tokens", tokens_kernel)
tokens_backward_tuned = tuned("tokens_backward", tokens_kernel)  # the backward epilogues hold more: narrower tiles
weights_tuned = tuned("weights", weights_kernel)


def tokens(a: Tensor, b: Tensor, outs: list[Tensor], index: Tensor, count: Tensor, *, role: str, kept: str, b_by: str,
           gather: bool = False, bias: Tensor | None = None, aux: tuple[Tensor, ...] = (),
           scores: Tensor | None = None, samples: int = 1) -> None:  # fmt: skip
    """`outs` = role(a @ b + bias) for token rows a `(M, K)`, b `(N, K)` when `b_by` is n, `(K, N)` when it is k.

    `kept` names the width, n or k, that the list is for; `gather` reads b's rows through the list. With `scores`,
    float32 `(samples, N)`, each kept unit's Σ activation · ∂activation is added per sample.
    """
    m, k = a.shape
    n = outs[0].shape[1]
    n8, k8, lda8, ldb8 = eighths("widths", n, k, a.stride(0), b.stride(0))
    part = a.new_empty(triton.cdiv(m, ROWS) + samples, n, dtype=torch.float32) if scores is not None else a
    out2, out3, aux1, aux2 = (*outs[1:], outs[0], outs[0])[0], outs[-1], (*aux, a)[0], (*aux, a, a)[1]
    kernel = tokens_backward_tuned if role.endswith("backward") else tokens_tuned
    kernel[lambda meta: (triton.cdiv(n, meta["BLOCK_N"]), triton.cdiv(m, ROWS))](
        a, b, a if bias is None else bias.contiguous(), outs[0], out2, out3, aux1, aux2, part, index, count, m, n8, k8,
        lda8, ldb8, n8, max(m // samples, 1), ROLE=role, B_BY=b_by, KEPT=kept, GATHER=gather, BIAS=bias is not None,
        SCORES=scores is not None, PRECISION=matmul_precision(), BLOCK_M=ROWS, **FUSED_MULTIPLY_ADD)  # fmt: skip
    if scores is not None:
        scores_kernel[(triton.cdiv(n, 128), samples)](part, scores, index, count, m, n, max(m // samples, 1), ROWS=ROWS,
                                                      BLOCK=128, **FUSED_MULTIPLY_ADD)  # fmt: skip


def weights(a: Tensor, b: Tensor, out: Tensor, index: Tensor, count: Tensor, *, kept: str,
            sums: Tensor | None = None) -> None:  # fmt: skip
    """out `(M, N)` = aᵀ b over tokens, zeros at pruned units; `sums` `(M,)` = Σ over tokens of a."""
    (t, m), n = a.shape, b.shape[1]
    m8, n8, lda8, ldb8 = eighths("widths", m, n, a.stride(0), b.stride(0))
    weights_tuned[lambda meta: (triton.cdiv(n, meta["BLOCK_N"]), triton.cdiv(m, meta["BLOCK_M"]))](
        a, b, out, out if sums is None else sums, index, count, t, m8, n8, lda8, ldb8, n8, KEPT=kept,
        SUMS=sums is not None, PRECISION=matmul_precision(), **FUSED_MULTIPLY_ADD)  # fmt: skip


def compact(w: Tensor, index: Tensor, count: Tensor) -> Tensor:
    """Kept columns of w `(rows, N)` side by side in a buffer of the same shape."""
    out, (rows, n) = torch.empty_like(w, memory_format=torch.contiguous_format), w.shape
    block, step = (1024, 1024) if INTERPRET else (256, 8)
    compact_kernel[(triton.cdiv(n, block), triton.cdiv(rows, step))](
        w.contiguous(), out, index, count, rows, *eighths("widths", n), ROWS=step, BLOCK=block,
        **FUSED_MULTIPLY_ADD)  # fmt: skip
    return out
