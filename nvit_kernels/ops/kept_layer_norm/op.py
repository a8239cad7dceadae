"""LayerNorm over kept channels, with the residual add before it and, in the backward, the channels' scores.

Derivations and shapes: docs/kernels/kept_layer_norm.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import triton
from torch import Tensor

from nvit_kernels.launch import (
    INTERPRET,
    check_list,
    describe,
    differentiated_once,
    on_device,
    power_of_two,
    remember,
    stays_one_operator,
)
from nvit_kernels.ops.fold import chunk_rows, fold, in_units
from nvit_kernels.ops.kept_layer_norm.kernels import backward_kernel, forward_kernel
from nvit_kernels.tuning import Launch

LONGEST_CHUNK = 64
BACKWARD_TILE = 2048  # elements: fewer registers, so that more programs share a processor


def blocks(width: int, elements: int = 4096) -> dict[str, int]:
    """A tile of whole rows, `elements` of them where a row leaves room, and the warps to hold it."""
    block = power_of_two(width)
    rows = LONGEST_CHUNK if INTERPRET else max(1, elements // block)
    return dict(BLOCK_M=min(rows, LONGEST_CHUNK), BLOCK_E=block, num_warps=min(16, max(4, block // 512)))


def _check(x: Tensor, w: Tensor, b: Tensor | None, mask: Tensor | None, residual: Tensor | None) -> None:
    width = x.shape[-1]
    for name, t in (("w", w), ("b", b), ("keep", mask)):
        if t is not None and t.shape != (width,):
            raise ValueError(f"{name} has shape {tuple(t.shape)}, expected ({width},) to match x {tuple(x.shape)}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(f"residual is {residual.dtype} {tuple(residual.shape)}, x is {x.dtype} {tuple(x.shape)}; "
                         "they are added, so they must agree")  # fmt: skip
    check_list(mask, width, x.device)


@dataclass
class Plan:
    """What is worked out once for operands of one description.

    Attributes:
        contiguous: all of them are.
        rows: of x, all but its last dim together.
        backward: launches by what is asked, with the shape of the partial sums between them.
    """

    forward: Launch
    contiguous: bool
    rows: int
    backward: dict[int | None, tuple[Launch, tuple[int, ...], Launch]] = field(default_factory=dict)


_plans: dict[tuple, Plan] = {}


def _plan(x: Tensor, w: Tensor, b: Tensor | None, mask: Tensor | None, residual: Tensor | None) -> Plan:
    key = describe(x, w, b, mask, residual)
    return _plans.get(key) or remember(_plans, key, _new_plan(x, w, b, mask, residual))


def _new_plan(x: Tensor, w: Tensor, b: Tensor | None, mask: Tensor | None, residual: Tensor | None) -> Plan:
    _check(x, w, b, mask, residual)
    width = x.shape[-1]
    rows, size = x.numel() // width, blocks(width)
    contiguous = all(t is None or t.is_contiguous() for t in (x, w, b, residual))
    grid = (triton.cdiv(rows, size["BLOCK_M"]),)
    return Plan(Launch(forward_kernel, grid, dict(rows=rows, **in_units(width), **size)), contiguous, rows)


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [t if t is None else t.contiguous() for t in tensors]


def launch(x, w, b, mask, count, eps, residual) -> tuple[Plan, Tensor, Tensor | None, Tensor]:
    """The plan, and y, x + residual where there is one, mean and 1 / standard deviation of every row `(2, rows)`.

    Arguments are checked once for each description of them.

    Raises:
        ValueError: shapes disagree.
    """
    plan = _plan(x, w, b, mask, residual)
    if not plan.contiguous:
        x, w, b, residual = contiguous(x, w, b, residual)
    y, total = torch.empty_like(x), None if residual is None else torch.empty_like(x)
    stats = x.new_empty(2, plan.rows, dtype=torch.float32)
    with on_device(x):
        plan.forward(x, residual, w, b, mask, count, y, total, stats, eps)
    return plan, y, total, stats


def launch_backward(plan, dy, dtotal, total, w, b, mask, count, stats, scores):
    """∂x (of the residual too), ∂w, and ∂b where there is a bias; adds scores to the buffer given."""
    if not (plan.contiguous and dy.is_contiguous() and (dtotal is None or dtotal.is_contiguous())):
        dy, dtotal, total, w, b = contiguous(dy, dtotal, total, w, b)
    samples = None if scores is None else total.shape[0] if scores.dim() == 2 else 1
    runs = plan.backward.get(samples)
    if runs is None:
        runs = plan.backward[samples] = _backward_launches(plan.rows, samples or 1, total.shape[-1], scores)
    run, shape, second = runs
    dx, part = torch.empty_like(total), total.new_empty(shape, dtype=torch.float32)
    dw, db = torch.empty_like(w), None if b is None else torch.empty_like(b)
    with on_device(total):
        run(dy, dtotal, total, w, mask, count, stats, dx, part)
        # Σ y·∂y = w Σ x̂·∂y + b Σ ∂y; a pruned channel has neither sum
        second(part, dw, db, w, b, scores)
    return dx, dw, db


def _backward_launches(rows: int, samples: int, width: int, scores: Tensor | None) -> tuple[Launch, tuple, Launch]:
    tokens = rows // samples
    chunk = chunk_rows(rows)
    shape = (samples, triton.cdiv(tokens, chunk), 2, width)
    size = blocks(width, BACKWARD_TILE)
    size["BLOCK_M"] = min(size["BLOCK_M"], chunk)
    fixed = dict(rows=rows, tokens=tokens, CHUNK=chunk, STAGES=3, **in_units(width), **size)
    return (
        Launch(backward_kernel, (shape[1], samples), fixed),
        shape,
        fold(*shape, scores is not None and scores.dim() == 2),
    )


class KeptLayerNorm(torch.autograd.Function):
    """The eager path."""

    @staticmethod
    def forward(ctx, x, w, b, mask, count, eps, residual, scores):
        ctx.plan, y, total, stats = launch(x, w, b, mask, count, eps, residual)
        ctx.save_for_backward(x if total is None else total, w, b, mask, count, stats)
        ctx.scores = scores  # written by the backward, so not guarded against writing
        if total is None:
            return y
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    @differentiated_once
    def backward(ctx, dy, dtotal=None):
        total, w, b, mask, count, stats = ctx.saved_tensors
        dy = torch.zeros_like(total) if dy is None else dy  # only the sum was used
        dx, dw, db = launch_backward(ctx.plan, dy, dtotal, total, w, b, mask, count, stats, ctx.scores)
        return dx, dw, db, None, None, None, dx if ctx.needs_input_grad[6] else None, None


@torch.library.custom_op("nvit::kept_layer_norm", mutates_args=())
def operator(x: Tensor, w: Tensor, b: Tensor | None, mask: Tensor | None, count: Tensor | None, eps: float,
             residual: Tensor | None, scores: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The same for torch.compile and export: y, x + residual (empty without one), statistics `(2, rows)`."""
    _, y, total, stats = launch(x, w, b, mask, count, eps, residual)
    return y, x.new_empty(0) if total is None else total, stats


