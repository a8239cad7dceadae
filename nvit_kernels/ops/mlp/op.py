"""fc1, GELU, fc2 over kept hidden units; the backward's dGELU epilogue also gives the units' scores.

Two ways: `fused` runs on device-side lists and never waits for the device; `gather` copies the kept weights out and
calls the vendor's matmul, reading the count on the host once per call. `ways.choose` says which, from measurements.
Derivations and shapes: docs/kernels/mlp.md.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nvit_kernels import ways
from nvit_kernels.launch import check_list, on_device
from nvit_kernels.ops.matmul.op import compact, tokens, weights


def check(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> None:
    """Raise `ValueError` unless the five tensors make an MLP of one dtype."""
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


@torch.library.custom_op("nvit::mlp", mutates_args=())
def _forward(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, index: Tensor | None,
             count: Tensor | None, scores: Tensor | None) -> tuple[Tensor, Tensor]:  # fmt: skip
    check(x, w1, b1, w2, b2)
    check_list(index, w1.shape[0], x.device)
    x2, w1, w2 = x.reshape(-1, x.shape[-1]).contiguous(), w1.contiguous(), w2.contiguous()
    u, y = x.new_empty(x2.shape[0], w1.shape[0]), x.new_empty(*x.shape[:-1], w2.shape[0])
    with on_device(x):
        way = ways.choose("mlp", x2, w1.shape[0], lambda w: _run(w, x2, w1, b1, w2, b2, index, count, u, y))
        _run(way, x2, w1, b1, w2, b2, index, count, u, y)
    return y, u


def _run(way, x, w1, b1, w2, b2, index, count, u, y) -> None:
    y = y.view(-1, y.shape[-1])
    if way == "gather":
        kept = kept_units(index, count)
        pre = u if kept is None else u[:, : len(kept)]
        pre.copy_(F.linear(x, rows(w1, kept), rows(b1, kept)))
        y.copy_(F.linear(F.gelu(pre), columns(w2, kept), b2))
        return
    activation = torch.empty_like(u)
    tokens(x, w1, index, count, role="gelu", kept="n", b_by="n", gather=True, bias=b1, out=u, out2=activation)
    tokens(activation, compact(w2, index, count), index, count, role="linear", kept="k", b_by="n", bias=b2, out=y)


@_forward.register_fake
def _(x, w1, b1, w2, b2, index, count, scores):
    return x.new_empty(*x.shape[:-1], w2.shape[0]), x.new_empty(x.numel() // x.shape[-1], w1.shape[0])


@torch.library.custom_op("nvit::mlp_backward", mutates_args=("scores",))
def _backward(dy: Tensor, x: Tensor, u: Tensor, w1: Tensor, w2: Tensor, index: Tensor | None, count: Tensor | None,
              scores: Tensor | None, wants: list[bool]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    x2, dy2 = x.reshape(-1, x.shape[-1]).contiguous(), dy.reshape(-1, dy.shape[-1]).contiguous()
    w1, w2, grads = w1.contiguous(), w2.contiguous(), _allocate(x, w1, w2, wants)
    arguments = (dy2, x2, u, w1, w2, index, count, grads, wants)
    samples = x.shape[0] if scores is not None and scores.dim() == 2 else 1
    with on_device(x):
        way = ways.choose("mlp_backward", x2, w1.shape[0], lambda w: _run_backward(w, *arguments, None, 1))
        _run_backward(way, *arguments, scores, samples)
    return grads


def _run_backward(way, dy, x, u, w1, w2, index, count, grads, wants, scores, samples) -> None:
    dx, dw1, db1, dw2, db2 = grads
    if way == "gather":
        kept = kept_units(index, count)
        pre = u if kept is None else u[:, : len(kept)]
        activation, dact = F.gelu(pre), dy @ columns(w2, kept)
        du = torch.ops.aten.gelu_backward(dact, pre)
        if scores is not None:
            add_scores(scores, activation, dact, kept, samples)
        if wants[0]:
            dx.view(-1, dx.shape[-1]).copy_(du @ rows(w1, kept))
        if wants[1]:
            put(dw1, 0, kept, du.T @ x)
        if wants[2]:
            put(db1, 0, kept, du.sum(0))
        if wants[3]:
            put(dw2, 1, kept, dy.T @ activation)
        if wants[4]:
            db2.copy_(dy.sum(0))
        return
    du, activation = torch.empty_like(u), torch.empty_like(u)
    tokens(dy, compact(w2, index, count), index, count, role="gelu_backward", kept="n", b_by="k", aux=u, out=du,
           out2=activation, scores=scores, samples=samples)  # fmt: skip
    if wants[0]:
        tokens(du, w1, index, count, role="linear", kept="k", b_by="k", gather=True, out=dx.view(-1, dx.shape[-1]))
    if wants[1] or wants[2]:
        weights(du, x, or_scratch(dw1, w1), index, count, kept="m", sums=db1 if wants[2] else None)
    if wants[3] or wants[4]:
        weights(dy, activation, or_scratch(dw2, w2), index, count, kept="n", sums=db2 if wants[4] else None)


def kept_units(index: Tensor | None, count: Tensor | None) -> Tensor | None:
    """The kept indices, int64; None where all are kept. Reads `count` on the host."""
    return None if index is None else index[: int(count)].long()


def rows(x: Tensor | None, kept: Tensor | None) -> Tensor | None:
    """Kept rows of a weight, or entries of a bias that may be absent; no copy where all are kept."""
    return x if x is None or kept is None else x[kept]


def columns(w: Tensor, kept: Tensor | None) -> Tensor:
    """Kept columns of a weight; no copy where all are kept."""
    return w if kept is None else w[:, kept]


def put(out: Tensor, dim: int, kept: Tensor | None, value: Tensor) -> None:
    """`value` at the kept places of `out` along `dim`, zeros between them."""
    if kept is None:
        out.copy_(value)
    else:
        out.zero_().index_copy_(dim, kept, value)


def add_scores(scores: Tensor, activation: Tensor, grad: Tensor, kept: Tensor | None, samples: int) -> None:
    """scores += Σ activation · ∂activation over each sample's tokens, at the kept units."""
    product = (activation.float() * grad.float()).unflatten(0, (samples, -1)).sum(1)
    scores = scores.view(samples, -1)
    scores.add_(product) if kept is None else scores.index_add_(1, kept, product)


