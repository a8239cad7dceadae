"""fc1, GELU, fc2 over kept hidden units; the backward's ∂GELU pass also gives the units' scores.

Three ways, of which `ways.choose` picks one by measurements. Derivations and shapes: docs/kernels/mlp.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nvit_kernels import ways
from nvit_kernels.launch import check_list, describe, differentiated_once, remember, stays_one_operator
from nvit_kernels.ops.mlp import fused, whole


def check(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, index: Tensor | None) -> None:
    """Raise `ValueError` unless the five tensors make an MLP of one dtype, and the list is of its hidden units."""
    hidden, width = w1.shape
    right = x.shape[-1] == width and w2.shape[1] == hidden
    right = right and (b1 is None or b1.shape == (hidden,)) and (b2 is None or b2.shape == (w2.shape[0],))
    if not right:
        shapes = [None if t is None else tuple(t.shape) for t in (x, w1, b1, w2, b2)]
        raise ValueError(f"x, w1, b1, w2, b2 have shapes {shapes}; expected (..., in), (hidden, in), (hidden,), "
                         "(out, hidden), (out,)")  # fmt: skip
    dtypes = {t.dtype for t in (x, w1, b1, w2, b2) if t is not None}
    if len(dtypes) > 1:
        raise ValueError(f"x and the weights mix {sorted(map(str, dtypes))}; cast them to one dtype, or use autocast")
    check_list(index, hidden, x.device)


_checked: dict[tuple, dict[str, str]] = {}  # ways by op, by description of what was found right


def forward(way, x, w1, b1, w2, b2, index, count, mask, saves) -> tuple[Tensor, Tensor, Tensor]:
    """Output `(..., out)`, pre-activation and activation `(tokens, hidden)` as the way keeps them."""
    rows = x.reshape(-1, x.shape[-1])
    if way == "fused":
        y, u, a = fused.launch(rows.contiguous(), w1, b1, w2, b2, index, count)
    else:
        y, u, a = whole.launch(rows, w1, b1, w2, b2, mask, saves)
    return y.view(*x.shape[:-1], y.shape[1]), u, a


def backward(way, dy, x, u, a, w1, b1, w2, b2, index, count, mask, scores, wants):
    """Gradients of x, w1, b1, w2, b2, None where `wants` says no; adds scores to the buffer given."""
    rows, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    samples = whole.samples_of(x, scores)
    if way == "fused":
        dx, *grads = fused.launch_backward(dy.contiguous(), rows.contiguous(), u, a, w1, b1, w2, b2, index, count,
                                           scores, samples, wants)  # fmt: skip
    else:
        dx, *grads = whole.launch_backward(dy, rows, u, a, w1, b1, w2, mask, scores, samples, wants)
    return None if dx is None else dx.view(x.shape), *grads


class Mlp(torch.autograd.Function):
    """The eager path. Where weights were gathered beforehand, `kept` says which units they are, for the scores."""

    @staticmethod
    def forward(ctx, way, x, w1, b1, w2, b2, index, count, mask, kept, scores):
        y, u, a = forward(way, x, w1, b1, w2, b2, index, count, mask, saves=True)
        a = a if ctx.needs_input_grad[4] or (ctx.needs_input_grad[5] and way == "fused") else None
        ctx.save_for_backward(x, u, a, w1, b1, w2, b2, index, count, mask, kept)
        ctx.way = way
        ctx.scores = scores  # written by the backward, so not guarded against writing
        return y

    @staticmethod
    @differentiated_once
    def backward(ctx, dy):
        x, u, a, w1, b1, w2, b2, index, count, mask, kept = ctx.saved_tensors
        wants, scores = ctx.needs_input_grad[1:6], ctx.scores
        part = scores
        if kept is not None and scores is not None:
            part = scores.new_zeros(*scores.shape[:-1], len(kept))
        grads = backward(ctx.way, dy, x, u, a, w1, b1, w2, b2, index, count, mask, part, wants)
        if part is not scores:
            scores.index_add_(-1, kept, part)
        return None, *grads, None, None, None, None, None


@torch.library.custom_op("nvit::mlp", mutates_args=())
def operator(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, index: Tensor | None,
             count: Tensor | None, mask: Tensor | None,
             scores: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The same for torch.compile and export, by a way that never waits: output, pre-activation, activation."""
    check(x, w1, b1, w2, b2, index)
    way = ways.without_waiting("mlp_backward", x, index is not None)
    return forward(way, x, w1, b1, w2, b2, index, count, mask, saves=True)


