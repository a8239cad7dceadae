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
from nvit_kernels.ops.merge_tokens.kernels import backward_kernel, keys_kernel, match_kernel, means_kernel
from nvit_kernels.ops.merge_tokens.reference import check
from nvit_kernels.tuning import Launch

MOST_TOKENS, WIDEST_KEY = 256, 128
"""Behind the prefix, and dims of a key: what one program holds."""

ROWS, FEW_ROWS = (512, 512) if INTERPRET else (16, 4)
"""Tokens of a program of the backward; few where sizes have a gradient."""

KEYS_TILE = dict(BLOCK_M=512, BLOCK_H=1) if INTERPRET else dict(BLOCK_M=32, BLOCK_H=4)
"""Tokens of a program that takes keys together, and heads whose loads wait together."""

MEANS_TILE = dict(BLOCK_M=256, BLOCK_C=1024) if INTERPRET else dict(BLOCK_M=32, BLOCK_C=64)
"""Rows and channels of a program that means tokens. 64 divides the usual widths, and is a line of cache in 16 bits."""

_plans: dict[tuple, tuple[Launch, ...] | Launch] = {}


def match_tile(tokens: int, prefix: int, dims: int) -> dict[str, int]:
    """Tile sizes and warps of the kernel that has an image a program."""
    half = power_of_two((tokens - prefix + 1) // 2 or 1)
    return dict(BLOCK_T=half, BLOCK_D=power_of_two(dims) if INTERPRET else 16, num_warps=8 if half > 32 else 4)


def _plan(x: Tensor, keys: Tensor, sizes: Tensor | None, r: int, prefix: int) -> tuple[Launch, ...]:
    key = (*describe(x, keys, sizes), r, prefix)
    return _plans.get(key) or remember(_plans, key, _new_plan(x, keys, sizes, r, prefix))


def _new_plan(x: Tensor, keys: Tensor, sizes: Tensor | None, r: int, prefix: int) -> tuple[Launch, ...]:
    """Launches of the three kernels."""
    check(x, keys, sizes, r, prefix)
    (batch, tokens, width), (_, heads, _, dims) = x.shape, keys.shape
    if tokens - prefix > MOST_TOKENS or dims > WIDEST_KEY:
        raise ValueError(
            f"{tokens - prefix} tokens with keys of {dims} dims do not fit one program ({MOST_TOKENS}, {WIDEST_KEY}); "
            "use the reference instead"
        )
    left, cdiv = tokens - r, triton.cdiv
    strides = dict(zip(("stride_b", "stride_h", "stride_n"), keys.stride(), strict=False))
    of_keys = dict(tokens=tokens, key_heads=heads, dims=dims, **strides, BLOCK_D=power_of_two(dims), **KEYS_TILE)
    of_image = dict(tokens=tokens, r=r, prefix=prefix, dims=dims, **match_tile(tokens, prefix, dims))
    of_rows = dict(tokens=tokens, left=left, width=width, **MEANS_TILE)
    programs = cdiv(left, MEANS_TILE["BLOCK_M"]) * cdiv(width, MEANS_TILE["BLOCK_C"])
    return (
        Launch(keys_kernel, (batch * cdiv(tokens, KEYS_TILE["BLOCK_M"]),), of_keys),
        Launch(match_kernel, (batch,), of_image),
        Launch(means_kernel, (batch * programs,), of_rows),
    )


def launch(x: Tensor, keys: Tensor, sizes: Tensor | None, r: int, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    """The merged tokens, their sizes and every token's place; arguments are checked once for each description.

    Raises:
        ValueError: shapes disagree, or more tokens than one program holds.
    """
    x, sizes = x.contiguous(), None if sizes is None else sizes.float().contiguous()
    keys = keys if keys.stride(-1) == 1 else keys.contiguous()
    take_keys, match, means = _plan(x, keys, sizes, r, prefix)
    batch, tokens, width = x.shape
    y, total = x.new_empty(batch, tokens - r, width), x.new_empty(batch, tokens - r, dtype=torch.float32)
    place = torch.empty(batch, tokens, dtype=torch.int64, device=x.device)
    stays, following = torch.empty_like(total, dtype=torch.int32), torch.empty_like(place, dtype=torch.int32)
    unit = torch.empty(batch, tokens, keys.shape[-1], dtype=torch.float32, device=x.device)
    with on_device(x):
        take_keys(keys, unit)
        match(unit, sizes, total, place, stays, following)
        means(x, sizes, y, total, stays, following)
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
    """Fused `reference.merge_tokens`, which says what the arguments are."""
    if stays_one_operator(x, keys):
        return operator(x, keys.detach(), sizes, r, prefix)
    if torch.is_grad_enabled():
        return MergeTokens.apply(x, keys.detach(), sizes, r, prefix)
    return launch(x, keys, sizes, r, prefix)
