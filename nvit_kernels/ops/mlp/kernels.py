"""What surrounds the vendor's products in an MLP, one pass each; docs/kernels/mlp.md says what they compute.

Least traffic, T tokens and F hidden units of s bytes: forward 2·T·F·s, backward 3·T·F·s, and the partial sums of the
backward, 8·F for every CHUNK tokens. No products.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def hidden_columns(b, mask, pid, units, UNIT: tl.constexpr, BLOCK_N: tl.constexpr):
    """Columns of a tile, which of them there are, which are kept, and their bias."""
    width = units * UNIT
    col = pid * BLOCK_N + tl.arange(0, BLOCK_N)
    there = col < width
    kept = there
    if mask is not None:
        kept = tl.load(mask + col, mask=there, other=0) != 0
    shift = tl.zeros([BLOCK_N], tl.float32)
    if b is not None:
        shift = tl.load(b + col, mask=there, other=0.0).to(tl.float32)
    return col, there, kept, shift


@triton.jit
def normal(x, NARROW: tl.constexpr):
    """Φ(x) and exp(-x²/2). Where the results are 16 bits wide, Φ comes from the exponential that both need.

    That is formula 7.1.26 of Abramowitz and Stegun: off by at most 1.5e-7, a hundredth of what rounding will do, for
    half the instructions of erf, which otherwise are about as dear here as the memory.
    """
    bell = tl.exp(-0.5 * x * x)
    if NARROW:
        t = 1 / (1 + 0.23164189 * tl.abs(x))
        tail = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
        tail *= 0.5 * bell
        return tl.where(x < 0, tail, 1 - tail), bell
    else:
        return 0.5 * (1 + tl.erf(x * 0.7071067811865476)), bell


@triton.jit
def gelu_kernel(
    u,  # (rows, width), fc1's product without its bias
    b,  # (width,); None: no bias
    mask,  # (width,) bool, True stays; None: all stay
    a,  # out: (rows, width), may be u itself
    rows,  # tokens of all samples
    units,  # width / UNIT
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """a = GELU(u + b), exact zeros at pruned units."""
    col, there, kept, shift = hidden_columns(b, mask, tl.program_id(0), units, UNIT, BLOCK_N)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    at = row.to(tl.int64)[:, None] * (units * UNIT) + col[None, :]
    inside = (row < rows)[:, None] & there[None, :]
    x = tl.load(u + at, mask=inside, other=0.0).to(tl.float32) + shift[None, :]
    below, _ = normal(x, a.dtype.element_ty.primitive_bitwidth < 32)
    x *= below
    if mask is not None:
        x = tl.where(kept[None, :], x, 0.0)
    tl.store(a + at, x.to(a.dtype.element_ty), mask=inside)


@triton.jit
def gelu_backward_kernel(
    u,  # (samples · tokens, width), as in the forward
    b,  # (width,); None: no bias
    mask,  # (width,) bool; None: all stay
    da,  # (samples · tokens, width)
    du,  # out: (samples · tokens, width), may be da itself
    part,  # out: (samples, tiles, 2, width) float32, Σ ∂u and Σ a·∂a of CHUNK tokens; None: not wanted
    tokens,  # of a sample
    units,  # width / UNIT
    UNIT: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """∂u = ∂a · GELU'(u + b), exact zeros at pruned units; the bias's gradient and the units' scores on the way."""
    col, there, kept, shift = hidden_columns(b, mask, tl.program_id(0), units, UNIT, BLOCK_N)
    tile, sample = tl.program_id(1), tl.program_id(2).to(tl.int64)
    width = units * UNIT
    bias_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    score_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(tile * CHUNK, tl.minimum(tile * CHUNK + CHUNK, tokens), BLOCK_M):
        token = start + tl.arange(0, BLOCK_M)
        at = (sample * tokens + token)[:, None] * width + col[None, :]
        inside = (token < tokens)[:, None] & there[None, :]
        x = tl.load(u + at, mask=inside, other=0.0).to(tl.float32) + shift[None, :]
        grad = tl.load(da + at, mask=inside, other=0.0).to(tl.float32)
        if mask is not None:
            grad = tl.where(kept[None, :], grad, 0.0)
        below, bell = normal(x, du.dtype.element_ty.primitive_bitwidth < 32)
        out = grad * (below + x * bell * 0.3989422804014327)
        tl.store(du + at, out.to(du.dtype.element_ty), mask=inside)
        bias_sum += out
        score_sum += grad * x * below
    if part is not None:
        slot = part + (sample * tl.num_programs(1) + tile) * 2 * width + col
        tl.store(slot, tl.sum(bias_sum, 0), mask=there)
        tl.store(slot + width, tl.sum(score_sum, 0), mask=there)