@operator.register_fake
def _(x, w, b, mask, count, eps, residual, scores):
    y, rows = torch.empty_like(x, memory_format=torch.contiguous_format), x.numel() // x.shape[-1]
    return y, x.new_empty(0) if residual is None else torch.empty_like(y), x.new_empty(2, rows, dtype=torch.float32)


@torch.library.custom_op("nvit::kept_layer_norm_backward", mutates_args=("scores",))
def operator_backward(dy: Tensor, dtotal: Tensor | None, total: Tensor, w: Tensor, b: Tensor | None,
                      mask: Tensor | None, count: Tensor | None, stats: Tensor,
                      scores: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    plan = _plan(total, w, b, mask, None)
    dx, dw, db = launch_backward(plan, dy, dtotal, total, w, b, mask, count, stats, scores)
    return dx, dw, w.new_empty(0) if db is None else db


@operator_backward.register_fake
def _(dy, dtotal, total, w, b, mask, count, stats, scores):
    like = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (total, w)]
    return *like, w.new_empty(0) if b is None else torch.empty_like(b, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    x, w, b, mask, count, _, residual, ctx.scores = inputs
    _, total, stats = output
    ctx.added = residual is not None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(total if ctx.added else x, w, b, mask, count, stats)


def _differentiate(ctx, dy, dtotal, _):
    total, w, b, mask, count, stats = ctx.saved_tensors
    dy = torch.zeros_like(total) if dy is None else dy
    dtotal = dtotal if ctx.added else None
    dx, dw, db = operator_backward(dy, dtotal, total, w, b, mask, count, stats, ctx.scores)
    return dx, dw, None if b is None else db, None, None, None, dx if ctx.added else None, None


operator.register_autograd(_differentiate, setup_context=_save)


def kept_layer_norm(x, w, b, keep=None, eps=1e-6, residual=None, scores=None):
    """Fused `reference.kept_layer_norm`, which says what the arguments are."""
    mask, count = (None, None) if keep is None else (keep.mask, keep.count)
    if stays_one_operator(x, w):
        y, total, _ = operator(x, w, b, mask, count, eps, residual, scores)
        return y if residual is None else (y, total)
    if torch.is_grad_enabled():
        return KeptLayerNorm.apply(x, w, b, mask, count, eps, residual, scores)
    _, y, total, _ = launch(x, w, b, mask, count, eps, residual)
    return y if residual is None else (y, total)
