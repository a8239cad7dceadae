"""Kernels of attention over kept heads and dims, flash style; docs/kernels/attention.md says what they compute."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def kept_columns(mask, width, SIZE: tl.constexpr, MASKED: tl.constexpr):
    """True for each kept column of a head.

    Loads stay dense and wide. Zeroing one operand, once per program, takes a pruned dim out of every product: a
    list of 2-byte gathers would touch the same sectors, and costs registers that a tile of 64 x 64 does not have.
    """
    i = tl.arange(0, SIZE)
    if MASKED:
        return tl.load(mask + i, mask=i < width, other=0) != 0
    else:
        return i < width


@triton.jit
def add_to_logits(s, bias, window, m, n, N, N8, BIAS: tl.constexpr, WINDOW: tl.constexpr):
    """Logits in base 2 plus a head's bias and a window's mask at queries `m` and keys `n`.

    Rows of both are N8 * 8 wide so that loads are: the launcher fills them up with -inf, which shuts keys past N.
    Queries past N read the last row; they are never stored, and weigh nothing in the backward.
    """
    at, inside = tl.minimum(m, N - 1) * (N8 * 8) + n, n < N8 * 8
    if BIAS:
        s += tl.load(bias + at, mask=inside, other=float("-inf")).to(tl.float32) * 1.4426950408889634
    if WINDOW:
        s += tl.load(window + at, mask=inside, other=float("-inf")).to(tl.float32) * 1.4426950408889634
    return s


@triton.jit
def forward_kernel(q, k, v, o, stats, heads, heads_n, qk_mask, v_mask, bias, window, scale_log2, H, N, QK8, V8,
                   N8, windows, q_b8, q_h8, q_n8, k_b8, k_h8, k_n8, v_b8, v_h8, v_n8,
                   BIAS: tl.constexpr, WINDOW: tl.constexpr, MASK_QK: tl.constexpr, MASK_V: tl.constexpr,
                   PRECISION: tl.constexpr, BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
                   BLOCK_N: tl.constexpr):  # fmt: skip
    slot, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    h = tl.load(heads + slot).to(tl.int64)
    rm = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rn = tl.arange(0, BLOCK_N)
    dc, vc = tl.arange(0, BLOCK_QK), tl.arange(0, BLOCK_V)
    d_in, v_in = (dc < QK8 * 8), (vc < V8 * 8)
    o_ptrs = o + ((b * N + rm[:, None]) * H + h) * (V8 * 8) + vc[None, :]
    o_mask = (rm < N)[:, None] & v_in[None, :]
    if slot >= tl.load(heads_n):
        tl.store(o_ptrs, tl.zeros([BLOCK_M, BLOCK_V], o.dtype.element_ty), mask=o_mask)
        for part in tl.static_range(2):
            tl.store(stats + ((b * H + h) * 2 + part) * N + rm, tl.zeros([BLOCK_M], tl.float32), mask=rm < N)
        return
    q += b * (q_b8 * 8) + h * (q_h8 * 8)
    k += b * (k_b8 * 8) + h * (k_h8 * 8)
    v += b * (v_b8 * 8) + h * (v_h8 * 8)
    bias += h * N * (N8 * 8)
    window += (tl.program_id(2) % windows).to(tl.int64) * N * (N8 * 8)
    qt = tl.load(q + rm[:, None] * (q_n8 * 8) + dc[None, :], mask=(rm < N)[:, None] & d_in[None, :], other=0.0)
    if MASK_QK:
        qt = tl.where(kept_columns(qk_mask, QK8 * 8, BLOCK_QK, MASK_QK)[None, :], qt, 0.0)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for n0 in range(0, N, BLOCK_N):
        n = n0 + rn
        kt = tl.load(k + n[None, :] * (k_n8 * 8) + dc[:, None], mask=(n < N)[None, :] & d_in[:, None], other=0.0)
        s = tl.dot(qt, kt, input_precision=PRECISION) * scale_log2
        s = add_to_logits(s, bias, window, rm[:, None], n[None, :], N, N8, BIAS, WINDOW)
        s = tl.where((n < N)[None, :], s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        base = higher
        if BIAS or WINDOW:  # a mask may shut all keys so far
            base = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(s - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(p, 1)
        vt = tl.load(v + n[:, None] * (v_n8 * 8) + vc[None, :], mask=(n < N)[:, None] & v_in[None, :], other=0.0)
        acc = tl.dot(p.to(vt.dtype), vt, acc * shrink[:, None], input_precision=PRECISION)
        top = higher
    if MASK_V:
        acc = tl.where(kept_columns(v_mask, V8 * 8, BLOCK_V, MASK_V)[None, :], acc, 0.0)
    tl.store(o_ptrs, (acc / total[:, None]).to(o.dtype.element_ty), mask=o_mask)
    row = stats + (b * H + h) * 2 * N + rm  # both, not their log: the backward's weights are then as exact as these
    tl.store(row, top, mask=rm < N)
    tl.store(row + N, 1 / total, mask=rm < N)


@triton.jit
def delta_kernel(o, do, delta, v_part, heads, heads_n, H, N, V8, do_b8, do_h8, do_n8,
                 SCORES: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr):  # fmt: skip
    tile, slot, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    h = tl.load(heads + slot).to(tl.int64)
    rm, vc = tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_V)
    rows = tl.where(slot < tl.load(heads_n), N, 0)  # a pruned head has no rows to read, and scores zero
    there = (rm < rows)[:, None] & (vc < V8 * 8)[None, :]
    ot = tl.load(o + ((b * N + rm[:, None]) * H + h) * (V8 * 8) + vc[None, :], mask=there, other=0.0)
    dot = tl.load(do + b * (do_b8 * 8) + h * (do_h8 * 8) + rm[:, None] * (do_n8 * 8) + vc[None, :], there, 0.0)
    product = ot.to(tl.float32) * dot.to(tl.float32)
    tl.store(delta + (b * H + h) * N + rm, tl.sum(product, 1), mask=rm < N)
    if SCORES:
        part = v_part + ((b * H + h) * tl.num_programs(0) + tile) * (V8 * 8)
        tl.store(part + vc, tl.sum(product, 0), mask=vc < V8 * 8)


@triton.jit
def dkv_kernel(q, k, v, do, stats, delta, dk, dv, heads, heads_n, qk_mask, v_mask, bias, window, scale, H, N, QK8, V8,
               N8, windows, q_b8, q_h8, q_n8, k_b8, k_h8, k_n8, v_b8, v_h8, v_n8, do_b8, do_h8, do_n8,
               BIAS: tl.constexpr, WINDOW: tl.constexpr, MASK_QK: tl.constexpr, MASK_V: tl.constexpr,
               PRECISION: tl.constexpr, BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
               BLOCK_N: tl.constexpr):  # fmt: skip
    slot, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    h = tl.load(heads + slot).to(tl.int64)
    rn = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    dc, vc = tl.arange(0, BLOCK_QK), tl.arange(0, BLOCK_V)
    d_in, v_in = (dc < QK8 * 8), (vc < V8 * 8)
    d_kept = kept_columns(qk_mask, QK8 * 8, BLOCK_QK, MASK_QK)
    v_kept = kept_columns(v_mask, V8 * 8, BLOCK_V, MASK_V)
    dk_ptrs = dk + ((b * N + rn[:, None]) * H + h) * (QK8 * 8) + dc[None, :]
    dv_ptrs = dv + ((b * N + rn[:, None]) * H + h) * (V8 * 8) + vc[None, :]
    dk_acc = tl.zeros([BLOCK_N, BLOCK_QK], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    if slot < tl.load(heads_n):
        q += b * (q_b8 * 8) + h * (q_h8 * 8)
        k += b * (k_b8 * 8) + h * (k_h8 * 8)
        v += b * (v_b8 * 8) + h * (v_h8 * 8)
        do += b * (do_b8 * 8) + h * (do_h8 * 8)
        bias += h * N * (N8 * 8)
        window += (tl.program_id(2) % windows).to(tl.int64) * N * (N8 * 8)
        here = (rn < N)[:, None]
        kt = tl.load(k + rn[:, None] * (k_n8 * 8) + dc[None, :], mask=here & d_in[None, :], other=0.0)
        vt = tl.load(v + rn[:, None] * (v_n8 * 8) + vc[None, :], mask=here & v_in[None, :], other=0.0)
        if MASK_QK:
            kt = tl.where(d_kept[None, :], kt, 0.0)
        if MASK_V:
            vt = tl.where(v_kept[None, :], vt, 0.0)
        for m0 in range(0, N, BLOCK_M):
            m = m0 + tl.arange(0, BLOCK_M)
            row = (m < N)[:, None]
            qt = tl.load(q + m[:, None] * (q_n8 * 8) + dc[None, :], mask=row & d_in[None, :], other=0.0)
            dot = tl.load(do + m[:, None] * (do_n8 * 8) + vc[None, :], mask=row & v_in[None, :], other=0.0)
            top = tl.load(stats + (b * H + h) * 2 * N + m, mask=m < N, other=0.0)
            share = tl.load(stats + (b * H + h) * 2 * N + N + m, mask=m < N, other=0.0)  # rows past N weigh nothing
            centre = tl.load(delta + (b * H + h) * N + m, mask=m < N, other=0.0)
            s = tl.dot(kt, tl.trans(qt), input_precision=PRECISION) * (scale * 1.4426950408889634)
            s = add_to_logits(s, bias, window, m[None, :], rn[:, None], N, N8, BIAS, WINDOW)
            p = tl.exp2(s - top[None, :]) * share[None, :]
            dv_acc = tl.dot(p.to(dot.dtype), dot, dv_acc, input_precision=PRECISION)
            dp = tl.dot(vt, tl.trans(dot), input_precision=PRECISION)
            ds = p * (dp - centre[None, :])
            dk_acc = tl.dot(ds.to(qt.dtype), qt, dk_acc, input_precision=PRECISION)
    if MASK_QK:
        dk_acc = tl.where(d_kept[None, :], dk_acc, 0.0)
    if MASK_V:
        dv_acc = tl.where(v_kept[None, :], dv_acc, 0.0)
    tl.store(dk_ptrs, (dk_acc * scale).to(dk.dtype.element_ty), mask=(rn < N)[:, None] & d_in[None, :])
    tl.store(dv_ptrs, dv_acc.to(dv.dtype.element_ty), mask=(rn < N)[:, None] & v_in[None, :])


@triton.jit
def dq_kernel(q, k, v, do, stats, delta, dq, qk_part, heads, heads_n, qk_mask, v_mask, bias, window, scale, H, N, QK8,
              V8, N8, windows, q_b8, q_h8, q_n8, k_b8, k_h8, k_n8, v_b8, v_h8, v_n8, do_b8, do_h8, do_n8,
              BIAS: tl.constexpr, WINDOW: tl.constexpr, SCORES: tl.constexpr, MASK_QK: tl.constexpr,
              MASK_V: tl.constexpr, PRECISION: tl.constexpr, BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr,
              BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    tile, slot, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    h = tl.load(heads + slot).to(tl.int64)
    rm = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    dc, vc = tl.arange(0, BLOCK_QK), tl.arange(0, BLOCK_V)
    d_in, v_in = (dc < QK8 * 8), (vc < V8 * 8)
    d_kept = kept_columns(qk_mask, QK8 * 8, BLOCK_QK, MASK_QK)
    acc = tl.zeros([BLOCK_M, BLOCK_QK], tl.float32)
    product = tl.zeros([BLOCK_QK], tl.float32)
    if slot < tl.load(heads_n):
        q += b * (q_b8 * 8) + h * (q_h8 * 8)
        k += b * (k_b8 * 8) + h * (k_h8 * 8)
        v += b * (v_b8 * 8) + h * (v_h8 * 8)
        do += b * (do_b8 * 8) + h * (do_h8 * 8)
        bias += h * N * (N8 * 8)
        window += (tl.program_id(2) % windows).to(tl.int64) * N * (N8 * 8)
        here = (rm < N)[:, None]
        qt = tl.load(q + rm[:, None] * (q_n8 * 8) + dc[None, :], mask=here & d_in[None, :], other=0.0)
        dot = tl.load(do + rm[:, None] * (do_n8 * 8) + vc[None, :], mask=here & v_in[None, :], other=0.0)
        if MASK_QK:
            qt = tl.where(d_kept[None, :], qt, 0.0)
        if MASK_V:
            dot = tl.where(kept_columns(v_mask, V8 * 8, BLOCK_V, MASK_V)[None, :], dot, 0.0)
        top = tl.load(stats + (b * H + h) * 2 * N + rm, mask=rm < N, other=0.0)
        share = tl.load(stats + (b * H + h) * 2 * N + N + rm, mask=rm < N, other=0.0)
        centre = tl.load(delta + (b * H + h) * N + rm, mask=rm < N, other=0.0)
        for n0 in range(0, N, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)
            row = (n < N)[:, None]
            kt = tl.load(k + n[:, None] * (k_n8 * 8) + dc[None, :], mask=row & d_in[None, :], other=0.0)
            vt = tl.load(v + n[:, None] * (v_n8 * 8) + vc[None, :], mask=row & v_in[None, :], other=0.0)
            s = tl.dot(qt, tl.trans(kt), input_precision=PRECISION) * (scale * 1.4426950408889634)
            s = add_to_logits(s, bias, window, rm[:, None], n[None, :], N, N8, BIAS, WINDOW)
            p = tl.exp2(s - top[:, None]) * share[:, None]
            dp = tl.dot(dot, tl.trans(vt), input_precision=PRECISION)
            ds = p * (dp - centre[:, None])  # keys past N: their k is zero, so they add nothing below
            acc = tl.dot(ds.to(kt.dtype), kt, acc, input_precision=PRECISION)
        acc *= scale
        if MASK_QK:
            acc = tl.where(d_kept[None, :], acc, 0.0)
        product = tl.sum(qt.to(tl.float32) * acc, 0)
    dq_ptrs = dq + ((b * N + rm[:, None]) * H + h) * (QK8 * 8) + dc[None, :]
    tl.store(dq_ptrs, acc.to(dq.dtype.element_ty), mask=(rm < N)[:, None] & d_in[None, :])
    if SCORES:
        part = qk_part + ((b * H + h) * tl.num_programs(0) + tile) * (QK8 * 8)
        tl.store(part + dc, product, mask=d_in)


@triton.jit
def dbias_kernel(q, k, v, do, stats, delta, bias_part, heads, heads_n, qk_mask, v_mask, bias, window, scale, H, N, QK8,
                 V8, N8, windows, batch, q_b8, q_h8, q_n8, k_b8, k_h8, k_n8, v_b8, v_h8, v_n8, do_b8, do_h8, do_n8,
                 BIAS: tl.constexpr, WINDOW: tl.constexpr, MASK_QK: tl.constexpr, MASK_V: tl.constexpr,
                 PRECISION: tl.constexpr, BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
                 BLOCK_N: tl.constexpr):  # fmt: skip
    """A tile of a head's ∂S summed over samples `split`, `split + splits`, …: a part of ∂bias, without atomics."""
    slot, split, splits = tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    h = tl.load(heads + slot).to(tl.int64)
    tile, across = tl.program_id(0), tl.cdiv(N, BLOCK_N)
    rm = tile // across * BLOCK_M + tl.arange(0, BLOCK_M)
    rn = tile % across * BLOCK_N + tl.arange(0, BLOCK_N)
    dc, vc = tl.arange(0, BLOCK_QK), tl.arange(0, BLOCK_V)
    d_in, v_in = kept_columns(qk_mask, QK8 * 8, BLOCK_QK, MASK_QK), kept_columns(v_mask, V8 * 8, BLOCK_V, MASK_V)
    row, key = (rm < N)[:, None], (rn < N)[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if slot < tl.load(heads_n):
        bias += h * N * (N8 * 8)
        for i in range(0, tl.cdiv(batch - split, splits)):
            b = (split + i * splits).to(tl.int64)
            qb, kb, vb = q + b * (q_b8 * 8) + h * (q_h8 * 8), k + b * (k_b8 * 8) + h * (k_h8 * 8), v + b * (v_b8 * 8)
            qt = tl.load(qb + rm[:, None] * (q_n8 * 8) + dc[None, :], mask=row & d_in[None, :], other=0.0)
            kt = tl.load(kb + rn[:, None] * (k_n8 * 8) + dc[None, :], mask=key & (dc < QK8 * 8)[None, :], other=0.0)
            vt = tl.load(
                vb + h * (v_h8 * 8) + rn[:, None] * (v_n8 * 8) + vc[None, :],
                mask=key & (vc < V8 * 8)[None, :],
                other=0.0,
            )
            dot = tl.load(
                do + b * (do_b8 * 8) + h * (do_h8 * 8) + rm[:, None] * (do_n8 * 8) + vc[None, :],
                mask=row & v_in[None, :],
                other=0.0,
            )
            top = tl.load(stats + (b * H + h) * 2 * N + rm, mask=rm < N, other=0.0)
            share = tl.load(stats + (b * H + h) * 2 * N + N + rm, mask=rm < N, other=0.0)
            centre = tl.load(delta + (b * H + h) * N + rm, mask=rm < N, other=0.0)
            s = tl.dot(qt, tl.trans(kt), input_precision=PRECISION) * (scale * 1.4426950408889634)
            here = window + ((split + i * splits) % windows).to(tl.int64) * N * (N8 * 8)
            s = add_to_logits(s, bias, here, rm[:, None], rn[None, :], N, N8, BIAS, WINDOW)
            p = tl.exp2(s - top[:, None]) * share[:, None]
            dp = tl.dot(dot, tl.trans(vt), input_precision=PRECISION)
            acc += p * (dp - centre[:, None])
    part = bias_part + ((split * H + h) * N + rm[:, None]) * N + rn[None, :]
    tl.store(part, acc, mask=row & (rn < N)[None, :])
