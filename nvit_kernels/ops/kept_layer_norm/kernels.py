"""The kernels of LayerNorm over kept channels; docs/kernels/kept_layer_norm.md says what they compute.

An optional pointer is None where there is nothing: Triton compiles a kernel of its own for that.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def kept_channels(mask, count, col, width):
    """Which of the columns are kept (pruned ones and those past the width are not), and how many are, as a float."""
    if mask is not None:
        keep = tl.load(mask + col, mask=col < width, other=0) != 0
        return keep, tl.maximum(tl.load(count), 1).to(tl.float32)
    else:
        return col < width, tl.cast(width, tl.float32)


@triton.jit
def forward_kernel(
    x,  # (rows, width)
    residual,  # (rows, width), added to x first; None: nothing is added
    w,  # (width,)
    b,  # (width,); None: no shift
    mask,  # (width,) bool, True stays; None: all stay
    count,  # (1,) int32, how many stay; None with mask
    y,  # out: (rows, width)
    total,  # out: (rows, width), x + residual; None with residual
    stats,  # out: (2, rows) float32, mean and 1 / standard deviation
    eps,  # added to the variance
    rows,  # tokens of all samples
    units,  # width / UNIT
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    width = units * UNIT
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.arange(0, BLOCK_E)
    inside = (row < rows)[:, None] & (col < width)[None, :]
    at = row.to(tl.int64)[:, None] * width + col[None, :]
    value = tl.load(x + at, mask=inside, other=0.0)
    if residual is not None:
        value = (value.to(tl.float32) + tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)).to(value.dtype)
        tl.store(total + at, value, mask=inside)
    keep, n = kept_channels(mask, count, col, width)
    kept = tl.where(keep[None, :], value.to(tl.float32), 0.0)
    mu = tl.sum(kept, 1) / n
    centred = tl.where(keep[None, :], kept - mu[:, None], 0.0)
    r = 1 / tl.sqrt(tl.sum(centred * centred, 1) / n + eps)
    scale = tl.load(w + col, mask=keep, other=0.0).to(tl.float32)
    out = centred * r[:, None] * scale[None, :]
    if b is not None:
        shift = tl.load(b + col, mask=keep, other=0.0).to(tl.float32)
        out = centred * r[:, None] * scale[None, :] + shift[None, :]
    tl.store(y + at, out.to(y.dtype.element_ty), mask=inside)
    tl.store(stats + row, mu, mask=row < rows)
    tl.store(stats + rows + row, r, mask=row < rows)


@triton.jit
def backward_kernel(
    dy,  # (samples, tokens, width)
    dtotal,  # (samples, tokens, width), gradient of the sum itself; None: nobody asked for it
    total,  # (samples, tokens, width), what was normed
    w,  # (width,)
    mask,  # (width,) bool; None: all stay
    count,  # (1,) int32; None with mask
    stats,  # (2, rows) float32, mean and 1 / standard deviation
    dx,  # out: (samples, tokens, width)
    part,  # out: (samples, tiles, 2, width) float32, ∂w and ∂b of CHUNK tokens
    rows,  # tokens of all samples
    tokens,  # of a sample
    units,  # width / UNIT
    UNIT: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    width = units * UNIT
    tile, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    col = tl.arange(0, BLOCK_E)
    keep, n = kept_channels(mask, count, col, width)
    scale = tl.load(w + col, mask=keep, other=0.0).to(tl.float32)
    dw = tl.zeros([BLOCK_E], tl.float32)
    db = tl.zeros([BLOCK_E], tl.float32)
    for start in tl.range(tile * CHUNK, tl.minimum(tile * CHUNK + CHUNK, tokens), BLOCK_M, num_stages=STAGES):
        token = start + tl.arange(0, BLOCK_M)
        row = sample * tokens + token
        inside = (token < tokens)[:, None] & (col < width)[None, :]
        there = (token < tokens)[:, None] & keep[None, :]
        at = row[:, None] * width + col[None, :]
        mu = tl.load(stats + row, mask=token < tokens, other=0.0)
        r = tl.load(stats + rows + row, mask=token < tokens, other=0.0)
        normed = tl.load(total + at, mask=inside, other=0.0).to(tl.float32)
        normed = tl.where(there, (normed - mu[:, None]) * r[:, None], 0.0)
        grad = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.where(there, grad, 0.0)
        dw += tl.sum(grad * normed, 0)
        db += tl.sum(grad, 0)
        grad *= scale[None, :]
        along = tl.sum(grad * normed, 1) / n
        level = tl.sum(grad, 1) / n
        out = tl.where(there, (grad - normed * along[:, None] - level[:, None]) * r[:, None], 0.0)
        if dtotal is not None:
            out += tl.load(dtotal + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + at, out.to(dx.dtype.element_ty), mask=inside)
    slot = part + (sample * tl.num_programs(0) + tile) * 2 * width
    tl.store(slot + col, dw, mask=col < width)
    tl.store(slot + width + col, db, mask=col < width)
