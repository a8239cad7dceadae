"""Each public function in plain torch, differentiable, in any dtype: what the kernels must match.

Pruned units are left out by index, not multiplied by zero, so on a CPU too a masked call costs what is kept.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from nvit_kernels.kept import Kept


def take(x: Tensor, kept: Kept | None, dim: int) -> Tensor:
    """The kept part of `x` along `dim`."""
    return x if kept is None else x.index_select(dim, kept.indices())


def spread(x: Tensor, kept: Kept | None, dim: int) -> Tensor:
    """The inverse of `take`: kept parts back in their places, exact zeros between them."""
    if kept is None:
        return x
    shape = list(x.shape)
    shape[dim] = kept.width
    return x.new_zeros(shape).index_copy(dim, kept.indices(), x)


def on_gradient(x: Tensor, scores: Tensor | None, score) -> Tensor:
    """`x`, and at its backward `scores += score(∂x)`, summed over samples too when `scores` is a vector."""
    if scores is None or not x.requires_grad:
        return x

    def accumulate(grad: Tensor) -> None:
        part = score(grad)
        scores.add_(part.sum(0) if scores.dim() == 1 else part)

    x = x.view_as(x)  # a node of its own, so that the hook sees this use of x alone
    x.register_hook(accumulate)
    return x


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    heads: Kept | None = None,
    qk: Kept | None = None,
    v_dim: Kept | None = None,
    head_scores: Tensor | None = None,
    qk_scores: Tensor | None = None,
    v_scores: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """softmax(scale · q kᵀ + bias + mask) v over kept heads and dims; what is pruned comes out as exact zeros.

    Scores are of the gates that would stand on the units, so sums of value · gradient over tokens (and heads):
    `head_scores` Σ o·∂o of each head, `v_scores` Σ o·∂o of each v dim, `qk_scores` Σ q·∂q of each qk dim. The backward
    adds them to float32 buffers `(batch, units)`, per sample, or `(units,)`, summed over the batch.

    Args:
        q, k: `(batch, heads, tokens, qk_dim)`.
        v: `(batch, heads, tokens, v_dim)`; `v_dim` need not equal `qk_dim`.
        scale: factor on the logits; after pruning still the dense model's.
        heads, qk, v_dim: kept units, None keeps all. One list of qk (v) dims serves all heads.
        bias: `(heads, tokens, tokens)` added to every sample's logits, float32 or of q's dtype; differentiable.
        mask: `(windows, tokens, tokens)` of the same dtypes, added to sample i's logits from window i modulo windows;
            a constant. It may hold -inf, but no row of -inf alone.

    Returns:
        `(batch, heads, tokens, v_dim)`, a view of `(batch, tokens, heads, v_dim)` memory.

    Raises:
        ValueError: shapes or dtypes disagree, or the windows do not divide the batch; on CUDA also head dims that are
            no multiple of 8 or over 256.
    """
    q_kept = take(take(q, heads, 1), qk, 3)
    k_kept = take(take(k, heads, 1), qk, 3)
    v_kept = take(take(v, heads, 1), v_dim, 3)

    def q_score(grad):
        return spread(_wide(q_kept.detach() * grad).sum((1, 2)), qk, 1)

    q_kept_ = on_gradient(q_kept, qk_scores, q_score)
    logits = q_kept_ @ k_kept.transpose(-2, -1) * scale
    if bias is not None:
        logits = logits + take(bias, heads, 0)
    if mask is not None:
        logits = (logits.unflatten(0, (-1, len(mask))) + mask.detach().unsqueeze(1)).flatten(0, 1)
    out = logits.softmax(-1).to(v.dtype) @ v_kept

    def o_score(dims, kept):
        return lambda grad: spread(_wide(out_value * grad).sum(dims), kept, 1)

    out_value = out.detach()
    out = on_gradient(out, head_scores, o_score((2, 3), heads))
    out = on_gradient(out, v_scores, o_score((1, 2), v_dim))
    return spread(spread(out, heads, 1), v_dim, 3).transpose(1, 2).contiguous().transpose(1, 2)


def mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    hidden: Kept | None = None,
    scores: Tensor | None = None,
) -> Tensor:
    """fc2(GELU(fc1(x))) over kept hidden units, with the exact erf GELU.

    The backward adds Σ a·∂a over tokens, a the activation, to `scores`: float32 `(batch, hidden)`, per sample (the
    leading dim of x), or `(hidden,)`. It equals Σ w·∂w over the columns of `w2`.

    Args:
        x: `(batch, ..., in)`.
        w1, b1: `(hidden, in)`, `(hidden,)`.
        w2, b2: `(out, hidden)`, `(out,)`.
        hidden: kept hidden units, None keeps all. Pruned rows of w1, b1 and columns of w2 are never read.

    Returns:
        `(batch, ..., out)`.

    Raises:
        ValueError: shapes disagree; on CUDA also widths that are no multiple of 8.
    """
    activation = F.gelu(F.linear(x, take(w1, hidden, 0), take_bias(b1, hidden)))
    return F.linear(_scored(activation, hidden, scores), take(w2, hidden, 1), b2)


def swiglu(
    x: Tensor,
    w_gate: Tensor,
    b_gate: Tensor | None,
    w_value: Tensor,
    b_value: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    hidden: Kept | None = None,
    scores: Tensor | None = None,
) -> Tensor:
    """fc2(SiLU(gate(x)) · value(x)) over kept hidden units; otherwise as `mlp`.

    Args:
        w_gate, b_gate, w_value, b_value: `(hidden, in)`, `(hidden,)` each; halves of a packed weight may be views.
    """
    gate = F.linear(x, take(w_gate, hidden, 0), take_bias(b_gate, hidden))
    value = F.linear(x, take(w_value, hidden, 0), take_bias(b_value, hidden))
    return F.linear(_scored(F.silu(gate) * value, hidden, scores), take(w2, hidden, 1), b2)


def take_bias(b: Tensor | None, kept: Kept | None) -> Tensor | None:
    """The kept part of a bias that may be absent."""
    return None if b is None else take(b, kept, 0)


def _scored(activation: Tensor, hidden: Kept | None, scores: Tensor | None) -> Tensor:
    value = activation.detach()
    return on_gradient(activation, scores, lambda grad: spread(_per_sample(value * grad), hidden, 1))


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _per_sample(x: Tensor) -> Tensor:
    """Sum over all but the first and last dims, in at least float32."""
    x = _wide(x)
    return x.flatten(1, -2).sum(1) if x.dim() > 2 else x


def kept_layer_norm(
    x: Tensor,
    w: Tensor,
    b: Tensor,
    keep: Kept | None = None,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    scores: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm whose statistics are over kept channels; pruned channels come out as exact zeros.

    With `residual`, norms `x + residual` and returns that sum too. The backward adds Σ y·∂y over tokens, y the output,
    to `scores`, float32 `(batch, width)` or `(width,)`: what removing a channel takes from all readers of this norm.

    Args:
        x, residual: `(batch, ..., width)`.
        w, b: `(width,)`.
        keep: kept channels, None keeps all.

    Returns:
        y like x; with `residual` the pair (y, x + residual).

    Raises:
        ValueError: shapes disagree.
    """
    total = x if residual is None else x + residual
    kept_x, kept_w, kept_b = (take(t, keep, -1) for t in (total, w, b))
    y = F.layer_norm(kept_x, kept_w.shape, kept_w.to(x.dtype), kept_b.to(x.dtype), eps)
    value = y.detach()
    y = on_gradient(y, scores, lambda grad: spread(_per_sample(value * grad), keep, 1))
    y = spread(y, keep, y.dim() - 1)
    return y if residual is None else (y, total)


def group_dot(params: Mapping[str, Tensor], grads: Mapping[str, Tensor], plan, *, scale=1.0) -> Tensor:
    """Σ scale · w·∂w of every unit that `plan` declares, over whole parameters at once.

    Args:
        params: parameters by name; every name in the plan must be there.
        grads: loss gradients with the same keys and shapes.
        plan: a `GroupDotPlan`.
        scale: a number, or a tensor of one element; 1 / loss scale under AMP.

    Returns:
        `(plan.outputs,)`: float32, or float64 where the parameters are.

    Raises:
        KeyError: a slice names a parameter without a gradient.
        ValueError: a shape differs from the plan's, or (on CUDA) dtypes are mixed.
    """
    plan.check(params, grads)
    first = params[plan.slices[0].name]
    out = first.new_zeros(plan.outputs, dtype=torch.float64 if first.dtype == torch.float64 else torch.float32)
    for s in plan.slices:
        product = (params[s.name].to(out.dtype) * grads[s.name].to(out.dtype))[s.start : s.stop].reshape(s.view)
        out[s.offset : s.offset + s.units] += product.movedim(s.axis, 0).reshape(s.units, -1).sum(1)
    return out * scale
