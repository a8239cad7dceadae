"""An activation and its gradient, handed out in the backward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Sink = Callable[[Tensor, Tensor], None]
"""Takes an activation and the gradient there, of one shape."""


class _Observed(torch.autograd.Function):
    """Identity. The anchor makes it differentiable even when everything before it is frozen."""

    @staticmethod
    def forward(ctx, x: Tensor, anchor: Tensor, sink: Sink, again: Callable, *kept: Tensor) -> Tensor:
        ctx.save_for_backward(*kept)
        ctx.sink, ctx.again = sink, again
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        kept = ctx.saved_tensors
        ctx.sink(ctx.again(*kept), grad)
        return grad, None, None, None, *[None] * len(kept)


def observed(x: Tensor, sink: Sink, again: tuple | None = None) -> Tensor:
    """`x` itself; `sink` gets it, with its gradient, when a backward pass comes through, also in a frozen model.

    Args:
        again: `(function, *tensors)` that give `x` once more, so that it need not be kept; see `nvit.functional`.
    """
    function, *kept = again or (_itself, x)
    anchor = torch.zeros((), device=x.device, requires_grad=True)
    return _Observed.apply(x, anchor, sink, function, *(t.detach() for t in kept))


def _itself(x: Tensor) -> Tensor:
    return x
