"""Alike tokens merged into their weighted means: checks, launch, gradients.

Derivation: docs/kernels/merge_tokens.md.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from nvit_kernels.launch import (
    INTERPRET,
    describe,
    differentiated_once,
    on_device,
    power_of_two,
    remember,
    stays_one_operator,
)
from nvit_kernels.ops.merge_tokens.kernels import backward_kernel, forward_kernel
from nvit_kernels.ops.merge_tokens.reference import check
from nvit_kernels.tuning import Launch

MOST_TOKENS, WIDEST_KEY = 256, 128
"""Behind the prefix, and dims of a key: what one program holds."""

ROWS, FEW_ROWS = (512, 512) if INTERPRET else (16, 4)
"""Tokens of a program of the backward; few where sizes have a gradient."""

_plans: dict[tuple, Launch] = {}


def blocks(tokens: int, prefix: int, dims: int, width: int, exact: bool) -> dict[str, int]:
    """Tile sizes and warps of the forward kernel; smaller for float32, whose products take more registers."""
    half = power_of_two((tokens - prefix + 1) // 2 or 1)
    wide = INTERPRET and power_of_two(width)
    return dict(
        BLOCK_T=half,
        BLOCK_D=power_of_two(dims),
        BLOCK_C=wide or (16 if exact else 32),
        BLOCK_O=128 if INTERPRET else 16 if exact else 32,
        num_warps=8 if half > 32 else 4,
    )


def _plan(x: Tensor, keys: Tensor, sizes: Tensor | None, r: int, prefix: int) -> Launch:
    key = (*describe(x, keys, sizes), r, prefix)
    return _plans.get(key) or remember(_plans, key, _new_plan(x, keys, sizes, r, prefix))


def _new_plan(x: Tensor, keys: Tensor, sizes: Tensor | None, r: int, prefix: int) -> Launch:
    check(x, keys, sizes, r, prefix)
    (batch, tokens, width), (_, heads, _, dims) = x.shape, keys.shape
    if tokens - prefix > MOST_TOKENS or dims > WIDEST_KEY:
        raise ValueError(
            f"{tokens - prefix} tokens with keys of {dims} dims do not fit one program ({MOST_TOKENS}, {WIDEST_KEY}); "
            "use the reference instead"
        )
    stride_b, stride_h, stride_n = keys.stride()[:3]
    sizes_of = dict(tokens=tokens, width=width, r=r, prefix=prefix, key_heads=heads, dims=dims)
    strides = dict(stride_b=stride_b, stride_h=stride_h, stride_n=stride_n)
    exact = x.dtype == torch.float32
    fixed = dict(**sizes_of, **strides, EXACT=exact, **blocks(tokens, prefix, dims, width, exact))
    return Launch(forward_kernel, (batch,), fixed)


def launch(x: Tensor, keys: Tensor, sizes: Tensor | None, r: int, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    """The merged tokens, their sizes and every token's place; arguments are checked once for each description.

    Raises:
        ValueError: shapes disagree, or more tokens than one program holds.
    """
    x, sizes = x.contiguous(), None if sizes is None else sizes.float().contiguous()
    keys = keys if keys.stride(-1) == 1 else keys.contiguous()
    run = _plan(x, keys, sizes, r, prefix)
    batch, tokens, width = x.shape
    y, total = x.new_empty(batch, tokens - r, width), x.new_empty(batch, tokens - r, dtype=torch.float32)
    place = torch.empty(batch, tokens, dtype=torch.int64, device=x.device)
    with on_device(x):
        run(x, keys, sizes, y, total, place)
    return y, total, place


def launch_backward(
    dy: Tensor, dtotal: Tensor | None, x: Tensor | None, y: Tensor, sizes: Tensor | None, total: Tensor, place: Tensor
) -> tuple[Tensor, Tensor | None]:
    """∂x, and ∂sizes where `x` and `dtotal` are given."""
    batch, tokens = place.shape
    left, width = y.shape[1:]
    dx = y.new_empty(batch, tokens, width)
    dsizes = None if dtotal is None else torch.empty_like(place, dtype=torch.float32)
    dtotal = None if dtotal is None else dtotal.contiguous()
    shape = dict(rows=batch * tokens, tokens=tokens, left=left, width=width)
    rows = ROWS if dtotal is None else FEW_ROWS
    tile = dict(BLOCK_M=rows, BLOCK_C=min(power_of_two(width), 1024 if INTERPRET else 256))
    grid = (triton.cdiv(batch * tokens, rows),)
    key = (backward_kernel, *describe(y, dtotal, sizes, place))
    run = _plans.get(key) or remember(_plans, key, Launch(backward_kernel, grid, {**shape, **tile}))
    with on_device(y):
        run(dy.contiguous(), dtotal, None if dtotal is None else x, y, sizes, total, place, dx, dsizes)
    return dx, dsizes


class MergeTokens(torch.autograd.Function):
    """The eager path: gradients go through the means and the sizes; which tokens merge has none."""

    @staticmethod
    def forward(ctx, x, keys, sizes, r, prefix):
        y, total, place = launch(x, keys, sizes, r, prefix)
        wanted = sizes is not None and sizes.requires_grad
        sizes = None if sizes is None else sizes.float().contiguous()
        ctx.save_for_backward(x.contiguous() if wanted else None, y, sizes, total, place)
        ctx.mark_non_differentiable(*((place,) if wanted else (total, place)))
        ctx.set_materialize_grads(False)
        ctx.wanted = wanted
        return y, total, place

    @staticmethod
    @differentiated_once
    def backward(ctx, dy, dtotal, _):
        return _gradients(dy, dtotal, ctx, launch_backward)


def _gradients(dy: Tensor | None, dtotal: Tensor | None, ctx, run) -> tuple[Tensor | None, ...]:
    x, y, sizes, total, place = ctx.saved_tensors
    dy = torch.zeros_like(y) if dy is None else dy
    if ctx.wanted:
        dtotal = torch.zeros_like(total) if dtotal is None else dtotal
    dx, dsizes = run(dy, dtotal if ctx.wanted else None, x, y, sizes, total, place)
    return dx, None, dsizes if ctx.wanted else None, None, None


@torch.library.custom_op("nvit::merge_tokens", mutates_args=())
def operator(x: Tensor, keys: Tensor, sizes: Tensor | None, r: int, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same for torch.compile and export."""
    return launch(x, keys, sizes, r, prefix)


