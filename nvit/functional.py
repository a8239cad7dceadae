"""The mathematics of a pruned block on plain tensors; the only door through which fused kernels enter.

Conventions. `x` is the residual stream `(batch, tokens, emb)`. An index (int64, ascending) names what is kept along
one dimension of a weight; `None` means all of it. Masked weights keep their dense shape: each operation gathers the
kept part and multiplies densely, so that its cost follows what is kept and its gradients are exactly zero elsewhere.
The stream itself carries kept channels only, from `enter_stream` to the classifier.

A tap, where one is given, is called as `tap(kind, activation, axis)` on the activation where units of that kind leave
the network, units counted along `axis` (negative), and returns it unchanged; `nvit.saliency` uses it to read gate
gradients in the backward pass. The first dimension is the image. A fourth argument `(function, *tensors)` computes the
activation once more from tensors that the backward pass keeps anyway, so that the activation itself need not be kept.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Tap = Callable[..., Tensor]

Projection = tuple[Tensor, Tensor | None, Tensor | None]
"""Weight `(out, in)` and bias of a linear layer, and its kept rows."""

_kernels_on = True


def use_kernels(on: bool) -> None:
    """Whether fused kernels run where they can (`--no-kernels` turns them off). They are on to begin with."""
    global _kernels_on
    _kernels_on = on


def _kernels(x: Tensor) -> ModuleType | None:
    """`nvit_kernels.functional` where kernels may run on `x`, else None; its `<op>_takes` says whether one does.

    The kept part is gathered first here as well: at the narrow width the kernels meet every projection, not only the
    ones with kept lists, so that a masked step costs what a compact one does.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not _kernels_on or not (x.is_cuda or interpreted) or x.dtype == torch.float64:
        return None
    from nvit_kernels import functional

    return functional


class _Take(torch.autograd.Function):
    """`weight[rows][:, cols]`. Its backward fills one zeroed dense gradient, where two index_select would fill two."""

    @staticmethod
    def forward(ctx, weight: Tensor, rows: Tensor | None, cols: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, cols)
        ctx.shape = weight.shape
        part = weight if rows is None else weight.index_select(0, rows)
        return part if cols is None else part.index_select(1, cols)

    @staticmethod
    def backward(ctx, grad: Tensor):
        rows, cols = ctx.saved_tensors
        if cols is not None:
            wide = grad.new_zeros(grad.shape[0], ctx.shape[1])
            grad = wide.index_copy_(1, cols, grad)
        if rows is not None:
            grad = grad.new_zeros(ctx.shape).index_copy_(0, rows, grad)
        return grad, None, None


def take(weight: Tensor, rows: Tensor | None = None, cols: Tensor | None = None) -> Tensor:
    """The kept part of a matrix `(out, in)` or, without `cols`, of a vector `(out,)`."""
    if rows is None and cols is None:
        return weight
    if weight.dim() == 1:
        return weight.index_select(0, rows)
    return _Take.apply(weight, rows, cols)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None = None, cols: Tensor | None = None
) -> Tensor:
    """`F.linear` over kept outputs (`rows`) and kept inputs (`cols`): `(..., kept in) -> (..., kept out)`."""
    return F.linear(x, take(weight, rows, cols), None if bias is None else take(bias, rows))


def enter_stream(x: Tensor, emb: Tensor | None) -> Tensor:
    """Tokens `(batch, tokens, dense emb)` from the host's embedding to the stream of kept channels."""
    return x if emb is None else x.index_select(-1, emb)


