"""SiLU(gate) · value, fc2 over kept hidden units: `mlp` with two inputs to the activation, and its three ways."""

from __future__ import annotations

import torch
from torch import Tensor

from nvit_kernels import ways
from nvit_kernels.launch import describe, differentiated_once, remember, stays_one_operator
from nvit_kernels.ops.mlp.op import check
from nvit_kernels.ops.mlp.whole import samples_of
from nvit_kernels.ops.swiglu import fused, whole

_checked: dict[tuple, dict[str, str]] = {}  # ways by op, by description of what was found right


def forward(way, x, wg, bg, wv, bv, w2, b2, index, count, mask, saves) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output `(..., out)`, and gate, value and activation `(tokens, hidden)` as the way keeps them."""
    rows = x.reshape(-1, x.shape[-1])
    if way == "fused":
        y, gate, value, a = fused.launch(rows.contiguous(), wg, bg, wv, bv, w2, b2, index, count)
    else:
        y, gate, value, a = whole.launch(rows, wg, bg, wv, bv, w2, b2, mask, saves)
    return y.view(*x.shape[:-1], y.shape[1]), gate, value, a


def backward(way, dy, x, gate, value, a, wg, bg, wv, bv, w2, b2, index, count, mask, scores, wants):
    """Gradients of x, wg, bg, wv, bv, w2, b2, None where `wants` says no; adds scores to the buffer given."""
    rows, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    samples = samples_of(x, scores)
    if way == "fused":
        dx, *grads = fused.launch_backward(dy.contiguous(), rows.contiguous(), gate, value, a, wg, bg, wv, bv, w2, b2,
                                           index, count, scores, samples, wants)  # fmt: skip
    else:
        dx, *grads = whole.launch_backward(dy, rows, gate, value, a, wg, bg, wv, bv, w2, mask, scores, samples, wants)
    return None if dx is None else dx.view(x.shape), *grads


class SwiGLU(torch.autograd.Function):
    """The eager path. Where weights were gathered beforehand, `kept` says which units they are, for the scores."""

    @staticmethod
    def forward(ctx, way, x, wg, bg, wv, bv, w2, b2, index, count, mask, kept, scores):
        y, gate, value, a = forward(way, x, wg, bg, wv, bv, w2, b2, index, count, mask, saves=True)
        a = a if ctx.needs_input_grad[6] or (ctx.needs_input_grad[7] and way == "fused") else None
        ctx.save_for_backward(x, gate, value, a, wg, bg, wv, bv, w2, b2, index, count, mask, kept)
        ctx.way = way
        ctx.scores = scores  # written by the backward, so not guarded against writing
        return y

    @staticmethod
    @differentiated_once
    def backward(ctx, dy):
        *saved, kept = ctx.saved_tensors
        part = scores = ctx.scores
        if kept is not None and scores is not None:
            part = scores.new_zeros(*scores.shape[:-1], len(kept))
        grads = backward(ctx.way, dy, *saved, part, ctx.needs_input_grad[1:8])
        if part is not scores:
            scores.index_add_(-1, kept, part)
        return None, *grads, None, None, None, None, None


@torch.library.custom_op("nvit::swiglu", mutates_args=())
def operator(x: Tensor, wg: Tensor, bg: Tensor | None, wv: Tensor, bv: Tensor | None, w2: Tensor, b2: Tensor | None,
             index: Tensor | None, count: Tensor | None, mask: Tensor | None,
             scores: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The same for torch.compile and export, by a way that never waits: output, gate, value, activation."""
    check(x, wg, bg, w2, b2, index)
    check(x, wv, bv, w2, b2, index)
    way = ways.without_waiting("swiglu_backward", x, index is not None)
    return forward(way, x, wg, bg, wv, bv, w2, b2, index, count, mask, saves=True)


@operator.register_fake
def _(x, wg, bg, wv, bv, w2, b2, index, count, mask, scores):
    gate = x.new_empty(x.numel() // x.shape[-1], wg.shape[0])
    return x.new_empty(*x.shape[:-1], w2.shape[0]), gate, torch.empty_like(gate), torch.empty_like(gate)


@torch.library.custom_op("nvit::swiglu_backward", mutates_args=("scores",))
def operator_backward(dy: Tensor, x: Tensor, gate: Tensor, value: Tensor, a: Tensor, wg: Tensor, bg: Tensor | None,
                      wv: Tensor, bv: Tensor | None, w2: Tensor, b2: Tensor | None, index: Tensor | None,
                      count: Tensor | None, mask: Tensor | None, scores: Tensor | None,
                      wants: list[bool]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    way = ways.without_waiting("swiglu_backward", x, index is not None)
    grads = backward(way, dy, x, gate, value, a, wg, bg, wv, bv, w2, b2, index, count, mask, scores, wants)
    return tuple(x.new_empty(0) if grad is None else grad for grad in grads)


@operator_backward.register_fake
def _(dy, x, gate, value, a, wg, bg, wv, bv, w2, b2, index, count, mask, scores, wants):
    like = zip((x, wg, bg, wv, bv, w2, b2), wants, strict=True)
    return tuple(x.new_empty(t.shape if wanted else (0,)) for t, wanted in like)


def _save(ctx, inputs, output):
    *tensors, ctx.scores = inputs
    ctx.save_for_backward(tensors[0], *output[1:], *tensors[1:])
    ctx.set_materialize_grads(False)  # nobody differentiates what is saved: no zeros for it


def _differentiate(ctx, dy, *_):
    wants = list(ctx.needs_input_grad[:7])
    grads = operator_backward(dy, *ctx.saved_tensors, ctx.scores, wants)
    return *(g if wanted else None for g, wanted in zip(grads, wants, strict=True)), None, None, None, None


operator.register_autograd(_differentiate, setup_context=_save)


def swiglu(x, w_gate, b_gate, w_value, b_value, w2, b2, hidden=None, scores=None):
    """Fused `reference.swiglu`, which says what the arguments are."""
    tensors = (x, w_gate, b_gate, w_value, b_value, w2, b2)
    index, count, mask = (None, None, None) if hidden is None else (hidden.index, hidden.count, hidden.mask)
    if stays_one_operator(x, w_gate):
        return operator(*tensors, index, count, mask, scores)[0]
    key = describe(*tensors, index)
    known = _checked.get(key)
    if known is None:
        check(x, w_gate, b_gate, w2, b2, index)
        check(x, w_value, b_value, w2, b2, index)
        known = remember(_checked, key, {})
    saves = torch.is_grad_enabled()
    way = ways.choose(known, "swiglu_backward" if saves else "swiglu", x, w_gate.shape[0], index is not None,
                      lambda way: ways.step(lambda *t: _run(way, *t, hidden, None, saves), tensors))  # fmt: skip
    return _run(way, *tensors, hidden, scores, saves)


def _run(way, x, wg, bg, wv, bv, w2, b2, hidden, scores, saves):
    index, count, mask, kept = None, None, None, None
    if hidden is not None:
        index, count, mask = hidden.index, hidden.count, hidden.mask
        if way == "gather":
            kept, mask = hidden.indices(), None
            wg, wv, w2 = wg.index_select(0, kept), wv.index_select(0, kept), w2.index_select(1, kept)
            bg, bv = (None if b is None else b.index_select(0, kept) for b in (bg, bv))
    if saves:
        return SwiGLU.apply(way, x, wg, bg, wv, bv, w2, b2, index, count, mask, kept, scores)
    return forward(way, x, wg, bg, wv, bv, w2, b2, index, count, mask, saves=False)[0]