@operator.register_fake
def _(x, keys, sizes, r, prefix):
    batch, tokens, width = x.shape
    left = tokens - r
    places = x.new_empty(batch, tokens, dtype=torch.int64)
    return x.new_empty(batch, left, width), x.new_empty(batch, left, dtype=torch.float32), places


@torch.library.custom_op("nvit::merge_tokens_backward", mutates_args=())
def operator_backward(dy: Tensor, dtotal: Tensor | None, x: Tensor | None, y: Tensor, sizes: Tensor | None,
                      total: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:  # fmt: skip
    dx, dsizes = launch_backward(dy, dtotal, x, y, sizes, total, place)
    return dx, total.new_empty(0) if dsizes is None else dsizes


@operator_backward.register_fake
def _(dy, dtotal, x, y, sizes, total, place):
    batch, tokens = place.shape
    empty = total.new_empty
    return y.new_empty(batch, tokens, y.shape[-1]), empty(0) if dtotal is None else empty(batch, tokens)


def _save(ctx, inputs, output):
    x, _, sizes, _, _ = inputs
    y, total, place = output
    ctx.wanted = sizes is not None and sizes.requires_grad
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x if ctx.wanted else None, y, sizes, total, place)


def _differentiate(ctx, dy, dtotal, _):
    return _gradients(dy, dtotal, ctx, operator_backward)


operator.register_autograd(_differentiate, setup_context=_save)


def merge_tokens(
    x: Tensor, keys: Tensor, sizes: Tensor | None, r: int, prefix: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Fused `reference.merge_tokens`, which says what the arguments are. In bfloat16 sizes are exact up to 256."""
    if stays_one_operator(x, keys):
        return operator(x, keys.detach(), sizes, r, prefix)
    if torch.is_grad_enabled():
        return MergeTokens.apply(x, keys.detach(), sizes, r, prefix)
    return launch(x, keys, sizes, r, prefix)
