"""Attention over kept heads and dims, flash style; the backward also gives the head, QK and V scores.

Derivations and shapes: docs/kernels/attention.md.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from nvit_kernels.configs import tuned
from nvit_kernels.launch import FUSED_MULTIPLY_ADD, eighths, kept_or_all, matmul_precision, on_device, power_of_two

LARGEST_HEAD = 256
BIAS_PROGRAMS = 1024
LOG2E = 1.4426950408889634


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
                   BIAS: tl.constexpr, WINDOW: tl.constexpr, MASK_QK: tl.constexpr, MASK_V: tl.constexpr, PRECISION: tl.constexpr, BLOCK_QK: tl.constexpr,
                   BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
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
    window += b % windows * N * (N8 * 8)
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
               BIAS: tl.constexpr, WINDOW: tl.constexpr, MASK_QK: tl.constexpr, MASK_V: tl.constexpr, PRECISION: tl.constexpr, BLOCK_QK: tl.constexpr,
               BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
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
        window += b % windows * N * (N8 * 8)
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
              BIAS: tl.constexpr, WINDOW: tl.constexpr, SCORES: tl.constexpr, MASK_QK: tl.constexpr, MASK_V: tl.constexpr, PRECISION: tl.constexpr,
              BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
              BLOCK_N: tl.constexpr):  # fmt: skip
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
        window += b % windows * N * (N8 * 8)
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
    """A tile of a head's ∂S, summed over every so many-th sample: each writes its part, so no atomics."""
    slot, split, splits = tl.program_id(1), tl.program_id(2).to(tl.int64), tl.num_programs(2)
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
            b = split + i * splits
            qb, kb, vb = q + b * (q_b8 * 8) + h * (q_h8 * 8), k + b * (k_b8 * 8) + h * (k_h8 * 8), v + b * (v_b8 * 8)
            qt = tl.load(qb + rm[:, None] * (q_n8 * 8) + dc[None, :], mask=row & d_in[None, :], other=0.0)
            kt = tl.load(kb + rn[:, None] * (k_n8 * 8) + dc[None, :], mask=key & (dc < QK8 * 8)[None, :], other=0.0)
            vt = tl.load(vb + h * (v_h8 * 8) + rn[:, None] * (v_n8 * 8) + vc[None, :],
                         mask=key & (vc < V8 * 8)[None, :], other=0.0)
            dot = tl.load(do + b * (do_b8 * 8) + h * (do_h8 * 8) + rm[:, None] * (do_n8 * 8) + vc[None, :],
                          mask=row & v_in[None, :], other=0.0)
            top = tl.load(stats + (b * H + h) * 2 * N + rm, mask=rm < N, other=0.0)
            share = tl.load(stats + (b * H + h) * 2 * N + N + rm, mask=rm < N, other=0.0)
            centre = tl.load(delta + (b * H + h) * N + rm, mask=rm < N, other=0.0)
            s = tl.dot(qt, tl.trans(kt), input_precision=PRECISION) * (scale * 1.4426950408889634)
            s = add_to_logits(s, bias, window + b % windows * N * (N8 * 8), rm[:, None], rn[None, :], N, N8, BIAS,
                              WINDOW)
            p = tl.exp2(s - top[:, None]) * share[:, None]
            dp = tl.dot(dot, tl.trans(vt), input_precision=PRECISION)
            acc += p * (dp - centre[:, None])
    part = bias_part + ((split * H + h) * N + rm[:, None]) * N + rn[None, :]
    tl.store(part, acc, mask=row & (rn < N)[None, :])


forward_tuned = tuned("attention_forward", forward_kernel)
dkv_tuned = tuned("attention_dkv", dkv_kernel)
dq_tuned = tuned("attention_dq", dq_kernel)
dbias_tuned = tuned("attention_dbias", dbias_kernel)


def score_rows(head: int) -> int:
    """Token rows per program wherever partial scores are laid out by them, so never tuned: fewer for wide heads."""
    return 64 if head <= 128 else 32


def bias_splits(batch: int, heads: int, tokens: int) -> int:
    """Parts that the sum of the bias's gradient over samples is cut into: enough programs to fill a GPU.

    It counts tiles of 64 x 64, whatever is tuned, so that the order of summation is a matter of shapes alone.
    """
    return max(1, min(batch, triton.cdiv(BIAS_PROGRAMS, heads * triton.cdiv(tokens, 64) ** 2)))


