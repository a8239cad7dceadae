"""What surrounds the vendor's products in a gated MLP, one pass each; docs/kernels/mlp.md says what they compute.

Least traffic, T tokens and F hidden units of s bytes: forward 3·T·F·s, backward 5·T·F·s, and the partial sums of the
backward, 12·F for every CHUNK tokens. No products.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nvit_kernels.ops.mlp.kernels import hidden_columns


@triton.jit
def gated_kernel(
    gate,  # (rows, width), product without its bias
    value,  # (rows, width)
    b_gate,  # (width,); None: no bias
    b_value,  # (width,)
    mask,  # (width,) bool, True stays; None: all stay
    a,  # out: (rows, width), may be gate itself
    rows,  # tokens of all samples
    units,  # width / UNIT
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """a = SiLU(gate + b_gate) · (value + b_value), exact zeros at pruned units."""
    col, there, kept, g_shift = hidden_columns(b_gate, mask, tl.program_id(0), units, UNIT, BLOCK_N)
    _, _, _, v_shift = hidden_columns(b_value, mask, tl.program_id(0), units, UNIT, BLOCK_N)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    at = row.to(tl.int64)[:, None] * (units * UNIT) + col[None, :]
    inside = (row < rows)[:, None] & there[None, :]
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32) + g_shift[None, :]
    v = tl.load(value + at, mask=inside, other=0.0).to(tl.float32) + v_shift[None, :]
    x = g / (1 + tl.exp(-g)) * v
    if mask is not None:
        x = tl.where(kept[None, :], x, 0.0)
    tl.store(a + at, x.to(a.dtype.element_ty), mask=inside)


@triton.jit
def gated_backward_kernel(
    gate,  # (samples · tokens, width), as in the forward
    value,  # (samples · tokens, width)
    b_gate,  # (width,); None: no bias
    b_value,  # (width,)
    mask,  # (width,) bool; None: all stay
    da,  # (samples · tokens, width)
    dgate,  # out: (samples · tokens, width), may be da itself
    dvalue,  # out: (samples · tokens, width)
    part,  # out: (samples, tiles, 3, width) float32, Σ ∂gate, Σ ∂value, Σ a·∂a of CHUNK tokens; None: not wanted
    tokens,  # of a sample
    units,  # width / UNIT
    UNIT: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Gradients of gate and value; the biases' gradients and the units' scores on the way."""
    col, there, kept, g_shift = hidden_columns(b_gate, mask, tl.program_id(0), units, UNIT, BLOCK_N)
    _, _, _, v_shift = hidden_columns(b_value, mask, tl.program_id(0), units, UNIT, BLOCK_N)
    tile, sample = tl.program_id(1), tl.program_id(2).to(tl.int64)
    width = units * UNIT
    gate_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    value_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    score_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(tile * CHUNK, tl.minimum(tile * CHUNK + CHUNK, tokens), BLOCK_M):
        token = start + tl.arange(0, BLOCK_M)
        at = (sample * tokens + token)[:, None] * width + col[None, :]
        inside = (token < tokens)[:, None] & there[None, :]
        g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32) + g_shift[None, :]
        v = tl.load(value + at, mask=inside, other=0.0).to(tl.float32) + v_shift[None, :]
        grad = tl.load(da + at, mask=inside, other=0.0).to(tl.float32)
        if mask is not None:
            grad = tl.where(kept[None, :], grad, 0.0)
        open_ = 1 / (1 + tl.exp(-g))
        silu = g * open_
        of_gate = grad * v * (open_ + silu * (1 - open_))
        of_value = grad * silu
        tl.store(dgate + at, of_gate.to(dgate.dtype.element_ty), mask=inside)
        tl.store(dvalue + at, of_value.to(dvalue.dtype.element_ty), mask=inside)
        gate_sum += of_gate
        value_sum += of_value
        score_sum += of_value * v
    if part is not None:
        slot = part + (sample * tl.num_programs(1) + tile) * 3 * width + col
        tl.store(slot, tl.sum(gate_sum, 0), mask=there)
        tl.store(slot + width, tl.sum(value_sum, 0), mask=there)
        tl.store(slot + 2 * width, tl.sum(score_sum, 0), mask=there)
