"""Attention over short rows: launches and gradients. Derivations and shapes: docs/kernels/attention_short.md."""

from __future__ import annotations

import torch
from torch import Tensor

from nvit_kernels.launch import differentiated_once, on_device, stays_one_operator
from nvit_kernels.ops.attention.op import LOG2E, by_token
from nvit_kernels.ops.attention.short_layouts import Config
from nvit_kernels.ops.attention.short_plan import Plan, read, read_mass, takes

__all__ = ["attention_short", "attention_short_packed", "launch", "launch_backward", "read", "takes"]

Gradients = tuple[Tensor, Tensor, Tensor]
Scores = tuple[Tensor | None, Tensor | None, Tensor | None]  # head, qk and v buffers, as `reference.attention` has them


def launch(
    plan: Plan, q: Tensor, k: Tensor, v: Tensor, scale: float, config: Config | None = None, mass: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """o `(batch, heads, tokens, v_dim)`, laid out token by token; float32 log2-sums `(batch, heads, tokens)`."""
    b, h, n = plan.batch, plan.heads, plan.tokens
    o, lse = by_token(b, h, n, plan.v, q), q.new_empty(b, h, n, dtype=torch.float32)
    with on_device(q):
        plan.forward(config)(q, k, v, read_mass(plan, mass), o, lse, scale * LOG2E)
    return o, lse


def separate_gradients(q: Tensor, v: Tensor) -> Gradients:
    """Uninitialised ∂q, ∂k, ∂v, each laid out token by token."""
    return by_token(*q.shape, q), by_token(*q.shape, q), by_token(*v.shape, q)


def launch_backward(
    plan: Plan, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float,
    gradients: Gradients, scores: Scores, config: Config | None = None, mass: Tensor | None = None,
) -> None:  # fmt: skip
    """Fill `gradients`, separate or the parts of one packed tensor, and add to the `scores` that are there.

    Raises:
        ValueError: no layout of the backward fits the device.
    """
    b, h = plan.batch, plan.heads
    do, o = _dense_by_token(do), _dense_by_token(o)
    run = plan.backward(gradients[0].stride(2) != h * plan.qk, config)
    first = (config or plan.backward_config).delta_first
    qk_part = v_part = head_part = None
    if any(buffer is not None for buffer in scores):
        qk_part, v_part, head_part = (q.new_empty(b, h, width, dtype=torch.float32) for width in (plan.qk, plan.v, 1))
    with on_device(q):
        delta = torch.empty_like(lse) if first else None
        run(q, k, v, read_mass(plan, mass), o, do, lse, delta, *gradients, qk_part, v_part, head_part, scale)
        if qk_part is not None:
            _add_scores(plan, scores, qk_part, v_part, head_part)


def _dense_by_token(x: Tensor) -> Tensor:
    """`x` `(batch, heads, tokens, dim)` dense, token by token and 16-byte aligned: itself where it is so already."""
    x = x.transpose(1, 2)
    x = x if x.is_contiguous() else x.contiguous()
    return (x if x.data_ptr() % 16 == 0 else x.clone()).transpose(1, 2)


def _add_scores(plan: Plan, scores: Scores, qk_part: Tensor, v_part: Tensor, head_part: Tensor) -> None:
    """Add the sums over tokens to buffers `(batch, units)`, or `(units,)` summed over the batch too."""
    head, qk, v = (b if b is None or b.is_contiguous() else b.new_zeros(b.shape) for b in scores)
    samples = tuple([plan.batch if b is not None and b.dim() == 1 else 1 for b in (qk, v, head)])
    plan.scores(samples)(qk_part, v_part, head_part, qk, v, head)
    for buffer, summed in zip(scores, (head, qk, v), strict=True):
        if buffer is not summed:
            buffer += summed


class ShortAttention(torch.autograd.Function):
    """The eager path on q, k and v apart."""

    @staticmethod
    def forward(ctx, q, k, v, scale, head_scores, qk_scores, v_scores, mass):
        plan, q, k, v = read(q, k, v)
        if any(ctx.needs_input_grad):
            plan.check_backward()
        o, lse = launch(plan, q, k, v, scale, mass=mass)
        ctx.save_for_backward(q, k, v, o, lse, mass)
        ctx.plan, ctx.scale = plan, scale
        ctx.scores = head_scores, qk_scores, v_scores  # written by the backward, so not guarded against writing
        return o

    @staticmethod
    @differentiated_once
    def backward(ctx, do):
        q, k, v, o, lse, mass = ctx.saved_tensors
        gradients = separate_gradients(q, v)
        launch_backward(ctx.plan, do, q, k, v, o, lse, ctx.scale, gradients, ctx.scores, mass=mass)
        return *gradients, None, None, None, None, None


class PackedShortAttention(torch.autograd.Function):
    """The eager path on a packed projection, whose gradient is written packed: no unbind and no stack of it."""

    @staticmethod
    def forward(ctx, qkv, scale, head_scores, qk_scores, v_scores, mass):
        plan, q, k, v = read(*unpack(qkv))
        if ctx.needs_input_grad[0]:
            plan.check_backward()
        o, lse = launch(plan, q, k, v, scale, mass=mass)
        packed = qkv if plan.readable else torch.stack([t.transpose(1, 2) for t in (q, k, v)], 2)
        ctx.save_for_backward(packed, o, lse, mass)
        ctx.scale = scale
        ctx.scores = head_scores, qk_scores, v_scores
        return o

    @staticmethod
    @differentiated_once
    def backward(ctx, do):
        qkv, o, lse, mass = ctx.saved_tensors
        gradient = qkv.new_empty(qkv.shape)
        plan, q, k, v = read(*unpack(qkv))
        launch_backward(plan, do, q, k, v, o, lse, ctx.scale, unpack(gradient), ctx.scores, mass=mass)
        return gradient, None, None, None, None, None


def unpack(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v `(batch, heads, tokens, dim)` as views of a projection `(batch, tokens, 3, heads, dim)`."""
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)


@torch.library.custom_op("nvit::attention_short", mutates_args=())
def operator(
    q: Tensor, k: Tensor, v: Tensor, scale: float,
    head_scores: Tensor | None, qk_scores: Tensor | None, v_scores: Tensor | None, mass: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same for torch.compile and export; the buffers are for its backward."""
    return launch(*read(q, k, v), scale, mass=mass)


@operator.register_fake
def _(q, k, v, scale, head_scores, qk_scores, v_scores, mass=None):
    return by_token(*v.shape, q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("nvit::attention_short_backward", mutates_args=("head_scores", "qk_scores", "v_scores"))
def operator_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float,
    head_scores: Tensor | None, qk_scores: Tensor | None, v_scores: Tensor | None, mass: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`launch_backward` for torch.compile."""
    gradients = separate_gradients(q, v)
    plan, q, k, v = read(q, k, v)
    launch_backward(plan, do, q, k, v, o, lse, scale, gradients, (head_scores, qk_scores, v_scores), mass=mass)
    return gradients


@operator_backward.register_fake
def _(do, q, k, v, o, lse, scale, head_scores, qk_scores, v_scores, mass=None):
    return separate_gradients(q, v)


def _save(ctx, inputs, output):
    q, k, v, ctx.scale, *ctx.scores, mass = inputs
    ctx.save_for_backward(q, k, v, *output, mass)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, do, _):
    *saved, mass = ctx.saved_tensors
    return *operator_backward(do, *saved, ctx.scale, *ctx.scores, mass), None, None, None, None, None


operator.register_autograd(_differentiate, setup_context=_save)


def attention_short(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    head_scores: Tensor | None = None,
    qk_scores: Tensor | None = None,
    v_scores: Tensor | None = None,
    mass: Tensor | None = None,
) -> Tensor:
    """Fused `nvit_kernels.reference.attention` for what `takes` says, with everything kept and no more than mass added.

    Raises:
        ValueError: shapes or dtypes disagree, or `takes` is False.
    """
    scale = float(scale)
    if stays_one_operator(q, v):
        return operator(q, k, v, scale, head_scores, qk_scores, v_scores, mass)[0]
    if torch.is_grad_enabled():
        return ShortAttention.apply(q, k, v, scale, head_scores, qk_scores, v_scores, mass)
    return launch(*read(q, k, v), scale, mass=mass)[0]


def attention_short_packed(
    qkv: Tensor,
    scale: float,
    head_scores: Tensor | None = None,
    qk_scores: Tensor | None = None,
    v_scores: Tensor | None = None,
    mass: Tensor | None = None,
) -> Tensor:
    """`attention_short` of a projection `(batch, tokens, 3, heads, dim)`, whose gradient comes packed like it.

    The backward of `unbind` copies three gradients into one tensor: 116 MB moved at 64 x 12 heads of 197 x 64, against
    156 MB of the whole backward. This writes them there.

    Raises:
        ValueError: as `attention_short`.
    """
    if torch.is_grad_enabled() and not stays_one_operator(qkv, qkv):
        return PackedShortAttention.apply(qkv, float(scale), head_scores, qk_scores, v_scores, mass)
    return attention_short(*unpack(qkv), scale, head_scores, qk_scores, v_scores, mass)
