"""The forward kernel of attention over kept heads and dims, flash style, and what all its kernels share.

docs/kernels/attention.md says what they compute. An optional pointer is None where there is nothing: Triton compiles a
kernel of its own for that.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def kept_columns(mask, width, SIZE: tl.constexpr):
    """True for each kept column of a head.

    Loads stay dense and wide. Zeroing one operand, once per program, takes a pruned dim out of every product: a
    list of 2-byte gathers would touch the same sectors, and costs registers that a tile of 64 x 64 does not have.
    """
    i = tl.arange(0, SIZE)
    if mask is not None:
        return tl.load(mask + i, mask=i < width, other=0) != 0
    else:
        return i < width


@triton.jit
def head_at(slot, heads):
    """The head of a slot of the grid: kept ones first where a list says which are kept."""
    if heads is not None:
        return tl.load(heads + slot).to(tl.int64)
    else:
        return slot.to(tl.int64)


@triton.jit
def where_kept(slot, heads_n, n):
    """`n`, or 0 in a slot past the kept heads: a program there reads nothing and writes zeros."""
    if heads_n is not None:
        return tl.where(slot < tl.load(heads_n), n, 0)
    else:
        return n


@triton.jit
def head_start(x, b, h, H, N, h8, n8):
    """Where head `h` of sample `b` (int64 both) begins, from strides of heads and tokens divided by 8.

    A sample is as long as all its tokens or all its heads, whichever lies outside; the launcher copies what is neither.
    """
    sample8 = tl.maximum(tl.cast(N * n8, tl.int32), tl.cast(H * h8, tl.int32))
    return x + b * sample8 * 8 + h * (h8 * 8)


@triton.jit
def add_to_logits(s, bias, window, m, n, N):
    """Logits in base 2 plus a head's bias and a window's mask at queries `m` and keys `n`.

    Rows of both are a multiple of 8 wide so that loads are: the launcher fills them up with -inf, which shuts keys past
    N. Queries past N read the last row; they are never stored, and weigh nothing in the backward.
    """
    wide = (N + 7) // 8 * 8
    at, inside = tl.minimum(m, N - 1) * wide + n, n < wide
    if bias is not None:
        s += tl.load(bias + at, mask=inside, other=float("-inf")).to(tl.float32) * 1.4426950408889634
    if window is not None:
        s += tl.load(window + at, mask=inside, other=float("-inf")).to(tl.float32) * 1.4426950408889634
    return s


@triton.jit
def plane(x, i, N):
    """Plane `i` of `(·, N, N)` whose rows are filled up to a multiple of 8."""
    return x + i.to(tl.int64) * N * ((N + 7) // 8 * 8)


@triton.jit
def forward_kernel(
    q,  # (B, H, N, QK)
    k,  # (B, H, N, QK), with q's strides
    v,  # (B, H, N, V)
    heads,  # (H,) int32, kept ones first; None: all are kept
    heads_n,  # (1,) int32, how many are kept; None with heads
    qk_mask,  # (QK,) bool, True stays; None: all stay
    v_mask,  # (V,) bool
    bias,  # (H, N, N), rows filled up with -inf to a multiple of 8; None: no bias
    window,  # (windows, N, N), filled up alike; None: no mask
    o,  # out: (B, N, H, V)
    stats,  # out: (B, H, 2, N) float32, row maximum of the logits in base 2, and 1 / row sum
    scale_log2,  # factor on the logits times log2(e)
    windows,  # sample i meets window i modulo this; None with window
    H,  # heads
    N,  # tokens
    QK8,  # query and key dims / 8
    V8,  # value dims / 8
    qk_h8,  # strides of q and k, elements / 8: from head to head
    qk_n8,  # from token to token
    v_h8,  # of v
    v_n8,
    PRECISION: tl.constexpr,
    BLOCK_QK: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    slot, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    h = head_at(slot, heads)
    rm = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rn = tl.arange(0, BLOCK_N)
    dc, vc = tl.arange(0, BLOCK_QK), tl.arange(0, BLOCK_V)
    d_in, v_in = (dc < QK8 * 8), (vc < V8 * 8)
    o_ptrs = o + ((b * N + rm[:, None]) * H + h) * (V8 * 8) + vc[None, :]
    o_mask = (rm < N)[:, None] & v_in[None, :]
    row = stats + (b * H + h) * 2 * N + rm
    if heads_n is not None:  # noqa: SIM102  a constant, then a value of the device
        if slot >= tl.load(heads_n):
            tl.store(o_ptrs, tl.zeros([BLOCK_M, BLOCK_V], o.dtype.element_ty), mask=o_mask)
            tl.store(row, tl.zeros([BLOCK_M], tl.float32), mask=rm < N)
            tl.store(row + N, tl.zeros([BLOCK_M], tl.float32), mask=rm < N)
            return
    q = head_start(q, b, h, H, N, qk_h8, qk_n8)
    k = head_start(k, b, h, H, N, qk_h8, qk_n8)
    v = head_start(v, b, h, H, N, v_h8, v_n8)
    if bias is not None:
        bias = plane(bias, h, N)
    if window is not None:
        window = plane(window, tl.program_id(2) % windows, N)
    qt = tl.load(q + rm[:, None] * (qk_n8 * 8) + dc[None, :], mask=(rm < N)[:, None] & d_in[None, :], other=0.0)
    if qk_mask is not None:
        qt = tl.where(kept_columns(qk_mask, QK8 * 8, BLOCK_QK)[None, :], qt, 0.0)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for n0 in range(0, N, BLOCK_N):
        n = n0 + rn
        kt = tl.load(k + n[None, :] * (qk_n8 * 8) + dc[:, None], mask=(n < N)[None, :] & d_in[:, None], other=0.0)
        s = tl.dot(qt, kt, input_precision=PRECISION) * scale_log2
        s = add_to_logits(s, bias, window, rm[:, None], n[None, :], N)
        s = tl.where((n < N)[None, :], s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        base = higher
        if bias is not None or window is not None:  # a mask may shut all keys so far
            base = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(s - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(p, 1)
        vt = tl.load(v + n[:, None] * (v_n8 * 8) + vc[None, :], mask=(n < N)[:, None] & v_in[None, :], other=0.0)
        acc = tl.dot(p.to(vt.dtype), vt, acc * shrink[:, None], input_precision=PRECISION)
        top = higher
    if v_mask is not None:
        acc = tl.where(kept_columns(v_mask, V8 * 8, BLOCK_V)[None, :], acc, 0.0)
    tl.store(o_ptrs, (acc / total[:, None]).to(o.dtype.element_ty), mask=o_mask)
    tl.store(row, top, mask=rm < N)  # both, not their log: the backward's weights are then as exact as these
    tl.store(row + N, 1 / total, mask=rm < N)
