"""A gated MLP by our own products: `mlp.fused` with two inputs to the activation."""

from __future__ import annotations

import torch
from torch import Tensor

from nvit_kernels.launch import on_device
from nvit_kernels.ops.matmul.op import compact, tokens, weights


def launch(x, wg, bg, wv, bv, w2, b2, index, count) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output `(tokens, out)`, and gate, value and activation, compact in `(tokens, hidden)`."""
    wg, wv, w2 = wg.contiguous(), wv.contiguous(), w2.contiguous()
    gate = x.new_empty(x.shape[0], wg.shape[0])
    value, a = torch.empty_like(gate), torch.empty_like(gate)
    y = x.new_empty(x.shape[0], w2.shape[0])
    with on_device(x):
        tokens(x, wg, index, count, role="linear", kept="n", b_by="n", gather=True, bias=bg, out=gate)
        tokens(x, wv, index, count, role="swiglu", kept="n", b_by="n", gather=True, bias=bv, aux=gate, out=value,
               out2=a)  # fmt: skip
        tokens(a, compact(w2, index, count), index, count, role="linear", kept="k", b_by="n", bias=b2, out=y)
    return y, gate, value, a


def launch_backward(dy, x, gate, value, a, wg, bg, wv, bv, w2, b2, index, count, scores, samples, wants):
    """Gradients of x `(tokens, in)`, wg, bg, wv, bv, w2, b2, None where `wants` says no; adds scores to the buffer."""
    wg, wv, w2 = wg.contiguous(), wv.contiguous(), w2.contiguous()
    dx, grads = None, [None] * 6
    with on_device(x):
        if any(wants[:5]) or scores is not None:
            dg, dv = torch.empty_like(gate), torch.empty_like(gate)
            tokens(dy, compact(w2, index, count), index, count, role="swiglu_backward", kept="n", b_by="k", aux=gate,
                   aux2=value, out=dg, out2=dv, scores=scores, samples=samples)  # fmt: skip
            if wants[0]:
                dx, other = torch.empty_like(x), torch.empty_like(x)
                tokens(dg, wg, index, count, role="linear", kept="k", b_by="k", gather=True, out=dx)
                tokens(dv, wv, index, count, role="linear", kept="k", b_by="k", gather=True, out=other)
                dx += other
            for i, (grad, w, b) in enumerate(((dg, wg, bg), (dv, wv, bv))):
                if wants[2 * i + 1] or wants[2 * i + 2]:
                    grads[2 * i : 2 * i + 2] = _weights(grad, x, w, b, index, count, "m", wants[2 * i + 2])
        if wants[5] or wants[6]:
            grads[4:6] = _weights(dy, a, w2, b2, index, count, "n", wants[6])
    return dx, *(grad if wanted else None for grad, wanted in zip(grads, wants[1:], strict=True))


def _weights(left, right, w, b, index, count, kept: str, wants_sums: bool) -> tuple[Tensor, Tensor | None]:
    dw, db = torch.empty_like(w), torch.empty_like(b) if wants_sums else None
    weights(left, right, dw, index, count, kept=kept, sums=db)
    return dw, db
