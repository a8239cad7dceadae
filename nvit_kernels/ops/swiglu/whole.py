"""A gated MLP by the vendor's products, with one pass of ours around each, as `mlp.whole`."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from nvit_kernels.launch import on_device
from nvit_kernels.ops.fold import fold
from nvit_kernels.ops.mlp.whole import backward_pass, forward_pass, of_each
from nvit_kernels.ops.swiglu.kernels import gated_backward_kernel, gated_kernel
from nvit_kernels.tuning import Launch


@lru_cache(maxsize=1024)
def _forward_pass(rows: int, width: int) -> Launch:
    return forward_pass(gated_kernel, rows, width)


@lru_cache(maxsize=1024)
def _backward_pass(rows: int, width: int, samples: int) -> tuple[Launch, tuple[int, ...]]:
    return backward_pass(gated_backward_kernel, rows, width, samples, 3)


def _read(b: Tensor | None) -> Tensor | None:
    return None if b is None else b.contiguous()


def launch(x, wg, bg, wv, bv, w2, b2, mask, saves: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output `(tokens, out)`, gate and value without their biases, and the activation, `(tokens, hidden)` each.

    Args:
        x: `(tokens, in)`.
        mask: bool `(hidden,)`, True stays; None: all stay.
        saves: somebody will differentiate; otherwise the activation takes the gate's place.
    """
    gate, value = torch.mm(x, wg.t()), torch.mm(x, wv.t())
    a = torch.empty_like(gate) if saves else gate
    rows, width = gate.shape
    with on_device(x):
        _forward_pass(rows, width)(gate, value, _read(bg), _read(bv), mask, a)
    return F.linear(a, w2, b2), gate, value, a


def launch_backward(dy, x, gate, value, a, wg, bg, wv, bv, w2, mask, scores, samples, wants):
    """Gradients of x `(tokens, in)`, wg, bg, wv, bv, w2, b2, None where `wants` says no; adds scores to the buffer."""
    dx, dwg, dbg, dwv, dbv, dw2, db2 = [None] * 7
    rows, width = gate.shape
    if any(wants[:5]) or scores is not None:
        dg = torch.mm(dy, w2)  # ∂a, whose place ∂gate takes
        dv = torch.empty_like(dg)
        sums = wants[2] or wants[4] or scores is not None
        run, shape = _backward_pass(rows, width, samples)
        part = gate.new_empty(shape, dtype=torch.float32) if sums else None
        dbg = torch.empty_like(bg) if wants[2] else None
        dbv = torch.empty_like(bv) if wants[4] else None
        with on_device(x):
            run(gate, value, _read(bg), _read(bv), mask, dg, dg, dv, part)
            if sums:
                fold(*shape, of_each(scores))(part, dbg, dbv, None, None, scores)
        if wants[0]:
            dx = torch.addmm(torch.mm(dv, wv), dg, wg)
        dwg = torch.mm(dg.t(), x) if wants[1] else None
        dwv = torch.mm(dv.t(), x) if wants[3] else None
    dw2 = torch.mm(dy.t(), a) if wants[5] else None
    db2 = dy.sum(0) if wants[6] else None
    return dx, dwg, dbg, dwv, dbv, dw2, db2