def or_scratch(grad: Tensor, like: Tensor) -> Tensor:
    """`grad`, or a throw-away in its place where it is not wanted but its kernel runs for another's sake."""
    return grad if grad.numel() else like.new_empty(like.shape)


def _allocate(x: Tensor, w1: Tensor, w2: Tensor, wants: list[bool]) -> tuple[Tensor, ...]:
    shapes = (x.shape, w1.shape, w1.shape[:1], w2.shape, w2.shape[:1])
    return tuple(x.new_empty(shape if wanted else (0,)) for shape, wanted in zip(shapes, wants, strict=True))


@_backward.register_fake
def _(dy, x, u, w1, w2, index, count, scores, wants):
    return _allocate(x, w1, w2, wants)


def _save(ctx, inputs, output):
    x, w1, _, w2, _, index, count, ctx.scores = inputs
    ctx.save_for_backward(x, output[1], w1, w2, index, count)
    ctx.set_materialize_grads(False)  # nobody differentiates the saved pre-activation: no zeros for it


def _differentiate(ctx, dy, _):
    x, u, w1, w2, index, count = ctx.saved_tensors
    wants = list(ctx.needs_input_grad[:5])
    grads = _backward(dy, x, u, w1, w2, index, count, ctx.scores, wants)
    return *(g if wanted else None for g, wanted in zip(grads, wants, strict=True)), None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def mlp(x, w1, b1, w2, b2, hidden=None, scores=None):
    """Fused `reference.mlp`, which says what the arguments are."""
    lists = (None, None) if hidden is None else (hidden.index, hidden.count)
    return _forward(x, w1, b1, w2, b2, *lists, scores)[0]
