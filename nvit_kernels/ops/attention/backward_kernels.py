"""The kernels of attention's backward; docs/kernels/attention.md says what they compute.

Arguments that all share: q, k `(B, H, N, QK)` with one pair of strides, v, do `(B, H, N, V)` with one pair each,
`stats` and `delta` as the forward and `delta_kernel` leave them, lists, bias and mask as in `forward_kernel`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nvit_kernels.ops.attention.kernels import (
    add_to_logits,
    head_at,
    head_start,
    kept_columns,
    plane,
    where_kept,
)


@triton.jit
def delta_kernel(
    heads,  # (H,) int32, kept ones first; None: all are kept
    heads_n,  # (1,) int32
    o,  # (B, N, H, V)
    do,  # (B, H, N, V)
    delta,  # out: (B, H, N) float32, Σ o·∂o of each row
    v_part,  # out: (B, H, tiles, V) float32, Σ o·∂o of each column of a tile; None: no scores are wanted
    H,  # heads
    N,  # tokens
    V8,  # value dims / 8
    do_h8,  # strides of do, elements / 8: from head to head
    do_n8,  # from token to token
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    tile, slot, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    h = head_at(slot, heads)
    rm, vc = tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_V)
    there = (rm < where_kept(slot, heads_n, N))[:, None] & (vc < V8 * 8)[None, :]
    ot = tl.load(o + ((b * N + rm[:, None]) * H + h) * (V8 * 8) + vc[None, :], mask=there, other=0.0)
    do = head_start(do, b, h, H, N, do_h8, do_n8)
    dot = tl.load(do + rm[:, None] * (do_n8 * 8) + vc[None, :], mask=there, other=0.0)
    product = ot.to(tl.float32) * dot.to(tl.float32)
    tl.store(delta + (b * H + h) * N + rm, tl.sum(product, 1), mask=rm < N)
    if v_part is not None:
        part = v_part + ((b * H + h) * tl.num_programs(0) + tile) * (V8 * 8)
        tl.store(part + vc, tl.sum(product, 0), mask=vc < V8 * 8)


@triton.jit
def dkv_kernel(
    q,  # (B, H, N, QK)
    k,  # (B, H, N, QK), with q's strides
    v,  # (B, H, N, V)
    heads,  # (H,) int32, kept ones first; None: all are kept
    heads_n,  # (1,) int32
    qk_mask,  # (QK,) bool, True stays; None: all stay
    v_mask,  # (V,) bool
    bias,  # (H, N, N), rows filled up with -inf to a multiple of 8; None: no bias
    window,  # (windows, N, N), filled up alike; None: no mask
    do,  # (B, H, N, V)
    stats,  # (B, H, 2, N) float32
    delta,  # (B, H, N) float32
    scale,  # factor on the logits
    dk,  # out: (B, N, H, QK)
    dv,  # out: (B, N, H, V)
    windows,  # sample i meets window i modulo this
    H,  # heads
    N,  # tokens
    QK8,  # query and key dims / 8
    V8,  # value dims / 8
    qk_h8,  # strides, elements / 8: from head to head, from token to token
    qk_n8,
    v_h8,
    v_n8,
    do_h8,
    do_n8,
    PRECISION: tl.constexpr,
    BLOCK_QK: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A program has BLOCK_N keys of a head and walks over its queries."""
    slot, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    h = head_at(slot, heads)
    rows = where_kept(slot, heads_n, N)
    rn = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    dc, vc = tl.arange(0, BLOCK_QK), tl.arange(0, BLOCK_V)
    d_in, v_in = (dc < QK8 * 8), (vc < V8 * 8)
    dk_acc = tl.zeros([BLOCK_N, BLOCK_QK], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    q = head_start(q, b, h, H, N, qk_h8, qk_n8)
    k = head_start(k, b, h, H, N, qk_h8, qk_n8)
    v = head_start(v, b, h, H, N, v_h8, v_n8)
    do = head_start(do, b, h, H, N, do_h8, do_n8)
    if bias is not None:
        bias = plane(bias, h, N)
    if window is not None:
        window = plane(window, tl.program_id(2) % windows, N)
    here = (rn < rows)[:, None]
    kt = tl.load(k + rn[:, None] * (qk_n8 * 8) + dc[None, :], mask=here & d_in[None, :], other=0.0)
    vt = tl.load(v + rn[:, None] * (v_n8 * 8) + vc[None, :], mask=here & v_in[None, :], other=0.0)
    if qk_mask is not None:
        kt = tl.where(kept_columns(qk_mask, QK8 * 8, BLOCK_QK)[None, :], kt, 0.0)
    if v_mask is not None:
        vt = tl.where(kept_columns(v_mask, V8 * 8, BLOCK_V)[None, :], vt, 0.0)
    for m0 in range(0, rows, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        row = (m < N)[:, None]
        qt = tl.load(q + m[:, None] * (qk_n8 * 8) + dc[None, :], mask=row & d_in[None, :], other=0.0)
        dot = tl.load(do + m[:, None] * (do_n8 * 8) + vc[None, :], mask=row & v_in[None, :], other=0.0)
        top = tl.load(stats + (b * H + h) * 2 * N + m, mask=m < N, other=0.0)
        share = tl.load(stats + (b * H + h) * 2 * N + N + m, mask=m < N, other=0.0)  # rows past N weigh nothing
        centre = tl.load(delta + (b * H + h) * N + m, mask=m < N, other=0.0)
        s = tl.dot(kt, tl.trans(qt), input_precision=PRECISION) * (scale * 1.4426950408889634)
        s = add_to_logits(s, bias, window, m[None, :], rn[:, None], N)
        p = tl.exp2(s - top[None, :]) * share[None, :]
        dv_acc = tl.dot(p.to(dot.dtype), dot, dv_acc, input_precision=PRECISION)
        dp = tl.dot(vt, tl.trans(dot), input_precision=PRECISION)
        ds = p * (dp - centre[None, :])
        dk_acc = tl.dot(ds.to(qt.dtype), qt, dk_acc, input_precision=PRECISION)
    if qk_mask is not None:
        dk_acc = tl.where(kept_columns(qk_mask, QK8 * 8, BLOCK_QK)[None, :], dk_acc, 0.0)
    if v_mask is not None:
        dv_acc = tl.where(kept_columns(v_mask, V8 * 8, BLOCK_V)[None, :], dv_acc, 0.0)
    dk_ptrs = dk + ((b * N + rn[:, None]) * H + h) * (QK8 * 8) + dc[None, :]
    dv_ptrs = dv + ((b * N + rn[:, None]) * H + h) * (V8 * 8) + vc[None, :]
    tl.store(dk_ptrs, (dk_acc * scale).to(dk.dtype.element_ty), mask=(rn < N)[:, None] & d_in[None, :])
    tl.store(dv_ptrs, dv_acc.to(dv.dtype.element_ty), mask=(rn < N)[:, None] & v_in[None, :])


@triton.jit
def dq_kernel(
    q,  # (B, H, N, QK)
    k,  # (B, H, N, QK), with q's strides
    v,  # (B, H, N, V)
    heads,  # (H,) int32, kept ones first; None: all are kept
    heads_n,  # (1,) int32
    qk_mask,  # (QK,) bool, True stays; None: all stay
    v_mask,  # (V,) bool
    bias,  # (H, N, N), rows filled up with -inf to a multiple of 8; None: no bias
    window,  # (windows, N, N), filled up alike; None: no mask
    do,  # (B, H, N, V)
    stats,  # (B, H, 2, N) float32
    delta,  # (B, H, N) float32
    scale,  # factor on the logits
    dq,  # out: (B, N, H, QK)
    qk_part,  # out: (B, H, tiles, QK) float32, Σ q·∂q of each column of a tile; None: no scores are wanted
    windows,  # sample i meets window i modulo this
    H,  # heads
    N,  # tokens
    QK8,  # query and key dims / 8
    V8,  # value dims / 8
    qk_h8,  # strides, elements / 8: from head to head, from token to token
    qk_n8,
    v_h8,
    v_n8,
    do_h8,
    do_n8,
    PRECISION: tl.constexpr,
    BLOCK_QK: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A program has BLOCK_M queries of a head and walks over its keys."""
    tile, slot, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    h = head_at(slot, heads)
    rows = where_kept(slot, heads_n, N)
    rm = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    dc, vc = tl.arange(0, BLOCK_QK), tl.arange(0, BLOCK_V)
    d_in, v_in = (dc < QK8 * 8), (vc < V8 * 8)
    acc = tl.zeros([BLOCK_M, BLOCK_QK], tl.float32)
    q = head_start(q, b, h, H, N, qk_h8, qk_n8)
    k = head_start(k, b, h, H, N, qk_h8, qk_n8)
    v = head_start(v, b, h, H, N, v_h8, v_n8)
    do = head_start(do, b, h, H, N, do_h8, do_n8)
    if bias is not None:
        bias = plane(bias, h, N)
    if window is not None:
        window = plane(window, tl.program_id(2) % windows, N)
    here = (rm < rows)[:, None]
    qt = tl.load(q + rm[:, None] * (qk_n8 * 8) + dc[None, :], mask=here & d_in[None, :], other=0.0)
    dot = tl.load(do + rm[:, None] * (do_n8 * 8) + vc[None, :], mask=here & v_in[None, :], other=0.0)
    if qk_mask is not None:
        qt = tl.where(kept_columns(qk_mask, QK8 * 8, BLOCK_QK)[None, :], qt, 0.0)
    if v_mask is not None:
        dot = tl.where(kept_columns(v_mask, V8 * 8, BLOCK_V)[None, :], dot, 0.0)
    top = tl.load(stats + (b * H + h) * 2 * N + rm, mask=rm < N, other=0.0)
    share = tl.load(stats + (b * H + h) * 2 * N + N + rm, mask=rm < N, other=0.0)
    centre = tl.load(delta + (b * H + h) * N + rm, mask=rm < N, other=0.0)
    for n0 in range(0, rows, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        row = (n < N)[:, None]
        kt = tl.load(k + n[:, None] * (qk_n8 * 8) + dc[None, :], mask=row & d_in[None, :], other=0.0)
        vt = tl.load(v + n[:, None] * (v_n8 * 8) + vc[None, :], mask=row & v_in[None, :], other=0.0)
        s = tl.dot(qt, tl.trans(kt), input_precision=PRECISION) * (scale * 1.4426950408889634)
        s = add_to_logits(s, bias, window, rm[:, None], n[None, :], N)
        p = tl.exp2(s - top[:, None]) * share[:, None]
        dp = tl.dot(dot, tl.trans(vt), input_precision=PRECISION)
        # Keys past N have logit 0, which may be far above a row's own: their p overflows, and inf · 0 is no number.
        ds = tl.where((n < N)[None, :], p * (dp - centre[:, None]), 0.0)
        acc = tl.dot(ds.to(kt.dtype), kt, acc, input_precision=PRECISION)
    acc *= scale
    if qk_mask is not None:
        acc = tl.where(kept_columns(qk_mask, QK8 * 8, BLOCK_QK)[None, :], acc, 0.0)
    dq_ptrs = dq + ((b * N + rm[:, None]) * H + h) * (QK8 * 8) + dc[None, :]
    tl.store(dq_ptrs, acc.to(dq.dtype.element_ty), mask=(rm < N)[:, None] & d_in[None, :])
    if qk_part is not None:
        part = qk_part + ((b * H + h) * tl.num_programs(0) + tile) * (QK8 * 8)
        tl.store(part + dc, tl.sum(qt.to(tl.float32) * acc, 0), mask=d_in)


@triton.jit
def dbias_kernel(
    q,  # (B, H, N, QK)
    k,  # (B, H, N, QK), with q's strides
    v,  # (B, H, N, V)
    heads,  # (H,) int32, kept ones first; None: all are kept
    heads_n,  # (1,) int32
    qk_mask,  # (QK,) bool, True stays; None: all stay
    v_mask,  # (V,) bool
    bias,  # (H, N, N), rows filled up with -inf to a multiple of 8; None: no bias
    window,  # (windows, N, N), filled up alike; None: no mask
    do,  # (B, H, N, V)
    stats,  # (B, H, 2, N) float32
    delta,  # (B, H, N) float32
    scale,  # factor on the logits
    bias_part,  # out: (splits, H, N, N) float32
    windows,  # sample i meets window i modulo this
    B,  # samples
    H,  # heads
    N,  # tokens
    QK8,  # query and key dims / 8
    V8,  # value dims / 8
    qk_h8,  # strides, elements / 8: from head to head, from token to token
    qk_n8,
    v_h8,
    v_n8,
    do_h8,
    do_n8,
    PRECISION: tl.constexpr,
    BLOCK_QK: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A tile of a head's ∂S summed over samples `split`, `split + splits`, …: a part of ∂bias, without atomics."""
    slot, split, splits = tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    h = head_at(slot, heads)
    rows = where_kept(slot, heads_n, N)
    tile, across = tl.program_id(0), tl.cdiv(N, BLOCK_N)
    rm = tile // across * BLOCK_M + tl.arange(0, BLOCK_M)
    rn = tile % across * BLOCK_N + tl.arange(0, BLOCK_N)
    dc, vc = tl.arange(0, BLOCK_QK), tl.arange(0, BLOCK_V)
    d_in, v_in = kept_columns(qk_mask, QK8 * 8, BLOCK_QK), kept_columns(v_mask, V8 * 8, BLOCK_V)
    row, key = (rm < rows)[:, None], (rn < rows)[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if bias is not None:
        bias = plane(bias, h, N)
    for i in range(0, where_kept(slot, heads_n, tl.cdiv(B - split, splits))):
        b = (split + i * splits).to(tl.int64)
        q_rows = head_start(q, b, h, H, N, qk_h8, qk_n8) + rm[:, None] * (qk_n8 * 8)
        k_rows = head_start(k, b, h, H, N, qk_h8, qk_n8) + rn[:, None] * (qk_n8 * 8)
        v_rows = head_start(v, b, h, H, N, v_h8, v_n8) + rn[:, None] * (v_n8 * 8)
        do_rows = head_start(do, b, h, H, N, do_h8, do_n8) + rm[:, None] * (do_n8 * 8)
        qt = tl.load(q_rows + dc[None, :], mask=row & d_in[None, :], other=0.0)
        kt = tl.load(k_rows + dc[None, :], mask=key & (dc < QK8 * 8)[None, :], other=0.0)
        vt = tl.load(v_rows + vc[None, :], mask=key & (vc < V8 * 8)[None, :], other=0.0)
        dot = tl.load(do_rows + vc[None, :], mask=row & v_in[None, :], other=0.0)
        top = tl.load(stats + (b * H + h) * 2 * N + rm, mask=rm < N, other=0.0)
        share = tl.load(stats + (b * H + h) * 2 * N + N + rm, mask=rm < N, other=0.0)
        centre = tl.load(delta + (b * H + h) * N + rm, mask=rm < N, other=0.0)
        s = tl.dot(qt, tl.trans(kt), input_precision=PRECISION) * (scale * 1.4426950408889634)
        shut = window
        if window is not None:
            shut = plane(window, (split + i * splits) % windows, N)
        s = add_to_logits(s, bias, shut, rm[:, None], rn[None, :], N)
        p = tl.exp2(s - top[:, None]) * share[:, None]
        dp = tl.dot(dot, tl.trans(vt), input_precision=PRECISION)
        acc += p * (dp - centre[:, None])
    part = bias_part + ((split * H + h) * N + rm[:, None]) * N + rn[None, :]
    tl.store(part, acc, mask=(rm < N)[:, None] & (rn < N)[None, :])
