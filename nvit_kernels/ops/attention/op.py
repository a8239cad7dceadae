"""Attention over kept heads and dims: launches and gradients; the backward also gives the scores.

Derivations and shapes: docs/kernels/attention.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import triton
from torch import Tensor

from nvit_kernels.launch import (
    describe,
    differentiated_once,
    matmul_precision,
    on_device,
    power_of_two,
    remember,
    stays_one_operator,
)
from nvit_kernels.ops.attention import operands
from nvit_kernels.ops.attention.backward_kernels import dbias_kernel, delta_kernel, dkv_kernel, dq_kernel
from nvit_kernels.ops.attention.kernels import forward_kernel
from nvit_kernels.tuning import Launch, Tuned, about

BIAS_PROGRAMS = 1024
LOG2E = 1.4426950408889634

forward_tuned = Tuned("attention_forward", forward_kernel)
dkv_tuned = Tuned("attention_dkv", dkv_kernel)
dq_tuned = Tuned("attention_dq", dq_kernel)
dbias_tuned = Tuned("attention_dbias", dbias_kernel)


def score_rows(head: int) -> int:
    """Token rows per program wherever partial scores are laid out by them, so never tuned: fewer for wide heads."""
    return 64 if head <= 128 else 32


def bias_splits(batch: int, heads: int, tokens: int) -> int:
    """Parts that the sum of the bias's gradient over samples is cut into: enough programs to fill a GPU.

    It counts tiles of 64 x 64, whatever is tuned, so that the order of summation is a matter of shapes alone.
    """
    return max(1, min(batch, triton.cdiv(BIAS_PROGRAMS, heads * triton.cdiv(tokens, 64) ** 2)))


def by_token(batch: int, heads: int, tokens: int, dim: int, like: Tensor) -> Tensor:
    """Uninitialised `(batch, heads, tokens, dim)` laid out token by token, as the projection reads it."""
    return like.new_empty(batch, tokens, heads, dim).transpose(1, 2)


@dataclass
class Plan:
    """What is worked out once for operands of one description.

    Attributes:
        readable: the kernels read q, k, v where they are.
        kind: what the choice of a config depends on.
        fixed: arguments that all kernels share and that hold no memory, by name.
        launches: prepared at their first use, by kernel and what is asked of it.
    """

    readable: bool
    kind: tuple
    fixed: dict[str, object]
    launches: dict[tuple, Launch] = field(default_factory=dict)


_plans: dict[tuple, Plan] = {}


def _plan(q, k, v, heads, qk_mask, v_mask, bias, mask) -> Plan:
    aligned = (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16 == 0
    key = (aligned, matmul_precision(), *describe(q, k, v, heads, qk_mask, v_mask, bias, mask))
    return _plans.get(key) or remember(_plans, key, _new_plan(q, k, v, heads, qk_mask, v_mask, bias, mask))


def _new_plan(q, k, v, heads, qk_mask, v_mask, bias, mask) -> Plan:
    operands.check(q, k, v)
    operands.check_added(q, bias, mask)
    operands.check_kept(q, v, heads, qk_mask, v_mask)
    (q_, k_), v_ = operands.readable_alike(q, k), operands.readable(v)
    (b, h, n, d), e = q.shape, v.shape[-1]
    fixed = dict(
        windows=None if mask is None else len(mask),
        H=h,
        N=n,
        QK8=d // 8,
        V8=e // 8,
        **operands.strides8("qk", q_),
        **operands.strides8("v", v_),
        PRECISION=matmul_precision(),
        BLOCK_QK=power_of_two(d),
        BLOCK_V=power_of_two(e),
    )
    there = (None if t is None else t.dtype for t in (heads, qk_mask, v_mask, bias, mask))
    return Plan(q_ is q and k_ is k and v_ is v, (n, d, e, about(b * h), *there), fixed)


Read = tuple[Tensor | None, ...]
"""q, k, v, heads, heads_n, qk_mask, v_mask, bias, window: as all kernels take them, in their order."""


def read(q, k, v, heads, heads_n, qk_mask, v_mask, bias, mask) -> tuple[Plan, Read]:
    """The plan of these operands, and they as the kernels read them; checked once for each description.

    Raises:
        ValueError: see `operands.check`, `check_added`, `check_kept`.
    """
    plan = _plan(q, k, v, heads, qk_mask, v_mask, bias, mask)
    if not plan.readable:
        (q, k), v = operands.readable_alike(q, k), operands.readable(v)
    if bias is not None:
        bias = operands.whole_rows(bias)
    if mask is not None:
        mask = operands.whole_rows(mask)
    return plan, (q, k, v, heads, heads_n, qk_mask, v_mask, bias, mask)


def launch(plan: Plan, shared: Read, scale: float) -> tuple[Tensor, Tensor]:
    """Output `(batch, heads, tokens, v_dim)` and statistics `(batch, heads, 2, tokens)` of what `read` returns."""
    q, v = shared[0], shared[2]
    b, h, n, _ = q.shape
    o, stats = by_token(b, h, n, v.shape[3], q), q.new_empty(b, h, 2, n, dtype=torch.float32)
    memory = (*shared, o, stats, scale * LOG2E)
    with on_device(q):
        run = plan.launches.get("forward")
        if run is None:
            run = plan.launches["forward"] = forward_tuned.prepare(
                plan.kind, q, lambda block: (triton.cdiv(n, block["BLOCK_M"]), h, b), plan.fixed, memory
            )
        run(*memory)
    return o, stats


def launch_backward(plan, shared, scale, do, o, stats, head_scores, qk_scores, v_scores, wants_bias):
    """Gradients of q, k, v, and of the bias in float32 where it is wanted; adds scores to the buffers given."""
    do = operands.readable(do)
    o = o if o.transpose(1, 2).is_contiguous() else o.transpose(1, 2).contiguous().transpose(1, 2)
    q, v, heads, heads_n = shared[0], shared[2], shared[3], shared[4]
    (b, h, n, d), e = q.shape, v.shape[3]
    wants_v, wants_qk = head_scores is not None or v_scores is not None, qk_scores is not None
    rows = score_rows(max(d, e))
    tiles = -(-n // rows)
    dq, dk, dv = by_token(b, h, n, d, q), by_token(b, h, n, d, q), by_token(b, h, n, e, q)
    delta = q.new_empty(b, h, n, dtype=torch.float32)
    v_part = q.new_empty(b, h, tiles, e, dtype=torch.float32) if wants_v else None
    qk_part = q.new_empty(b, h, tiles, d, dtype=torch.float32) if wants_qk else None
    bias_part = q.new_empty(bias_splits(b, h, n), h, n, n, dtype=torch.float32) if wants_bias else None
    memory = (*shared, do, stats, delta, scale)
    asked = (do.stride(), wants_qk, wants_bias)
    with on_device(q):
        runs = plan.launches.get(asked)
        if runs is None:
            runs = plan.launches[asked] = BackwardLaunches(plan, rows, memory, do, dq, dk, dv, qk_part, bias_part)
        runs.delta(heads, heads_n, o, do, delta, v_part)
        runs.dq(*memory, dq, qk_part)
        runs.dkv(*memory, dk, dv)
        if wants_bias:
            runs.dbias(*memory, bias_part)
    if wants_v:
        _add(head_scores, v_part, (2, 3))
        _add(v_scores, v_part, (1, 2))
    if wants_qk:
        _add(qk_scores, qk_part, (1, 2))
    return dq, dk, dv, bias_part.sum(0) if wants_bias else None


class BackwardLaunches:
    """The prepared launches of a backward: delta, dq, dkv, and dbias where it is wanted."""

    def __init__(self, plan: Plan, rows: int, memory: tuple, do, dq, dk, dv, qk_part, bias_part):
        q = memory[0]
        b, h, n, _ = q.shape
        fixed = {**plan.fixed, **operands.strides8("do", do)}
        kind = (*plan.kind, qk_part is None)
        tiles = (triton.cdiv(n, rows), h, b)
        of_delta = {name: fixed[name] for name in ("H", "N", "V8", "do_h8", "do_n8", "BLOCK_V")}
        self.delta = Launch(delta_kernel, tiles, {**of_delta, "BLOCK_M": rows})
        self.dq = dq_tuned.prepare(kind, q, lambda _: tiles, {**fixed, "BLOCK_M": rows}, (*memory, dq, qk_part))
        self.dkv = dkv_tuned.prepare(
            kind, q, lambda block: (triton.cdiv(n, block["BLOCK_N"]), h, b), fixed, (*memory, dk, dv)
        )
        if bias_part is not None:
            self.dbias = dbias_tuned.prepare(
                kind,
                q,
                lambda block: (triton.cdiv(n, block["BLOCK_M"]) * triton.cdiv(n, block["BLOCK_N"]), h, len(bias_part)),
                {**fixed, "B": b},
                (*memory, bias_part),
            )


def _add(scores: Tensor | None, partial: Tensor, dims: tuple[int, int]) -> None:
    if scores is not None:
        scores += partial.sum(dims if scores.dim() == 2 else (0, *dims))


class Attention(torch.autograd.Function):
    """The eager path. Saves what the kernels read: a copy where one was made."""

    @staticmethod
    def forward(ctx, q, k, v, scale, heads, heads_n, qk_mask, v_mask, head_scores, qk_scores, v_scores, bias, mask):
        ctx.plan, shared = read(q, k, v, heads, heads_n, qk_mask, v_mask, bias, mask)
        o, stats = launch(ctx.plan, shared, scale)
        ctx.save_for_backward(o, stats, *shared)
        ctx.scale = scale
        ctx.scores = head_scores, qk_scores, v_scores  # written by the backward, so not guarded against writing
        ctx.bias_dtype = None if bias is None else bias.dtype
        return o

    @staticmethod
    @differentiated_once
    def backward(ctx, do):
        o, stats, *shared = ctx.saved_tensors
        wants_bias = ctx.needs_input_grad[11]
        dq, dk, dv, dbias = launch_backward(ctx.plan, shared, ctx.scale, do, o, stats, *ctx.scores, wants_bias)
        dbias = dbias.to(ctx.bias_dtype) if wants_bias else None
        return dq, dk, dv, None, None, None, None, None, None, None, None, dbias, None


@torch.library.custom_op("nvit::attention", mutates_args=())
def operator(
    q: Tensor, k: Tensor, v: Tensor, scale: float,
    heads: Tensor | None, heads_n: Tensor | None, qk_mask: Tensor | None, v_mask: Tensor | None,
    head_scores: Tensor | None, qk_scores: Tensor | None, v_scores: Tensor | None,
    bias: Tensor | None, mask: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same for torch.compile and export."""
    return launch(*read(q, k, v, heads, heads_n, qk_mask, v_mask, bias, mask), scale)


