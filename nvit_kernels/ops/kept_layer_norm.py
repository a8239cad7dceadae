"""LayerNorm over kept channels, with the residual add before it and, in the backward, the channels' scores.

Derivations and shapes: docs/kernels/kept_layer_norm.md.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvit_kernels.launch import FUSED_MULTIPLY_ADD, INTERPRET, on_device, power_of_two

CHUNK = 64  # rows that one backward program folds into one partial sum of ∂w and ∂b


@triton.jit
def forward_kernel(x, residual, w, b, mask, count, y, total, mean, rstd, rows, units, eps, UNIT: tl.constexpr,
                   MASKED: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK_M: tl.constexpr,
                   BLOCK_E: tl.constexpr):  # fmt: skip
    width = units * UNIT
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.arange(0, BLOCK_E)
    inside = (row < rows)[:, None] & (col < width)[None, :]
    at = row.to(tl.int64)[:, None] * width + col[None, :]
    value = tl.load(x + at, mask=inside, other=0.0)
    if RESIDUAL:
        value = (value.to(tl.float32) + tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)).to(value.dtype)
        tl.store(total + at, value, mask=inside)
    if MASKED:
        keep = tl.load(mask + col, mask=col < width, other=0) != 0
        n = tl.maximum(tl.load(count), 1).to(tl.float32)
    else:
        keep = col < width
        n = width.to(tl.float32)
    kept = tl.where(keep[None, :], value.to(tl.float32), 0.0)
    mu = tl.sum(kept, 1) / n
    centred = tl.where(keep[None, :], kept - mu[:, None], 0.0)
    r = 1 / tl.sqrt(tl.sum(centred * centred, 1) / n + eps)
    scale = tl.load(w + col, mask=keep, other=0.0).to(tl.float32)
    shift = tl.load(b + col, mask=keep, other=0.0).to(tl.float32)
    out = centred * r[:, None] * scale[None, :] + shift[None, :]
    tl.store(y + at, out.to(y.dtype.element_ty), mask=inside)
    tl.store(mean + row, mu, mask=row < rows)
    tl.store(rstd + row, r, mask=row < rows)


@triton.jit
def backward_kernel(dy, dtotal, total, w, mask, count, mean, rstd, dx, part, tokens, units, UNIT: tl.constexpr,
                    MASKED: tl.constexpr, RESIDUAL: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr,
                    BLOCK_E: tl.constexpr):  # fmt: skip
    width = units * UNIT
    tile, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    col = tl.arange(0, BLOCK_E)
    if MASKED:
        keep = tl.load(mask + col, mask=col < width, other=0) != 0
        n = tl.maximum(tl.load(count), 1).to(tl.float32)
    else:
        keep = col < width
        n = width.to(tl.float32)
    scale = tl.load(w + col, mask=keep, other=0.0).to(tl.float32)
    dw = tl.zeros([BLOCK_E], tl.float32)
    db = tl.zeros([BLOCK_E], tl.float32)
    for start in range(tile * CHUNK, tl.minimum(tile * CHUNK + CHUNK, tokens), BLOCK_M):
        token = start + tl.arange(0, BLOCK_M)
        row = sample * tokens + token
        inside = (token < tokens)[:, None] & (col < width)[None, :]
        there = (token < tokens)[:, None] & keep[None, :]
        at = row[:, None] * width + col[None, :]
        mu = tl.load(mean + row, mask=token < tokens, other=0.0)
        r = tl.load(rstd + row, mask=token < tokens, other=0.0)
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
        if RESIDUAL:
            out += tl.load(dtotal + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + at, out.to(dx.dtype.element_ty), mask=inside)
    slot = part + (sample * tl.num_programs(0) + tile) * 2 * width
    tl.store(slot + col, dw, mask=col < width)
    tl.store(slot + width + col, db, mask=col < width)


def _blocks(width: int) -> dict[str, int]:
    """A tile of whole rows, 4096 elements where a row leaves room, and the warps to hold it."""
    block = power_of_two(width)
    rows = CHUNK if INTERPRET else max(1, 4096 // block)
    return dict(BLOCK_M=min(rows, CHUNK), BLOCK_E=block, num_warps=min(16, max(4, block // 512)), **FUSED_MULTIPLY_ADD)


def _unit(width: int) -> tuple[int, int]:
    return (width // 8, 8) if width % 8 == 0 else (width, 1)


def _check(x: Tensor, w: Tensor, b: Tensor, mask: Tensor | None, residual: Tensor | None) -> None:
    width = x.shape[-1]
    for name, t in (("w", w), ("b", b), ("keep", mask)):
        if t is not None and t.shape != (width,):
            raise ValueError(f"{name} has shape {tuple(t.shape)}, expected ({width},) to match x {tuple(x.shape)}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(f"residual is {residual.dtype} {tuple(residual.shape)}, x is {x.dtype} {tuple(x.shape)}; "
                         "they are added, so they must agree")  # fmt: skip


@torch.library.custom_op("nvit::kept_layer_norm", mutates_args=())
def _forward(x: Tensor, w: Tensor, b: Tensor, mask: Tensor | None, count: Tensor | None, eps: float,
             residual: Tensor | None, scores: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    _check(x, w, b, mask, residual)
    x, w, b, width = x.contiguous(), w.contiguous(), b.contiguous(), x.shape[-1]
    rows = x.numel() // width
    y, mean, rstd = torch.empty_like(x), *(x.new_empty(rows, dtype=torch.float32) for _ in range(2))
    total = x.new_empty(0) if residual is None else torch.empty_like(x)
    blocks, (units, unit) = _blocks(width), _unit(width)
    with on_device(x):
        forward_kernel[(triton.cdiv(rows, blocks["BLOCK_M"]),)](
            x, x if residual is None else residual.contiguous(), w, b, w if mask is None else mask,
            mean if count is None else count, y, total, mean, rstd, rows, units, eps,
            UNIT=unit, MASKED=mask is not None, RESIDUAL=residual is not None, **blocks)  # fmt: skip
    return y, total, mean, rstd


@_forward.register_fake
def _(x, w, b, mask, count, eps, residual, scores):
    y, rows = torch.empty_like(x, memory_format=torch.contiguous_format), x.numel() // x.shape[-1]
    total = x.new_empty(0) if residual is None else torch.empty_like(y)
    return y, total, *(x.new_empty(rows, dtype=torch.float32) for _ in range(2))


@torch.library.custom_op("nvit::kept_layer_norm_backward", mutates_args=("scores",))
def _backward(dy: Tensor, dtotal: Tensor | None, total: Tensor, w: Tensor, b: Tensor, mask: Tensor | None,
              count: Tensor | None, mean: Tensor, rstd: Tensor,
              scores: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dy, total, w, width = dy.contiguous(), total.contiguous(), w.contiguous(), total.shape[-1]
    rows = total.numel() // width
    samples = total.shape[0] if scores is not None and scores.dim() == 2 else 1
    tokens = rows // samples
    tiles, blocks, (units, unit) = triton.cdiv(tokens, CHUNK), _blocks(width), _unit(width)
    dx, part = torch.empty_like(total), total.new_empty(samples, tiles, 2, width, dtype=torch.float32)
    with on_device(total):
        backward_kernel[(tiles, samples)](
            dy, dy if dtotal is None else dtotal.contiguous(), total, w, w if mask is None else mask,
            mean if count is None else count, mean, rstd, dx, part, tokens, units,
            UNIT=unit, MASKED=mask is not None, RESIDUAL=dtotal is not None, CHUNK=CHUNK, **blocks)  # fmt: skip
    per_sample = part.sum(1)
    if scores is not None:  # Σ y·∂y = w Σ x̂·∂y + b Σ ∂y; a pruned channel has neither sum
        score = per_sample[:, 0] * w.float() + per_sample[:, 1] * b.float()
        scores += score if scores.dim() == 2 else score[0]
    return dx, per_sample[:, 0].sum(0).to(w.dtype), per_sample[:, 1].sum(0).to(b.dtype)


@_backward.register_fake
def _(dy, dtotal, total, w, b, mask, count, mean, rstd, scores):
    return torch.empty_like(total, memory_format=torch.contiguous_format), torch.empty_like(w), torch.empty_like(b)


def _save(ctx, inputs, output):
    x, w, b, mask, count, _, residual, ctx.scores = inputs
    _, total, mean, rstd = output
    ctx.added = residual is not None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(total if ctx.added else x, w, b, mask, count, mean, rstd)


def _differentiate(ctx, dy, dtotal, _mean, _rstd):
    total, w, b, mask, count, mean, rstd = ctx.saved_tensors
    dy = torch.zeros_like(total) if dy is None else dy  # only the sum was used
    dx, dw, db = _backward(dy, dtotal if ctx.added else None, total, w, b, mask, count, mean, rstd, ctx.scores)
    return dx, dw, db, None, None, None, dx if ctx.added else None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def kept_layer_norm(x, w, b, keep=None, eps=1e-6, residual=None, scores=None):
    """Fused `nvit_kernels.reference.kept_layer_norm`, which says what the arguments are."""
    mask, count = (None, None) if keep is None else (keep.mask, keep.count)
    y, total, _, _ = _forward(x, w, b, mask, count, eps, residual, scores)
    return y if residual is None else (y, total)