def kept_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, kept: Tensor | None, eps: float, *, rms: bool = False
) -> Tensor:
    """LayerNorm, or RMSNorm, whose statistics count kept channels only.

    Args:
        x: `(..., kept)`.
        weight, bias: `(dense,)`.
        kept: kept channels of the weight.
    """
    weight, bias = take(weight, kept), None if bias is None else take(bias, kept)
    if rms:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    if (kernels := _kernels(x)) and kernels.kept_layer_norm_takes(x):
        return kernels.kept_layer_norm(x, weight, bias, eps=eps)
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def layer_scale(x: Tensor, gamma: Tensor, emb: Tensor | None) -> Tensor:
    """LayerScale: `x` `(..., kept emb)` times the kept part of `gamma` `(dense emb,)`."""
    return x * take(gamma, emb)


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding: dims come in pairs that turn by an angle of the token's place.

    Attributes:
        sin, cos: `(tokens, dims)` or, where heads turn by angles of their own, `(heads, tokens, dims)` or anything else
            broadcastable to `(batch, heads, tokens, dims)`; alike for both of a pair.
        prefix: so many tokens at the front have no place.
    """

    sin: Tensor
    cos: Tensor
    prefix: int = 0

    def of(self, dims: Tensor | None, heads: Tensor | None = None) -> Rotary:
        """The same for kept dims and kept heads; None keeps all."""
        return Rotary(*(_kept_angles(t, dims, heads) for t in (self.sin, self.cos)), self.prefix)

    def __call__(self, x: Tensor, pairs: str) -> Tensor:
        """Turn `x` `(batch, heads, tokens, dims)`; pairs are `interleaved` (neighbours) or `half` a head apart."""
        still, x = x[..., : self.prefix, :], x[..., self.prefix :, :]
        if pairs == "half":
            first, second = x.chunk(2, dim=-1)
            turned = torch.cat([-second, first], dim=-1)
        else:
            turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
        return torch.cat([still, (x * self.cos + turned * self.sin).to(x.dtype)], dim=-2)


def _kept_angles(table: Tensor, dims: Tensor | None, heads: Tensor | None) -> Tensor:
    table = table if dims is None else table.index_select(-1, dims)
    return table if heads is None else table.index_select(-3, heads)


def tap_windows(tap: Tap, windows: int) -> Tap:
    """A tap for activations of `(batch · windows, …)`: the first dimension is the image again."""
    return lambda kind, x, axis, again=None: tap(kind, x.unflatten(0, (-1, windows)), axis).flatten(0, 1)


def _tap_queries(tap: Tap, q: Tensor, pairs: str | None) -> Tensor:
    if pairs is None:
        return tap("qk_dim", q, -1)
    shape, axis = ((2, -1), -1) if pairs == "half" else ((-1, 2), -2)
    return tap("qk_dim", q.unflatten(-1, shape), axis).flatten(-2)


def attention(
    x: Tensor,
    inputs: Sequence[Projection],
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    *,
    heads: int,
    qk_dim: int,
    v_dim: int,
    scale: float,
    emb: Tensor | None = None,
    proj_cols: Tensor | None = None,
    q_norm: Callable[[Tensor], Tensor] | None = None,
    k_norm: Callable[[Tensor], Tensor] | None = None,
    norm: Callable[[Tensor], Tensor] | None = None,
    gate: Projection | None = None,
    rope: Rotary | None = None,
    pairs: str | None = None,
    bias: Tensor | None = None,
    attn_mask: Tensor | None = None,
    dropout: float = 0.0,
    tap: Tap | None = None,
) -> Tensor:
    """Multi-head self-attention with separate query/key and value widths, over kept heads and dims.

    Args:
        x: `(batch, tokens, kept emb)`.
        inputs: one projection to all queries, then keys, then values, head by head, `(heads·(2·qk + v), emb)` dense; or
            one to each.
        proj_weight: `(emb, heads·v)` dense.
        heads, qk_dim, v_dim: how many are kept.
        scale: of the logits; the dense model's, whatever is kept.
        emb, proj_cols: kept channels, kept columns of proj.
        q_norm, k_norm: norms over the kept dims of every head, `(batch, tokens, heads, qk)` to the same shape. The
            tap sees queries after theirs, so that removing a unit is measured on what the keys meet.
        norm: over all heads' outputs together, `(batch, tokens, heads·v)` to the same shape.
        gate: a projection of `x` whose sigmoid multiplies the heads' outputs, after their norm.
        rope, pairs: turn queries and keys, after their norms, see `Rotary`.
        bias: of the position, added to the logits of every kept head, `(heads, tokens, tokens)` or with a 1 in front.
        attn_mask: additive or boolean, broadcastable to `(batch, heads, tokens, tokens)`, or `(windows, 1, tokens,
            tokens)` for a batch whose windows come one image after another.

    Returns:
        `(batch, tokens, kept emb)`.
    """
    batch, tokens, _ = x.shape
    parts = [linear(x, weight, bias, rows, emb) for weight, bias, rows in inputs]
    if len(parts) == 1:
        parts = parts[0].split((heads * qk_dim, heads * qk_dim, heads * v_dim), dim=-1)
    q, k, v = (p.unflatten(-1, (heads, -1)) for p in parts)
    q, k = q if q_norm is None else q_norm(q), k if k_norm is None else k_norm(k)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if rope is not None:
        q, k = rope(q, pairs), rope(k, pairs)
    if tap is not None:
        q = _tap_queries(tap, q, pairs)
    out = _attend(q, k, v, scale, bias, attn_mask, dropout).transpose(1, 2).reshape(batch, tokens, heads * v_dim)
    out = out if norm is None else norm(out)
    if gate is not None:
        weight, bias, rows = gate
        out = out * linear(x, weight, bias, rows, emb).sigmoid()
    if tap is not None:
        out = tap("v_dim", tap("heads", out.unflatten(-1, (heads, -1)), -2), -1).flatten(-2)
    return linear(out, proj_weight, proj_bias, emb, proj_cols)


DotSlice = tuple[str, int, int | None, tuple[int, ...], int, int]
"""Parameter name, first and last row, view, axis, first place among the outputs."""


def group_dot(params: Mapping[str, Tensor], grads: Mapping[str, Tensor], slices: Sequence[DotSlice]) -> Tensor | None:
    """Σ grad · weight of every unit of `slices` in a few launches for the whole model, fp32 `(outputs,)`.

    None where no fused kernel runs; `nvit.saliency` then sums slice by slice.
    """
    first = params[slices[0][0]]
    kernels = _kernels(first)
    if kernels is None or not kernels.group_dot_takes(first):
        return None
    shapes = tuple((name, tuple(params[name].shape)) for name in dict.fromkeys(s[0] for s in slices))
    return kernels.group_dot(params, grads, _plan(tuple(slices), shapes))


@lru_cache(maxsize=8)
def _plan(slices: tuple[DotSlice, ...], shapes: tuple[tuple[str, tuple[int, ...]], ...]):
    from nvit_kernels import functional

    return functional.GroupDotPlan([functional.DotSlice(*s) for s in slices], dict(shapes))


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None, attn_mask: Tensor | None, dropout: float
) -> Tensor:
    """softmax(scale · q kᵀ + bias + mask) v: `(batch, heads, tokens, v_dim)`."""
    qk_dim, v_dim = q.shape[-1], v.shape[-1]
    if not dropout and (kernels := _kernels(q)) and kernels.attention_takes(q, v_dim):
        added = _per_head_and_window(q, bias, attn_mask)
        if added is not None:
            return kernels.attention(q, k, v, scale, bias=added[0], mask=added[1])
    if qk_dim != v_dim and q.device.type == "cpu":
        # The fused CPU kernel wants one width: zero columns add nothing to the logits or are cut off again.
        wide = max(qk_dim, v_dim)
        q, k, v = (F.pad(t, (0, wide - t.shape[-1])) if t.shape[-1] < wide else t for t in (q, k, v))
    attn_mask = _one_mask(len(q), bias, attn_mask)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout, scale=scale)
    return out[..., :v_dim]


def _per_head_and_window(
    q: Tensor, bias: Tensor | None, attn_mask: Tensor | None
) -> tuple[Tensor | None, Tensor | None] | None:
    """What the fused kernel adds: a bias `(heads, tokens, tokens)` and a mask `(windows, tokens, tokens)`.

    None where the two are not of this form: a boolean mask, one that differs by image and head, or is learned.
    """
    batch, heads, tokens, _ = q.shape
    square = (tokens, tokens)
    bias = None if bias is None else bias.view(heads, *square)
    if attn_mask is None:
        return bias, None
    if not attn_mask.is_floating_point():
        return None
    if attn_mask.shape in ((heads, *square), (1, heads, *square)):
        of_heads = attn_mask.reshape(heads, *square)
        return of_heads if bias is None else bias + of_heads, None
    windows = attn_mask.shape[0] if attn_mask.dim() == 4 else 1
    if attn_mask.shape != (windows, 1, *square) or batch % windows or attn_mask.requires_grad:
        return None
    return bias, attn_mask.squeeze(1)


def _one_mask(batch: int, bias: Tensor | None, attn_mask: Tensor | None) -> Tensor | None:
    """Bias and mask as one that broadcasts to `(batch, heads, tokens, tokens)`."""
    if attn_mask is not None and attn_mask.dim() == 4 and len(attn_mask) not in (1, batch):
        attn_mask = attn_mask.repeat(batch // len(attn_mask), 1, 1, 1)
    if bias is None or attn_mask is None:
        return attn_mask if bias is None else bias
    if attn_mask.dtype == torch.bool:
        return bias.masked_fill(~attn_mask, -torch.inf)
    return bias + attn_mask


def gated_mlp(
    x: Tensor,
    first: Sequence[tuple[Tensor, Tensor | None]],
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    act: Callable[[Tensor], Tensor],
    *,
    gate_last: bool = False,
    emb: Tensor | None = None,
    first_rows: Tensor | None = None,
    hidden: Tensor | None = None,
    norm: Callable[[Tensor], Tensor] | None = None,
    dropout: float = 0.0,
    tap: Tap | None = None,
) -> Tensor:
    """fc2(act(gate) * value) over kept hidden units, as SwiGLU: `(batch, tokens, kept emb)` to the same shape.

    Args:
        first: weight `(hidden, emb)` and bias of the gate and of the value, or of both packed, `(2·hidden, emb)`.
        gate_last: the value is packed before the gate.
        first_rows: kept rows of each weight in `first`.
        hidden: kept columns of fc2.
        norm: over the hidden units; the tap sees them after it.
    """
    parts = [linear(x, weight, bias, first_rows, emb) for weight, bias in first]
    gate, value = parts if len(parts) == 2 else parts[0].chunk(2, dim=-1)
    if gate_last:
        gate, value = value, gate
    again = (lambda gate, value: act(gate) * value, gate, value)
    return _last(again, fc2_weight, fc2_bias, emb, hidden, norm, dropout, tap)


def _last(again, weight, bias, emb, hidden, norm, dropout, tap) -> Tensor:
    """From kept hidden units, as `again` computes them, back to the stream."""
    function, *inputs = again
    h = function(*inputs)
    if dropout:
        h = F.dropout(h, dropout)
    h = h if norm is None else norm(h)
    if tap is not None:
        h = tap("mlp", h, -1, again if norm is None and not dropout else None)
    return linear(h, weight, bias, emb, hidden)


def _is_exact_gelu(act: Callable[[Tensor], Tensor]) -> bool:
    return type(act) is nn.GELU and act.approximate == "none"


def mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    act: Callable[[Tensor], Tensor],
    *,
    emb: Tensor | None = None,
    hidden: Tensor | None = None,
    norm: Callable[[Tensor], Tensor] | None = None,
    dropout: float = 0.0,
    tap: Tap | None = None,
) -> Tensor:
    """fc1, activation, fc2 over kept hidden units: `(batch, tokens, kept emb)` to the same shape."""
    if tap is None and norm is None and not dropout and _is_exact_gelu(act):
        width = fc1_weight.shape[0] if hidden is None else len(hidden)
        out = len(fc2_weight) if emb is None else len(emb)
        if (kernels := _kernels(x)) and kernels.mlp_takes(x, x.shape[-1], width, out):
            first = take(fc1_weight, hidden, emb), None if fc1_bias is None else take(fc1_bias, hidden)
            second = take(fc2_weight, emb, hidden), None if fc2_bias is None else take(fc2_bias, emb)
            return kernels.mlp(x, *first, *second)
    again = (act, linear(x, fc1_weight, fc1_bias, hidden, emb))
    return _last(again, fc2_weight, fc2_bias, emb, hidden, norm, dropout, tap)
