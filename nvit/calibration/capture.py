"""The one way to read activations and their gradients out of a model: `capture`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..layers import prunable_layers

Place = tuple[str, str]
"""Name of a prunable layer, and one of its sites: `out`, `qk`, `emb` or `in`; see `Prunable.sites`."""

Sink = Callable[[Place, Tensor, Tensor | None], None]
"""Takes a place, its activation as `layers.Site` says it lies, and the loss' gradient there, of the same shape."""


class Enough(Exception):
    """Raised by a sink that needs nothing of what follows in the forward pass."""


class _Observed(torch.autograd.Function):
    """Identity. The anchor makes it differentiable even when everything before it is frozen."""

    @staticmethod
    def forward(ctx, x: Tensor, anchor: Tensor, sink: Callable, again: Callable, *kept: Tensor) -> Tensor:
        ctx.save_for_backward(*kept)
        ctx.sink, ctx.again = sink, again
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        kept = ctx.saved_tensors
        ctx.sink(ctx.again(*kept), grad)
        return grad, None, None, None, *[None] * len(kept)


def observed(x: Tensor, sink: Callable[[Tensor, Tensor], None], again: tuple | None = None) -> Tensor:
    """`x` itself; `sink` gets it, with its gradient, when a backward pass comes through, also in a frozen model.

    Args:
        again: `(function, *tensors)` that give `x` once more, so that it need not be kept; see `layers.functional`.
    """
    function, *kept = again or (_itself, x)
    anchor = torch.zeros((), device=x.device, requires_grad=True)
    return _Observed.apply(x, anchor, sink, function, *(t.detach() for t in kept))


def _itself(x: Tensor) -> Tensor:
    return x


@contextmanager
def capture(model: nn.Module, places: Iterable[Place], sink: Sink, *, gradients: bool = True) -> Iterator[None]:
    """Hand to `sink` what passes `places` of a prepared model while this is open.

    Several captures at once work, on the same places too; each is taken off by itself, also after an exception. A
    forward pass inside goes on as it would have.

    Args:
        gradients: hand out each activation with its gradient, in the backward pass (nothing where gradients are
            disabled); otherwise without, in the forward pass, which a sink may end by raising `Enough`.

    Raises:
        ValueError: a layer has no such site.
        KeyError: the model has no such layer.
    """
    layers, leave = prunable_layers(model), []
    try:
        for place in places:
            name, site = place
            leave.append(layers[name].watch(site, _callback(place, sink, gradients)))
        yield
    finally:
        for off in reversed(leave):
            off()


def _callback(place: Place, sink: Sink, gradients: bool) -> Callable[[Tensor, tuple | None], Tensor]:
    def at_once(x: Tensor, again: tuple | None) -> Tensor:
        sink(place, x, None)
        return x

    def with_gradient(x: Tensor, again: tuple | None) -> Tensor:
        if not torch.is_grad_enabled():
            return x
        return observed(x, lambda act, grad: sink(place, act, grad), again)

    return with_gradient if gradients else at_once
