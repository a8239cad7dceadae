"""An MLP by our own products, which read the kept list on the device and take GELU into their epilogues."""

from __future__ import annotations

import torch
from torch import Tensor

from nvit_kernels.launch import on_device
from nvit_kernels.ops.matmul.op import compact, tokens, weights


def launch(x, w1, b1, w2, b2, index, count) -> tuple[Tensor, Tensor, Tensor]:
    """Output `(tokens, out)`, and pre-activation and activation, compact in `(tokens, hidden)`."""
    w1, w2 = w1.contiguous(), w2.contiguous()
    u = x.new_empty(x.shape[0], w1.shape[0])
    a = torch.empty_like(u)
    y = x.new_empty(x.shape[0], w2.shape[0])
    with on_device(x):
        tokens(x, w1, index, count, role="gelu", kept="n", b_by="n", gather=True, bias=b1, out=u, out2=a)
        tokens(a, compact(w2, index, count), index, count, role="linear", kept="k", b_by="n", bias=b2, out=y)
    return y, u, a


def launch_backward(dy, x, u, a, w1, b1, w2, b2, index, count, scores, samples, wants):
    """Gradients of x `(tokens, in)`, w1, b1, w2, b2, None where `wants` says no; adds scores to the buffer given."""
    w1, w2 = w1.contiguous(), w2.contiguous()
    dx = torch.empty_like(x) if wants[0] else None
    dw1 = torch.empty_like(w1) if wants[1] or wants[2] else None
    db1 = torch.empty_like(b1) if wants[2] else None
    dw2 = torch.empty_like(w2) if wants[3] or wants[4] else None
    db2 = torch.empty_like(b2) if wants[4] else None
    with on_device(x):
        if wants[0] or wants[1] or wants[2] or scores is not None:
            du = torch.empty_like(u)
            tokens(dy, compact(w2, index, count), index, count, role="gelu_backward", kept="n", b_by="k", aux=u, out=du,
                   scores=scores, samples=samples)  # fmt: skip
            if wants[0]:
                tokens(du, w1, index, count, role="linear", kept="k", b_by="k", gather=True, out=dx)
            if wants[1] or wants[2]:
                weights(du, x, dw1, index, count, kept="m", sums=db1)
        if wants[3] or wants[4]:
            weights(dy, a, dw2, index, count, kept="n", sums=db2)
    return dx, dw1 if wants[1] else None, db1, dw2 if wants[3] else None, db2