@operator.register_fake
def _(x, w1, b1, w2, b2, index, count, mask, scores):
    u = x.new_empty(x.numel() // x.shape[-1], w1.shape[0])
    return x.new_empty(*x.shape[:-1], w2.shape[0]), u, torch.empty_like(u)


@torch.library.custom_op("nvit::mlp_backward", mutates_args=("scores",))
def operator_backward(dy: Tensor, x: Tensor, u: Tensor, a: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor,
                      b2: Tensor | None, index: Tensor | None, count: Tensor | None, mask: Tensor | None,
                      scores: Tensor | None,
                      wants: list[bool]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    way = ways.without_waiting("mlp_backward", x, index is not None)
    grads = backward(way, dy, x, u, a, w1, b1, w2, b2, index, count, mask, scores, wants)
    return tuple(x.new_empty(0) if grad is None else grad for grad in grads)


@operator_backward.register_fake
def _(dy, x, u, a, w1, b1, w2, b2, index, count, mask, scores, wants):
    like = zip((x, w1, b1, w2, b2), wants, strict=True)
    return tuple(x.new_empty(t.shape if wanted else (0,)) for t, wanted in like)


def _save(ctx, inputs, output):
    x, w1, b1, w2, b2, index, count, mask, ctx.scores = inputs
    ctx.save_for_backward(x, *output[1:], w1, b1, w2, b2, index, count, mask)
    ctx.set_materialize_grads(False)  # nobody differentiates what is saved: no zeros for it


def _differentiate(ctx, dy, _u, _a):
    wants = list(ctx.needs_input_grad[:5])
    grads = operator_backward(dy, *ctx.saved_tensors, ctx.scores, wants)
    return *(g if wanted else None for g, wanted in zip(grads, wants, strict=True)), None, None, None, None


operator.register_autograd(_differentiate, setup_context=_save)


def mlp(x, w1, b1, w2, b2, hidden=None, scores=None):
    """Fused `reference.mlp`, which says what the arguments are."""
    index, count, mask = (None, None, None) if hidden is None else (hidden.index, hidden.count, hidden.mask)
    if stays_one_operator(x, w1):
        return operator(x, w1, b1, w2, b2, index, count, mask, scores)[0]
    key = describe(x, w1, b1, w2, b2, index)
    known = _checked.get(key)
    if known is None:
        check(x, w1, b1, w2, b2, index)
        known = remember(_checked, key, {})
    saves = torch.is_grad_enabled()
    tensors = (x, w1, b1, w2, b2)
    way = ways.choose(known, "mlp_backward" if saves else "mlp", x, w1.shape[0], index is not None,
                      lambda way: ways.step(lambda *t: _run(way, *t, hidden, None, saves), tensors))  # fmt: skip
    return _run(way, *tensors, hidden, scores, saves)


def _run(way, x, w1, b1, w2, b2, hidden, scores, saves):
    index, count, mask, kept = None, None, None, None
    if hidden is not None:
        index, count, mask = hidden.index, hidden.count, hidden.mask
        if way == "gather":
            kept, mask = hidden.indices(), None
            w1, w2 = w1.index_select(0, kept), w2.index_select(1, kept)
            b1 = None if b1 is None else b1.index_select(0, kept)
    if saves:
        return Mlp.apply(way, x, w1, b1, w2, b2, index, count, mask, kept, scores)
    return forward(way, x, w1, b1, w2, b2, index, count, mask, saves=False)[0]