@operator.register_fake
def _(q, k, v, scale, heads, heads_n, qk_mask, v_mask, head_scores, qk_scores, v_scores, bias, mask):
    b, h, n, _ = q.shape
    return by_token(b, h, n, v.shape[-1], q), q.new_empty(b, h, 2, n, dtype=torch.float32)


@torch.library.custom_op("nvit::attention_backward", mutates_args=("head_scores", "qk_scores", "v_scores"))
def operator_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, stats: Tensor, scale: float,
    heads: Tensor | None, heads_n: Tensor | None, qk_mask: Tensor | None, v_mask: Tensor | None,
    head_scores: Tensor | None, qk_scores: Tensor | None, v_scores: Tensor | None,
    bias: Tensor | None, mask: Tensor | None, wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    plan, shared = read(q, k, v, heads, heads_n, qk_mask, v_mask, bias, mask)
    *grads, dbias = launch_backward(plan, shared, scale, do, o, stats, head_scores, qk_scores, v_scores, wants_bias)
    return *grads, stats.new_empty(0) if dbias is None else dbias


@operator_backward.register_fake
def _(do, q, k, v, o, stats, scale, heads, heads_n, qk_mask, v_mask, head_scores, qk_scores, v_scores, bias, mask,
      wants_bias):  # fmt: skip
    b, h, n, d = q.shape
    dbias = q.new_empty((h, n, n) if wants_bias else 0, dtype=torch.float32)
    return *(by_token(b, h, n, dim, q) for dim in (d, d, v.shape[-1])), dbias


