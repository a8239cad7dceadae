"""Attention for rows of at most 208 keys: a program per image and head, no online softmax; two kernels.

A head's keys fit in one program, so its logits are in registers whole: the softmax is one maximum and one sum, nothing
is rescaled, and every tensor is read once. docs/kernels/attention_short.md derives what is computed. `N`, the number of
tokens, is a constant of compilation: full pieces then carry no mask. Logits are in base 2 throughout.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nvit_kernels.ops.attention.kernels import head_start

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def rows(x, start, size8, stride8, N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows `start ... start + ROWS` of a head as `(ROWS, COLUMNS)`: zeros past row N and past column size8 * 8."""
    i, c = start + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    return tl.load(x + i[:, None] * (stride8 * 8) + c[None, :], (i < N)[:, None] & (c < size8 * 8)[None, :], 0.0)


@triton.jit
def put_rows(x, values, start, size8, stride8, N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Write `values` `(ROWS, COLUMNS)` where `rows` would read them."""
    i, c = start + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    there = (i < N)[:, None] & (c < size8 * 8)[None, :]
    tl.store(x + i[:, None] * (stride8 * 8) + c[None, :], values.to(x.dtype.element_ty), there)


@triton.jit
def logits(qt, kt, start: tl.constexpr, N: tl.constexpr, KEYS: tl.constexpr):
    """q kᵀ `(queries, KEYS)` with a piece of the keys, -inf past key N."""
    s = tl.dot(qt, tl.trans(kt))
    if start + KEYS > N:
        s = tl.where((start + tl.arange(0, KEYS) < N)[None, :], s, float("-inf"))
    return s


@triton.jit
def mass_of(mass, start, N: tl.constexpr, KEYS: tl.constexpr):
    """The mass of a piece of keys in base 2 `(KEYS,)`: -inf past key N, which shuts them as a mask would."""
    n = start + tl.arange(0, KEYS)
    return tl.load(mass + n, n < N, float("-inf")) * LOG2E


@triton.jit
def weighed(qt, kt, mass, scale_log2, start: tl.constexpr, N: tl.constexpr, KEYS: tl.constexpr):
    """`logits`, not scaled yet; where keys have a mass, scaled and with it.

    The mass is read again for every tile, from the L1 cache: held in a thread's registers it would be half as much as
    its logits, and spill on sm_80.
    """
    if mass is not None:
        return tl.dot(qt, tl.trans(kt)) * scale_log2 + mass_of(mass, start, N, KEYS)[None, :]
    else:
        return logits(qt, kt, start, N, KEYS)


@triton.jit
def weights(s, top, mass, scale_log2):
    """exp2 of `weighed` logits less their row's `top`."""
    if mass is not None:
        return tl.exp2(s - top[:, None])
    else:
        return tl.exp2(s * scale_log2 - top[:, None])


@triton.jit
def forward_kernel(
    q,  # (B, H, N, D) through strides
    k,  # (B, H, N, D) through the same strides
    v,  # (B, H, N, E) through strides
    mass,  # (B, N) float32, added to the logits of a key; None: nothing is added
    o,  # (B, N, H, E)
    lse,  # (B, H, N) float32: log2 of each row's sum of exp2
    scale_log2,  # of the logits, times log2 e
    H,
    QK8,  # D / 8
    V8,  # E / 8
    qk_h8,  # strides of q and k, elements / 8: from head to head
    qk_n8,  # from token to token
    v_h8,  # of v
    v_n8,
    N: tl.constexpr,
    KEYS_A: tl.constexpr,  # pieces that hold N keys; 0 where there is none
    KEYS_B: tl.constexpr,
    KEYS_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_QK: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
):
    """P = softmax(q kᵀ + mass), o = P v of one head, a tile of queries at a time, k and v held.

    Products: 2 a tile, 2 N² (D + E) operations a head: 7.6 G at 64 x 12 heads of 197 x 64 (10.5 G as padded to
    256 x 208). Loads: q, k, v once, 16 bytes at a time. Bytes there: 3 x 19.4 MB read, 19.4 + 0.6 MB written: 78 MB.
    """
    i = tl.program_id(0).to(tl.int64)
    b, h = i // H, i % H
    q = head_start(q, b, h, H, N, qk_h8, qk_n8)
    k = head_start(k, b, h, H, N, qk_h8, qk_n8)
    v = head_start(v, b, h, H, N, v_h8, v_n8)
    o += (b * N * H + h) * (V8 * 8)
    ka = rows(k, 0, QK8, qk_n8, N, KEYS_A, BLOCK_QK)
    va = rows(v, 0, V8, v_n8, N, KEYS_A, BLOCK_V)
    if KEYS_B:
        kb = rows(k, KEYS_A, QK8, qk_n8, N, KEYS_B, BLOCK_QK)
        vb = rows(v, KEYS_A, V8, v_n8, N, KEYS_B, BLOCK_V)
    if KEYS_C:
        kc = rows(k, KEYS_A + KEYS_B, QK8, qk_n8, N, KEYS_C, BLOCK_QK)
        vc = rows(v, KEYS_A + KEYS_B, V8, v_n8, N, KEYS_C, BLOCK_V)
    if mass is not None:
        mass += b * N
    for m0 in tl.range(0, N, BLOCK_M, num_stages=STAGES):
        qt = rows(q, m0, QK8, qk_n8, N, BLOCK_M, BLOCK_QK)
        sa = weighed(qt, ka, mass, scale_log2, 0, N, KEYS_A)
        top = tl.max(sa, 1)
        if KEYS_B:
            sb = weighed(qt, kb, mass, scale_log2, KEYS_A, N, KEYS_B)
            top = tl.maximum(top, tl.max(sb, 1))
        if KEYS_C:
            sc = weighed(qt, kc, mass, scale_log2, KEYS_A + KEYS_B, N, KEYS_C)
            top = tl.maximum(top, tl.max(sc, 1))
        if mass is None:
            top *= scale_log2
        pa = weights(sa, top, mass, scale_log2)
        total = tl.sum(pa, 1)
        acc = tl.dot(pa.to(va.dtype), va)
        if KEYS_B:
            pb = weights(sb, top, mass, scale_log2)
            total += tl.sum(pb, 1)
            acc = tl.dot(pb.to(va.dtype), vb, acc)
        if KEYS_C:
            pc = weights(sc, top, mass, scale_log2)
            total += tl.sum(pc, 1)
            acc = tl.dot(pc.to(va.dtype), vc, acc)
        put_rows(o, acc * (1 / total)[:, None], m0, V8, H * V8, N, BLOCK_M, BLOCK_V)
        m = m0 + tl.arange(0, BLOCK_M)
        tl.store(lse + i * N + m, top + tl.log2(total), m < N)


@triton.jit
def backward_kernel(
    q,  # (B, H, N, D) through strides
    k,  # (B, H, N, D) through the same strides
    v,  # (B, H, N, E) through strides
    mass,  # (B, N) float32, as the forward had it, or None
    o,  # (B, N, H, E)
    do,  # (B, N, H, E)
    lse,  # (B, H, N) float32, from the forward
    delta,  # (B, H, N) float32, scratch in which δ is summed before the loop, or None
    dq,  # (B, N, H, D), or where PACKED a part of (B, N, 3, H, D)
    dk,  # (B, N, H, D), likewise
    dv,  # (B, N, H, E), likewise
    qk_part,  # (B, H, D) float32: q·∂q summed over tokens, or None
    v_part,  # (B, H, E) float32: o·∂o summed over tokens; with qk_part
    head_part,  # (B, H) float32: and over dims; with qk_part
    scale,
    H,
    QK8,  # D / 8
    V8,  # E / 8
    qk_h8,  # strides of q and k, elements / 8: from head to head
    qk_n8,  # from token to token
    v_h8,  # of v
    v_n8,
    N: tl.constexpr,
    PACKED: tl.constexpr,
    KEYS: tl.constexpr,  # a power of two that holds N
    CHUNK: tl.constexpr,  # keys read again at once for the scores
    BLOCK_M: tl.constexpr,
    BLOCK_QK: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradients of one head, a tile of queries at a time; k, v, ∂k, ∂v of all keys held, keys along the rows.

    Products: 5 a tile (Sᵀ, ∂v, ∂Pᵀ, ∂k, ∂q): 2 N² (3 D + 2 E) operations a head, 19.1 G at 64 x 12 heads of 197 x 64
    (28.2 G as padded to 224 x 256). Loads: q, k, v, o, ∂o once, 16 bytes at a time; scores read k, v, ∂k, ∂v again,
    from L2. Bytes there: 5 x 19.4 + 0.6 MB read, 3 x 19.4 MB written: 156 MB.
    """
    i = tl.program_id(0).to(tl.int64)
    b, h = i // H, i % H
    q = head_start(q, b, h, H, N, qk_h8, qk_n8)
    k = head_start(k, b, h, H, N, qk_h8, qk_n8)
    v = head_start(v, b, h, H, N, v_h8, v_n8)
    o += (b * N * H + h) * (V8 * 8)
    do += (b * N * H + h) * (V8 * 8)
    parts = 3 if PACKED else 1
    dq += (b * N * parts * H + h) * (QK8 * 8)
    dk += (b * N * parts * H + h) * (QK8 * 8)
    dv += (b * N * parts * H + h) * (V8 * 8)
    kt = rows(k, 0, QK8, qk_n8, N, KEYS, BLOCK_QK)
    vt = rows(v, 0, V8, v_n8, N, KEYS, BLOCK_V)
    n = tl.arange(0, KEYS)
    if mass is not None:
        held = mass_of(mass + b * N, 0, N, KEYS)
    dk_acc = tl.zeros([KEYS, BLOCK_QK], tl.float32)
    dv_acc = tl.zeros([KEYS, BLOCK_V], tl.float32)
    if delta is not None:  # the loop then loads nothing but what its products take, and that can be fetched ahead
        product = rows(o, 0, V8, H * V8, N, KEYS, BLOCK_V).to(tl.float32)
        product *= rows(do, 0, V8, H * V8, N, KEYS, BLOCK_V).to(tl.float32)
        tl.store(delta + i * N + n, tl.sum(product, 1), n < N)
        tl.debug_barrier()  # other threads of this program read it
    for m0 in tl.range(0, N, BLOCK_M, num_stages=STAGES):
        m = m0 + tl.arange(0, BLOCK_M)
        qt = rows(q, m0, QK8, qk_n8, N, BLOCK_M, BLOCK_QK)
        dot = rows(do, m0, V8, H * V8, N, BLOCK_M, BLOCK_V)
        # queries past N weigh nothing: with a mass alone exp2 of it could be infinite in 16 bits, times ∂o = 0
        base = tl.load(lse + i * N + m, m < N, 0.0 if mass is None else float("inf"))
        if delta is not None:
            centre = tl.load(delta + i * N + m, m < N, 0.0)
        else:
            ot = rows(o, m0, V8, H * V8, N, BLOCK_M, BLOCK_V)
            centre = tl.sum(ot.to(tl.float32) * dot.to(tl.float32), 1)
        if mass is not None:
            p = tl.exp2(tl.dot(kt, tl.trans(qt)) * (scale * LOG2E) + held[:, None] - base[None, :])
        else:
            p = tl.exp2(tl.dot(kt, tl.trans(qt)) * (scale * LOG2E) - base[None, :])
            if KEYS > N:  # their k is zero, but infinity times zero is not
                p = tl.where((n < N)[:, None], p, 0.0)
        p = p.to(dot.dtype)  # kept rounded, as eager keeps it: 16 registers a thread, float32 would take 32
        dv_acc = tl.dot(p, dot, dv_acc)
        dp = tl.dot(vt, tl.trans(dot))
        ds = p * (dp - centre[None, :]).to(p.dtype)  # two at a time in 16 bits, and no unpacking
        dk_acc = tl.dot(ds, qt, dk_acc)
        # of few queries ∂qᵀ, as a warp-group product has at least 64 rows
        dq_tile = tl.trans(tl.dot(tl.trans(kt), ds)) if BLOCK_M < 64 else tl.dot(tl.trans(ds), kt)
        put_rows(dq, dq_tile * scale, m0, QK8, parts * H * QK8, N, BLOCK_M, BLOCK_QK)
    put_rows(dv, dv_acc, 0, V8, parts * H * V8, N, KEYS, BLOCK_V)
    put_rows(dk, dk_acc * scale, 0, QK8, parts * H * QK8, N, KEYS, BLOCK_QK)
    if qk_part is not None:
        # Σ q·∂q over queries is Σ k·∂k over keys, and Σ o·∂o is Σ v·∂v, dim by dim: one sum at the end. The gradients
        # come back through memory, since held with k and v they would spill.
        tl.debug_barrier()
        qk_sum = tl.zeros([BLOCK_QK], tl.float32)
        v_sum = tl.zeros([BLOCK_V], tl.float32)
        for n0 in tl.range(0, N, CHUNK, num_stages=1):
            k_again = rows(k, n0, QK8, qk_n8, N, CHUNK, BLOCK_QK).to(tl.float32)
            qk_sum += tl.sum(k_again * rows(dk, n0, QK8, parts * H * QK8, N, CHUNK, BLOCK_QK).to(tl.float32), 0)
            v_again = rows(v, n0, V8, v_n8, N, CHUNK, BLOCK_V).to(tl.float32)
            v_sum += tl.sum(v_again * rows(dv, n0, V8, parts * H * V8, N, CHUNK, BLOCK_V).to(tl.float32), 0)
        d, e = tl.arange(0, BLOCK_QK), tl.arange(0, BLOCK_V)
        tl.store(qk_part + i * (QK8 * 8) + d, qk_sum, d < QK8 * 8)
        tl.store(v_part + i * (V8 * 8) + e, v_sum, e < V8 * 8)
        tl.store(head_part + i, tl.sum(v_sum, 0))


@triton.jit
def add_rows(out, part, samples, rows_each, width, B, ROWS: tl.constexpr, UNITS: tl.constexpr):
    """out `(B / samples, width)` += the sums of part `(B, rows_each, width)` for this program's units, unless None."""
    if out is not None:
        s, u = tl.program_id(1), tl.program_id(0) * UNITS + tl.arange(0, UNITS)
        units, count = (u < width) & (s * samples < B), samples * rows_each
        total = tl.load(out + s * width + u, units, 0.0)
        for r0 in range(0, count, ROWS):
            r = r0 + tl.arange(0, ROWS)
            there = (r < count)[:, None] & units[None, :]
            total += tl.sum(tl.load(part + (s * count + r)[:, None] * width + u[None, :], there, 0.0), 0)
        tl.store(out + s * width + u, total, units)


@triton.jit
def scores_kernel(
    qk_part,  # (B, H, D) float32
    v_part,  # (B, H, E) float32
    head_part,  # (B, H) float32
    qk_scores,  # float32, added to: (B, D), or (D,) where the sum is over samples too; None: not asked for
    v_scores,  # (B, E), (E,) or None
    head_scores,  # (B, H), (H,) or None
    qk_samples,  # samples summed into one: 1 or B
    v_samples,
    head_samples,
    B,
    H,
    D,
    E,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """The second stage of the scores: a program per 16 units, sample and buffer, each sum in one program's order."""
    which = tl.program_id(2)
    if which == 0:
        add_rows(qk_scores, qk_part, qk_samples, H, D, B, ROWS, UNITS)
    elif which == 1:
        add_rows(v_scores, v_part, v_samples, H, E, B, ROWS, UNITS)
    else:
        add_rows(head_scores, head_part, head_samples, 1, H, B, ROWS, UNITS)
