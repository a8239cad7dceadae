"""SiLU(gate) · value, fc2 over kept hidden units: `mlp`'s kernels with two inputs to the product, and its two ways."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nvit_kernels import ways
from nvit_kernels.launch import check_list, on_device
from nvit_kernels.ops.matmul.op import compact, tokens, weights
from nvit_kernels.ops.mlp import op as plain


@torch.library.custom_op("nvit::swiglu", mutates_args=())
def _forward(x: Tensor, wg: Tensor, bg: Tensor | None, wv: Tensor, bv: Tensor | None, w2: Tensor, b2: Tensor | None,
             index: Tensor | None, count: Tensor | None,
             scores: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    plain.check(x, wg, bg, w2, b2)
    plain.check(x, wv, bv, w2, b2)
    check_list(index, wg.shape[0], x.device)
    x2, wg, wv, w2 = x.reshape(-1, x.shape[-1]).contiguous(), wg.contiguous(), wv.contiguous(), w2.contiguous()
    gate, value = (x.new_empty(x2.shape[0], wg.shape[0]) for _ in range(2))
    y = x.new_empty(*x.shape[:-1], w2.shape[0])
    arguments = (x2, wg, bg, wv, bv, w2, b2, index, count, gate, value, y.view(-1, y.shape[-1]))
    with on_device(x):
        _run(ways.choose("swiglu", x2, wg.shape[0], lambda way: _run(way, *arguments)), *arguments)
    return y, gate, value


def _run(way, x, wg, bg, wv, bv, w2, b2, index, count, gate, value, y) -> None:
    if way == "gather":
        kept = plain.kept_units(index, count)
        g, v = (t if kept is None else t[:, : len(kept)] for t in (gate, value))
        g.copy_(F.linear(x, plain.rows(wg, kept), plain.rows(bg, kept)))
        v.copy_(F.linear(x, plain.rows(wv, kept), plain.rows(bv, kept)))
        y.copy_(F.linear(F.silu(g) * v, plain.columns(w2, kept), b2))
        return
    activation = torch.empty_like(gate)
    tokens(x, wg, index, count, role="linear", kept="n", b_by="n", gather=True, bias=bg, out=gate)
    tokens(x, wv, index, count, role="swiglu", kept="n", b_by="n", gather=True, bias=bv, aux=gate, out=value,
           out2=activation)  # fmt: skip
    tokens(activation, compact(w2, index, count), index, count, role="linear", kept="k", b_by="n", bias=b2, out=y)


@_forward.register_fake
def _(x, wg, bg, wv, bv, w2, b2, index, count, scores):
    gate, value = (x.new_empty(x.numel() // x.shape[-1], wg.shape[0]) for _ in range(2))
    return x.new_empty(*x.shape[:-1], w2.shape[0]), gate, value


@torch.library.custom_op("nvit::swiglu_backward", mutates_args=("scores",))
def _backward(dy: Tensor, x: Tensor, gate: Tensor, value: Tensor, wg: Tensor, wv: Tensor, w2: Tensor,
              index: Tensor | None, count: Tensor | None, scores: Tensor | None,
              wants: list[bool]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    x2, dy2 = x.reshape(-1, x.shape[-1]).contiguous(), dy.reshape(-1, dy.shape[-1]).contiguous()
    wg, wv, w2, grads = wg.contiguous(), wv.contiguous(), w2.contiguous(), _allocate(x, wg, w2, wants)
    arguments = (dy2, x2, gate, value, wg, wv, w2, index, count, grads, wants)
    samples = x.shape[0] if scores is not None and scores.dim() == 2 else 1
    with on_device(x):
        way = ways.choose("swiglu_backward", x2, wg.shape[0], lambda w: _run_backward(w, *arguments, None, 1))
        _run_backward(way, *arguments, scores, samples)
    return grads


def _run_backward(way, dy, x, gate, value, wg, wv, w2, index, count, grads, wants, scores, samples) -> None:
    dx, dwg, dbg, dwv, dbv, dw2, db2 = grads
    if way == "gather":
        kept = plain.kept_units(index, count)
        g, v = (t if kept is None else t[:, : len(kept)] for t in (gate, value))
        dact = dy @ plain.columns(w2, kept)
        silu, opened = F.silu(g), torch.sigmoid(g)
        dg, dv = dact * v * (opened + silu * (1 - opened)), dact * silu
        if scores is not None:
            plain.add_scores(scores, silu * v, dact, kept, samples)
        if wants[0]:
            dx.view(-1, dx.shape[-1]).copy_(dg @ plain.rows(wg, kept) + dv @ plain.rows(wv, kept))
        for grad, weight_grad, bias_grad, i in ((dg, dwg, dbg, 1), (dv, dwv, dbv, 3)):
            if wants[i]:
                plain.put(weight_grad, 0, kept, grad.T @ x)
            if wants[i + 1]:
                plain.put(bias_grad, 0, kept, grad.sum(0))
        if wants[5]:
            plain.put(dw2, 1, kept, dy.T @ (silu * v))
        if wants[6]:
            db2.copy_(dy.sum(0))
        return
    dg, dv, activation = (torch.empty_like(gate) for _ in range(3))
    tokens(dy, compact(w2, index, count), index, count, role="swiglu_backward", kept="n", b_by="k", aux=gate,
           aux2=value, out=dg, out2=activation, out3=dv, scores=scores, samples=samples)  # fmt: skip
    if wants[0]:
        flat = dx.view(-1, dx.shape[-1])
        other = torch.empty_like(flat)
        tokens(dg, wg, index, count, role="linear", kept="k", b_by="k", gather=True, out=flat)
        tokens(dv, wv, index, count, role="linear", kept="k", b_by="k", gather=True, out=other)
        flat += other
    for grad, weight_grad, bias_grad, i in ((dg, dwg, dbg, 1), (dv, dwv, dbv, 3)):
        if wants[i] or wants[i + 1]:
            weights(grad, x, plain.or_scratch(weight_grad, wg), index, count, kept="m",
                    sums=bias_grad if wants[i + 1] else None)  # fmt: skip
    if wants[5] or wants[6]:
        weights(dy, activation, plain.or_scratch(dw2, w2), index, count, kept="n", sums=db2 if wants[6] else None)


def _allocate(x: Tensor, w: Tensor, w2: Tensor, wants: list[bool]) -> tuple[Tensor, ...]:
    shapes = (x.shape, w.shape, w.shape[:1], w.shape, w.shape[:1], w2.shape, w2.shape[:1])
    return tuple(x.new_empty(shape if wanted else (0,)) for shape, wanted in zip(shapes, wants, strict=True))


@_backward.register_fake
def _(dy, x, gate, value, wg, wv, w2, index, count, scores, wants):
    return _allocate(x, wg, w2, wants)


def _save(ctx, inputs, output):
    x, wg, _, wv, _, w2, _, index, count, ctx.scores = inputs
    ctx.save_for_backward(x, *output[1:], wg, wv, w2, index, count)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy, _gate, _value):
    wants = list(ctx.needs_input_grad[:7])
    x, gate, value, wg, wv, w2, index, count = ctx.saved_tensors
    grads = _backward(dy, x, gate, value, wg, wv, w2, index, count, ctx.scores, wants)
    return *(g if wanted else None for g, wanted in zip(grads, wants, strict=True)), None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def swiglu(x, w_gate, b_gate, w_value, b_value, w2, b2, hidden=None, scores=None):
    """Fused `reference.swiglu`, which says what the arguments are."""
    lists = (None, None) if hidden is None else (hidden.index, hidden.count)
    return _forward(x, w_gate, b_gate, w_value, b_value, w2, b2, *lists, scores)[0]