def _save(ctx, inputs, output):
    q, k, v, ctx.scale, *lists, bias, mask = inputs
    ctx.save_for_backward(q, k, v, *output, *lists[:4], bias, mask)
    ctx.set_materialize_grads(False)
    ctx.scores = lists[4:]


def _differentiate(ctx, do, _):
    q, k, v, o, stats, *lists, bias, mask = ctx.saved_tensors
    wants_bias = ctx.needs_input_grad[11]
    *grads, dbias = operator_backward(do, q, k, v, o, stats, ctx.scale, *lists, *ctx.scores, bias, mask, wants_bias)
    return *grads, *([None] * 8), dbias.to(bias.dtype) if wants_bias else None, None


operator.register_autograd(_differentiate, setup_context=_save)


def attention(q, k, v, scale, heads=None, qk=None, v_dim=None, head_scores=None, qk_scores=None, v_scores=None,
              bias=None, mask=None):  # fmt: skip
    """Fused `reference.attention`, which says what the arguments are."""
    index, count = (None, None) if heads is None else (heads.index, heads.count)
    qk, v_dim = None if qk is None else qk.mask, None if v_dim is None else v_dim.mask
    scale = float(scale)
    if stays_one_operator(q, v):
        return operator(q, k, v, scale, index, count, qk, v_dim, head_scores, qk_scores, v_scores, bias, mask)[0]
    if torch.is_grad_enabled():
        return Attention.apply(q, k, v, scale, index, count, qk, v_dim, head_scores, qk_scores, v_scores, bias, mask)
    return launch(*read(q, k, v, index, count, qk, v_dim, bias, mask), scale)[0]