def _strides8(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(stride // 8 for t in tensors for stride in t.stride()[:3])


def _readable(x: Tensor) -> Tensor:
    """`x` as it is where its rows are contiguous and 16-byte aligned, else a copy."""
    aligned = x.stride(-1) == 1 and all(s % 8 == 0 for s in x.stride()[:3]) and x.data_ptr() % 16 == 0
    return x if aligned else x.contiguous()


def _by_token(batch: int, heads: int, tokens: int, dim: int, like: Tensor) -> Tensor:
    """Uninitialised `(batch, heads, tokens, dim)` laid out token by token, as the projection reads it."""
    return like.new_empty(batch, tokens, heads, dim).transpose(1, 2)


def check(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise `ValueError` unless q, k, v are `(batch, heads, tokens, dim)` of one dtype with heads the kernels take."""
    if q.dim() != 4 or k.shape != q.shape or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: expected (batch, heads, tokens, "
                         "qk_dim) twice and (batch, heads, tokens, v_dim)")  # fmt: skip
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; cast them to one dtype")
    if max(q.shape[-1], v.shape[-1]) > LARGEST_HEAD:
        raise ValueError(f"head dims {q.shape[-1]} and {v.shape[-1]} exceed {LARGEST_HEAD}, the most a tile holds")
    eighths("head dims", q.shape[-1], v.shape[-1])


def check_added(q: Tensor, bias: Tensor | None, mask: Tensor | None) -> None:
    """Raise `ValueError` unless bias `(heads, tokens, tokens)` and mask `(windows, tokens, tokens)` fit q."""
    batch, heads, tokens, _ = q.shape
    if bias is not None and bias.shape != (heads, tokens, tokens):
        raise ValueError(f"bias is {tuple(bias.shape)}, expected (heads, tokens, tokens), {(heads, tokens, tokens)}")
    if mask is not None and (mask.shape[1:] != (tokens, tokens) or not len(mask) or batch % len(mask)):
        raise ValueError(f"mask is {tuple(mask.shape)}, expected (windows, {tokens}, {tokens}) with a number of "
                         f"windows that divides the batch of {batch}")  # fmt: skip
    for name, t in (("bias", bias), ("mask", mask)):
        if t is not None and (t.dtype not in (q.dtype, torch.float32) or t.device != q.device):
            raise ValueError(f"{name} is {t.dtype} on {t.device}; q on {q.device} takes {q.dtype} or torch.float32")


def _whole_rows(x: Tensor) -> Tensor:
    """`(·, tokens, tokens)` contiguous, with rows filled up to a multiple of 8 by -inf."""
    return F.pad(x, (0, -x.shape[-1] % 8), value=float("-inf")).contiguous() if x.shape[-1] % 8 else x.contiguous()


@torch.library.custom_op("nvit::attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float,
    heads: Tensor | None, heads_n: Tensor | None, qk_mask: Tensor | None, v_mask: Tensor | None,
    head_scores: Tensor | None, qk_scores: Tensor | None, v_scores: Tensor | None,
    bias: Tensor | None = None, mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check(q, k, v)
    check_added(q, bias, mask)
    q, k, v = _readable(q), _readable(k), _readable(v)
    b, h, n, d = q.shape
    o, stats = _by_token(b, h, n, v.shape[-1], q), q.new_empty(b, h, 2, n, dtype=torch.float32)
    lists = _lists(q, v, heads, heads_n, qk_mask, v_mask)
    added, windows = _added(bias, mask, lists[0])
    with on_device(q):
        forward_tuned[lambda meta: (triton.cdiv(n, meta["BLOCK_M"]), h, b)](
            q, k, v, o, stats, *lists, *added, scale * LOG2E, h, n, d // 8, v.shape[-1] // 8, triton.cdiv(n, 8),
            windows, *_strides8(q, k, v), BIAS=bias is not None, WINDOW=mask is not None, MASK_QK=qk_mask is not None, MASK_V=v_mask is not None, PRECISION=matmul_precision(),
            BLOCK_QK=power_of_two(d), BLOCK_V=power_of_two(v.shape[-1]), **FUSED_MULTIPLY_ADD)  # fmt: skip
    return o, stats


def _lists(q, v, heads, heads_n, qk_mask, v_mask) -> tuple[Tensor, ...]:
    for name, mask, width in (("qk", qk_mask, q.shape[-1]), ("v_dim", v_mask, v.shape[-1])):
        if mask is not None and (mask.numel() != width or mask.device != q.device):
            raise ValueError(f"{name} lists {mask.numel()} dims on {mask.device}, the tensor has {width} on {q.device}")
    lists = kept_or_all(heads, heads_n, q.shape[1], q.device)
    return (*lists, *(lists[0] if mask is None else mask for mask in (qk_mask, v_mask)))


def _added(bias: Tensor | None, mask: Tensor | None, unread: Tensor) -> tuple[tuple[Tensor, Tensor], int]:
    """What is added to the logits as kernels read it, `unread` in place of what is not, and the number of windows."""
    return tuple(unread if t is None else _whole_rows(t) for t in (bias, mask)), 1 if mask is None else len(mask)


@_forward.register_fake
def _(q, k, v, scale, heads, heads_n, qk_mask, v_mask, head_scores, qk_scores, v_scores, bias=None, mask=None):
    b, h, n, _ = q.shape
    return _by_token(b, h, n, v.shape[-1], q), q.new_empty(b, h, 2, n, dtype=torch.float32)


@torch.library.custom_op("nvit::attention_backward", mutates_args=("head_scores", "qk_scores", "v_scores"))
def _backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, stats: Tensor, scale: float,
    heads: Tensor | None, heads_n: Tensor | None, qk_mask: Tensor | None, v_mask: Tensor | None,
    head_scores: Tensor | None, qk_scores: Tensor | None, v_scores: Tensor | None,
    bias: Tensor | None = None, mask: Tensor | None = None, wants_bias: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    do, q, k, v = _readable(do), _readable(q), _readable(k), _readable(v)
    o = o.transpose(1, 2).contiguous()  # already so, unless someone copied it on the way
    (b, h, n, d), e = q.shape, v.shape[-1]
    rows = score_rows(max(d, e))
    tiles = triton.cdiv(n, rows)
    delta = q.new_empty(b, h, n, dtype=torch.float32)
    v_part = q.new_empty(b, h, tiles, e, dtype=torch.float32)
    qk_part = q.new_empty(b, h, tiles, d, dtype=torch.float32)
    dq, dk, dv = (_by_token(b, h, n, dim, q) for dim in (d, d, e))
    lists = _lists(q, v, heads, heads_n, qk_mask, v_mask)
    added, windows = _added(bias, mask, lists[0])
    sizes, strides = (scale, h, n, d // 8, e // 8, triton.cdiv(n, 8), windows), _strides8(q, k, v, do)
    meta = dict(BIAS=bias is not None, WINDOW=mask is not None, MASK_QK=qk_mask is not None, MASK_V=v_mask is not None, PRECISION=matmul_precision(),
                BLOCK_QK=power_of_two(d), BLOCK_V=power_of_two(e), **FUSED_MULTIPLY_ADD)  # fmt: skip
    wants_v, wants_qk = head_scores is not None or v_scores is not None, qk_scores is not None
    with on_device(q):
        delta_kernel[(tiles, h, b)](o, do, delta, v_part, *lists[:2], h, n, e // 8, *_strides8(do), SCORES=wants_v,
                                    BLOCK_V=meta["BLOCK_V"], BLOCK_M=rows, **FUSED_MULTIPLY_ADD)  # fmt: skip
        dq_tuned[(tiles, h, b)](q, k, v, do, stats, delta, dq, qk_part, *lists, *added, *sizes, *strides,
                                SCORES=wants_qk, BLOCK_M=rows, **meta)  # fmt: skip
        dkv_tuned[lambda m: (triton.cdiv(n, m["BLOCK_N"]), h, b)](
            q, k, v, do, stats, delta, dk, dv, *lists, *added, *sizes, *strides, **meta)  # fmt: skip
        bias_part = q.new_empty(bias_splits(b, h, n) if wants_bias else 0, h, n, n, dtype=torch.float32)
        if wants_bias:
            dbias_tuned[lambda m: (triton.cdiv(n, m["BLOCK_M"]) * triton.cdiv(n, m["BLOCK_N"]), h, len(bias_part))](
                q, k, v, do, stats, delta, bias_part, *lists, *added, *sizes, b, *strides, **meta)  # fmt: skip
    if wants_v:
        _add(head_scores, v_part, (2, 3))
        _add(v_scores, v_part, (1, 2))
    _add(qk_scores, qk_part, (1, 2)) if wants_qk else None
    return dq, dk, dv, bias_part.sum(0) if wants_bias else bias_part.new_empty(0)


def _add(scores: Tensor | None, partial: Tensor, dims: tuple[int, int]) -> None:
    if scores is not None:
        scores += partial.sum(dims if scores.dim() == 2 else (0, *dims))


@_backward.register_fake
def _(do, q, k, v, o, stats, scale, heads, heads_n, qk_mask, v_mask, head_scores, qk_scores, v_scores, bias=None,
      mask=None, wants_bias=False):  # fmt: skip
    b, h, n, d = q.shape
    dbias = q.new_empty((h, n, n) if wants_bias else 0, dtype=torch.float32)
    return *(_by_token(b, h, n, dim, q) for dim in (d, d, v.shape[-1])), dbias


def _save(ctx, inputs, output):
    q, k, v, ctx.scale, *lists, bias, mask = inputs
    ctx.save_for_backward(q, k, v, *output, *lists[:4], bias, mask)
    ctx.set_materialize_grads(False)
    ctx.scores = lists[4:]  # written by the backward, so not among what autograd guards against writing


def _differentiate(ctx, do, _):
    q, k, v, o, stats, *lists, bias, mask = ctx.saved_tensors
    wants_bias = ctx.needs_input_grad[11]
    *grads, dbias = _backward(do, q, k, v, o, stats, ctx.scale, *lists, *ctx.scores, bias, mask, wants_bias)
    return *grads, *([None] * 8), dbias.to(bias.dtype) if wants_bias else None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def attention(q, k, v, scale, heads=None, qk=None, v_dim=None, head_scores=None, qk_scores=None, v_scores=None,
              bias=None, mask=None):  # fmt: skip
    """Fused `nvit_kernels.reference.attention`, which says what the arguments are."""
    lists = (None, None) if heads is None else (heads.index, heads.count)
    masks = (None if kept is None else kept.mask for kept in (qk, v_dim))
    return _forward(q, k, v, float(scale), *lists, *masks, head_scores, qk_scores, v_scores, bias, mask)[0]
