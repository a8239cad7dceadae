"""LayerNorm over kept channels, with the residual add before it and, in the backward, the channels' scores.

Derivations and shapes: docs/kernels/kept_layer_norm.md.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from nvit_kernels.launch import FUSED_MULTIPLY_ADD, INTERPRET, on_device, power_of_two
from nvit_kernels.ops.kept_layer_norm.kernels import backward_kernel, forward_kernel

CHUNK = 64  # rows that one backward program folds into one partial sum of ∂w and ∂b


def blocks(width: int) -> dict[str, int]:
    """A tile of whole rows, 4096 elements where a row leaves room, and the warps to hold it."""
    block = power_of_two(width)
    rows = CHUNK if INTERPRET else max(1, 4096 // block)
    return dict(BLOCK_M=min(rows, CHUNK), BLOCK_E=block, num_warps=min(16, max(4, block // 512)), **FUSED_MULTIPLY_ADD)


def _in_units(width: int) -> dict[str, int]:
    """A width as the kernels take it: divided by 8 where it can be, so that loads stay wide."""
    unit = 1 if width % 8 else 8
    return dict(units=width // unit, UNIT=unit)


def _check(x: Tensor, w: Tensor, b: Tensor | None, mask: Tensor | None, residual: Tensor | None) -> None:
    width = x.shape[-1]
    for name, t in (("w", w), ("b", b), ("keep", mask)):
        if t is not None and t.shape != (width,):
            raise ValueError(f"{name} has shape {tuple(t.shape)}, expected ({width},) to match x {tuple(x.shape)}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(f"residual is {residual.dtype} {tuple(residual.shape)}, x is {x.dtype} {tuple(x.shape)}; "
                         "they are added, so they must agree")  # fmt: skip


@torch.library.custom_op("nvit::kept_layer_norm", mutates_args=())
def _forward(x: Tensor, w: Tensor, b: Tensor | None, mask: Tensor | None, count: Tensor | None, eps: float,
             residual: Tensor | None, scores: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    _check(x, w, b, mask, residual)
    x, width = x.contiguous(), x.shape[-1]
    rows = x.numel() // width
    y, mean, rstd = torch.empty_like(x), *(x.new_empty(rows, dtype=torch.float32) for _ in range(2))
    total = x.new_empty(0) if residual is None else torch.empty_like(x)
    size = blocks(width)
    with on_device(x):
        forward_kernel[(triton.cdiv(rows, size["BLOCK_M"]),)](
            x=x, residual=None if residual is None else residual.contiguous(), w=w.contiguous(),
            b=None if b is None else b.contiguous(), mask=mask, count=count, y=y,
            total=None if residual is None else total, mean=mean, rstd=rstd, rows=rows, eps=eps, **_in_units(width),
            **size,
        )  # fmt: skip
    return y, total, mean, rstd


@_forward.register_fake
def _(x, w, b, mask, count, eps, residual, scores):
    y, rows = torch.empty_like(x, memory_format=torch.contiguous_format), x.numel() // x.shape[-1]
    total = x.new_empty(0) if residual is None else torch.empty_like(y)
    return y, total, *(x.new_empty(rows, dtype=torch.float32) for _ in range(2))


@torch.library.custom_op("nvit::kept_layer_norm_backward", mutates_args=("scores",))
def _backward(dy: Tensor, dtotal: Tensor | None, total: Tensor, w: Tensor, b: Tensor | None, mask: Tensor | None,
              count: Tensor | None, mean: Tensor, rstd: Tensor,
              scores: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dy, total, width = dy.contiguous(), total.contiguous(), total.shape[-1]
    samples = total.shape[0] if scores is not None and scores.dim() == 2 else 1
    tokens = total.numel() // width // samples
    tiles = triton.cdiv(tokens, CHUNK)
    dx, part = torch.empty_like(total), total.new_empty(samples, tiles, 2, width, dtype=torch.float32)
    with on_device(total):
        backward_kernel[(tiles, samples)](
            dy=dy, dtotal=None if dtotal is None else dtotal.contiguous(), total=total, w=w.contiguous(), mask=mask,
            count=count, mean=mean, rstd=rstd, dx=dx, part=part, tokens=tokens, CHUNK=CHUNK, **_in_units(width),
            **blocks(width),
        )  # fmt: skip
    per_sample = part.sum(1)
    if scores is not None:  # Σ y·∂y = w Σ x̂·∂y + b Σ ∂y; a pruned channel has neither sum
        score = per_sample[:, 0] * w.float()
        score = score if b is None else score + per_sample[:, 1] * b.float()
        scores += score if scores.dim() == 2 else score[0]
    db = w.new_empty(0) if b is None else per_sample[:, 1].sum(0).to(b.dtype)
    return dx, per_sample[:, 0].sum(0).to(w.dtype), db


@_backward.register_fake
def _(dy, dtotal, total, w, b, mask, count, mean, rstd, scores):
    db = w.new_empty(0) if b is None else torch.empty_like(b)
    return torch.empty_like(total, memory_format=torch.contiguous_format), torch.empty_like(w), db


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
    return dx, dw, None if b is None else db, None, None, None, dx if ctx.added else None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def kept_layer_norm(x, w, b, keep=None, eps=1e-6, residual=None, scores=None):
    """Fused `reference.kept_layer_norm`, which says what the arguments are."""
    mask, count = (None, None) if keep is None else (keep.mask, keep.count)
    y, total, _, _ = _forward(x, w, b, mask, count, eps, residual, scores)
    return y if residual is None else (y, total)
